"""The truth of the pocket world that stays in the repository: compressed renders of its objects.

- ``pocket/truth``: every object, in every colour, from the 24 cameras with which runs are judged:
  evenly around at the test views' elevation of 15 degrees, distance 3.6 and field of view 40.
- ``pocket/ideal``: the objects of the gallery from many cameras, for the ideal denoiser
  (``lods.load("lods-sds", model="pocket/ideal", cameras="tokens", ...)``).

Both are folders of :mod:`lods.models.renders`. ``python -m pocket.truth --work DIR`` makes them
from the models and from what :mod:`pocket.render` has left in the work folder.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from pocket.assets import find
from pocket.colours import level, paint
from pocket.render import LEVEL_VIEWS, SEED, reduce, stage_of
from pocket.tools import renders, say, whole_file
from pocket.world import OBJECTS, Object, cameras

HERE = Path(__file__).resolve().parent
TRUTH, IDEAL = HERE / "truth", HERE / "ideal"
JUDGED, ELEVATION, DISTANCE, FOVY = 24, 15.0, 3.6, 40.0
GALLERY = (
    *("hamburger", "teddy bear", "bulldog", "cat", "cactus", "fire hydrant", "birthday cake"),
    *("soccer ball", "armchair", "toy train", "car", "cupcake"),
)
IDEAL_VIEWS = 200
FORMAT = "avif"  # at 4:4:4 a third of the error of WebP, whose colours have half the resolution
COMPRESSION = {"quality": 80, "subsampling": "4:4:4", "speed": 6}


def judged_cameras() -> Float[np.ndarray, "24 4"]:
    """Elevation, azimuth, distance and field of view of the judged views, from azimuth 0 on."""
    azimuth = np.arange(JUDGED) * 360.0 / JUDGED
    same = (np.full(JUDGED, value) for value in (ELEVATION, DISTANCE, FOVY))
    e, d, f = same
    return np.stack([e, azimuth, d, f], axis=1).astype(np.float32)


def photograph(
    thing: Object, assets: Path, views: Float[np.ndarray, "V 4"]
) -> dict[str | None, UInt8[np.ndarray, "V S S 4"]]:
    """The object from these cameras, premultiplied, in each of its colours (None: its own)."""
    colours = (None, *thing.colours)
    with tempfile.TemporaryDirectory() as unpacked:
        stage = stage_of(thing, assets, Path(unpacked))
        bright = 1.0
        if thing.colours:
            samples = (stage.picture(*c.tolist()) for c in cameras(LEVEL_VIEWS, SEED))
            bright = level(samples, thing)
        found: dict[str | None, list] = {colour: [] for colour in colours}
        for camera in views:
            picture = stage.picture(*camera.tolist())
            for colour in colours:
                seen = picture if colour is None else paint(picture, thing, colour, bright)
                found[colour].append(reduce(seen))
        stage.close()
    return {colour: np.stack(pictures) for colour, pictures in found.items()}


def _kept(thing: Object, work: Path) -> Path:
    return work / "judged" / f"{thing.slug}.npz"


def photograph_judged(assets: Path | None, work: Path) -> None:
    """Keep the judged views of the objects that have none in ``work/judged``, without loss.
    ``assets`` is what :func:`pocket.assets.find` takes; with nothing to do it is not looked for."""
    wanting = [thing for thing in OBJECTS if not _kept(thing, work).exists()]
    found = find(assets, work) if wanting else Path()
    views = judged_cameras()
    for thing in wanting:
        pictures = photograph(thing, found, views)
        with whole_file(_kept(thing, work)) as tmp, tmp.open("wb") as stream:
            arrays: dict[str, Any] = {str(c): p for c, p in pictures.items()}
            np.savez_compressed(stream, **arrays)
        say(f"{thing.name}: {len(views)} judged views")


def judged(work: Path) -> dict:
    """The judged views by (name, colour), as they are kept."""
    found, views = {}, judged_cameras()
    for thing in OBJECTS:
        with np.load(_kept(thing, work), allow_pickle=False) as file:
            for colour in (None, *thing.colours):
                found[thing.name, colour] = views, file[str(colour)]
    return found


def ideal(work: Path, count: int = IDEAL_VIEWS, names=GALLERY) -> dict:
    """The first ``count`` renders of objects, by (name, colour None)."""
    found = {}
    for thing in OBJECTS:
        if thing.name in names:
            folder = work / "renders" / thing.slug
            pictures = np.load(folder / "rgba.npy", mmap_mode="r")[:count]
            if len(pictures) < count:
                raise ValueError(f"{folder} has {len(pictures)} views, not {count}: render more")
            found[thing.name, None] = np.load(folder / "cameras.npy")[:count], pictures
    return found


def loss_of_compression(views: dict, folder: Path) -> dict[tuple, float]:
    """PSNR in dB over white of the views in ``folder`` to those that were written, by object."""
    read, found = renders.Renders.read(folder), {}
    for thing in read.objects:
        pictures = np.asarray(views[thing.name, thing.colour][1], np.float64)
        now = read.views(thing).astype(np.float64)
        over = [p[..., :3] + 255 - p[..., 3:] for p in (pictures, now)]
        error = ((over[0] - over[1]) ** 2).mean()
        found[thing.name, thing.colour] = float(10 * np.log10(255**2 / max(error, 1e-9)))
    return found


def make(assets: Path | None, work: Path, truth: Path = TRUTH, ideal_views: Path = IDEAL) -> None:
    """Write both folders, and say how much of the pictures their compression costs."""
    photograph_judged(assets, work)
    for folder, views in ((truth, judged(work)), (ideal_views, ideal(work))):
        renders.write(folder, views, FORMAT, **COMPRESSION)
        loss = loss_of_compression(views, folder)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        worst = min(loss, key=lambda each: loss[each])
        mean = np.mean(list(loss.values()))
        say(f"{folder}: {size:.1f} MB, {mean:.1f} dB, at worst {loss[worst]:.1f} dB ({worst[0]})")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.truth", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--assets", type=Path, help="folder of the .sh3f files, or of the package")
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    args = parser.parse_args(arguments)
    try:
        make(args.assets, args.work)
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
