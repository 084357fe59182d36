"""What is looked at in a model folder before a library loads it."""

import json
import os

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

CONFIGS = ("config.json", "tokenizer_config.json")
MAX_TIMESTEPS = 100_000  # of a noise schedule; those of published models have 1,000
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def refuse_custom_code(model: str, part: str) -> None:
    """Raise :class:`UserError` if the `part` ("tokenizer", "text_encoder") of the folder `model`
    asks for code of its own (``auto_map``, an attention kernel from the hub), has a configuration
    that is not a JSON object, or names weights that are not safetensors.

    Nothing is looked at on the hub: there ``trust_remote_code=False`` and
    ``use_safetensors=True`` decide.
    """
    folder = os.path.join(model, part)
    for name in CONFIGS:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        for key, value in read_object(path).items():
            kernel = "attn_implementation" in key and "/" in str(value)
            if key == "auto_map" or kernel:
                raise UserError(
                    f"{path} asks for code that is not part of the libraries ({key}), which is "
                    "never run: use another model"
                )
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".safetensors.index.json"):
            path = os.path.join(folder, name)
            shards = read_object(path).get("weight_map")
            for shard in shards.values() if isinstance(shards, dict) else [None]:
                plain = isinstance(shard, str) and os.path.basename(shard) == shard
                if not (plain and shard.endswith(".safetensors")):
                    raise UserError(f"{path} names weights that are not .safetensors beside it")


def refuse_long_schedule(model: str, part: str) -> None:
    """Raise :class:`UserError` if the noise schedule of the folder `model` has no number of
    timesteps, or more than MAX_TIMESTEPS: a table is made of it."""
    path = os.path.join(model, part, "scheduler_config.json")
    steps = read_object(path).get("num_train_timesteps", 1000) if os.path.isfile(path) else 1000
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
        raise UserError(
            f"{path}: num_train_timesteps is {str(steps)[:30]}, not 1 to {MAX_TIMESTEPS}: the "
            "model folder is damaged"
        )


def read_object(path: str) -> dict:
    """The JSON object in a file. Raises :class:`UserError` for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not JSON ({detail}): the model folder is damaged") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: the model folder is damaged")
    return content


def weights_identity(path: str) -> bytes:
    """Bytes that change when the file with weights at `path` does, without reading all of it: its
    size, the times of its last change (mtime, which copying can keep, and ctime, which it cannot),
    and 64 samples of 4 KiB, evenly from its first byte to its last."""
    stat = os.stat(path)
    parts = [f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} ".encode()]
    last = max(stat.st_size - _SAMPLE_BYTES, 0)
    with open(path, "rb") as file:
        for i in range(_SAMPLES):
            file.seek(last * i // (_SAMPLES - 1))
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)
