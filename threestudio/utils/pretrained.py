"""Parts of a diffusers model, from a folder or the hub."""

import os
import sys
from pathlib import Path

import torch

from threestudio.utils import extensions
from threestudio.utils.errors import UserError
from threestudio.utils.safe_models import refuse_custom_code, refuse_long_schedule
from threestudio.utils.typing import *

REPOSITORY = Path(__file__).resolve().parents[2]


def find_model(model: str) -> str:
    """`model`, or if that is no folder from here but one of this repository (the overlays name such
    a one) or one that an extension brings, that folder: a run can be started from everywhere. An
    extension says so with a function ``find_model(model) -> folder or ""``."""
    beside = REPOSITORY / model
    if "/" not in model or os.path.isabs(model) or os.path.isdir(model):
        return model
    if any((beside / part).is_dir() for part in ("unet", "text_encoder")):
        return str(beside)
    for name in extensions.loaded:
        find = getattr(sys.modules.get(name), "find_model", None)
        if find is not None and (folder := find(model)):
            return folder
    return model


def load_part(
    cls: Any, model: str, part: str, variants: Tuple[Optional[str], ...] = (None,), **kwargs
) -> Any:
    """``cls.from_pretrained(model, subfolder=part, **kwargs)`` of the first of `variants` ("fp16",
    or None for the plain file) that there is. `model`: a folder, relative to the current one (or
    to this repository) or absolute, or a hub id. Raises :class:`UserError` that says what was
    looked for, and where, and for a network some of whose weights are missing."""
    model = find_model(model)
    if not os.path.isdir(model) and (model.count("/") != 1 or model[0] in "./~"):
        raise UserError(
            f"there is no model folder {model!r} (from {os.getcwd()}): set "
            "pretrained_model_name_or_path to a diffusers folder or to a hub id 'owner/name'"
        )
    if os.path.isdir(model):
        refuse_custom_code(model, part)
        refuse_long_schedule(model, part)
    problem = None
    for variant in variants:
        options = kwargs if variant is None else {**kwargs, "variant": variant}
        try:
            return load_complete(cls, model, subfolder=part, **options)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # one of many kinds, by library and by version
            problem = error if problem is None or variant is None else problem
    if isinstance(problem, UserError):
        raise problem
    where = "in the folder" if os.path.isdir(model) else "on the hub or in its local cache"
    raise UserError(
        f"cannot load {part} of {model!r} {where} "
        f"({type(problem).__name__}: {_first_line(problem)}): check "
        "pretrained_model_name_or_path, the network, or download the model first"
    )


def load_complete(cls: Any, model: str, **kwargs) -> Any:
    """``cls.from_pretrained(model, **kwargs)``. For a network some of whose weights are not in the
    files it raises :class:`UserError`: the libraries only warn, and fill in random numbers."""
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        return cls.from_pretrained(model, **kwargs)
    network, report = cls.from_pretrained(model, output_loading_info=True, **kwargs)
    lost = sorted(report["missing_keys"])
    if lost:
        where = os.path.join(model, kwargs.get("subfolder", ""))
        raise UserError(
            f"the weights in {where} lack {len(lost)} of the tensors of a {cls.__name__}, such as "
            f"{lost[0]}: download the model again, or save it in the format that the installed "
            "transformers and diffusers read"
        )
    return network


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line if len(line) <= 200 else line[:200] + "..."
