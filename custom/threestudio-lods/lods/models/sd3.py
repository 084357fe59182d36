"""Stable Diffusion 3 and 3.5: a transformer over picture and text that predicts a velocity."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.learned import lora
from lods.models.cards import Location, resolve
from lods.models.families import serves
from lods.models.files import load_index, load_model_config
from lods.models.flow import FlowModel
from lods.models.text import Loader, TextPlan, run_clip, run_t5
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

CLIP = (
    ("tokenizer", "text_encoder", "CLIPTextModelWithProjection"),
    ("tokenizer_2", "text_encoder_2", "CLIPTextModelWithProjection"),
)
T5 = ("tokenizer_3", "text_encoder_3")
T5_TOKENS = 256  # to which the pipeline fills a text up, or cuts it


@serves("SD3Transformer2DModel")
class SD3Model(FlowModel):
    """The frozen transformer, VAE and schedule of Stable Diffusion 3 or 3.5 (arXiv:2403.03206).

    Its network predicts v = eps - z, so that ``predict`` returns eps = x_t + alpha_t v. A text is
    the last but one hidden states of two CLIP encoders beside one another, filled up with zeros to
    the width of T5's, then T5's own 256 rows, and the pooled vectors of both CLIP encoders. A
    folder without T5 (``[null, null]`` in its ``model_index.json``) has zeros in its place, as in
    diffusers.
    """

    lora_sites = lora.Sites(lora.JOINT_TARGETS, "transformer")

    @classmethod
    def image_tokens(cls, transformer, vae):
        """Of squares of the transformer's ``patch_size``."""
        side, patch = transformer.config.sample_size, transformer.config.patch_size
        return (side // patch) ** 2 if isinstance(side, int) and patch else 0

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """Two CLIP text encoders, and T5 where the folder has it."""
        width = load_model_config(model.path, cls.part, model.revision).get("joint_attention_dim")
        with_t5, rows = has_t5(model), t5_rows(model)
        parts = tuple(part for each in CLIP for part in each[:2]) + T5 * with_t5

        def run(texts: Sequence[str], load: Loader, device: Any):
            return encode(texts, load, int(width or 0), with_t5, device, rows)

        return TextPlan(parts, run, f"sd3-{width}-{rows}")

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """Of CLIP's tokens and T5's, and the pooled vector. Raises ``ValueError`` where the folder
        has no CLIP text model."""
        location = resolve(self.name)
        config = load_model_config(location.path, "text_encoder", location.revision)
        tokens = config.get("max_position_embeddings")
        if not isinstance(tokens, int):
            raise ValueError(
                f"the text_encoder of {self.name!r} does not say how many tokens it takes "
                "(max_position_embeddings): it is not a CLIP text model"
            )
        pooled: int = self.network.config.pooled_projection_dim
        return TextLayout(tokens + t5_rows(location), self.text_width, pooled)

    def layout_of(self, texts) -> TextLayout:
        """With as many tokens as there are, so that no text encoder is asked."""
        pooled = TextLayout(0, self.text_width, self.network.config.pooled_projection_dim)
        tokens = texts.shape[1] - pooled.pooled_rows
        return TextLayout(tokens, self.text_width, pooled.pooled)

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a time into what the blocks are modulated with."""
        return self.network.time_text_embed.timestep_embedder

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        return self.network(
            hidden_states=x_t,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            timestep=self.schedule.told(t),  # type: ignore[attr-defined]
        ).sample


def has_t5(model: Location) -> bool:
    """Whether the pipeline has a third text encoder. Raises ``ValueError``, one line, where it is
    named and is not there."""
    index = load_index(model, "whether the model has a T5 text encoder")
    named = bool((index.get(T5[1]) or [None])[0])
    if named and os.path.isdir(model.path):
        lost = [part for part in T5 if not os.path.isdir(os.path.join(model.path, part))]
        if lost:
            raise ValueError(
                f"{model.path} has no {lost[0]}, the T5 that its model_index.json names: download "
                f"it, or write [null, null] there for {T5[0]} and {T5[1]}, to do without T5"
            )
    return named


def t5_rows(model: Location) -> int:
    """How many rows a text has of T5, or of zeros in its place: the pipeline's 256, or fewer where
    the encoder's config says ``n_positions``, as that of the flow model in this package does, whose
    third encoder makes zeros and whose transformer does as well with few of them."""
    config = load_model_config(model.path, T5[1], model.revision) if has_t5(model) else {}
    most = config.get("n_positions")
    return min(T5_TOKENS, most) if isinstance(most, int) and most > 0 else T5_TOKENS


def encode(
    texts: Sequence[str], load: Loader, width: int, with_t5: bool, device: torch.device | str,
    t5_tokens: int = T5_TOKENS,
) -> tuple[Float[Tensor, "N T D"], list[int]]:  # fmt: skip
    """Embeddings (N, T, D) of texts (:class:`SD3Model`), and for each a number that is above T
    where the text is cut off: by T5 where there is one, which reads more than CLIP, else by CLIP.
    One encoder is in memory at a time; T5 is in bfloat16 on a GPU, all others in float32."""
    texts, states, pooled, counts, limit = list(texts), [], [], [], None
    for parts in CLIP:
        output, counts, limit = run_clip(texts, load, parts, device, True, limit)
        states.append(output.hidden_states[-2])
        pooled.append(output[0])
    rows, vector = torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)
    if rows.shape[-1] > width:
        raise ValueError(
            f"the text encoders make rows of {rows.shape[-1]}, and the transformer takes {width}: "
            "the model folder is damaged"
        )
    rows = F.pad(rows, (0, width - rows.shape[-1]))
    if with_t5:
        more, counts, limit = *run_t5(texts, load, T5, t5_tokens, device), t5_tokens
    else:
        more, limit = rows.new_zeros(len(texts), t5_tokens, width), limit or 0
    layout = TextLayout(rows.shape[1] + t5_tokens, width, vector.shape[-1])
    packed = layout.pack(torch.cat([rows, more.to(rows)], dim=1), vector)
    return packed, [count + layout.shape[0] - limit for count in counts]
