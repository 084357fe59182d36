"""The objects of the pocket world, how they are named, and from where they are seen.

The objects are models of Sweet Home 3D's furniture libraries, which Debian packages as
``sweethome3d-furniture`` (makers and licences: CREDITS.md). They were chosen by their look at
128 pixels: no people, no trademarks, nothing flat. Each is one canonical instance; those with
``colours`` come recoloured as well.

Captions use threestudio's view words (front within 45 degrees of azimuth 0, back beyond 135,
overhead above an elevation of 60 degrees, side otherwise).
"""

import re
from dataclasses import dataclass

import numpy as np

from pocket.views import TEMPLATES, VIEWS, view_of  # noqa: F401

SIZE = 128  # pixels of a side
HALF_SIDE = 0.87  # longest half side of every object's bounding box, in world units
COLOURS = ("red", "yellow", "green", "blue")
LIBRARIES = {  # folder in the zip, licence
    "BlendSwap-CC-0": "CC0 1.0",
    "BlendSwap-CC-BY": "CC-BY 3.0",
    "KatorLegaz": "CC-BY 3.0 US",
    "Scopia": "CC-BY 3.0",
}


@dataclass(frozen=True)
class Object:
    """One object.

    ``entry`` is its number in the catalogue of ``library``. ``turn`` degrees about the vertical
    bring its front to azimuth 0. ``paint`` is the part that is recoloured, as ranges of hue in
    degrees (low, high; low > high goes through 0) of what has a saturation of at least
    ``paint_from``; None for an object that comes in its own colours only. ``like`` is the colour
    word that is as true of its own colours.
    """

    name: str
    library: str
    entry: int
    turn: float = 0.0
    front: bool = True  # front and back can be told apart
    paint: tuple[float, float] | None = None
    paint_from: float = 0.25
    like: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file's name."""
        return self.name.replace(" ", "-")

    @property
    def colours(self) -> tuple[str, ...]:
        """The colours in which it comes besides its own."""
        return COLOURS if self.paint else ()


_0, _BY, _K, _S = LIBRARIES
OBJECTS = (
    Object("hamburger", _BY, 96, front=False),
    Object("teddy bear", _0, 51),
    Object("snowman", _BY, 72),
    Object("bulldog", _BY, 89),
    Object("cat", _S, 161),
    Object("horse", _BY, 97),
    Object("chicken", _0, 94),
    Object("motorbike", _0, 123, turn=-90),
    Object("biplane", _0, 10),
    Object("toy train", _BY, 106, turn=90),
    Object("armchair", _0, 139, paint=(330, 40)),
    Object("cactus", _0, 107, front=False),
    Object("christmas tree", _S, 130, front=False),
    Object("bonsai tree", _S, 192, front=False),
    Object("fire hydrant", _K, 79, paint=(330, 30), like="red"),
    Object("teapot", _S, 123),
    Object("barrel", _0, 72, front=False),
    Object("hot dog", _0, 147, front=False),
    Object("rabbit", _S, 205),
    Object("traffic cone", _S, 262, front=False),
    Object("dog", _S, 162),
    Object("forklift", _0, 119, turn=90, paint=(30, 80), like="yellow"),
    Object("bowl of apples", _S, 70, front=False),
    Object("birthday cake", _S, 128, front=False),
    Object("coffee cup", _0, 9),
    Object("backpack", _BY, 2, paint=(0, 360), paint_from=0.0),
    Object("rocking horse", _0, 8, turn=90),
    Object("cupcake", _0, 142, front=False),
    Object("soccer ball", _BY, 71, front=False),
    Object("puzzle cube", _BY, 69),
    Object("tricycle", _S, 189),
    Object("basketball", _0, 78, front=False),
    Object("sneakers", _S, 147, paint=(330, 30), like="red"),
    Object("car", _K, 59, paint=(330, 30), like="red"),
    Object("toaster", _S, 395, paint=(10, 60)),
    Object("gift", _BY, 26, front=False, paint=(160, 220)),
    Object("kettle", _BY, 8, paint=(80, 180)),
    Object("chair", _BY, 18, paint=(170, 240)),
    Object("bean bag", _S, 145, front=False, paint=(60, 140)),
    Object("suitcase", _BY, 103, front=False, paint=(180, 260)),
)
NAMES = tuple(o.name for o in OBJECTS)


def cameras(count: int, seed: int = 0) -> np.ndarray:
    """``count`` cameras that cover the ranges of the overlays evenly, from any start of the list:
    float32 (count, 4) with elevation and azimuth in degrees, distance and vertical field of view
    in degrees.

    Elevation -10..45 (85 %) or 60..89, azimuth -180..180, distance 3.2..4.0, field of view 36..44.
    The points are those of a Halton sequence (bases 2, 3, 5, 7) moved by a random vector modulo 1.
    """
    index = np.arange(1, count + 1)
    u = np.stack([_radical_inverse(index, base) for base in (2, 3, 5, 7)], axis=1)
    u = (u + np.random.default_rng(seed).uniform(size=4)) % 1.0
    low = u[:, 0] / 0.85
    elevation = np.where(low < 1, -10 + 55 * low, 60 + 29 * (u[:, 0] - 0.85) / 0.15)
    columns = elevation, 360 * u[:, 1] - 180, 3.2 + 0.8 * u[:, 2], 36 + 8 * u[:, 3]
    return np.stack(columns, axis=1).astype(np.float32)


def _radical_inverse(index: np.ndarray, base: int) -> np.ndarray:
    """The digits of ``index`` in ``base``, mirrored at the point."""
    value, scale = np.zeros(len(index)), 1.0 / base
    while index.any():
        value += scale * (index % base)
        index, scale = index // base, scale / base
    return value


def caption(
    rng, name: str, colour: str | None = None, view: int = -1, template: str | None = None
) -> str:
    """A caption; ``colour`` None and ``view`` -1 leave these words out. ``rng`` draws the template
    if none is given."""
    words = name if colour is None else f"{colour} {name}"
    if name == "sneakers":  # the plural takes no article
        named = words
    else:
        named = f"{'an' if words[0] in 'aeio' else 'a'} {words}"
    template = template or TEMPLATES[rng.integers(len(TEMPLATES))]
    text = template.format(named)
    return text if view < 0 else f"{text}, {VIEWS[view]} view"


def asked(prompt: str) -> tuple[Object, str | None]:
    """(object, colour) that a prompt names; the colour is None where none is named. Capitals do not
    matter, as to the tokenizer; of names within each other the longest counts ("hot dog").

    Raises ``ValueError`` for a prompt that does not name exactly one object, or several colours, or
    one for an object that comes in its own colours only.
    """
    text = prompt.lower()
    rest, found = text, []
    for thing in sorted(OBJECTS, key=lambda o: -len(o.name)):
        rest, times = re.subn(rf"\b{thing.name}\b", " ", rest)
        found += [thing] * bool(times)
    if len(found) != 1:
        raise ValueError(f"{prompt!r} must name exactly one of: {', '.join(NAMES)}")
    named = [c for c in COLOURS if re.search(rf"\b{c}\b", rest)]
    if len(named) > 1:
        raise ValueError(f"{prompt!r} must name one colour at most, for the whole object")
    if named and not found[0].paint:
        raise ValueError(f"{prompt!r}: a {found[0].name} comes in its own colours only")
    return found[0], named[0] if named else None
