"""SANA (arXiv:2410.10629): a flow over latents 32 times smaller than the picture, told the text by
a small language model."""

import functools
import inspect
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lods.learned import lora
from lods.models.cards import Location
from lods.models.families import serves
from lods.models.files import load_model_config, load_scheduler_config
from lods.models.flow import FlowModel
from lods.models.masked_text import PARTS, MaskedEncoder, as_diffusers
from lods.models.text import Loader, TextPlan
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

TOKENS = 300  # to which the pipeline fills a text up, or cuts it


@serves("SanaTransformer2DModel")
class SanaModel(FlowModel):
    """The frozen transformer, deep-compression autoencoder and schedule of a SANA.

    Its network predicts v = eps - z, and is told ``timestep_scale`` T s. A text is the last hidden
    states of a Gemma 2, 300 rows with a mask. Before a text stands the pipeline's question to the
    language model (``complex_human_instruction``, from the installed diffusers), of which the
    rows keep the first token only; the empty text is embedded without it, as the pipeline does with
    a negative prompt. (It leaves the question out for a negative prompt of words too; here a text
    is embedded alike whatever it is for.)
    """

    lora_sites = lora.Sites(lora.TARGETS, "transformer")
    half = torch.bfloat16  # its makers' own; activations of the 1024 px model overflow in float16

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import SanaTransformer2DModel

        return SanaTransformer2DModel

    @classmethod
    def vae_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import AutoencoderDC

        return AutoencoderDC

    @classmethod
    def width_of(cls, transformer):
        """Of the language model's rows."""
        return transformer.config.caption_channels

    @classmethod
    def load_network(cls, model: Location, dtype: torch.dtype) -> Any:
        """Refuses SANA-Sprint, which was distilled to guided predictions."""
        if load_model_config(model.path, cls.part, model.revision).get("guidance_embeds"):
            raise ValueError(
                f"{model.path!r} is a SANA-Sprint, which was distilled to give guided predictions, "
                "and has no null prediction: take sana-1600m"
            )
        return super().load_network(model, dtype)

    @classmethod
    def load_schedule(cls, model: Location, name: str) -> Any:
        """The config of diffusers' flow scheduler, or that of its DPM-Solver for flows in the same
        words."""
        config = load_scheduler_config(model)
        if config.get("_class_name") != "DPMSolverMultistepScheduler":
            return super().load_schedule(model, name)
        kind = config.get("prediction_type")
        if not config.get("use_flow_sigmas") or kind != "flow_prediction":
            raise ValueError(
                f"the scheduler of {name!r} is that of a diffusion (prediction_type "
                f"{str(kind)[:30]}, use_flow_sigmas {bool(config.get('use_flow_sigmas'))}), and a "
                "SANA is a flow: the model folder is damaged"
            )
        return config | {"shift": config.get("flow_shift", 1.0)}

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """Gemma 2, and the question that stands before a text."""
        asked = zlib.crc32(question().encode())
        return TextPlan(PARTS, encode, f"sana-{TOKENS}-{asked:08x}")

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """See :class:`lods.models.base.Model`."""
        return TextLayout(TOKENS, self.text_width, masked=True)

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a time into what the blocks are modulated with."""
        return self.network.time_embed.emb.timestep_embedder

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        scale = self.schedule.steps * self.network.config.timestep_scale
        return self.network(
            x_t,
            encoder_hidden_states=text.tokens,
            encoder_attention_mask=text.bias(),
            timestep=self.schedule.told(t, scale),  # type: ignore[attr-defined]
        ).sample


def question() -> str:
    """What the pipeline of the installed diffusers asks the language model before each prompt."""
    from diffusers import SanaPipeline

    asked = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
    return "\n".join(asked.default or ())


def encode(
    texts: Sequence[str], load: Loader, device: torch.device | str
) -> tuple[Float[Tensor, "N T D"], list[int]]:
    """Embeddings (N, T, D) of texts (:class:`SanaModel`), and for each a number that is above T
    where the text is cut off."""
    texts = as_diffusers(texts)
    encoder, before = MaskedEncoder(load, "Gemma2Model", device), question()
    [asked] = encoder.count([before])
    asked = asked if before else 2
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    counts = encoder.count(texts)
    for empty in (True, False):
        places = [place for place, text in enumerate(texts) if empty == (not text)]
        if not places:
            continue
        whole = [texts[place] if empty else before + texts[place] for place in places]
        # the question's first token, as that of the text, and then only what comes after it
        extra = 0 if empty else asked - 2
        states, mask = encoder(whole, TOKENS + extra)
        kept = [0, *range(extra + 1, TOKENS + extra)]
        layout = TextLayout(TOKENS, states.shape[-1], masked=True)
        packed = layout.pack(states[:, kept], mask=mask[:, kept])
        for place, row, count in zip(places, packed, encoder.count(whole)):
            rows[place], counts[place] = row, count - extra + len(row) - TOKENS
    return torch.stack(rows), counts
