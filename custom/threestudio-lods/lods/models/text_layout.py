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
    mask: Bool[Tensor, "B N"] | None = None  # which tokens count
    weights: Float[Tensor, "B N"] | None = None  # how much each does: 1, or a blend's part of it

    def to(self, dtype: torch.dtype) -> "Parts":
        """The same in another dtype."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Parts(self.tokens.to(dtype), pooled, self.mask, self.weights)

    def followed_by(self, rows: Float[Tensor, "B M D"]) -> "Parts":
        """With tokens more, all of which count."""
        tokens, ones = torch.cat([self.tokens, rows], dim=1), rows.new_ones(rows.shape[:2])
        if self.mask is None or self.weights is None:
            return Parts(tokens, self.pooled)
        mask = torch.cat([self.mask, ones.bool()], dim=1)
        weights = torch.cat([self.weights, ones.to(self.weights)], dim=1)
        return Parts(tokens, self.pooled, mask, weights)

    def compact(self) -> "Parts":
        """With the tokens that count at the beginning, in their order, and not more rows than some
        text fills."""
        if self.mask is None or self.weights is None:
            return self
        most = max(int(self.mask.sum(1).max()), 1)
        order = self.mask.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        tokens = self.tokens.gather(1, order[..., None].expand(-1, -1, self.tokens.shape[-1]))
        mask, weights = (each.gather(1, order) for each in (self.mask, self.weights))
        return Parts(tokens, self.pooled, mask, weights)

    def bias(self) -> Float[Tensor, "B 1 N"]:
        """What the mask adds to the scores of an attention over the tokens, in their dtype: the
        logarithm of their weights, 0 for those that count and -10000 (diffusers' own) for those
        that do not. Raises ``ValueError`` where there is no mask."""
        if self.weights is None:
            raise ValueError("the embeddings have no mask")
        return self.weights.log().clamp(min=-10_000.0)[:, None].to(self.tokens.dtype)


@dataclass(frozen=True)
class TextLayout:
    """One tensor (T, D) for all that a network is told of a text, so that everybody else stacks,
    repeats, blends, caches and learns embeddings without knowing what is in them:

    - ``tokens`` rows, one for each token, ``width`` = D numbers wide;
    - with ``pooled`` > 0 a vector of so many numbers, in as many rows as it fills, zeros after it;
    - with ``masked`` which tokens count, 1 or 0 for each, in as many rows as they fill; the rows
      of tokens that do not count are zeros.

    Embeddings are blended linearly (Perp-Neg does so with those of two views), and what is blended
    may have masks that differ. With zeros in those rows a blend sum_i r_i e_i, of parts r_i that
    sum to 1, holds all that is needed: in place of its mask a token has the weight m = sum of the
    r_i of those texts in which it counts, and its row over m is the mean over those texts alone.
    ``unpack`` returns that row, and m in ``weights``; its logarithm in an attention
    (:meth:`Parts.bias`) counts the token with weight m, so that the network's prediction goes from
    that of one text to that of the other without a jump. ``mask`` is then the union of those of all
    texts with a part in the blend.

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
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)
        parts = [tokens, self._rows(pooled), self._rows(None if mask is None else mask.to(tokens))]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def unpack(self, texts: Float[Tensor, "B T D"]) -> Parts:
        """The parts of embeddings; differentiable, but for the mask."""
        ends = self.tokens, self.tokens + self.pooled_rows
        pooled = None
        if self.pooled:
            pooled = texts[:, ends[0] : ends[1]].flatten(1)[:, : self.pooled]
        if not self.masked:
            return Parts(texts[:, : ends[0]], pooled)
        weights = texts[:, ends[1] :].flatten(1)[:, : self.tokens].detach().float()
        mask = weights > 0
        weights = weights.clamp(min=0)
        share = torch.where(mask, weights, 1.0).to(texts)
        return Parts(texts[:, : ends[0]] / share[..., None], pooled, mask, weights)

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
