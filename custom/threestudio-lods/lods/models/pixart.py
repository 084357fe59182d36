"""PixArt-Sigma (arXiv:2403.04692): a diffusion over a transformer, told the text by T5 alone."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lods.learned import lora
from lods.models.cards import Location
from lods.models.ddpm import load_ddpm
from lods.models.families import serves
from lods.models.latent import LatentModel
from lods.models.masked_text import PARTS, MaskedEncoder, as_diffusers
from lods.models.schedule import Schedule
from lods.models.text import Loader, TextPlan
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

TOKENS = 300  # to which the pipeline fills a text up, or cuts it


@serves("PixArtTransformer2DModel")
class PixArtModel(LatentModel):
    """The frozen transformer, VAE and schedule of a PixArt-Sigma: no flow, but a diffusion.

    Its network predicts the noise and, in as many channels again, the variance of its sampler's
    steps, which is left out here as in diffusers. A text is the last hidden states of T5, 300 rows
    with a mask. PixArt-alpha at 1024 pixels, which is told the picture's size too, is refused.
    """

    part = "transformer"
    lora_sites = lora.Sites(lora.TARGETS, "transformer")

    def __init__(self, transformer, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        config = transformer.config
        if transformer.use_additional_conditions:
            raise ValueError(
                f"the transformer of {name!r} wants the picture's size beside the prompt "
                "(use_additional_conditions), as PixArt-alpha does: take pixart-sigma"
            )
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"the transformer of {name!r} makes {config.out_channels} channels of "
                f"{config.in_channels}, neither noise alone nor noise and variance: the model "
                "folder is damaged, or of another kind"
            )
        schedule = Schedule(scheduler.alphas_cumprod)
        kind = scheduler.config.get("prediction_type", "epsilon")
        width = config.caption_channels or config.cross_attention_dim
        super().__init__(transformer, vae, schedule, kind, width, device, name, shares_vae)

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel

    @classmethod
    def load_schedule(cls, model: Location, name: str) -> Any:
        """diffusers' DDPM scheduler."""
        return load_ddpm(model, name)

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """T5."""
        return TextPlan(PARTS, encode, f"pixart-{TOKENS}")

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """See :class:`lods.models.base.Model`."""
        return TextLayout(TOKENS, self.text_width, masked=True)

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a timestep into what the blocks are modulated with."""
        return self.network.adaln_single.emb.timestep_embedder

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        output = self.network(
            x_t,
            encoder_hidden_states=text.tokens,
            encoder_attention_mask=text.bias(),
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return output[:, : self.latent_channels]


def encode(
    texts: Sequence[str], load: Loader, device: torch.device | str
) -> tuple[Float[Tensor, "N T D"], list[int]]:
    """Embeddings (N, T, D) of texts (:class:`PixArtModel`), and for each a number that is above T
    where the text is cut off."""
    texts, encoder = as_diffusers(texts), MaskedEncoder(load, "T5EncoderModel", device)
    states, mask = encoder(texts, TOKENS)
    layout = TextLayout(TOKENS, states.shape[-1], masked=True)
    more = layout.shape[0] - TOKENS
    return layout.pack(states, mask=mask), [count + more for count in encoder.count(texts)]
