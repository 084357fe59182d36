"""How a family's texts are embedded (:class:`TextPlan`), and CLIP's encoders, one as in Stable
Diffusion 1 and 2, or two as in SDXL."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.models.additions import Additions
from lods.models.cards import NETWORKS, Location, first_line, resolve
from lods.models.files import load_complete, load_index, load_model_config, refuse_code
from torch import Tensor

# (tokenizer, text encoder) and the class of the encoder in transformers
ENCODERS = (
    ("tokenizer", "text_encoder", "CLIPTextModel"),
    ("tokenizer_2", "text_encoder_2", "CLIPTextModelWithProjection"),
)
Loader = Callable[..., Any]


def has_two_encoders(location: Location) -> bool:
    """Whether the UNet of the model takes SDXL's embeddings; false where it has no UNet."""
    try:
        config = load_model_config(location.path, "unet", location.revision)
    except ValueError:  # only text parts, or nothing, of which whoever loads them complains
        return False
    return config.get("addition_embed_type") == "text_time"


def zeros_for_empty(location: Location) -> bool:
    """Whether SDXL's embedding of an empty text is all zeros: what ``model_index.json`` says; true,
    diffusers' default, where it says nothing."""
    config = load_index(location, "how an empty prompt is embedded")
    return bool(config.get("force_zeros_for_empty_prompt", True))


def encode(
    texts: Sequence[str],
    load: Loader,
    two_encoders: bool,
    zero_empty: bool,
    device: torch.device | str,
) -> tuple[Float[Tensor, "N T D"], list[int]]:
    """Embeddings of texts, and the number of tokens that each has before it is cut off.

    One encoder: its last hidden states. Two: for each token the last but one hidden states of both
    one after the other, and in a last row the second encoder's pooled embedding with zeros after it
    (see :class:`lods.models.unet.UNetModel`); an empty text is all zeros with ``zero_empty``.
    ``load(cls, part, **kwargs)`` loads one part of the model, one after the other, so that only one
    encoder takes memory.
    """
    texts, states, counts, pooled = list(texts), [], [], torch.empty(0)
    for parts in ENCODERS[: 1 + two_encoders]:
        output, counts, _ = run_clip(texts, load, parts, device, two_encoders)
        if not two_encoders:
            return output[0], counts
        states.append(output.hidden_states[-2])
        pooled = output[0]
    rows = torch.cat(states, dim=-1)
    if pooled.ndim != 2 or pooled.shape[-1] > rows.shape[-1]:
        raise ValueError(
            f"the pooled text embedding is {tuple(pooled.shape)}, which does not fit into a "
            f"row of {rows.shape[-1]}: the model's text encoders are not SDXL's"
        )
    row = F.pad(pooled, (0, rows.shape[-1] - pooled.shape[-1]))[:, None]
    embeddings = torch.cat([rows, row], dim=1)
    if zero_empty:
        embeddings[[not text for text in texts]] = 0
    return embeddings, [count + 1 for count in counts]  # the pooled row counts as a token


def run_clip(
    texts: list[str],
    load: Loader,
    parts: tuple[str, str, str],
    device: torch.device | str,
    hidden_states: bool,
    limit: int | None = None,
) -> tuple[Any, list[int], int]:
    """(output of a CLIP text encoder, the number of tokens of each text before it is cut off, the
    number that it is cut to or filled up to). ``parts``: of ENCODERS; ``limit``: the last number,
    by default the encoder's own."""
    import transformers

    tokenizer_part, encoder_part, kind = parts
    # not left to its default, which asks at the terminal
    tokenizer = load(transformers.AutoTokenizer, tokenizer_part, trust_remote_code=False)
    encoder = load(getattr(transformers, kind), encoder_part, use_safetensors=True)
    encoder = encoder.to(device, torch.float32).eval()
    own = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    length: int = own if limit is None else limit
    counts = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    ids = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return encoder(ids.to(device), output_hidden_states=hidden_states), counts, length


def run_t5(
    texts: list[str],
    load: Loader,
    parts: tuple[str, str],
    length: int,
    device: torch.device | str,
) -> tuple[Float[Tensor, "N length D"], list[int]]:
    """(last hidden states of a T5 encoder for texts that are cut to ``length`` tokens or filled up
    to them, the number of tokens of each before). ``parts``: the subfolders of tokenizer and
    encoder. It is in bfloat16 on a GPU, in float32 on a CPU."""
    import transformers

    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    tokenizer = load(transformers.AutoTokenizer, parts[0], trust_remote_code=False)
    encoder = load(transformers.T5EncoderModel, parts[1], use_safetensors=True, torch_dtype=dtype)
    encoder = encoder.to(device, dtype).eval()
    ids = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    counts = [len(each) for each in tokenizer(texts, verbose=False).input_ids]
    with torch.no_grad():
        return encoder(ids.to(device))[0], counts


@dataclass(frozen=True)
class TextPlan:
    """How the texts of a model are embedded.

    ``parts`` are the subfolders that it reads; ``note`` says what beside their files an embedding
    depends on, for whoever keeps embeddings. ``encode(texts, load, device)`` returns what
    :func:`encode` does; ``load(cls, part, **kwargs)`` loads one part, one after the other.
    """

    parts: tuple[str, ...]
    encode: Callable[[Sequence[str], Loader, Any], tuple[Float[Tensor, "N T D"], list[int]]]
    note: str = ""
    plain: bool = False  # one CLIP text encoder, and nothing beside its rows


def clip_plan(location: Location) -> TextPlan:
    """Of a model shaped like Stable Diffusion or SDXL."""
    two = has_two_encoders(location)
    zero = two and zeros_for_empty(location)
    parts = tuple(part for pair in ENCODERS[: 1 + two] for part in pair[:2])

    def run(texts: Sequence[str], load: Loader, device: Any):
        return encode(texts, load, two, zero, device)

    return TextPlan(parts, run, "zero" * zero, plain=not two)


class Texts:
    """The text encoders of a card, folder or hub id. Called with texts it loads them, embeds all
    texts in one call and lets the encoders go again: a prompt is embedded once."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        plan: Callable[[Location], TextPlan],
        device: torch.device | str = "cpu",
        additions: Additions | None = None,
    ):
        self.name, self.shape, self.plan, self.device = name, shape, plan, device
        self.additions = additions or Additions()

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "N T D"]:
        """Embeddings (N, T, D), float32. Raises ``ValueError``, one line, for a model that is
        missing or damaged."""
        location = resolve(self.name)
        plan = self.plan(location)

        def load(cls: Any, part: str, **kwargs: Any) -> Any:
            if os.path.isdir(location.path):
                refuse_code(location.path, part)
            options = {**kwargs, "revision": location.revision}
            try:
                if issubclass(cls, torch.nn.Module):
                    return load_complete(cls, location.path, part, **options)
                return cls.from_pretrained(location.path, subfolder=part, **options)
            except ValueError:
                raise
            except Exception as error:  # of many kinds, by library and by version
                raise ValueError(
                    f"the {part} of {self.name!r} cannot be loaded ({first_line(error)}): download "
                    "the model again"
                ) from None

        # an encoder that is made may draw random numbers; a prompt shall not change the run's
        with torch.random.fork_rng(devices=[]):
            if self.additions:
                load = self.additions.loader(load, network_config(location))
                texts = self.additions.spelt_out(texts)
            return plan.encode(texts, load, self.device)[0].float()


def network_config(location: Location) -> dict[str, Any]:
    """Of the model's network; an empty one where there is none."""
    for part in NETWORKS:
        with contextlib.suppress(ValueError):
            return load_model_config(location.path, part, location.revision)
    return {}
