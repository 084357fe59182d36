"""Models shaped like Stable Diffusion (1, 2, XL): a UNet, a VAE and a table of noise levels."""

import functools
from typing import Any

import torch
from lods.models.cards import Location, resolve
from lods.models.ddpm import load_ddpm
from lods.models.families import serves
from lods.models.files import load_model_config
from lods.models.latent import LatentModel
from lods.models.schedule import Schedule
from lods.models.text import TextPlan, clip_plan
from lods.models.text_layout import Parts, TextLayout
from torch import nn


@serves("UNet2DConditionModel")
class UNetModel(LatentModel):
    """The frozen UNet, VAE and noise schedule of a Stable-Diffusion-shaped model.

    A model shaped like SDXL takes the second text encoder's pooled embedding too. It travels as the
    embeddings' last row (:mod:`lods.models.text_layout`): T is then the number of tokens plus
    ``pooled_rows`` = 1 (else 0). Such a model is told that the picture has its own size, and
    is not cropped.
    """

    def __init__(self, unet, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        self.pooled_width: int = _pooled_width(unet.config)
        self.pooled_rows: int = int(self.pooled_width > 0)
        # SDXL's VAE overflows in float16, and its config says so; others say it by default only
        if self.pooled_rows and vae.config.get("force_upcast", True):
            torch.nn.Module.to(vae, torch.float32)  # diffusers' own warns of each such change
        schedule = Schedule(scheduler.alphas_cumprod)
        kind = scheduler.config.get("prediction_type", "epsilon")
        width = unet.config.cross_attention_dim
        super().__init__(unet, vae, schedule, kind, width, device, name, shares_vae)

    @property
    def unet(self) -> Any:
        """The network."""
        return self.network

    @unet.setter
    def unet(self, network: Any) -> None:
        self.network = network

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    @classmethod
    def load_schedule(cls, model: Location, name: str) -> Any:
        """diffusers' DDPM scheduler."""
        return load_ddpm(model, name)

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """CLIP text encoders, one or (SDXL) two."""
        return clip_plan(model)

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """Raises ``ValueError`` where the model's text encoder is not a CLIP text model."""
        location = resolve(self.name)
        config = load_model_config(location.path, "text_encoder", location.revision)
        tokens = config.get("max_position_embeddings")
        if tokens is None:
            raise ValueError(
                f"the text_encoder of {self.name!r} does not say how many tokens it takes "
                "(max_position_embeddings): it is not a CLIP text model"
            )
        return TextLayout(tokens, self.text_width, self.pooled_width)

    def layout_of(self, texts) -> TextLayout:
        """With as many tokens as there are, so that no text encoder is asked."""
        return TextLayout(texts.shape[1] - self.pooled_rows, self.text_width, self.pooled_width)

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a timestep into what the UNet's blocks add."""
        return self.unet.time_embedding

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        more = {}
        if text.pooled is not None:
            size = float(self.image_size)
            time_ids = text.pooled.new_tensor([size, size, 0.0, 0.0, size, size])
            conditions = {
                "text_embeds": text.pooled,
                "time_ids": time_ids.expand(len(text.pooled), -1),
            }
            more["added_cond_kwargs"] = conditions
        return self.unet(x_t, t, encoder_hidden_states=text.tokens, **more).sample


def _pooled_width(config) -> int:
    """Width of the pooled embedding that a UNet takes beside the prompt's; 0: it takes none."""
    kind = config.get("addition_embed_type", None)
    if kind is None:
        return 0
    # six numbers of size and crop, each as a sinusoidal embedding, stand after it
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if kind != "text_time" or total is None or each is None:
        raise ValueError(
            f"the UNet wants more than the prompt (addition_embed_type {kind!r}): use a model "
            "shaped like Stable Diffusion 1 or 2, or like SDXL (text_time)"
        )
    width = total - 6 * each
    if not 0 < width <= config.cross_attention_dim:
        raise ValueError(
            f"the UNet wants {total} numbers beside the prompt, which with six sizes of {each} "
            "leaves no pooled text embedding: it is not a text-to-image model of SDXL's shape"
        )
    return width
