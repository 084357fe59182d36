"""Tensors of a learned part, to and from safetensors files."""

from pathlib import Path

from lods.files import whole_file
from torch import Tensor


def write_safetensors(path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write float32 tensors; the file is replaced only when it is complete."""
    from safetensors.torch import save_file

    values = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as partial:
        save_file(values, partial, metadata=metadata)
    return Path(path)


def read_safetensors(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, finite ones only, and its metadata. Raises ``ValueError``,
    one line."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    bad = [name for name, value in tensors.items() if not value.float().isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds values that are not finite, in {bad[0]!r}")
    return tensors, metadata
