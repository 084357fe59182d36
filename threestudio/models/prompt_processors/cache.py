"""A folder of text embeddings that survives interrupted writes and changed models."""

import hashlib
import os
from dataclasses import dataclass

from safetensors import safe_open
from safetensors.torch import save_file

import threestudio
from threestudio.utils.files import whole_file
from threestudio.utils.typing import *


def hash_prompt(model: str, prompt: str) -> str:
    """Name under which the embedding of ``prompt`` by ``model`` is kept."""
    return hashlib.sha256(f"{len(model)}:{model}{prompt}".encode()).hexdigest()[:40]


@dataclass
class EmbeddingCache:
    """One safetensors file per (model, text): tensor ``embedding`` (T, D), and as metadata the
    text and the number of tokens it has before truncation.

    A file is written beside its place and moved there, so that no reader sees half of one; one
    that cannot be read counts as absent and is written anew.
    """

    folder: str

    def path(self, model: str, text: str) -> str:
        return os.path.join(self.folder, f"{hash_prompt(model, text)}.safetensors")

    def load(
        self,
        model: str,
        text: str,
        shape: Tuple[Optional[int], Optional[int]] = (None, None),
    ) -> Optional[Tuple[Float[Tensor, "T D"], int]]:
        """(embedding, token count), or None. `shape`: what is known of (T, D)."""
        path = self.path(model, text)
        if not os.path.isfile(path):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, embedding = file.metadata(), file.get_tensor("embedding")
            same = metadata["text"] == text and metadata["model"] == model
            real = embedding.is_floating_point() and bool(embedding.isfinite().all())
            if not same or embedding.ndim != 2 or not real:
                raise ValueError("it holds something else")
            if any(n not in (None, m) for n, m in zip(shape, embedding.shape)):
                raise ValueError(f"it is {tuple(embedding.shape)}, and the model's are {shape}")
            return embedding, int(metadata["tokens"])
        except Exception as error:  # whatever is wrong with the file, the remedy is the same
            threestudio.warn(f"Recomputing a text embedding: {path} is unreadable ({error})")
            return None

    def save(self, model: str, text: str, embedding: Float[Tensor, "T D"], tokens: int) -> None:
        """Raises ``OSError`` where the folder cannot be written to."""
        os.makedirs(self.folder, exist_ok=True)
        metadata = {"text": text, "tokens": str(tokens), "model": model}
        with whole_file(self.path(model, text)) as temporary:
            save_file({"embedding": embedding.cpu().contiguous()}, temporary, metadata)
