"""The conditions of the predictions of one step: texts and cameras, as one argument."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float
from lods.cameras import Cameras
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """Of B images: the embeddings of the prompt y and of the null prompt n (the negative prompt),
    for each image's view; the N negatives of Perp-Neg (arXiv:2304.04968) with their weights; the
    embeddings of the other texts that the method asked for, by name; the cameras; and, of a method
    that edits, the latents of the source, seen from the same cameras."""

    prompt: Float[Tensor, "B T D"]
    null: Float[Tensor, "B T D"]
    negatives: tuple[Float[Tensor, "B T D"], ...] = ()
    weights: Float[Tensor, "B N"] | None = None
    others: Mapping[str, Float[Tensor, "B T D"]] = field(default_factory=dict)
    cameras: Cameras | None = None
    source: Float[Tensor, "B c h w"] | None = None


class Prompts(Protocol):
    """The texts of a run, embedded."""

    def plain(self, text: str) -> Float[Tensor, "T D"]:
        """The embedding, without words for a view, of "prompt", "null", or another text ("source":
        what the renders look like; "edited": that of what is edited, which somebody has to have
        said; "bad": a text of bad pictures)."""
        ...

    def conditions(self, cameras: Cameras, others: Sequence[str] = ()) -> Conditions:
        """The texts for these cameras, one row each; ``others`` names the other texts wanted."""
        ...
