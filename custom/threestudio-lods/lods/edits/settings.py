"""The settings of an edit of a picture, and what they are where nobody says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lods import settings
from lods.cameras import TOLD

CONFIG = "config.json"
MAX_CONFIG = 1 << 20  # bytes

# By whose model it is and by the method. Of Stable Diffusion they are the published ones, or for
# PDS and LODS-edit what moves a picture as far; of the models of this package what tries gave.
#   scale   guidance_scale of the method
#   lr      of SGD on the latents, whose gradient the mean over the draws is
#   draws   of (t, noise) for a step, as rows of one call
#   steps
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion": {
        "lods-dds": {"scale": 7.5, "lr": 0.0122, "draws": 1, "steps": 200},
        "lods-pds": {"scale": 100.0, "lr": 0.012, "draws": 1, "steps": 200},
        "lods-ssd": {"scale": 3.75, "lr": 0.0122, "draws": 1, "steps": 200},
        "lods-drf": {"scale": 16.5, "lr": 0.02, "draws": 1, "steps": 50},
        "lods-edit": {"scale": 7.5, "lr": 0.09, "draws": 1, "steps": 200},
    },
    "pocket": {
        "lods-dds": {"scale": 3.0, "lr": 0.03, "draws": 4, "steps": 60},
        "lods-pds": {"scale": 20.0, "lr": 0.04, "draws": 4, "steps": 60},
        "lods-ssd": {"scale": 1.5, "lr": 0.015, "draws": 4, "steps": 60},
        "lods-drf": {"scale": 7.5, "lr": 0.005, "draws": 4, "steps": 60},
        "lods-edit": {"scale": 3.0, "lr": 0.2, "draws": 4, "steps": 60},
    },
}
LEVEL = 0.5  # of --where
LEARNED_LR = 1e-3  # of the learned part, by AdamW
OWN: dict[str, dict[str, Any]] = {  # beside these, by the number of steps
    "lods-drf": {
        "min_step_percent": lambda steps: [0, 0.98, 0.02, steps],
        "max_step_percent": lambda steps: [0, 0.98, 0.02, steps],
        "drf_shift": lambda steps: [0, 0.0, 1.0, steps],
    }
}


@dataclass
class EditSettings:
    """What ``config.json`` of an edit holds."""

    source_prompt: str
    prompt: str
    method: str
    model: str
    negative_prompt: str = ""
    steps: Annotated[int, "[1, 1000000]"] = 200
    scale: Annotated[float, "(0, 1e9]"] = 7.5
    lr: Annotated[float, "(0, 1e6]"] = 0.02
    learned_lr: Annotated[float, "(0, 1e6]"] = LEARNED_LR
    draws: Annotated[int, "[1, 4096]"] = 1
    seed: Annotated[int, "[0, 4294967295]"] = 0
    every: Annotated[int, "[1, 1000000]"] = 50
    details: Annotated[float, "[0, 1]"] = 1.0
    cameras: Annotated[str, TOLD] = TOLD[0]
    azimuth: Annotated[float, "[-360, 360]"] = 0.0
    elevation: Annotated[float, "[-90, 90]"] = 0.0
    # of the file that the picture was in
    width: Annotated[int, "[1, 16384]"] = 1
    height: Annotated[int, "[1, 16384]"] = 1

    def of_method(self) -> dict[str, Any]:
        """The settings of the method."""
        own = OWN.get(self.method, {})
        return {
            "guidance_scale": self.scale,
            **{name: of_steps(self.steps) for name, of_steps in own.items()},
        }

    def text(self) -> str:
        return json.dumps(vars(self), indent=2) + "\n"


def defaults(family: str, method: str) -> dict[str, Any]:
    """What :data:`FAMILIES` has for a model of the family, one of ``pocket`` for the other models
    of this package. Raises ``ValueError`` for a method that edits nothing."""
    of_family = FAMILIES["stable-diffusion" if family == "stable-diffusion" else "pocket"]
    if method not in of_family:
        names = ", ".join(name.removeprefix("lods-") for name in of_family)
        raise ValueError(f"--method {method} edits nothing: the methods that do are {names}")
    return dict(of_family[method])


def read_settings(folder: Path) -> EditSettings:
    """Those of a folder. Raises ``ValueError``, one line."""
    path = folder / CONFIG
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG + 1)
        values = json.loads(data) if len(data) <= MAX_CONFIG else None
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not the settings of an edit: name the folder of one")
    try:
        missing = [n for n in ("source_prompt", "prompt", "method", "model") if n not in values]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        return settings.make(EditSettings, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def refuse_unseen(where: str, model: str) -> None:
    """Raise ``ValueError``, one line, for words to look for of which the model of this name can see
    none, where its folder lists the words that it knows."""
    from lods.models.cards import local_folder
    from lods.models.vocabulary import OPTION, Vocabulary

    folder = local_folder(model)
    vocabulary = Vocabulary.read(folder) if folder else None
    if vocabulary is not None and (text := vocabulary.unseen(where, OPTION)):
        raise ValueError(f"--where: {text}")


def level_of(where: str | None, level: float | None) -> float:
    """How strongly words have to be seen, 0..1. Raises ``ValueError``, one line."""
    if where is not None and not where.strip():
        raise ValueError("--where is empty: give words that the model knows")
    if level is None:
        return LEVEL
    if where is None:
        raise ValueError("--level is of --where, which is not there")
    if not 0 <= level <= 1:
        raise ValueError(f"--level {level:g} is not from 0 to 1")
    return level
