"""Parts of a diffusers folder or hub repository: their configurations and weights, as data only."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from lods.models import checkpoint
from lods.models.cards import Location, first_line, is_hub_id, missing, no_such_model


def read_config(path: str) -> dict[str, Any]:
    """The JSON object in the file ``path``. Raises ``ValueError``, one line, for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({first_line(error)}): the model folder is damaged"
        ) from None
    return config


def load_model_config(
    name_or_path: str, subfolder: str, revision: str | None = None
) -> dict[str, Any]:
    """``config.json`` of one part of a diffusers folder or hub repository, as a dictionary.

    Raises ``ValueError`` with one line that says what was looked for and what to do.
    """
    from transformers import PretrainedConfig

    if name_or_path and os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, subfolder, "config.json")
        if os.path.isfile(path):
            return read_config(path)
        raise ValueError(
            f"the folder {name_or_path!r} has no {subfolder}/config.json: it is not a diffusers "
            "Stable Diffusion folder (with unet, vae, text_encoder, tokenizer and scheduler)"
        )
    if not is_hub_id(name_or_path):
        raise ValueError(no_such_model(name_or_path))
    try:
        found = PretrainedConfig.get_config_dict(
            name_or_path, subfolder=subfolder, revision=revision
        )[0]
    except (OSError, ValueError) as error:
        raise ValueError(cannot_be_had(name_or_path, subfolder, error)) from None
    if not found:
        raise ValueError(cannot_be_had(name_or_path, subfolder, ValueError("no config.json")))
    return found


def load_index(model: Location, says: str) -> dict[str, Any]:
    """``model_index.json`` of a diffusers folder or hub repository, as a dictionary. Raises
    ``ValueError``, one line, with what it ``says``."""
    from diffusers import DiffusionPipeline

    try:
        index: Any = DiffusionPipeline.load_config(model.path, revision=model.revision)
    except Exception as error:  # of many kinds, by library and by version
        raise ValueError(
            f"model_index.json of {model.path!r} cannot be read ({first_line(error)}): it says "
            f"{says}"
        ) from None
    return dict(index)


def load_scheduler_config(model: Location) -> dict[str, Any]:
    """The config of the scheduler of a folder or hub repository, of whatever class. Raises
    ``ValueError``, one line."""
    from diffusers import DDPMScheduler

    try:
        config: Any = DDPMScheduler.load_config(
            model.path, subfolder="scheduler", revision=model.revision
        )
    except Exception as error:  # of many kinds, by library and by version
        raise ValueError(cannot_be_had(model.path, "scheduler", error)) from None
    if not isinstance(config, dict):
        raise ValueError(f"the scheduler's config in {model.path} is no object: it is damaged")
    return config


def cannot_be_had(name_or_path: str, part: str, error: BaseException) -> str:
    """One line for a part of a model that was not found, with what to do."""
    what = f"{part} of {name_or_path} is"
    return missing(name_or_path, what, first_line(error), name_or_path)


# of the files of weights, in the order in which they are looked for
VARIANTS = {
    torch.float32: (None, "fp16"),
    torch.float16: ("fp16", None),
    torch.bfloat16: ("bf16", "fp16", None),
}


class Incomplete(ValueError):
    """Some of a network's weights are not in its files."""


def load_complete(cls, path: str, subfolder: str, **kwargs):
    """``cls.from_pretrained`` of a network, or the same from the file that the folder ``path``
    stands for (:mod:`lods.models.checkpoint`). Raises :class:`Incomplete`, one line, if the files
    lack some of its weights, where the libraries only warn and take random numbers for them."""
    if (found := checkpoint.of_folder(path)) is not None:
        from lods.models.checkpoint_weights import load_part

        return load_part(cls, found, subfolder, kwargs.get("torch_dtype"))
    with _no_bars():
        network, report = cls.from_pretrained(
            path, subfolder=subfolder, output_loading_info=True, **kwargs
        )
    if lost := sorted(report["missing_keys"]):
        raise Incomplete(
            f"{len(lost)} tensors of a {cls.__name__} are missing in {path}/{subfolder}, the first "
            f"of them {lost[0]}: download the model again, or save it in the format of the "
            "installed versions of transformers and diffusers"
        )
    return network


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, most of which last less than a second."""
    from transformers.utils import logging

    shown = getattr(logging, "is_progress_bar_enabled", lambda: False)()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """Nothing less is logged by diffusers, which warns of fields and buffers that its networks do
    not have."""
    with _logged_from(logging.ERROR):
        yield


@contextlib.contextmanager
def _logged_from(level: int) -> Iterator[None]:
    """diffusers logs what is of this level or above, of those in :mod:`logging`."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(level)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def load_weights(cls, model: Location, subfolder: str, dtype: torch.dtype):
    """``cls.from_pretrained``, safetensors only, from whichever variant (fp16, bf16 or none)
    exists."""
    if checkpoint.of_folder(model.path) is not None:  # one file, in one dtype
        return load_complete(cls, model.path, subfolder, torch_dtype=dtype)
    errors = []
    for variant in VARIANTS.get(dtype, (None,)):
        try:
            with _logged_from(logging.CRITICAL):  # a variant that is not there is no error
                return load_complete(
                    cls,
                    model.path,
                    subfolder=subfolder,
                    revision=model.revision,
                    variant=variant,
                    use_safetensors=True,
                    torch_dtype=dtype,
                )
        except Exception as error:  # of many kinds, by library and by version
            errors.append(error)
    if isinstance(errors[0], Incomplete):
        raise errors[0]
    if os.path.isdir(model.path):
        raise ValueError(
            f"the weights in {os.path.join(model.path, subfolder)} cannot be read "
            f"({first_line(errors[0])}): it needs complete .safetensors files of this model"
        )
    raise ValueError(cannot_be_had(model.path, subfolder + " (.safetensors)", errors[0]))


def refuse_code(folder: str, part: str) -> None:
    """Raise ``ValueError`` if a part of a model's folder asks for code of its own (``auto_map``, or
    an attention kernel of the hub): files from others are treated as data."""
    for name in ("config.json", "tokenizer_config.json"):
        path = os.path.join(folder, part, name)
        for key, value in read_config(path).items() if os.path.isfile(path) else ():
            kernel = "attn_implementation" in key and "/" in str(value)
            if key == "auto_map" or kernel:
                raise ValueError(
                    f"{path} asks for code that is not part of the libraries ({key}), which is "
                    "never run: use another model"
                )
