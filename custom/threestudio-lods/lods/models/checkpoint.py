"""A model in one ``.safetensors`` file, as community models are published.

Its name is its path. Everything that is not a weight (configurations, tokenizers) is built from the
shapes in the file's header (:mod:`lods.models.checkpoint_layout`) into a folder in diffusers'
layout without weights, which lives as long as the process; whoever loads weights of such a folder
gets them from the file (:mod:`lods.models.checkpoint_weights`).

It is read before torch is imported, and imports nothing heavy.
"""

import contextlib
import dataclasses
import json
import os
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

from lods.models.checkpoint_layout import layout_of, write_folder
from lods.models.checkpoint_parts import Layout, Shapes, Unfit

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER = 100_000_000  # bytes, of the format itself
PREDICTIONS = ("epsilon", "v_prediction")
MAX_PIXELS = 4096
# what the file's own metadata (modelspec) calls a prediction
_NAMES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
_NAMES["eps"] = "epsilon"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A file, what it holds, and what it says of itself. ``prediction``: of PREDICTIONS or "flow",
    None where nothing but the network can tell."""

    path: str
    folder: str
    layout: Layout
    prediction: str | None
    pixels: int | None


_known: dict[tuple[str, int, int], Checkpoint] = {}
_by_folder: dict[str, Checkpoint] = {}
_folders: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def is_file_name(name: str) -> bool:
    """Whether a model's name is that of a file of weights, and not of a folder."""
    return name.lower().endswith((SUFFIX, *PICKLES)) and not os.path.isdir(name)


def folder_of(name: str) -> str:
    """The folder that stands for the checkpoint in the file ``name``. Raises ``ValueError``, one
    line, for a file that is missing, a pickle, damaged, or no model of a known family."""
    return read(name).folder


def of_folder(folder: str) -> Checkpoint | None:
    """The checkpoint that a folder of :func:`folder_of` stands for; None for any other folder."""
    return _by_folder.get(folder)


def read(name: str) -> Checkpoint:
    """See :func:`folder_of`."""
    if name.lower().endswith(PICKLES):
        raise ValueError(refuse_pickle(name))
    try:
        status = os.stat(name)
    except OSError as error:
        raise ValueError(f"the file {name!r} cannot be read: {error.strerror}") from None
    key = os.path.realpath(name), status.st_size, status.st_mtime_ns
    if key not in _known:
        _known[key] = found = _read(name)
        _by_folder[found.folder] = found
    return _known[key]


def refuse_pickle(name: str) -> str:
    """One line for a file that is read by unpickling."""
    return (
        f"{name!r} is a pickle, which can run code when it is read: take the model's .safetensors "
        "file, or convert it where you trust it"
    )


def _read(name: str) -> Checkpoint:
    shapes, metadata = read_header(name)
    try:
        layout = layout_of(shapes)
    except Unfit as error:
        raise ValueError(f"{name!r} {error}") from None
    prediction = "flow"
    if "flow" not in layout.image_size:
        prediction = _prediction(name, shapes, metadata)
        scheduler = layout.configs["scheduler"]
        if prediction is not None:
            scheduler["prediction_type"] = prediction
        prediction = scheduler.get("prediction_type")
        if "ztsnr" in shapes:  # by which trainers say that the last step is noise alone
            scheduler["rescale_betas_zero_snr"] = True
    pixels = _pixels(metadata)
    shown = pixels or layout.image_size[prediction or "epsilon"]
    layout.configs[layout.network]["sample_size"] = latent_size(layout, shown)
    layout.configs["vae"]["sample_size"] = shown
    made = tempfile.TemporaryDirectory(prefix="lods-checkpoint-")
    _folders.append(made)
    write_folder(layout, Path(made.name))
    return Checkpoint(name, made.name, layout, prediction, pixels)


def latent_size(layout: Layout, pixels: int) -> int:
    """Of the latents of pictures with so many pixels a side."""
    return pixels >> (len(layout.configs["vae"]["block_out_channels"]) - 1)


def read_header(path: str) -> tuple[Shapes, dict[str, str]]:
    """(the shape of every tensor by its name, the metadata) of a safetensors file. Raises
    ``ValueError``, one line, for a file of another kind."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError("its header is longer than the file")
            content = json.loads(file.read(length))
        metadata = content.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in content.items()}
        ends = [entry["data_offsets"][1] for entry in content.values()]
        if not all(isinstance(n, int) and n >= 0 for shape in shapes.values() for n in shape):
            raise ValueError("it has a shape that is none")
        if size < 8 + length + max(ends, default=0):
            raise ValueError("it ends too early")
    except OSError as error:
        raise ValueError(f"the file {path!r} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        why = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise ValueError(
            f"{path!r} is not a complete safetensors file ({why}): download it again"
        ) from None
    texts = isinstance(metadata, dict) and {k: v for k, v in metadata.items() if type(v) is str}
    return shapes, texts or {}


def _prediction(name: str, shapes: Shapes, metadata: dict[str, str]) -> str | None:
    """What the file says that its network predicts: by a tensor ``v_pred``, as trainers leave it,
    by its metadata, or by the original code's YAML beside it; None: nothing."""
    if "v_pred" in shapes:
        return PREDICTIONS[1]
    if said := _NAMES.get(metadata.get("modelspec.prediction_type", "").lower()):
        return said
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(f"{os.path.splitext(name)[0]}.yaml", encoding="utf-8") as file:
            found = re.search(r"^\s*parameterization:\s*['\"]?(\w+)", file.read(100_000), re.M)
        return _NAMES.get(found[1].lower()) if found else None
    return None


def _pixels(metadata: dict[str, str]) -> int | None:
    """The side that the metadata gives ("768x768"); None: none that serves."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", metadata.get("modelspec.resolution", ""))
    side = int(found[1]) if found and found[1] == found[2] else 0
    return side if 8 <= side <= MAX_PIXELS and side % 8 == 0 else None


def identity(name: str) -> dict[str, Any]:
    """What tells this file from another, without reading all of it."""
    status = os.stat(name)
    return {"path": os.path.realpath(name), "size": status.st_size, "time": status.st_mtime_ns}
