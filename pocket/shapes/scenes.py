"""The objects of the world of shapes, each built from primitives with random proportions.

Axes are threestudio's: z up, the front of an object looks along +x (azimuth 0).
"""

from dataclasses import dataclass, field

import numpy as np

from pocket.shapes.raycast import BOX, DOME, FRUSTUM, SPHERE, TORUS, WEDGE

COLORS = {
    "red": (0.85, 0.08, 0.08),
    "orange": (0.97, 0.47, 0.05),
    "yellow": (0.96, 0.86, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.10, 0.24, 0.86),
    "purple": (0.52, 0.13, 0.70),
    "black": (0.07, 0.07, 0.08),
    "white": (0.94, 0.94, 0.94),
}
COLOR_NAMES = tuple(COLORS)


@dataclass
class Scene:
    """Primitives as arrays, ready for ``raycast.render``."""

    kinds: list = field(default_factory=list)
    params: list = field(default_factory=list)
    centers: list = field(default_factory=list)
    axes: list = field(default_factory=list)
    colors: list = field(default_factory=list)

    def add(self, kind, center, size, color, turn=(0.0, 0.0, 0.0), param=0.0):
        """Add a unit shape scaled by ``size`` (half extents), turned by Euler angles x, y, z in
        degrees, moved to ``center``; a size may be one number."""
        size = np.broadcast_to(np.asarray(size, float), (3,))
        self.kinds.append(kind)
        self.params.append(param)
        self.centers.append(np.asarray(center, float))
        self.axes.append(_turn(turn) * size)
        self.colors.append(np.asarray(color, float))

    def arrays(self, fit: float = 0.87):
        """Centre the bounding box on the origin, fit its longest side to [-fit, fit]."""
        centers, axes = np.array(self.centers), np.array(self.axes)
        reach = (
            np.abs(axes).sum(-1)
            * (1 + np.array(self.params) * (np.array(self.kinds) == TORUS))[:, None]
        )
        low, high = (centers - reach).min(0), (centers + reach).max(0)
        scale = 2 * fit / (high - low).max()
        centers, axes = (centers - (low + high) / 2) * scale, axes * scale
        inverse = np.linalg.inv(axes)
        maps = np.concatenate([inverse, -inverse @ centers[:, :, None]], axis=2)
        return np.array(self.kinds), np.array(self.params, float), maps, np.array(self.colors)


def _turn(degrees):
    a, b, c = np.radians(degrees)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return rz @ ry @ rx


DARK, WHITE, WOOD, GREY = (
    (0.06, 0.06, 0.07),
    (0.95, 0.95, 0.95),
    (0.45, 0.27, 0.12),
    (0.5, 0.5, 0.52),
)
GLASS, GOLD, BREAD, SKIN = (
    (0.55, 0.80, 0.95),
    (0.98, 0.85, 0.25),
    (0.82, 0.52, 0.20),
    (0.93, 0.75, 0.52),
)


def _eyes(s, x, y, z, r, color=DARK):
    for side in (-1, 1):
        s.add(SPHERE, (x, side * y, z), r, color)


def hamburger(s, r, c):
    w = r.uniform(0.9, 1.1)
    s.add(FRUSTUM, (0, 0, -0.42), (w * 0.95, w * 0.95, 0.16), BREAD, param=1.05)
    s.add(FRUSTUM, (0, 0, -0.14), (w * 1.03, w * 1.03, 0.13), (0.33, 0.15, 0.07), param=1.0)
    s.add(BOX, (0, 0, 0.02), (w * 0.80, w * 0.80, 0.03), (0.99, 0.78, 0.12), turn=(0, 0, 45))
    s.add(FRUSTUM, (0, 0, 0.10), (w * 0.98, w * 0.98, 0.05), (0.85, 0.13, 0.10), param=1.0)
    s.add(FRUSTUM, (0, 0, 0.18), (w * 1.10, w * 1.10, 0.05), (0.30, 0.75, 0.15), param=0.98)
    s.add(DOME, (0, 0, 0.22), (w, w, r.uniform(0.55, 0.7)), BREAD)


def snowman(s, r, c):
    snow = (0.93, 0.95, 0.98)
    s.add(SPHERE, (0, 0, -0.62), 0.56, snow)
    s.add(SPHERE, (0, 0, 0.12), 0.41, snow)
    s.add(SPHERE, (0, 0, 0.68), 0.31, snow)
    _eyes(s, 0.26, 0.12, 0.76, 0.065)
    s.add(
        FRUSTUM,
        (0.46, 0, 0.66),
        (0.09, 0.09, 0.22),
        (0.98, 0.45, 0.05),
        turn=(0, 90, 0),
        param=0.05,
    )
    for z in (-0.05, 0.15, -0.45):
        s.add(SPHERE, (0.41 if z > -0.3 else 0.54, 0, z), 0.07, DARK)
    s.add(FRUSTUM, (0, 0, 0.93), (0.40, 0.40, 0.035), DARK, param=1.0)
    s.add(FRUSTUM, (0, 0, 1.12), (0.26, 0.26, 0.19), DARK, param=1.0)
    s.add(TORUS, (0, 0, 0.44), (0.27, 0.27, 0.27), (0.85, 0.10, 0.10), param=0.28)


def house(s, r, c):
    h = r.uniform(0.5, 0.6)
    s.add(BOX, (0, 0, 0), (0.72, 0.82, h), c)
    s.add(WEDGE, (0, 0, h + 0.34), (0.95, 0.84, 0.36), (0.50, 0.20, 0.12), turn=(0, 0, 90))
    s.add(BOX, (-0.35, 0.45, h + 0.52), (0.11, 0.11, 0.32), (0.55, 0.28, 0.2))
    s.add(BOX, (0.73, 0, -h + 0.38), (0.03, 0.20, 0.38), (0.32, 0.17, 0.08))
    for side in (-1, 1):
        s.add(BOX, (0.73, side * 0.52, 0.08), (0.03, 0.17, 0.18), GLASS)
        s.add(BOX, (0, side * 0.83, 0.05), (0.22, 0.03, 0.2), GLASS)


def car(s, r, c):
    top = r.uniform(0.28, 0.36)
    s.add(BOX, (0, 0, 0), (1.05, 0.50, 0.23), c)
    s.add(BOX, (-0.18, 0, 0.23 + top / 2), (0.50, 0.43, top / 2 + 0.06), c)
    s.add(BOX, (0.30, 0, 0.25 + top / 2), (0.05, 0.38, top / 2), GLASS, turn=(0, -18, 0))
    s.add(BOX, (-0.66, 0, 0.26 + top / 2), (0.04, 0.36, top / 2 - 0.03), (0.2, 0.25, 0.32))
    for side in (-1, 1):
        s.add(BOX, (-0.18, side * 0.435, 0.27 + top / 2), (0.38, 0.015, top / 2 - 0.02), GLASS)
        for x in (-0.62, 0.62):
            s.add(
                FRUSTUM,
                (x, side * 0.48, -0.22),
                (0.25, 0.25, 0.09),
                DARK,
                turn=(90, 0, 0),
                param=1.0,
            )
            s.add(
                FRUSTUM,
                (x, side * 0.53, -0.22),
                (0.12, 0.12, 0.06),
                (0.75, 0.75, 0.78),
                turn=(90, 0, 0),
                param=1.0,
            )
        s.add(SPHERE, (1.04, side * 0.32, 0.05), (0.06, 0.12, 0.10), (1.0, 0.97, 0.70))
        s.add(BOX, (-1.05, side * 0.34, 0.06), (0.03, 0.12, 0.08), (0.75, 0.02, 0.02))
    s.add(BOX, (1.05, 0, -0.08), (0.03, 0.22, 0.07), DARK)


def chair(s, r, c):
    h, back = r.uniform(0.5, 0.6), r.uniform(0.7, 0.85)
    s.add(BOX, (0, 0, 0), (0.50, 0.50, 0.08), c)
    s.add(BOX, (-0.44, 0, 0.08 + back / 2), (0.07, 0.50, back / 2), c)
    for x in (-0.42, 0.42):
        for y in (-0.42, 0.42):
            s.add(BOX, (x, y, -0.08 - h / 2), (0.075, 0.075, h / 2), WOOD)


def mushroom(s, r, c):
    s.add(FRUSTUM, (0, 0, -0.45), (0.32, 0.32, 0.48), (0.95, 0.90, 0.78), param=0.75)
    s.add(DOME, (0, 0, -0.05), (0.92, 0.92, r.uniform(0.62, 0.8)), c)
    spot = (0.15, 0.15, 0.15) if np.mean(c) > 0.9 else WHITE
    start = r.uniform(0, 360)
    for k in range(5):
        a = np.radians(start + 72 * k)
        s.add(SPHERE, (0.70 * np.cos(a), 0.70 * np.sin(a), 0.32), (0.17, 0.17, 0.15), spot)
    s.add(SPHERE, (0, 0, 0.66), (0.2, 0.2, 0.1), spot)


def ice_cream(s, r, c):
    s.add(
        FRUSTUM, (0, 0, -0.55), (0.46, 0.46, 0.62), (0.80, 0.55, 0.25), turn=(180, 0, 0), param=0.05
    )
    s.add(TORUS, (0, 0, 0.06), (0.42, 0.42, 0.42), c, param=0.25)
    s.add(SPHERE, (0, 0, 0.34), 0.50, c)
    s.add(SPHERE, (0, 0, 0.90), 0.12, (0.80, 0.04, 0.10))


def donut(s, r, c):
    minor = r.uniform(0.40, 0.46)
    s.add(TORUS, (0, 0, -0.05), (0.68, 0.68, 0.68), BREAD, param=minor)
    s.add(TORUS, (0, 0, 0.03), (0.68, 0.68, 0.64), c, param=minor - 0.03)
    for k in range(9):
        a = np.radians(40 * k + r.uniform(-12, 12))
        color = COLORS[COLOR_NAMES[r.integers(5)]]
        s.add(
            BOX,
            (0.68 * np.cos(a), 0.68 * np.sin(a), 0.31),
            (0.08, 0.03, 0.03),
            color,
            turn=(0, 0, r.uniform(0, 180)),
        )


def traffic_cone(s, r, c):
    cone = (0.98, 0.38, 0.05)
    s.add(BOX, (0, 0, -0.92), (0.62, 0.62, 0.07), cone)
    for low, high, color in (
        (-0.86, -0.35, cone),
        (-0.35, 0.0, WHITE),
        (0.0, 0.35, cone),
        (0.35, 0.62, WHITE),
        (0.62, 0.95, cone),
    ):
        wide = [0.46 - 0.36 * (z + 0.86) / 1.81 for z in (low, high)]
        s.add(
            FRUSTUM,
            (0, 0, (low + high) / 2),
            (wide[0], wide[0], (high - low) / 2),
            color,
            param=wide[1] / wide[0],
        )


def mug(s, r, c):
    s.add(FRUSTUM, (0, 0, 0), (0.60, 0.60, 0.68), c, param=r.uniform(1.0, 1.12))
    s.add(FRUSTUM, (0, 0, 0.66), (0.54, 0.54, 0.035), (0.23, 0.12, 0.06), param=1.05)
    s.add(TORUS, (0, 0.66, 0.02), (0.36, 0.36, 0.36), c, turn=(0, 90, 0), param=0.26)


def table(s, r, c):
    h = r.uniform(0.6, 0.75)
    s.add(BOX, (0, 0, 0.35), (0.75, 1.0, 0.08), c)
    for x in (-0.6, 0.6):
        for y in (-0.85, 0.85):
            s.add(BOX, (x, y, 0.27 - h / 2), (0.085, 0.085, h / 2), c)


def pine_tree(s, r, c):
    s.add(FRUSTUM, (0, 0, -0.85), (0.16, 0.16, 0.22), WOOD, param=1.0)
    for k, (z, w) in enumerate(((-0.38, 0.66), (0.10, 0.53), (0.55, 0.38))):
        s.add(FRUSTUM, (0, 0, z), (w, w, 0.38), (0.06, 0.40 + 0.05 * k, 0.14), param=0.03)


def rocket(s, r, c):
    s.add(FRUSTUM, (0, 0, -0.05), (0.34, 0.34, 0.62), c, param=0.95)
    s.add(FRUSTUM, (0, 0, 0.80), (0.33, 0.33, 0.26), (0.80, 0.82, 0.85), param=0.03)
    s.add(FRUSTUM, (0, 0, -0.77), (0.30, 0.30, 0.12), GREY, param=0.7)
    s.add(FRUSTUM, (0, 0, -0.98), (0.2, 0.2, 0.14), (1.0, 0.65, 0.1), turn=(180, 0, 0), param=0.1)
    s.add(TORUS, (0, 0, 0.25), (0.325, 0.325, 0.3), (0.80, 0.82, 0.85), param=0.12)
    for k in range(4):
        s.add(
            WEDGE,
            (0.38 * np.cos(k * np.pi / 2), 0.38 * np.sin(k * np.pi / 2), -0.55),
            (0.05, 0.42, 0.32),
            (0.80, 0.82, 0.85),
            turn=(0, 0, 90 * k + 90),
        )


def apple(s, r, c):
    s.add(SPHERE, (0, 0, 0), (0.80, 0.80, 0.72), c)
    s.add(FRUSTUM, (0, 0, 0.80), (0.06, 0.06, 0.22), WOOD, param=0.8)
    s.add(SPHERE, (0, 0.26, 0.90), (0.13, 0.28, 0.06), (0.25, 0.65, 0.15), turn=(15, 0, 0))


def robot(s, r, c):
    s.add(BOX, (0, 0, -0.05), (0.34, 0.44, 0.45), c)
    s.add(BOX, (0, 0, 0.72), (0.30, 0.34, 0.26), (0.72, 0.74, 0.78))
    _eyes(s, 0.30, 0.15, 0.78, (0.05, 0.10, 0.10), (0.1, 0.9, 0.95))
    s.add(BOX, (0.30, 0, 0.57), (0.03, 0.18, 0.04), DARK)
    s.add(BOX, (0.34, 0, 0.05), (0.03, 0.25, 0.18), (0.9, 0.9, 0.6))
    s.add(FRUSTUM, (0, 0, 1.06), (0.03, 0.03, 0.12), GREY, param=1.0)
    s.add(SPHERE, (0, 0, 1.2), 0.08, (0.9, 0.1, 0.1))
    for side in (-1, 1):
        s.add(BOX, (0, side * 0.60, 0.0), (0.12, 0.12, 0.42), GREY)
        s.add(BOX, (0.04, side * 0.22, -0.78), (0.18, 0.14, 0.30), GREY)


def teddy_bear(s, r, c):
    fur, pale = (0.55, 0.33, 0.14), SKIN
    s.add(SPHERE, (0, 0, -0.38), (0.46, 0.50, 0.52), fur)
    s.add(SPHERE, (0, 0, 0.45), 0.45, fur)
    s.add(SPHERE, (0.32, 0, -0.38), (0.20, 0.32, 0.36), pale)
    s.add(SPHERE, (0.38, 0, 0.36), (0.17, 0.20, 0.15), pale)
    s.add(SPHERE, (0.54, 0, 0.42), 0.065, DARK)
    _eyes(s, 0.38, 0.18, 0.58, 0.065)
    for side in (-1, 1):
        s.add(SPHERE, (0, side * 0.36, 0.82), (0.12, 0.18, 0.18), fur)
        s.add(SPHERE, (0.09, side * 0.36, 0.82), (0.06, 0.11, 0.11), pale)
        s.add(SPHERE, (0.12, side * 0.52, -0.18), (0.17, 0.20, 0.34), fur, turn=(side * 30, 0, 0))
        s.add(SPHERE, (0.32, side * 0.32, -0.80), (0.32, 0.19, 0.19), fur)
    s.add(SPHERE, (-0.48, 0, -0.62), 0.12, pale)


def lamp(s, r, c):
    s.add(FRUSTUM, (0, 0, -0.92), (0.42, 0.42, 0.06), GREY, param=0.9)
    s.add(FRUSTUM, (0, 0, -0.30), (0.065, 0.065, 0.60), GREY, param=1.0)
    s.add(FRUSTUM, (0, 0, 0.50), (0.70, 0.70, 0.42), c, param=r.uniform(0.45, 0.6))


def birthday_cake(s, r, c):
    plate = (0.82, 0.82, 0.85)
    s.add(FRUSTUM, (0, 0, -0.55), (1.05, 1.05, 0.04), plate, param=1.0)
    s.add(FRUSTUM, (0, 0, -0.28), (0.85, 0.85, 0.24), (0.96, 0.90, 0.75), param=1.0)
    s.add(FRUSTUM, (0, 0, 0.06), (0.88, 0.88, 0.14), c, param=1.0)
    start = r.uniform(0, 72)
    for k in range(5):
        a = np.radians(start + 72 * k)
        x, y = 0.55 * np.cos(a), 0.55 * np.sin(a)
        s.add(FRUSTUM, (x, y, 0.40), (0.07, 0.07, 0.22), (0.55, 0.85, 0.95), param=1.0)
        s.add(SPHERE, (x, y, 0.70), (0.07, 0.07, 0.11), (1.0, 0.75, 0.1))


def rubber_duck(s, r, c):
    duck, beak = (0.98, 0.82, 0.08), (0.98, 0.42, 0.05)
    s.add(SPHERE, (-0.1, 0, -0.30), (0.76, 0.55, 0.46), duck)
    s.add(SPHERE, (0.30, 0, 0.40), 0.42, duck)
    s.add(SPHERE, (0.76, 0, 0.34), (0.24, 0.22, 0.09), beak)
    _eyes(s, 0.62, 0.20, 0.55, 0.085)
    s.add(FRUSTUM, (-0.84, 0, 0.0), (0.22, 0.22, 0.28), duck, turn=(0, -35, 0), param=0.1)
    for side in (-1, 1):
        s.add(SPHERE, (-0.15, side * 0.50, -0.22), (0.36, 0.14, 0.22), (0.93, 0.70, 0.05))


def penguin(s, r, c):
    coat = (0.08, 0.09, 0.13)
    s.add(SPHERE, (0, 0, -0.2), (0.48, 0.52, 0.72), coat)
    s.add(SPHERE, (0.13, 0, -0.25), (0.42, 0.42, 0.60), WHITE)
    s.add(SPHERE, (0, 0, 0.58), 0.36, coat)
    s.add(SPHERE, (0.14, 0, 0.56), (0.26, 0.25, 0.24), WHITE)
    _eyes(s, 0.36, 0.12, 0.64, 0.06)
    s.add(
        FRUSTUM, (0.50, 0, 0.50), (0.10, 0.10, 0.16), (0.98, 0.62, 0.05), turn=(0, 90, 0), param=0.1
    )
    for side in (-1, 1):
        s.add(SPHERE, (-0.02, side * 0.55, -0.12), (0.18, 0.09, 0.45), coat, turn=(side * 14, 0, 0))
        s.add(SPHERE, (0.22, side * 0.22, -0.92), (0.26, 0.16, 0.08), (0.98, 0.62, 0.05))


@dataclass(frozen=True)
class Kind:
    """``name`` as captions say it; ``natural`` is its usual colour when it is colourable (the
    caption then may name one of COLORS); ``front`` says whether its views can be told apart."""

    name: str
    build: object
    natural: str | None = None
    front: bool = False


KINDS = (
    Kind("hamburger", hamburger),
    Kind("snowman", snowman, front=True),
    Kind("house", house, "white", front=True),
    Kind("car", car, "red", front=True),
    Kind("chair", chair, "orange", front=True),
    Kind("mushroom", mushroom, "red"),
    Kind("ice cream cone", ice_cream, "white"),
    Kind("donut", donut, "purple"),
    Kind("traffic cone", traffic_cone),
    Kind("mug", mug, "blue"),
    Kind("table", table, "orange"),
    Kind("pine tree", pine_tree),
    Kind("rocket", rocket, "red"),
    Kind("apple", apple, "red"),
    Kind("robot", robot, "blue", front=True),
    Kind("teddy bear", teddy_bear, front=True),
    Kind("lamp", lamp, "yellow"),
    Kind("birthday cake", birthday_cake, "white"),
    Kind("rubber duck", rubber_duck, front=True),
    Kind("penguin", penguin, front=True),
)
KIND_NAMES = tuple(k.name for k in KINDS)
