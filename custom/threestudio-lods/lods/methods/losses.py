"""What a method returns."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """``terms`` by name, each a scalar: ``loss_sds``, whose gradient is the method's, and the
    losses of its learned part; ``numbers`` to log. ``total`` is what to call ``backward`` on."""

    terms: dict[str, Float[Tensor, ""]]
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum of all terms."""
        return torch.stack(list(self.terms.values())).sum()
