"""Files of a learned text embedding."""

from pathlib import Path

from jaxtyping import Float
from lods.learned.files import read_safetensors, write_safetensors
from torch import Tensor

KEY = "learnable_embedding"


def save(path: str | Path, embedding: Float[Tensor, "T D"], metadata: dict[str, str]) -> Path:
    """Write ``learnable_embedding``, float32, to a safetensors file."""
    return write_safetensors(path, {KEY: embedding}, {"format": "lods-embedding", **metadata})


def load(path: str | Path, shape: tuple[int, ...]) -> tuple[Float[Tensor, "T D"], dict[str, str]]:
    """The embedding of a file, and the file's metadata. Raises ``ValueError``, one line, for a file
    of something else or of another shape."""
    tensors, metadata = read_safetensors(path)
    value = tensors.get(KEY)
    if value is None or tuple(value.shape) != tuple(shape):
        found = {name: tuple(tensor.shape) for name, tensor in list(tensors.items())[:3]}
        raise ValueError(
            f"{path} does not fit: a {KEY} of {tuple(shape)} is wanted, it holds {found}"
        )
    return value, metadata
