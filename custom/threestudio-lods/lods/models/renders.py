"""Renders of known objects from known cameras: a folder that an ideal denoiser answers from.

``renders.json`` lists the objects, and each has one picture, a sheet of all its views:

    {"size": 128, "objects": [{"name": "fire hydrant", "colour": "blue" (or null),
     "file": "fire-hydrant-blue.webp", "columns": 20, "cameras": [[elevation, azimuth, distance,
     fovy], ...]}, ...]}

Angles are in degrees, in threestudio's conventions, distances in world units. A sheet's red, green
and blue are multiplied by its alpha, so that a view over a background b is rgb + (1 - alpha) b.

``renders.json`` is read before torch is imported.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from lods.files import whole_file
from lods.models.cards import RENDERS as FILE

MAX_BYTES = 20_000_000  # of renders.json
MAX_OBJECTS, MAX_VIEWS, MAX_SIZE = 10_000, 10_000, 1_024
MAX_SIDE = 16_383  # pixels of a sheet, which is also WebP's limit
COLUMNS = 20
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,79}\.(?:webp|png|avif)")
RANGES = ((-90.0, 90.0), (-720.0, 720.0), (1e-3, 1e6), (1e-3, 179.0))  # of a camera's numbers


@dataclass(frozen=True)
class Object:
    """What is known of an object before its sheet is read. ``colour``: None for its own."""

    name: str
    colour: str | None
    file: str
    columns: int
    cameras: Float[np.ndarray, "V 4"]  # elevation, azimuth, distance, fovy


@dataclass(frozen=True)
class Renders:
    """A folder of renders. ``size``: pixels of a side of a view."""

    folder: Path
    size: int
    objects: tuple[Object, ...]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Renders":
        """Of a folder. Raises ``ValueError``, one line, for one without a ``renders.json``, and for
        one that is damaged. No path is read from it: only the names of files within the folder."""
        path = Path(folder) / FILE
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            return cls._checked(Path(folder), json.loads(data))
        except (OSError, ValueError, RecursionError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise ValueError(f"{path} does not list renders ({line}): make them anew") from None

    @classmethod
    def _checked(cls, folder: Path, content: Any) -> "Renders":
        entries = _get(content, "objects", list)
        size = _whole(_get(content, "size", int), "size", MAX_SIZE)
        if not 1 <= len(entries) <= MAX_OBJECTS:
            raise ValueError(f"it lists {len(entries)} objects, not 1 to {MAX_OBJECTS}")
        objects = tuple(_object(entry, size) for entry in entries)
        if len({(each.name, each.colour) for each in objects}) < len(objects):
            raise ValueError("it lists an object twice")
        return cls(folder, size, objects)

    def views(self, thing: Object) -> UInt8[np.ndarray, "V S S 4"]:
        """The pictures of one of the objects. Raises ``ValueError``, one line, for a sheet that is
        missing, damaged or of another size."""
        from PIL import Image

        path = self.folder / thing.file
        rows = -(-len(thing.cameras) // thing.columns)
        wanted = (thing.columns * self.size, rows * self.size)
        try:
            with Image.open(path, formats=("WEBP", "PNG", "AVIF")) as picture:
                if picture.size != wanted:  # before anything is decoded
                    raise ValueError(f"it has {picture.size} pixels, not {wanted}")
                sheet = np.asarray(picture.convert("RGBA"))
        except Exception as error:  # of many kinds, by format
            line = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise ValueError(f"{path} is no sheet of renders ({line}): make it anew") from None
        cells = sheet.reshape(rows, self.size, thing.columns, self.size, 4).swapaxes(1, 2)
        cells = cells.reshape(-1, self.size, self.size, 4)[: len(thing.cameras)]
        # what is lossy may make a colour brighter than its alpha
        return np.concatenate([np.minimum(cells[..., :3], cells[..., 3:]), cells[..., 3:]], -1)


def _object(entry: Any, size: int) -> Object:
    name, file = _get(entry, "name", str), _get(entry, "file", str)
    colour = entry.get("colour")
    if not name.strip() or len(name) > 80 or not (colour is None or isinstance(colour, str)):
        raise ValueError("an object has no name, or a colour that is no word")
    if not _NAME.fullmatch(file):
        raise ValueError(f"{file[:80]!r} is not the name of a sheet")
    columns = _whole(_get(entry, "columns", int), "columns", MAX_SIDE // size)
    try:
        cameras = np.asarray(_get(entry, "cameras", list), np.float32)
    except (TypeError, ValueError, OverflowError):
        cameras = np.zeros(0)
    if cameras.shape[1:] != (4,) or not 1 <= len(cameras) <= MAX_VIEWS:
        raise ValueError(f"the cameras of {name!r} are not 1 to {MAX_VIEWS} lists of four numbers")
    if -(-len(cameras) // columns) * size > MAX_SIDE:
        raise ValueError(f"the sheet of {name!r} would be more than {MAX_SIDE} pixels high")
    for column, (low, high) in zip(cameras.T, RANGES):
        if not ((column >= low) & (column <= high)).all():  # which NaN is not either
            raise ValueError(f"a camera of {name!r} is out of range")
    return Object(name, colour, file, columns, cameras)


def _get(content: Any, key: str, kind: type) -> Any:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"it has no {key}, or one of another kind")
    return value


def _whole(value: int, name: str, most: int) -> int:
    if not 1 <= value <= most:
        raise ValueError(f"{name} is {value}, not 1 to {most}")
    return value


def write(
    folder: str | os.PathLike,
    views: dict[tuple[str, str | None], tuple[Any, Any]],
    format: str = "webp",
    **options: Any,
) -> Renders:
    """Write a folder of renders: ``views`` has for each (name, colour) the cameras (V, 4) and the
    pictures, uint8 (V, S, S, 4), of which ``columns`` stand in a row of the sheet. ``options`` are
    Pillow's for the format; without any the sheets are lossless. ``renders.json`` comes last."""
    from PIL import Image

    folder, entries, size = Path(folder), [], 0
    for (name, colour), (cameras, pictures) in views.items():
        pictures = np.asarray(pictures, np.uint8)
        count, size = pictures.shape[:2]
        columns = min(COLUMNS, count)
        rows = -(-count // columns)
        cells = np.zeros((rows * columns, size, size, 4), np.uint8)
        cells[:count] = pictures
        sheet = cells.reshape(rows, columns, size, size, 4).swapaxes(1, 2)
        sheet = Image.fromarray(np.ascontiguousarray(sheet.reshape(rows * size, -1, 4)), "RGBA")
        stem = "-".join(filter(None, (name.replace(" ", "-"), colour)))
        file = f"{stem}.{format}"
        if not _NAME.fullmatch(file):
            raise ValueError(f"an object's name is small letters, digits and spaces, not {name!r}")
        lossless = {"lossless": True} if format == "webp" else {}
        with whole_file(folder / file) as tmp:
            # exact: what alpha hides stays as it is
            more = {"exact": True} if format == "webp" else {}
            sheet.save(tmp, format.upper(), **more, **(options or lossless))
        numbers = [[round(float(value), 4) for value in camera] for camera in cameras]
        if not all(math.isfinite(value) for camera in numbers for value in camera):
            raise ValueError(f"a camera of {name!r} is not finite")
        keys = ("name", "colour", "file", "columns", "cameras")
        entries.append(dict(zip(keys, (name, colour, file, columns, numbers))))
    content = {"size": size, "objects": entries}
    lines = json.dumps(content).replace('{"name"', '\n{"name"')
    with whole_file(folder / FILE) as tmp:
        tmp.write_text(lines + "\n", encoding="utf-8")
    return Renders.read(folder)
