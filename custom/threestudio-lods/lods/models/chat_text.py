"""Texts that a language model reads as a message of a user, in its chat format."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from lods.models.cards import Location
from lods.models.files import load_model_config
from lods.models.text import Loader
from torch import Tensor

PARTS = ("tokenizer", "text_encoder")


def check_kind(model: Location, kind: str, family: str, instead: str) -> None:
    """Raise ``ValueError``, one line, unless the text encoder's ``model_type`` is ``kind``."""
    found = load_model_config(model.path, PARTS[1], model.revision).get("model_type")
    if found != kind:
        raise ValueError(
            f"the text_encoder of {model.path!r} is a {str(found)[:60]}, and {family} has a "
            f"{kind}: take {instead}"
        )


class Reader:
    """A Qwen3 and its tokenizer: the language model without the way from its states to words, in
    bfloat16 on a GPU, in float32 on a CPU. ``thinking``: as in the chat format of Qwen3, whose
    answer begins with empty thoughts where it is false."""

    def __init__(self, load: Loader, device: torch.device | str, thinking: bool):
        import transformers

        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self.device, self.thinking = device, thinking
        self.tokenizer = load(transformers.AutoTokenizer, PARTS[0], trust_remote_code=False)
        model: Any = load(
            transformers.Qwen3Model, PARTS[1], use_safetensors=True, torch_dtype=dtype
        )
        self.model = model.to(device, dtype).eval()

    @property
    def layers(self) -> int:
        """Of the model."""
        return self.model.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Of a layer's states."""
        return self.model.config.hidden_size

    @torch.no_grad()
    def __call__(
        self, text: str, length: int, layers: Sequence[int]
    ) -> tuple[Float[Tensor, "length D"], Bool[Tensor, " length"], int]:
        """(the states of these layers beside one another, which rows are of the text, its tokens
        before it is cut off), cut or filled up to ``length`` rows. Layer i is what the i-th gives,
        0 what the first is given; negative ones count from the last."""
        told = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        count = len(self.tokenizer(told, verbose=False).input_ids)
        given = self.tokenizer(
            told, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        states = self.model(
            input_ids=given.input_ids,
            attention_mask=given.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        rows = torch.cat([states[layer] for layer in layers], dim=-1)[0].float()
        return rows, given.attention_mask[0].bool(), count
