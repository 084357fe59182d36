"""FLUX.1: a transformer over packed latents and T5's rows that predicts a velocity."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.learned import lora
from lods.models.cards import Location
from lods.models.families import serves
from lods.models.flow import FlowModel, grid, pack, side_by_vae, unpack
from lods.models.text import Loader, TextPlan, run_clip, run_t5
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

CLIP = ("tokenizer", "text_encoder", "CLIPTextModel")
T5 = ("tokenizer_2", "text_encoder_2")
T5_TOKENS = 512  # to which the pipeline fills a text up, or cuts it
GUIDANCE = 3.5  # which the pipeline tells a model that was distilled over guidance
UNDISTILLED = "openflux1"  # the card to take instead of such a model


@serves("FluxTransformer2DModel")
class FluxModel(FlowModel):
    """The frozen transformer, VAE and schedule of FLUX.1, or of a model with its transformer.

    Latents are (16, h, w), as the VAE makes them; 2 x 2 of their pixels are one token of the
    transformer, which is told where each token is, and sigma itself as the time. A text is T5's 512
    rows and CLIP's pooled vector. Rows of padding are rows like others: FLUX.1 has no mask.

    A transformer with ``guidance_embeds`` (FLUX.1-dev) is told a guidance scale, and was distilled
    to give a guided prediction in one call: it has no null prediction, and ``no_null`` says so. Its
    ``predict`` is what such a model gives under :data:`GUIDANCE`.
    """

    packs = 2
    lora_sites = lora.Sites(lora.JOINT_TARGETS, "transformer")

    def __init__(self, transformer, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        super().__init__(transformer, vae, scheduler, device, name, shares_vae)
        if transformer.config.guidance_embeds:
            self.no_null = (
                f"{name} takes a guidance scale as an input (guidance_embeds), was distilled to "
                f"give guided predictions, and has no other; take {UNDISTILLED}"
            )

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    @classmethod
    def side_of(cls, network, vae):
        """See :func:`lods.models.flow.side_by_vae`."""
        return side_by_vae(vae, cls.packs)

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """CLIP's pooled vector and T5's rows."""
        parts = *CLIP[:2], *T5

        def run(texts: Sequence[str], load: Loader, device: Any):
            return encode(texts, load, device)

        return TextPlan(parts, run, f"flux-{T5_TOKENS}")

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """Of T5's tokens and the pooled vector."""
        return TextLayout(T5_TOKENS, self.text_width, self.network.config.pooled_projection_dim)

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a time into what the blocks are modulated with."""
        return self.network.time_text_embed.timestep_embedder

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        height, width = x_t.shape[2:]
        places = grid(height // 2, width // 2, x_t.device)
        guided = self.network.config.guidance_embeds
        v = self.network(
            hidden_states=pack(x_t),
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            timestep=self.schedule.told(t, 1.0),  # type: ignore[attr-defined]
            guidance=x_t.new_full((len(x_t),), GUIDANCE) if guided else None,
            txt_ids=places.new_zeros(text.tokens.shape[1], 3),
            img_ids=F.pad(places, (1, 0)),
        ).sample
        return unpack(v, height)


def encode(
    texts: Sequence[str], load: Loader, device: torch.device | str
) -> tuple[Float[Tensor, "N T D"], list[int]]:
    """Embeddings (N, T, D) of texts (:class:`FluxModel`), and for each a number that is above T
    where T5 cuts the text off. One encoder is in memory at a time."""
    texts = list(texts)
    pooled = run_clip(texts, load, CLIP, device, False)[0].pooler_output
    rows, counts = run_t5(texts, load, T5, T5_TOKENS, device)
    layout = TextLayout(T5_TOKENS, rows.shape[-1], pooled.shape[-1])
    packed = layout.pack(rows.to(pooled), pooled)
    return packed, [count + layout.shape[0] - T5_TOKENS for count in counts]
