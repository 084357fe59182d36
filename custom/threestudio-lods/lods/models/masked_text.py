"""Text encoders whose tokens are filled up to a length, with a mask that says which ones count."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from lods.models.text import Loader
from torch import Tensor

PARTS = ("tokenizer", "text_encoder")


def as_diffusers(texts: Sequence[str]) -> list[str]:
    """Texts as the pipelines of these models write them, where nothing cleans them of markup: in
    small letters, without blanks at the ends."""
    return [text.lower().strip() for text in texts]


class MaskedEncoder:
    """A tokenizer and a text encoder (``kind``, a class of transformers); in bfloat16 on a GPU, in
    float32 on a CPU."""

    def __init__(self, load: Loader, kind: str, device: torch.device | str):
        import transformers

        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self.device = device
        self.tokenizer = load(transformers.AutoTokenizer, PARTS[0], trust_remote_code=False)
        self.tokenizer.padding_side = "right"
        cls: Any = getattr(transformers, kind)
        encoder = load(cls, PARTS[1], use_safetensors=True, torch_dtype=dtype)
        self.encoder = encoder.to(device, dtype).eval()

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before it is cut off."""
        return [len(each) for each in self.tokenizer(list(texts), verbose=False).input_ids]

    @torch.no_grad()
    def __call__(
        self, texts: Sequence[str], length: int
    ) -> tuple[Float[Tensor, "N length D"], Bool[Tensor, "N length"]]:
        """(last hidden states, which tokens are of the text), cut or filled up to ``length``."""
        given = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.encoder(given.input_ids, attention_mask=given.attention_mask)[0]
        return states.float(), given.attention_mask.bool()
