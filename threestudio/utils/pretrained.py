"""Parts of a diffusers model, from a folder or the hub."""

import os

import torch

from threestudio.utils.errors import UserError
from threestudio.utils.safe_models import refuse_custom_code, refuse_long_schedule
from threestudio.utils.typing import *


def load_part(
    cls: Any, model: str, part: str, variants: Tuple[Optional[str], ...] = (None,), **kwargs
) -> Any:
    """``cls.from_pretrained(model, subfolder=part, **kwargs)`` of the first of `variants` ("fp16",
    or None for the plain file) that there is. `model`: a folder, relative to the current one or
    absolute, or a hub id. Raises :class:`UserError` that says what was looked for, and where."""
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
            return cls.from_pretrained(model, subfolder=part, **options)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # one of many kinds, by library and by version
            problem = error if problem is None or variant is None else problem
    where = "in the folder" if os.path.isdir(model) else "on the hub or in its local cache"
    raise UserError(
        f"cannot load {part} of {model!r} {where} "
        f"({type(problem).__name__}: {_first_line(problem)}): check "
        "pretrained_model_name_or_path, the network, or download the model first"
    )


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line if len(line) <= 200 else line[:200] + "..."
