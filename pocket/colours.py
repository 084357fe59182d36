"""Recolouring pictures of an object so that its shading and texture stay.

Without highlights a pixel is albedo times brightness, and

c' = p max(c) / m

with the paint's colour p and a constant m of the object scales with c: painting the picture equals
painting the texture by the same rule. m is the 0.9 quantile of max(c) over the painted part in a
few fixed views, so that the brightest places get the paint's own colour.
"""

from collections.abc import Iterable

import numpy as np

from pocket.world import Object

PAINTS = {
    "red": (0.90, 0.08, 0.08),
    "yellow": (0.98, 0.82, 0.10),
    "green": (0.16, 0.66, 0.20),
    "blue": (0.12, 0.30, 0.90),
}
QUANTILE = 0.9


def painted_part(picture: np.ndarray, thing: Object) -> np.ndarray:
    """Which pixels of a straight uint8 (H, W, 4) picture are painted: bool (H, W)."""
    if thing.paint is None:
        raise ValueError(f"A {thing.name} comes in its own colours only.")
    rgb = picture[..., :3].astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(high - low, 1e-6)
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.select(
        [high == r, high == g], [(g - b) / spread % 6, (b - r) / spread + 2], (r - g) / spread + 4
    )
    hue *= 60
    first, last = thing.paint
    between = (first <= hue) & (hue <= last) if first <= last else (hue >= first) | (hue <= last)
    coloured = spread >= thing.paint_from * np.maximum(high, 1e-6)
    return between & coloured & (picture[..., 3] > 0)


def level(pictures: Iterable[np.ndarray], thing: Object) -> float:
    """m of the module's formula, from straight uint8 pictures. Raises ``ValueError`` if they show
    nothing that is painted."""
    values = [p[..., :3].max(-1)[painted_part(p, thing)] for p in pictures]
    values = np.concatenate(values)
    if not len(values):
        raise ValueError(f"Nothing of the {thing.name} has the hues {thing.paint} to be painted.")
    return max(float(np.quantile(values, QUANTILE)) / 255, 1 / 255)


def paint(picture: np.ndarray, thing: Object, colour: str, m: float) -> np.ndarray:
    """The straight uint8 (H, W, 4) picture with its painted part in another colour."""
    part = painted_part(picture, thing)
    out = picture.copy()
    brightness = picture[..., :3].max(-1)[part][:, None] / m
    painted = np.array(PAINTS[colour]) * brightness
    out[part, :3] = np.minimum(painted + 0.5, 255).astype(np.uint8)
    return out
