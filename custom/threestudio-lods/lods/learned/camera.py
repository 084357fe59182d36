"""An embedding that conditions a network on the camera: a part of what VSD learns."""

import contextlib

import torch.nn.functional as F
from jaxtyping import Float
from lods.models.base import Model
from torch import Tensor, nn


class CameraEmbedding(nn.Module):
    """Adds W_2 silu(W_1 c + b_1) + b_2 to a UNet's time embedding, for rows with a camera c (16,).

    The sum is made where :meth:`rows` says, and nowhere outside of it. W_2 and b_2 start as zero,
    so that, as with a LoRA, learning starts at the model itself.
    """

    def __init__(self, model: Model):
        super().__init__()
        embedding, device = model.time_embedding(), model.device
        width = [each for each in embedding.modules() if isinstance(each, nn.Linear)][
            -1
        ].out_features
        self.linear_1 = nn.Linear(16, width, device=device)
        self.linear_2 = nn.Linear(width, width, device=device)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)
        self._cameras: Tensor | None = None
        self._start = 0
        embedding.register_forward_hook(self._add)

    def forward(self, cameras: Float[Tensor, "B 16"]) -> Float[Tensor, "B E"]:
        return self.linear_2(F.silu(self.linear_1(cameras)))

    def _add(self, module, inputs, output: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        if self._cameras is None:
            return output
        added = self(self._cameras).to(output.dtype)
        after = len(output) - self._start - len(added)
        return output + F.pad(added, (0, 0, self._start, after))

    @contextlib.contextmanager
    def rows(self, cameras: Float[Tensor, "B 16"], start: int = 0):
        """Within this, the rows of the UNet's calls from ``start`` on have these cameras."""
        before = self._cameras, self._start
        self._cameras, self._start = cameras, start
        try:
            yield
        finally:
            self._cameras, self._start = before
