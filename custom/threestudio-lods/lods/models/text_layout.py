"""What an embedding of a text holds: rows for its tokens, and what a network takes beside them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

LEARNABLE = ("all", "tokens", "pooled")


@dataclass(frozen=True)
class Parts:
    """An embedding taken apart, for the call of a network."""

    tokens: Float[Tensor, "B N D"]
    pooled: Float[Tensor, "B P"] | None = None
    mask: Bool[Tensor, "B N"] | None = None


@dataclass(frozen=True)
class TextLayout:
    """One tensor (T, D) for all that a network is told of a text, so that everybody else stacks,
    repeats, blends, caches and learns embeddings without knowing what is in them:

    - ``tokens`` rows, one for each token, ``width`` = D numbers wide;
    - with ``pooled`` > 0 a vector of so many numbers, in as many rows as it fills, zeros after it;
    - with ``masked`` which tokens count, 1 or 0 for each, in as many rows as they fill.

    ``pack`` and ``unpack`` are all that a model family needs of it.
    """

    tokens: int
    width: int
    pooled: int = 0
    masked: bool = False

    @property
    def pooled_rows(self) -> int:
        """Rows of the pooled vector."""
        return -(-self.pooled // self.width)

    @property
    def mask_rows(self) -> int:
        """Rows of the mask."""
        return -(-self.tokens // self.width) if self.masked else 0

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D) of an embedding."""
        return self.tokens + self.pooled_rows + self.mask_rows, self.width

    def pack(
        self,
        tokens: Float[Tensor, "B N D"],
        pooled: Float[Tensor, "B P"] | None = None,
        mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The embeddings of B texts. Raises ``ValueError`` for parts of other sizes."""
        given = {"tokens": tokens.shape[1:], "pooled": pooled is not None and pooled.shape[1:]}
        given["mask"] = mask is not None and mask.shape[1:]
        wanted = {
            "tokens": (self.tokens, self.width),
            "pooled": bool(self.pooled) and (self.pooled,),
        }
        wanted["mask"] = self.masked and (self.tokens,)
        for part, size in wanted.items():
            found = given[part] and tuple(given[part])
            if found != size:
                raise ValueError(f"{part} of a text: {found or 'none'}, not {size or 'none'}")
        parts = [tokens, self._rows(pooled), self._rows(None if mask is None else mask.to(tokens))]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def unpack(self, texts: Float[Tensor, "B T D"]) -> Parts:
        """The parts of embeddings; differentiable, but for the mask."""
        ends = self.tokens, self.tokens + self.pooled_rows
        pooled = mask = None
        if self.pooled:
            pooled = texts[:, ends[0] : ends[1]].flatten(1)[:, : self.pooled]
        if self.masked:
            mask = texts[:, ends[1] :].flatten(1)[:, : self.tokens] > 0.5
        return Parts(texts[:, : ends[0]], pooled, mask)

    def learnable(self, what: str = "all") -> Bool[Tensor, "T D"]:
        """Which numbers of an embedding a method may learn: ``what`` of LEARNABLE, the mask never.
        Raises ``ValueError``, one line, for the pooled vector of a model that takes none."""
        if what not in LEARNABLE:
            raise ValueError(f"what is learned of a text is one of {LEARNABLE}, not {what!r}")
        if what == "pooled" and not self.pooled:
            raise ValueError(
                "learned_text=pooled: this model takes no pooled vector beside the tokens of a "
                "text, set learned_text=all"
            )
        rows = torch.zeros(self.shape, dtype=torch.bool)
        if what in ("all", "tokens"):
            rows[: self.tokens] = True
        if what in ("all", "pooled"):
            vector = rows[self.tokens : self.tokens + self.pooled_rows].view(-1)
            vector[: self.pooled] = True
        return rows

    def _rows(self, vector: Float[Tensor, "B P"] | None) -> Float[Tensor, "B R D"] | None:
        if vector is None:
            return None
        missing = -vector.shape[1] % self.width
        return F.pad(vector, (0, missing)).unflatten(1, (-1, self.width))
