"""Qwen-Image (arXiv:2508.02324): a flow over packed latents of a video autoencoder, told the text
by a vision-language model."""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lods.learned import lora
from lods.models import chat_text
from lods.models.cards import Location
from lods.models.families import serves
from lods.models.files import load_index, load_model_config, only_errors
from lods.models.flow import FlowModel, pack, unpack
from lods.models.text import Loader, TextPlan
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

TOKENS = 512  # to which the pipeline cuts a text
READ = 1024  # of a text, after the message of the system, by the language model
SIDE = 128  # of the latents that the pipeline draws
OTHERS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # fields of its relatives
PLAIN = "qwen-image"  # the card to take instead of one of them


@serves("QwenImageTransformer2DModel")
class QwenImageModel(FlowModel):
    """The frozen transformer, VAE and schedule of Qwen-Image.

    Latents are (16, h, w), less the means and over the deviations that the VAE's config holds; 2 x
    2 of their pixels are one token of the transformer, which is told sigma itself as the time. The
    VAE is one of films, and a picture a film of one frame. A text is the last hidden states of a
    Qwen2.5-VL after the system's message that the pipeline of the installed diffusers puts before
    it, 512 rows with a mask. As for :class:`lods.models.zimage.ZImageModel` a token has no weight:
    in a blend of texts the tokens of all of them count in full.

    Neither network says how large pictures are: 1024 pixels, as the pipeline draws them, or what
    ``sample_size`` (in pixels of the latents) says if it is added to the transformer's config.

    The pipeline scales a guided prediction back to the norm of that under the prompt. That is a
    step of its sampler, and not done here.
    """

    packs = 2
    lora_sites = lora.Sites(lora.JOINT_TARGETS, "transformer")
    half = torch.bfloat16  # its makers' own

    def __init__(self, transformer, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        if transformer.config.guidance_embeds:
            raise ValueError(
                f"{name!r} takes a guidance scale as an input (guidance_embeds), and was distilled "
                f"to give guided predictions: take {PLAIN}"
            )
        super().__init__(transformer, vae, scheduler, device, name, shares_vae)
        statistics = [vae.config.latents_mean, vae.config.latents_std]
        if [len(each) for each in statistics] != [self.latent_channels] * 2:
            raise ValueError(
                f"the vae of {name!r} has latents_mean and latents_std of other lengths than "
                f"its {self.latent_channels} channels: the model folder is damaged"
            )
        self.statistics = torch.tensor(statistics, device=self.device)[..., None, None]

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    @classmethod
    def vae_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import AutoencoderKLQwenImage

        return AutoencoderKLQwenImage

    @classmethod
    def load_network(cls, model: Location, dtype: torch.dtype) -> Any:
        """Refuses the relatives that edit pictures or draw layers."""
        config = load_model_config(model.path, cls.part, model.revision)
        found = [name for name in OTHERS if config.get(name)]
        kind = str(load_index(model, "what the model is for").get("_class_name"))
        if found or kind not in ("QwenImagePipeline", "None"):
            field = f" ({found[0]})" if found else ""
            raise ValueError(
                f"{model.path!r} is a {kind[:60]}{field}, which is told more than a text: take "
                f"{PLAIN}"
            )
        with only_errors():  # sample_size is no field of diffusers' class
            return super().load_network(model, dtype)

    @classmethod
    def side_of(cls, network, vae):
        """See the class."""
        return cls.part, network.config.get("sample_size", SIDE)

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """Qwen2.5-VL, and what stands around a text. Raises ``ValueError``, one line, for another
        language model."""
        chat_text.check_kind(model, "qwen2_5_vl", "Qwen-Image", PLAIN)
        asked = zlib.crc32(repr(template()).encode())
        return TextPlan(chat_text.PARTS, encode, f"qwen-image-{TOKENS}-{asked:08x}")

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """Of the tokens and their mask."""
        return TextLayout(TOKENS, self.text_width, masked=True)

    def encode_pictures(self, images):
        """See :class:`lods.models.latent.LatentModel`."""
        return super().encode_pictures(images.unsqueeze(2)).squeeze(2)

    def decode_pictures(self, z):
        """See :class:`lods.models.latent.LatentModel`."""
        return super().decode_pictures(z.unsqueeze(2)).squeeze(2)

    def from_vae(self, z):
        """See :class:`lods.models.latent.LatentModel`."""
        mean, deviation = self.statistics
        return (z - mean) / deviation

    def to_vae(self, latents):
        """See :class:`lods.models.latent.LatentModel`."""
        mean, deviation = self.statistics
        return latents * deviation + mean

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a time into what the blocks are modulated with."""
        return self.network.time_text_embed.timestep_embedder

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        height, width = x_t.shape[2:]
        text = text.compact()
        v = self.network(
            hidden_states=pack(x_t),
            encoder_hidden_states=text.tokens,
            encoder_hidden_states_mask=text.mask,
            timestep=self.schedule.told(t, 1.0),  # type: ignore[attr-defined]
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
        ).sample
        return unpack(v, height)


@functools.cache
def template() -> tuple[str, int]:
    """(the chat format of the pipeline in the installed diffusers, with {} for a text; the tokens
    at its beginning that the transformer does not see)."""
    from diffusers import QwenImagePipeline

    parts: Any = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    pipeline = QwenImagePipeline(**parts)
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx


def encode(
    texts: Sequence[str], load: Loader, device: torch.device | str
) -> tuple[Float[Tensor, "N T D"], list[int]]:
    """Embeddings (N, T, D) of texts (:class:`QwenImageModel`), and for each a number that is above
    T where the text is cut off. The language model is in bfloat16 on a GPU, in float32 on a
    CPU."""
    import transformers

    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    tokenizer = load(transformers.AutoTokenizer, chat_text.PARTS[0], trust_remote_code=False)
    kind: Any = transformers.Qwen2_5_VLForConditionalGeneration
    model = load(kind, chat_text.PARTS[1], use_safetensors=True, torch_dtype=dtype)
    model, (around, skipped) = model.model.to(device, dtype).eval(), template()
    packed, counts, layout = [], [], None
    for text in texts:
        told = around.replace("{}", text)
        counts.append(len(tokenizer(told, verbose=False).input_ids) - skipped)
        given = tokenizer(told, max_length=READ + skipped, truncation=True, return_tensors="pt").to(
            device
        )
        with torch.no_grad():
            states = model(**given, use_cache=False).last_hidden_state[0].float()
        rows = states[skipped:][:TOKENS]
        layout = layout or TextLayout(TOKENS, rows.shape[-1], masked=True)
        mask = torch.arange(TOKENS, device=rows.device) < len(rows)
        rows = nn.functional.pad(rows, (0, 0, 0, TOKENS - len(rows)))
        packed.append(layout.pack(rows[None], mask=mask[None]))
        counts[-1] += layout.mask_rows
    return torch.cat(packed), counts
