"""``lods edit`` of a picture: from what was asked to the folder of its results."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lods import settings as checked
from lods.edits import region as regions
from lods.edits.picture import Picture, open_picture
from lods.edits.run import REGION, RESULT, SHEET, SOURCE, PictureEdit, carry_on
from lods.edits.settings import (
    CONFIG,
    EditSettings,
    defaults,
    level_of,
    read_settings,
    refuse_unseen,
)
from lods.files import whole_file
from lods.methods import Method, find, names
from lods.models.vocabulary import OPTION
from lods.playground import camera_at, choose_model, dated, new_folder, refuse_folder
from lods.prompts import TextSettings, check_words

# options that are settings by the same name
ASKED = ("steps", "scale", "lr", "draws", "seed", "every", "details", "negative_prompt")
ASKED += ("cameras", "azimuth", "elevation")
METHOD = "lods-dds"


def start(path: Path, asked: dict[str, Any]) -> Path:
    """Edit the picture in a file, with the options of the command line in ``asked``; returns the
    folder. Raises ``ValueError``, one line, for what makes no sense."""
    size, region = open_picture(path).size, None  # before a model is loaded
    if asked["region"] is not None:
        region = regions.box_region(asked["region"], size)
    elif asked["mask"] is not None:
        region = regions.mask_region(asked["mask"], size)
    if asked["out"] is not None:
        refuse_folder(asked["out"])
    model, family, why = choose_model(asked["model"])
    method = full_name(asked["method"] or METHOD)
    values = defaults(family, method) | {
        name: asked[name] for name in ASKED if asked[name] is not None
    }
    values |= {"source_prompt": asked["source"], "prompt": asked["target"]}
    values |= {"method": method, "model": model}
    found = checked.make(EditSettings, values, "--")
    level = level_of(asked["where"], asked["level"])
    known = TextSettings(allow_unknown_words=asked["allow_unknown_words"])
    for text in (found.source_prompt, found.prompt):
        check_words(model, text, known, OPTION)
    if asked["where"] is not None and not asked["allow_unknown_words"]:
        refuse_unseen(asked["where"], model)
    print(f"Model: {model} ({why}).", flush=True)
    loaded = _load(found)
    picture = Picture.read(path, loaded.model.image_size)
    found.width, found.height = picture.width, picture.height
    everything = np.ones(picture.pixels.shape[:2], bool)
    inside = everything if region is None else picture.mask(region)
    edit = PictureEdit(found, picture, inside, loaded)
    if asked["where"] is not None:
        edit.restrict(_seen(edit, asked["where"], level))
    wanted = asked["out"] or Path("outputs", "edit", dated(f"{path.stem} {found.prompt}"))
    folder = new_folder(wanted, found.text())
    if folder != wanted:
        print(f"{wanted} holds another run: this one goes to {folder}", flush=True)
    edit.begin(folder)
    return _finish(edit, folder, [])


def go_on(folder: Path, steps: int | None) -> Path:
    """Go on with the edit in a folder, to ``steps`` steps. Raises ``ValueError``, one line."""
    found = read_settings(folder)
    if steps is not None and steps != found.steps:
        if len(found.of_method()) > 1:
            raise ValueError(
                f"{found.method} falls over its {found.steps} steps: begin anew for {steps}"
            )
        found.steps = steps
    defaults("pocket", found.method)  # refuses what edits nothing
    method = _load(found)
    picture = _stored(folder, found, method.model.image_size)
    region = np.asarray(open_picture(folder / REGION).convert("L")) >= 128
    if region.shape != picture.pixels.shape[:2]:
        raise ValueError(f"{folder / REGION} is not of this edit")
    edit = PictureEdit(found, picture, region, method)
    metrics = edit.resume(folder)
    if edit.step >= found.steps:
        raise ValueError(f"{folder} is done, at step {edit.step}: --steps asks for more")
    with whole_file(folder / CONFIG) as partial:
        partial.write_text(found.text())
    return _finish(edit, folder, metrics)


def full_name(name: str) -> str:
    """The registered name of a method. Raises ``ValueError`` that names the nearest."""
    cls = find(name)
    return next(full for full in names() if find(full) is cls)


def _load(found: EditSettings) -> Method:
    import lods

    torch.manual_seed(found.seed)
    return lods.load(
        found.method,
        found.model,
        found.prompt,
        found.negative_prompt,
        source_prompt=found.source_prompt,
        cameras=found.cameras,
        allow_unknown_words=True,  # they have been looked at
        **found.of_method(),
    )


def _stored(folder: Path, found: EditSettings, size: int) -> Picture:
    """The source in a folder, as the square that was worked on."""
    stored = np.asarray(open_picture(folder / SOURCE).convert("RGB"))
    picture = Picture(np.full((size, size, 3), 255, np.uint8), found.width, found.height)
    if stored.shape[:2] != picture.box[::-1]:
        raise ValueError(f"{folder / SOURCE} is not of this edit")
    picture.cut(picture.pixels)[:] = stored
    return picture


def _seen(edit: PictureEdit, words: str, level: float) -> np.ndarray:
    """Where the model sees the words in the source."""
    settings, model = edit.settings, edit.method.model
    assert edit.method.prompts is not None
    camera = camera_at(model, settings.elevation, settings.azimuth)
    conditions = edit.method.prompts.conditions(camera)
    text = model.text([words]).to(model.device)
    found = regions.word_map(model, edit.source, text, conditions)
    region = regions.region_of_words(found, level, edit.picture.size)
    if not region.any():
        raise ValueError(f"--where {words!r} is seen nowhere above --level {level:g}")
    print(f"{words!r} is seen in {100 * region.mean():.0f} % of the picture.", flush=True)
    return region


def _finish(edit: PictureEdit, folder: Path, metrics: list[dict[str, Any]]) -> Path:
    try:
        carry_on(edit, folder, metrics)
    finally:
        for what, name in (("Picture", RESULT), ("Before and after", SHEET)):
            if (folder / name).is_file():
                print(f"{what}: {folder / name}", flush=True)
    return folder
