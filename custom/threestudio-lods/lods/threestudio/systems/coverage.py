"""Notice when nothing of the object can be seen: such a run trains nothing, silently."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

import threestudio

VISIBLE = 1e-3  # opacity of a pixel; a picture of 8 bits shows 2e-3
LOOK_EVERY = 25  # batches: a GPU has to be waited for to know
STOP_AFTER = 100  # batches
SETTINGS = (
    "data.camera_distance_range, data.fovy_range, system.renderer.near_plane and far_plane, and "
    "the object's place and size in system.geometry"
)


class Coverage:
    """Counts how many batches in a row have had no pixel with an opacity above ``VISIBLE``.

    After ``LOOK_EVERY`` of them it warns, after ``STOP_AFTER`` it raises ``ValueError``; and so it
    does at the end of a training of fewer batches, not one of which showed anything. Nothing of
    the training is changed by it.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._empty: Int[Tensor, ""] | None = None  # in a row, until now
        self._warned = False
        self._views: list[bool] = []

    @torch.no_grad()
    def see(
        self, opacity: Float[Tensor, "*B 1"], everywhere: Callable[[bool], bool] = bool
    ) -> None:
        """Count one rendered batch. ``everywhere(empty)``: whether all processes say so."""
        if self._empty is None:
            self._empty = torch.zeros((), dtype=torch.int64, device=opacity.device)
        # kept where the picture is, and read now and then only
        seen = (opacity.detach() > VISIBLE).any()
        self._empty = torch.where(seen, torch.zeros_like(self._empty), self._empty + 1)
        self.batches += 1
        if self.batches % LOOK_EVERY:
            return
        count = int(self._empty)
        if everywhere(count >= STOP_AFTER):
            raise ValueError(self._report(count))
        if not everywhere(count >= LOOK_EVERY):
            self._warned = False
        elif not self._warned:
            self._warned = True
            threestudio.warn(
                f"{self._report(count)}; the run stops after {STOP_AFTER} such batches"
            )

    def finish(self, everywhere: Callable[[bool], bool] = bool) -> None:
        """At the end of a training: raise ``ValueError`` if none of its batches showed anything."""
        if self._empty is not None and everywhere(self.batches == int(self._empty)):
            raise ValueError(self._report(self.batches))

    def see_view(self, opacity: Float[Tensor, "*B 1"]) -> None:
        """Count one batch of views to test with."""
        self._views.append(bool((opacity > VISIBLE).any()))

    def finish_views(self) -> None:
        """At the end of a test: warn if none of its views showed anything."""
        if self._views and not any(self._views):
            threestudio.warn(
                "none of the test views shows anything of the object: look at "
                "data.eval_camera_distance, data.eval_fovy_deg, data.eval_elevation_deg, and "
                "system.renderer.near_plane and far_plane"
            )
        self._views = []

    def _report(self, count: int) -> str:
        return (
            f"nothing of the object was visible in the last {count} batches (the opacity of every "
            f"pixel is 0), so it was not trained: look at {SETTINGS}"
        )
