"""Text encoders with what is added to a model: words of textual inversions (arXiv:2208.01618), and
the LoRA files' own layers."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lods.learned.files import read_safetensors
from lods.models.additions import Additions, Inversion
from torch import Tensor, nn

# names of the vectors in files for models with two text encoders
BY_ENCODER = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
ONE = "emb_params"  # the name that A1111 gives them in safetensors
Vectors = Float[Tensor, "N D"]


class AddedText:
    """``load(cls, part, **options)`` of a model's text parts, with what is added to each."""

    def __init__(self, additions: Additions, load: Callable[..., Any], network: dict[str, Any]):
        self.additions, self.load, self.network = additions, load, network
        self.words = [read_inversion(each) for each in additions.inversions]
        self._ids: dict[str, list[int]] = {}  # of the words in the tokenizer before an encoder
        self._end: int | None = None

    def __call__(self, cls: Any, part: str, **options: Any) -> Any:
        loaded = self.load(cls, part, **options)
        if isinstance(loaded, nn.Module):
            self._teach(loaded, part)
        elif part in ("tokenizer", "tokenizer_2"):  # CLIP's; T5 has no such words
            self._spell(loaded, part)
        return loaded

    def _spell(self, tokenizer: Any, part: str) -> None:
        self._end = tokenizer.eos_token_id
        encoder, known = part.replace("tokenizer", "text_encoder"), tokenizer.get_vocab()
        for (word, found), given in zip(self.words, self.additions.inversions):
            vectors = vectors_for(found, encoder, given)
            names = spelling(word, len(vectors))
            if taken := [name for name in names if name in known]:
                raise ValueError(
                    f"{given.path}: the model knows the word {taken[0]!r} already: give another "
                    f"one, {given.path}@<word>"
                )
            tokenizer.add_tokens(names)
            self._ids[word] = tokenizer.convert_tokens_to_ids(names)

    def _teach(self, encoder: Any, part: str) -> None:
        from lods.models.frozen_lora import fuse_text

        for lora in self.additions.loras:
            fuse_text(encoder, part, lora, self.network)
        if part not in BY_ENCODER.values():
            return
        for (word, found), given in zip(self.words, self.additions.inversions):
            vectors, table = vectors_for(found, part, given), encoder.get_input_embeddings().weight
            if vectors.shape[1] != table.shape[1]:
                raise ValueError(
                    f"{given.path} does not fit this model: its vectors have {vectors.shape[1]} "
                    f"numbers, and those of the {part} have {table.shape[1]}"
                )
            _enter(encoder, self._ids[word], vectors)
        if self.words:
            # pooled at the end mark itself; by its id 2 transformers would take the largest id
            for module in encoder.modules():
                if hasattr(module, "eos_token_id"):
                    module.eos_token_id = self._end


@torch.no_grad()
def _enter(encoder: Any, ids: list[int], vectors: Vectors) -> None:
    table = encoder.get_input_embeddings().weight
    size = max(len(table), max(ids) + 1)
    larger = table.new_zeros(size, table.shape[1])
    larger[: len(table)] = table
    larger[ids] = vectors.to(table)
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(larger))


def spelling(word: str, count: int) -> list[str]:
    """One token for each vector of a word."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def spelt_out(additions: Additions, texts: Sequence[str]) -> list[str]:
    """See :meth:`lods.models.additions.Additions.spelt_out`."""
    texts = list(texts)
    for given in additions.inversions:
        word, found = read_inversion(given)
        count = len(next(iter(found.values())))
        whole = re.compile(rf"(?<!\w){re.escape(word)}(?![\w])", re.IGNORECASE)
        names = " ".join(spelling(word, count))
        texts = [whole.sub(lambda _, names=names: names, text) for text in texts]
    return texts


def vectors_for(found: dict[str, Vectors], encoder: str, given: Inversion) -> Vectors:
    """Those of one text encoder. Raises ``ValueError`` where the file has none for it."""
    if encoder in found:
        return found[encoder]
    if "" in found and encoder == "text_encoder":
        return found[""]
    raise ValueError(f"{given.path} does not fit this model: it has no vectors for its {encoder}")


def read_inversion(given: Inversion) -> tuple[str, dict[str, Vectors]]:
    """(its word, its vectors by text encoder, "" for the only one) from a file of diffusers or of
    A1111. Raises ``ValueError``, one line, for a file of something else."""
    content = _content(given.path)
    name, vectors = Path(given.path).stem, {}
    if isinstance(content, Tensor):
        vectors = {"": content}
    elif isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        vectors = {"": content["string_to_param"].get("*")}
        name = content.get("name") or name
    elif isinstance(content, dict) and set(content) & set(BY_ENCODER):
        vectors = {part: content[key] for key, part in BY_ENCODER.items() if key in content}
    elif isinstance(content, dict) and ONE in content:
        vectors = {"": content[ONE]}
    elif isinstance(content, dict) and len(content) == 1:
        ((name, only),) = content.items()
        vectors = {"": only}
    good = {k: v.detach() for k, v in vectors.items() if isinstance(v, Tensor)}
    good = {k: v[None] if v.ndim == 1 else v for k, v in good.items()}
    right = good and len(good) == len(vectors)
    right = right and all(v.ndim == 2 and v.is_floating_point() and len(v) for v in good.values())
    if not right or len({len(v) for v in good.values()}) != 1:
        raise ValueError(
            f"{given.path} is not a textual inversion of diffusers or A1111: it holds no vectors "
            "under one word"
        )
    if any(not value.isfinite().all() or len(value) > 75 for value in good.values()):
        raise ValueError(f"{given.path} holds values that are not finite, or more than 75 vectors")
    word = given.token or str(name)
    if re.search(r"\s", word) or not word:
        raise ValueError(f"{given.path} names no word: give one, {given.path}@<word>")
    return word, good


def _content(path: str) -> Any:
    if path.lower().endswith(".safetensors"):
        return read_safetensors(path)[0]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
        raise ValueError(
            f"{path} cannot be read as tensors alone ({why}): take or make a .safetensors file"
        ) from None
