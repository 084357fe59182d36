"""What every model offers, whatever its family: the protocol that methods are written against.

Nothing outside the file of a model family reads its networks or its noise table, so that a
transformer, a flow model or a multi-view model is one more file.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from lods import scores
from lods.cameras import Cameras
from lods.models.memory import Context
from lods.models.schedule import Schedule
from lods.models.text_layout import TextLayout
from torch import Tensor, nn


class AddsNoise:
    """What models have whose noise is that of their ``schedule``."""

    schedule: Schedule

    def add_noise(
        self, z: Float[Tensor, "B c h w"], eps: Float[Tensor, "B c h w"], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B c h w"]:
        """x_t = alpha_t z + sigma_t eps."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return scores.rows(alpha, z) * z + scores.rows(sigma, z) * eps

    def noise_of(
        self, x_t: Float[Tensor, "B c h w"], z: Float[Tensor, "B c h w"], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B c h w"]:
        """The eps with which ``add_noise`` makes x_t of z."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (x_t - scores.rows(alpha, z) * z) / scores.rows(sigma, z)


class TextEncoder(Protocol):
    """From texts to the embeddings that ``predict`` takes."""

    shape: tuple[int, int]  # (T, D): rows of an embedding, and their width

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "N T D"]:
        """One embedding per text, float32, on the model's device."""
        ...


class Model(Protocol):
    """A frozen text-to-image model. Tensors go in and out as float32, on ``device``."""

    name: str  # as it was asked for
    device: torch.device
    schedule: Schedule
    latent_shape: tuple[int, int, int]  # (c, h, w)
    image_size: int  # pixels of a side that it was made for
    text: TextEncoder
    text_width: int  # D of an embedding
    text_shape: tuple[int, int]  # (T, D), which is known before the text encoder is loaded
    # What the rows of an embedding are (see :func:`text_layout` for models without it)
    text_layout: TextLayout
    # Why the model has no usable null prediction, and what to take instead: one that was distilled
    # to give guided predictions in one call has none. "": it has one
    no_null: str
    # Gradients that go back through `predict` come out multiplied by this (1 unless the weights
    # are float16): a method that learns through it divides by it.
    grad_scale: float
    # Pictures of one object that it sees at once, consecutive rows of a call (1: each for itself);
    # models from elsewhere need not say it, see :func:`views_of`
    views: int
    # What it is told of a camera, one of :data:`lods.cameras.TOLD`: by "words" in the texts alone;
    # with "tokens" and "both" `predict` needs cameras with a field of view.
    cameras: str

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B c h w"]:
        """Latents z of images in 0..1. Differentiable."""
        ...

    def decode(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in 0..1 of latents."""
        ...

    def add_noise(
        self, z: Float[Tensor, "B c h w"], eps: Float[Tensor, "B c h w"], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B c h w"]:
        """x_t = alpha_t z + sigma_t eps."""
        ...

    def noise_of(
        self, x_t: Float[Tensor, "B c h w"], z: Float[Tensor, "B c h w"], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B c h w"]:
        """The eps with which ``add_noise`` makes x_t of z."""
        ...

    def predict(
        self,
        x_t: Float[Tensor, "B c h w"],
        t: Int[Tensor, " B"],
        texts: Float[Tensor, "B T D"],
        cameras: Cameras | None = None,
    ) -> Float[Tensor, "B c h w"]:
        """The noise that the model sees in x_t under these texts, and cameras if it is told them
        (see ``cameras``), whatever the network itself predicts."""
        ...

    def lora_network(self) -> nn.Module:
        """The network whose attention a LoRA can change; where, ``lora_sites`` of the model says
        (:class:`lods.learned.lora.Sites`), if it is no UNet."""
        ...

    def time_embedding(self) -> nn.Module:
        """The module whose output (rows, E), as wide as that of its last ``nn.Linear``, tells the
        network t."""
        ...

    def sibling(self, name: str) -> "Model":
        """Another model on the same device, with the same settings, that shares this one's VAE."""
        ...

    def prepare(self, context: Context | None = None) -> None:
        """Apply the settings for memory and speed, once, when all learned parts are in place.
        ``context``: see :func:`lods.models.memory.checkpoint_blocks`."""
        ...


def views_of(model: Any) -> int:
    """``model.views``; 1 for a model that does not say."""
    return getattr(model, "views", 1)


def text_layout(model: Any) -> TextLayout:
    """``model.text_layout``; of a model that does not say, tokens only."""
    found = getattr(model, "text_layout", None)
    return TextLayout(*model.text_shape) if found is None else found
