"""A world of plain pictures in place of the renders: each object and camera has one colour."""

import numpy as np

from pocket.data import Renders
from pocket.world import NAMES, OBJECTS, cameras

COUNT = 50


def colour_of(name: str, azimuth) -> np.ndarray:
    """(..., 3) in 0..1: which object, which side, and a half."""
    azimuth = np.asarray(azimuth, float)
    parts = np.broadcast_arrays(NAMES.index(name) / 39, np.cos(np.radians(azimuth)) / 2 + 0.5, 0.5)
    return np.stack(parts, -1)


def plain_renders(folder, names=NAMES, size: int = 16) -> Renders:
    """Opaque renders of these objects under ``folder``, whole pictures of ``colour_of``."""
    for thing in OBJECTS:
        if thing.name in names:
            home = folder / thing.slug
            home.mkdir(parents=True)
            views = cameras(COUNT)
            np.save(home / "cameras.npy", views)
            rgba = np.full((COUNT, size, size, 4), 255, np.uint8)
            colour = np.round(255 * colour_of(thing.name, views[:, 1])).astype(np.uint8)
            rgba[..., :3] = colour[:, None, None]
            np.save(home / "rgba.npy", rgba)
            for painted in thing.colours:
                np.save(home / f"rgba-{painted}.npy", rgba[:25])
    return Renders(folder)
