"""The worlds of objects that runs are judged in: which truth there is, and how a run compares.

A grid names one (``world: shapes``): the random shapes of :mod:`pocket.shapes`, or the real objects
of :mod:`pocket.world`. A world is an object with the members of :class:`World`.
"""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from evaluation.worlds.objects import Objects
from evaluation.worlds.shapes import Shapes
from pocket.shapes.truth import Pictures

__all__ = ["DEFAULT", "WORLDS", "World"]


class World(Protocol):
    """What can be asked of a world. ``cfg`` is the loaded configuration of a run, or None for
    latents, which are pictures without a third dimension."""

    metrics: tuple[str, ...]  # columns of a table
    side: int  # pixels of a picture in a contact sheet
    views: int | None  # test views that a run must have; None: any number

    def ready(self) -> None:
        """Raise ``ValueError``, one line, where the truth itself is not there."""
        ...

    def labels(self, prompt: str) -> dict[str, str]:
        """Cells ``kind`` and ``color`` of a prompt's row. Raises ``ValueError``, one line, for a
        prompt of which there is no truth."""
        ...

    def cameras(self, count: int) -> Float[np.ndarray, "N 4"] | None:
        """From where each of ``count`` latents is seen: elevation, azimuth, distance and vertical
        field of view; None: from the front, all of them."""
        ...

    def look(self, system: Any, data: Any, views: int) -> Pictures:
        """The pictures of a trained system that are judged."""
        ...

    def example(self, prompt: str, cfg: Any, seed: int, count: int) -> Pictures:
        """True pictures in place of a run's: ``count`` views, or ``count`` latents' pictures."""
        ...

    def score(self, prompt: str, cfg: Any, made: Pictures, true: bool) -> dict[str, float]:
        """The metrics that apply. ``true``: the pictures are those of :meth:`example`."""
        ...


WORLDS: dict[str, World] = {"shapes": Shapes(), "objects": Objects()}
DEFAULT = "shapes"
