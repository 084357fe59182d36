"""FLUX.2 [klein] base: a transformer over packed latents and a language model's hidden states."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.learned import lora
from lods.models import chat_text
from lods.models.cards import Location, resolve
from lods.models.families import serves
from lods.models.files import load_index, load_model_config
from lods.models.flow import FlowModel, grid, side_by_vae
from lods.models.text import Loader, TextPlan
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

TOKENS = 512  # to which the pipeline fills a text up, or cuts it
LAYERS = (9, 18, 27)  # of the language model, whose outputs stand beside one another
STEPS = 50  # of a sample of the pipeline, on which its shift depends
UNDISTILLED = "flux2-klein-base-4b"  # the card to take instead of a distilled one


@serves("Flux2Transformer2DModel")
class Flux2Model(FlowModel):
    """The frozen transformer, VAE and schedule of FLUX.2 [klein] base.

    Latents are (128, h, w) at a 16th of a picture's size: 2 x 2 pixels of the VAE's 32 channels
    beside one another, less the means and over the deviations that the VAE holds for each. A text
    is 512 rows of three layers of Qwen3, in its chat format; there is neither mask nor pooled
    vector. Its null is the empty message.

    The makers' pipeline shifts times by the number of tokens and of steps. The schedule here has
    the shift of :data:`STEPS` steps.
    """

    packs = 2
    # the last blocks have one matrix for queries, keys, values and the way into their MLP
    lora_sites = lora.Sites((*lora.JOINT_TARGETS, "to_qkv_mlp_proj"), "transformer")

    def __init__(self, transformer, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        if transformer.config.guidance_embeds:
            raise ValueError(
                f"{name} takes a guidance scale as an input (guidance_embeds), as FLUX.2 [dev] "
                f"does, and was distilled to give guided predictions: take {UNDISTILLED}"
            )
        size = vae.config.get("patch_size")  # which no autoencoder of another family has
        if not size or tuple(size) != (self.packs, self.packs):
            raise ValueError(
                f"the vae of {name!r}, {type(vae).__name__}, has patch_size {str(size)[:30]}, not "
                "[2, 2]: it is damaged, or of another kind"
            )
        super().__init__(transformer, vae, scheduler, device, name, shares_vae)

    @classmethod
    def from_pretrained(cls, name_or_path, device="cpu", dtype=None, vae=None, settings=None):
        """See :class:`lods.models.latent.LatentModel`; ``is_distilled`` in ``model_index.json``
        says that there is no null prediction."""
        loaded = super().from_pretrained(name_or_path, device, dtype, vae, settings)
        index = load_index(resolve(name_or_path), "whether the model was distilled")
        if index.get("is_distilled") and not loaded.no_null:
            loaded.no_null = (
                f"{name_or_path} was distilled to give guided predictions in a few steps "
                f"(is_distilled), and has no other; take {UNDISTILLED}"
            )
        return loaded

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    @classmethod
    def vae_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import AutoencoderKLFlux2

        return AutoencoderKLFlux2

    @classmethod
    def side_of(cls, network, vae):
        """See :func:`lods.models.flow.side_by_vae`."""
        return side_by_vae(vae, cls.packs)

    @classmethod
    def sizes(cls, network, vae):
        """Of the packed latents."""
        channels, side, image_size = super().sizes(network, vae)
        return channels * cls.packs**2, side // cls.packs, image_size

    @classmethod
    def schedule_config(cls, config, tokens):
        """With the shift of :func:`shift_of` at every size, where it depends on it."""
        mu = shift_of(tokens)
        return {**config, "base_shift": mu, "max_shift": mu}

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """Three layers of Qwen3. Raises ``ValueError``, one line, for another language model."""
        chat_text.check_kind(model, "qwen3", "FLUX.2 [klein]", UNDISTILLED)
        width = load_model_config(model.path, cls.part, model.revision).get("joint_attention_dim")

        def run(texts: Sequence[str], load: Loader, device: Any):
            return encode(texts, load, int(width or 0), device)

        return TextPlan(chat_text.PARTS, run, f"flux2-{TOKENS}-{LAYERS}")

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """Of the tokens alone."""
        return TextLayout(TOKENS, self.text_width)

    def from_vae(self, z):
        """See :class:`lods.models.latent.LatentModel`."""
        mean, deviation = self._statistics()
        return (F.pixel_unshuffle(z, self.packs) - mean) / deviation

    def to_vae(self, latents):
        """See :class:`lods.models.latent.LatentModel`."""
        mean, deviation = self._statistics()
        return F.pixel_shuffle(latents * deviation + mean, self.packs)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        mean, variance = (x.float().view(-1, 1, 1) for x in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a time into what the blocks are modulated with."""
        return self.network.time_guidance_embed.timestep_embedder

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        height, width = x_t.shape[2:]
        places = grid(height, width, x_t.device)
        rows = torch.arange(text.tokens.shape[1], device=x_t.device, dtype=torch.float32)
        v = self.network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            encoder_hidden_states=text.tokens,
            timestep=self.schedule.told(t, 1.0),  # type: ignore[attr-defined]
            txt_ids=F.pad(rows[:, None], (3, 0)),
            img_ids=F.pad(places, (1, 1)),
        ).sample
        return v.transpose(1, 2).unflatten(2, (height, width))


def shift_of(tokens: int, steps: int = STEPS) -> float:
    """mu of the makers' pipeline, whose shift is exp(mu): two straight lines in the number of
    ``tokens`` of a picture, one of 10 and one of 200 steps, and a straight line in the number of
    steps between them; of more than 4,300 tokens the second alone."""
    few = 8.73809524e-05 * tokens + 1.89833333
    many = 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (many - few) * (steps - 200) / 190


def encode(
    texts: Sequence[str], load: Loader, width: int, device: torch.device | str
) -> tuple[Float[Tensor, "N T D"], list[int]]:
    """Embeddings (N, T, D) of texts (:class:`Flux2Model`), and the number of tokens of each before
    it is cut off."""
    reader = chat_text.Reader(load, device, thinking=False)
    found = reader.width * len(LAYERS)
    if found != width or reader.layers < max(LAYERS):
        raise ValueError(
            f"the text_encoder has {reader.layers} layers and makes rows of {found}, and the "
            f"transformer takes {width} of layers {LAYERS}: the model folder is damaged"
        )
    read = [reader(text, TOKENS, LAYERS) for text in texts]
    return torch.stack([rows for rows, _, _ in read]), [count for _, _, count in read]
