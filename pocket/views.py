"""The words for views, and the ways in which captions name an object, of both worlds.

:mod:`pocket.shapes.make` takes what follows for a part of the world of shapes.
"""

VIEWS = ("side", "front", "back", "overhead")  # threestudio's order
TEMPLATES = (
    "{}",
    "a DSLR image of {}",
    "a DSLR photo of {}",
    "a photo of {}",
    "a 3d render of {}",
    "an image of {}",
    "a high quality photo of {}",
    "a picture of {}",
)


def view_of(elevation: float, azimuth: float) -> int:
    """Index into VIEWS of a camera, angles in degrees (the rules of threestudio's prompt
    processor: later ones override earlier ones)."""
    azimuth = (azimuth + 180) % 360 - 180
    if elevation > 60:
        return 3
    if abs(azimuth) < 45:
        return 1
    return 2 if abs(azimuth) > 135 else 0
