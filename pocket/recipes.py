"""What each stage of :mod:`pocket.make` is made with, as ``made_with.json`` of a work folder says.

A stage that has begun goes on under the recipe that it began with, and the stages after it take
what it left. A recipe is what the files of the stage depend on: of the world that is pictured, its
objects, paints, lights, cameras and sizes for the renders, its backgrounds for the latents, its
captions for the networks that read them; and seeds and shapes of networks. It is compared by value,
not by the text of the code, so that code can be rewritten.

What a folder does not say of a stage that has begun (because it was made before that was noted) is
taken to be what this code would have made, and noted from then on.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pocket.tools import say, whole_file

NEEDS = {  # by stage, in their order: those whose files it takes
    "render": (),
    "truth": ("render",),
    "vae": ("render",),
    "vae-on": ("vae",),
    "latents": ("render", "vae"),
    "unet": ("latents",),
    "decoder": ("vae",),
    "save": ("unet", "decoder"),
    "judge": ("render",),
    "report": ("save", "judge"),
    "flow": ("latents",),
    "save-flow": ("flow", "decoder"),
    "views": ("unet",),
    "save-views": ("views", "decoder"),
}
FILES = {  # what is in a work folder where a stage has begun
    "render": "renders/*/cameras.npy",
    "truth": "judged/*.npz",
    "vae": "vae*.pt",
    "vae-on": "vae_on*.pt",
    "latents": "latents/*.npy",
    "unet": "unet*.pt",
    "decoder": "decoder*.pt",
    "judge": "judge*.pt",
    "flow": "flow*.pt",
    "views": "views*.pt",
}
SHORT = 40  # letters of a value that a message shows

Recipe = dict[str, Any]


def recipes(seed: int) -> dict[str, Recipe]:
    """The recipe of each stage, as JSON gives it back."""
    from pocket import autoencoder, diffusion, flow, judge, multiview, truth, world
    from pocket.render import SEED

    views = {"words": world.VIEWS, "from where": _digest(_views_around())}
    backgrounds = _backgrounds()
    found = {
        "render": {**_pictures(), "cameras": _digest(world.cameras(1000, SEED))},
        "truth": {**_pictures(), "cameras": _digest(truth.judged_cameras())},
        "vae": {
            "seed": seed,
            "channels": [*autoencoder.CHANNELS, autoencoder.LATENT_CHANNELS],
            "backgrounds": backgrounds,
        },
        "vae-on": {"seed": seed},
        "latents": {"backgrounds": backgrounds},
        "unet": {
            "seed": seed,
            "channels": [*diffusion.CHANNELS, diffusion.WIDTH],
            "captions": _captions() | {"views": _digest(views)},
        },
        "decoder": {"seed": seed},
        "judge": {
            "seed": seed,
            "objects": {thing.name: [thing.front, thing.like] for thing in world.OBJECTS},
            "colours": judge.PALETTE,
            "views": views,
        },
    }
    shape = [flow.LAYERS_OF_TRANSFORMER, flow.HEADS]
    found["flow"] = {**found["unet"], "channels": shape}
    found["views"] = {**found["unet"], "at once": multiview.VIEWS}
    return json.loads(json.dumps(found))


def _digest(value) -> str:
    """Twelve letters that stand for an array, or for what JSON can write."""
    data = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def _pictures() -> Recipe:
    """What a picture of an object depends on besides the camera."""
    from pocket import assets, colours, render, world

    things = world.OBJECTS
    return {
        "pixels": world.SIZE,
        "half side": world.HALF_SIDE,
        "version of the models": assets.VERSION,
        "objects": {thing.name: [thing.library, thing.entry, thing.turn] for thing in things},
        "colours": {
            **colours.PAINTS,
            **{thing.name: [thing.paint, thing.paint_from] for thing in things if thing.paint},
            "brightest": colours.QUANTILE,
        },
        "lights": {
            "directions": render.LIGHTS,
            "ambient": render.AMBIENT,
            "texture": render.LARGEST_TEXTURE,
        },
    }


def _backgrounds() -> str:
    """A digest of the backgrounds that training draws and of the two that latents have."""
    from pocket import data
    from pocket.latents import grounds

    drawn = [data.background(np.random.default_rng((3, k))) for k in range(100)]
    both = [ground for k in range(100) for ground in grounds("car", k)]
    return _digest(np.round([*drawn, *both], 6))


def _views_around() -> list[int]:
    from pocket.world import view_of

    around = itertools.product(range(-90, 91, 5), range(-180, 181, 5))
    return [view_of(float(elevation), float(azimuth)) for elevation, azimuth in around]


def _captions() -> Recipe:
    """Every caption there is, the tokens they are read as, and how often parts are left out."""
    from pocket import latents, world

    said = [
        world.caption(None, thing.name, colour, view, "{}")
        for thing in world.OBJECTS
        for colour in (None, *thing.colours)
        for view in range(-1, len(world.VIEWS))
    ]
    return {
        "templates": world.TEMPLATES,
        "names": _digest(said),
        "tokens": _digest([latents.LENGTH, *latents.WORDS]),
        "left out": [*latents.UNSAID.values(), latents.EMPTY, latents.NO_ROWS],
    }


def needed(stage: str) -> list[str]:
    """The stages that ``stage`` builds upon, itself last."""
    found = [each for before in NEEDS[stage] for each in needed(before)]
    return list(dict.fromkeys([*found, stage]))


def check(work: Path, stages: Iterable[str], now: dict[str, Recipe]) -> None:
    """Raise ``ValueError`` if one of ``stages``, or one that it builds upon, has begun in ``work``
    under another recipe than ``now``'s."""
    made = read(work)
    for stage in dict.fromkeys(each for asked in stages for each in needed(asked)):
        if stage in now and begun(work, stage):
            other = [
                _change(key, before, now[stage].get(key))
                for key, before in made.get(stage, {}).items()
                if before != now[stage].get(key)
            ]
            if other:
                changes = ", ".join(other)
                raise ValueError(
                    f"{work}: the stage {stage} was made with {changes}: give another --work"
                )


def _change(key: str, before, now) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"other {key} ({', '.join(names[:3])}{more})"
    if max(len(str(before)), len(str(now))) > SHORT or isinstance(now, str):
        return f"other {key}"
    return f"{key} {before}, not {now}"


def note(work: Path, stage: str, now: dict[str, Recipe]) -> None:
    """Remember what ``stage`` is made with, and what is not noted of those that it builds upon;
    ``check`` comes first."""
    made = read(work)
    for each in needed(stage):
        if each not in now or (each != stage and not begun(work, each)):
            continue
        before = made.get(each, {})
        unsaid = [key for key in now[each] if key not in before]
        if unsaid and begun(work, each):
            say(f"{work}: {each} does not say its {', '.join(unsaid)}: taken to be as now")
        made[each] = now[each]
    with whole_file(work / "made_with.json") as tmp:
        tmp.write_text(json.dumps(made, indent=1) + "\n")


def begun(work: Path, stage: str) -> bool:
    """Whether ``work`` has files of this stage."""
    return any(work.glob(FILES[stage]))


def read(work: Path) -> dict[str, Recipe]:
    """The recipes that are noted in ``work``. Raises ``ValueError`` for a file that is damaged."""
    file = work / "made_with.json"
    made = read_json(file)
    if not all(isinstance(recipe, dict) for recipe in made.values()):
        raise ValueError(f"{file} is damaged: give another --work")
    return made


def read_json(file: Path) -> dict[str, Any]:
    """A dictionary, empty if there is no file. Raises ``ValueError`` if it holds something else."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: give another --work")
    return found
