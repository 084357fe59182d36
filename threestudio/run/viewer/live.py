"""The view of one run: what it does between two steps of the training, in the training's thread."""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import threestudio
from threestudio.run.interventions import PROMPT, SCALE, Interventions, current
from threestudio.run.viewer import server as servers
from threestudio.run.viewer.budget import SHARP, Budget, Cost
from threestudio.run.viewer.frames import Painter, View, to_bytes, undisturbed
from threestudio.run.viewer.panel import Panel
from threestudio.run.viewer.progress import Progress
from threestudio.run.viewer.saving import Saver
from threestudio.run.viewer.training_cameras import TrainingCameras
from threestudio.run.viewer.visitors import Drawn, Visitor, Visitors

STATUS_EVERY, CURVES_EVERY, SEEN_EVERY, CAMERAS_EVERY = 0.5, 2.0, 1.0, 1.0  # seconds
POINT_EVERY, SPLATS_EVERY = 0.25, 1.0
LEAVES_IN = 0.3  # seconds in which the last of what was sent leaves
MAX_SPLATS = 50_000
MAX_FAILURES = 3
SHOWN_CHANGES = 6
MOST_AWAY = 4.0  # how many times as far a first view is in a high window
VIEWS = 4  # of a batch, as the model sees it


class Live:
    """``between`` is to be called between steps, and draws whatever visitors wait for; it returns
    at once where nobody is there. ``stop()``: called where a visitor wants the training to end.
    ``note_pause(paused)``: called when the run begins to wait for a visitor, and when it goes on.
    ``interventions`` None: nothing is trained, and ``between`` is called again and again."""

    def __init__(
        self,
        server: servers.Server,
        system: Any,
        trainer: Any,
        folder: Path,
        interventions: Interventions | None = None,
        stop: Callable[[], None] = lambda: None,
        must_end: Callable[[], bool] = lambda: False,
        note_pause: Callable[[bool], None] = lambda paused: None,
    ) -> None:
        self.server, self.system, self.trainer, self.folder = server, system, trainer, folder
        self.interventions, self.stop, self.must_end = interventions, stop, must_end
        self.visitors, self.budget, self.cost = Visitors(), Budget(), Cost()
        self.painter = Painter(system, _unit_rays(trainer))
        self.progress = Progress(system, trainer)
        self.saver = Saver(system, trainer, folder, self.painter, self.visitors)
        self.training_cameras = TrainingCameras(system.renderer, lambda: self.painter.drawing)
        self.note_pause = note_pause
        self.paused = False
        self.paused_seconds = 0.0  # so far
        self._jobs: queue.Queue = queue.Queue(maxsize=8)
        self._wake = threading.Event()
        self._failures = 0
        self._told: dict[str, float] = {}  # what -> when it was last told
        self._changes = 0
        self._watching = self._seen_shown = False
        self._cameras_of = self._splats_of = -1
        self._splats: Any = None
        self._turns: list[Callable[[], bool]] = [
            self._draw_fresh,
            self._show_splats,
            self._show_cameras,
            self._show_curves,
            self._show_seen,
        ]
        prompt = current(system, PROMPT)
        training = interventions is not None
        scale = current(system, SCALE) if training else None
        self.panel = Panel(
            server.viser,
            title=prompt or folder.name,
            training=training,
            prompt=prompt,
            scale=scale if scale is not None and math.isfinite(scale) else None,
            can_export=hasattr(system, "on_predict_start"),
            sees=callable(getattr(getattr(system, "guidance", None), "watch", None)),
            splats=callable(getattr(getattr(system, "geometry", None), "splats", None)),
            jobs=self._note_job,
            ask=self._note_change,
        )
        self._set_scene()
        server.viser.on_client_connect(self._welcome)
        server.viser.on_client_disconnect(self._forget)

    # --- from viser's threads ---------------------------------------------------------------------

    async def _welcome(self, client: Any) -> None:
        visitor = self.visitors.add(client)
        stepped_back = self._step_back(client.camera)
        visitor.look(View.of(client.camera))
        self._told.clear()

        @client.camera.on_update
        async def _(camera: Any) -> None:
            nonlocal stepped_back  # a browser may begin elsewhere, and then go to the first view
            stepped_back = stepped_back or self._step_back(camera)
            visitor.look(View.of(camera))
            self._wake.set()

        self._wake.set()

    def _step_back(self, camera: Any) -> bool:
        """In a window that is higher than wide, the first view is from so far away that the object
        is in it as it would be in a square one; whether the camera was at that view."""
        first = self.server.viser.initial_camera
        height, width = camera.image_height, camera.image_width
        if not np.allclose(camera.position, first.position, atol=1e-2):
            return False
        if height > width > 0:
            look_at = np.array(first.look_at)
            away = min(height / width, MOST_AWAY)
            position = look_at + away * (np.array(first.position) - look_at)
            with camera.client.atomic():
                camera.position = position
                camera.look_at = look_at
        return True

    async def _forget(self, client: Any) -> None:
        self.visitors.remove(client.client_id)

    def _note_job(self, name: str, client_id: int | None) -> None:
        with contextlib.suppress(queue.Full):  # who presses faster than steps are taken
            self._jobs.put_nowait((name, client_id))
        self._wake.set()

    def _note_change(self, what: str, value: Any, client_id: int | None) -> None:
        if self.interventions is None:
            return

        def done(why: str | None) -> None:
            self._told.pop("status", None)
            if why is not None:
                assert self.interventions is not None
                before = current(self.system, what, self.interventions.changed)
                if what != PROMPT:  # a text is mended where it stands
                    self.panel.reset(what, before)
                self.visitors.tell(client_id, "Not changed", why)
            elif what == PROMPT:
                self.visitors.tell(client_id, "New prompt", f"from step {self.step} on")

        self.interventions.ask(what, value, done)
        if self.paused and what == PROMPT:
            self.visitors.tell(client_id, "New prompt", "from when the run is resumed")

    # --- the scene --------------------------------------------------------------------------------

    def _set_scene(self) -> None:
        cfg = getattr(getattr(self.trainer, "datamodule", None), "cfg", None)
        distance = float(getattr(cfg, "eval_camera_distance", 0) or 3.0)
        elevation = math.radians(float(getattr(cfg, "eval_elevation_deg", 15.0)))
        fov = math.radians(float(getattr(cfg, "eval_fovy_deg", 0) or 45.0))
        camera = self.server.viser.initial_camera
        camera.position = (distance * math.cos(elevation), 0.0, distance * math.sin(elevation))
        camera.look_at, camera.fov = (0.0, 0.0, 0.0), fov
        self._frustum = 0.12 * distance
        self.server.viser.scene.set_up_direction("+z")
        self.server.viser.scene.world_axes.visible = False

    # --- between two steps ------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps behind the current weights."""
        return self.progress.step

    def between(self) -> None:
        """Serve whoever waits. While the run is paused, this does not return."""
        now = time.monotonic()
        self.progress.end_step(now)
        if self.interventions is not None and self._due("point", POINT_EVERY, now):
            self.progress.note()
        try:
            self._serve()
            if self.paused and not self.must_end():
                self._wait()
        finally:
            self.progress.begin_step(time.monotonic())

    def _wait(self) -> None:
        """Serve until the run is resumed, or has to end."""
        begun = time.monotonic()
        self.note_pause(True)
        try:
            while self.paused and not self.must_end():
                self._wake.wait(0.05)
                self._wake.clear()
                self._serve()
        finally:
            self.paused_seconds += time.monotonic() - begun
            self.note_pause(False)

    def idle(self) -> None:
        """Serve once, where nothing is trained, and wait a moment."""
        self._wake.wait(0.1)
        self._wake.clear()
        self._serve()

    def _serve(self) -> None:
        while True:
            try:
                name, client_id = self._jobs.get_nowait()
            except queue.Empty:
                break
            self._do(name, client_id)
        self._follow_settings()
        if not len(self.visitors):
            return
        for visitor in self.visitors.all():
            self._draw_asked(visitor)
        self._show_first_seen()
        self._take_a_turn()
        # the last, for it is followed by a moment in which nothing else is allowed: where steps are
        # slow, there is a new line of text after each
        self._show_status()

    def _follow_settings(self) -> None:
        here = len(self.visitors) > 0
        if self.panel.share is not None:
            self.budget.share = min(max(float(self.panel.share.value), 1.0), 90.0) / 100
        cameras, see = self.panel.cameras, self.panel.see
        wanted = here and cameras is not None and bool(cameras.value)
        self.training_cameras.want(wanted)
        if cameras is not None and not cameras.value:
            self.training_cameras.hide()
        if not self._sends_splats:
            self._hide_splats()
        watching = here and see is not None and bool(see.value)
        if watching != self._watching:
            self._watching = watching
            self.system.guidance.watch(watching)
            self._seen_shown = False
            if see is not None and not see.value:
                self.panel.show_seen({})
            self.panel.await_seen(watching)

    # --- pictures ---------------------------------------------------------------------------------

    def _draw_asked(self, visitor: Visitor) -> None:
        """What a visitor waits for: the picture of a camera that moves, or has come to rest."""
        for _ in range(3):
            now = time.monotonic()
            kind = visitor.wants(self.step, now)
            free = self._is_free or self.budget.allows(True, now)
            if kind not in ("sharp", "moving") or not free or not self._can_draw(visitor):
                return
            if not self._draw(visitor, kind) or kind == "moving":
                return

    def _draw_fresh(self) -> bool:
        """The object as it is now, for the visitor who has seen least of it; whether one was."""
        for visitor in self.visitors.all():
            wanted = visitor.wants(self.step, time.monotonic()) == "fresh"
            if wanted and self._can_draw(visitor):
                return self._draw(visitor, "fresh")
        return False

    def _can_draw(self, visitor: Visitor) -> bool:
        if self._splats is not None or self._sends_splats:
            return False  # their browsers do it
        return self._failures < MAX_FAILURES and visitor.is_ready()

    @property
    def _is_free(self) -> bool:
        """Whether no training waits."""
        return self.paused or self.interventions is None

    def _take_a_turn(self) -> None:
        """Do one of the things that nobody has asked for just now, if the budget allows it: each
        that is due in turn, so that pictures do not keep the curves from being drawn."""
        if not self._is_free and not self.budget.allows(False, time.monotonic()):
            return
        for turn in list(self._turns):
            begun = time.monotonic()
            if turn():
                self._turns.remove(turn)
                self._turns.append(turn)
                if turn != self._draw_fresh:  # which accounts for itself
                    self._spend(begun)
                return

    def _draw(self, visitor: Visitor, kind: str) -> bool:
        view = visitor.view
        assert view is not None
        begun = time.monotonic()
        tallest = int(min(max(float(self.panel.tallest.value), 64), 2160))
        known = self.cost.is_known
        width, height = view.size(self.cost.pixels(self._seconds(kind)), tallest)
        try:
            with undisturbed(self.system, self.trainer):
                image = self.painter(view, width, height)
        except Exception as error:  # of a renderer, which must not cost the run
            self._fail(error)
            return False
        drawn = time.monotonic() - begun
        self.cost.saw(width * height, drawn, kind != "moving")
        quality = 70 if kind == "moving" else 92
        visitor.client.scene.set_background_image(image, format="jpeg", jpeg_quality=quality)
        visitor.client.flush()
        whole = height >= min(view.height, tallest) or drawn > SHARP / 3
        full = kind != "moving" and whole
        visitor.drawn = Drawn(view, self.step, height, full, kind == "moving" or not known)
        visitor.frames += 1
        self._spend(begun, kind != "fresh", kind == "sharp")
        return True

    def _seconds(self, kind: str) -> float:
        return SHARP if kind == "fresh" and self._is_free else self.budget.seconds(kind)

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        text = " ".join(str(error).split())[:200] or type(error).__name__
        threestudio.warn(f"the view could not be drawn: {text}")
        if self._failures == MAX_FAILURES:
            threestudio.warn("nothing more is drawn for visitors; the training goes on")

    def _spend(self, begun: float, asked: bool = False, owed: bool = False) -> None:
        now = time.monotonic()
        self.budget.spend(now - begun, now, asked, owed)

    @property
    def _sends_splats(self) -> bool:
        return self.panel.splats is not None and bool(self.panel.splats.value)

    def _show_splats(self) -> bool:
        """Send the Gaussians, in the place of pictures."""
        if not self._sends_splats or self._splats_of == self.step:
            return False
        if not self._due("splats", SPLATS_EVERY, time.monotonic()):
            return False
        with undisturbed(self.system, self.trainer):
            found = self.system.geometry.splats(MAX_SPLATS)
        arrays = {name: value.float().cpu().numpy() for name, value in found.items()}
        with self.server.viser.atomic():
            self._splats = self.server.viser.scene.add_gaussian_splats("/splats", **arrays)
        for visitor in self.visitors.all():
            if visitor.drawn is not None:
                visitor.client.scene.set_background_image(None)
                visitor.drawn = None
        self._splats_of = self.step
        return True

    def _hide_splats(self) -> None:
        if self._splats is not None:
            self._splats.remove()
            self._splats, self._splats_of = None, -1

    def _show_cameras(self) -> bool:
        wanted = self.panel.cameras is not None and bool(self.panel.cameras.value)
        if not wanted or self._cameras_of == self.step:
            return False
        if not self._due("cameras", CAMERAS_EVERY, time.monotonic()):
            return False
        with self.server.viser.atomic():
            shown = self.training_cameras.show(self.server.viser.scene, self._frustum)
        self._cameras_of = self.step if shown else self._cameras_of
        return shown

    # --- numbers ----------------------------------------------------------------------------------

    def _due(self, what: str, every: float, now: float) -> bool:
        if now - self._told.get(what, -1e9) < every:
            return False
        self._told[what] = now
        return True

    def _show_status(self) -> None:
        now = time.monotonic()
        if self.interventions is None or not self._due("status", STATUS_EVERY, now):
            return
        with self.server.viser.atomic():
            text = ("paused · " if self.paused else "") + self.progress.text()
            self.panel.show_status(text, self.progress.part, self.paused)
            self._show_changes()
        self._spend(now)

    def _show_changes(self) -> None:
        assert self.interventions is not None
        made = self.interventions.made
        if len(made) == self._changes:
            return
        self._changes = len(made)
        for change in made:
            self.panel.reset(change.what, change.new)
            if change.what == PROMPT:
                self.panel.show_prompt(change.new)
        self.panel.show_changes(made[-SHOWN_CHANGES:])

    def _show_curves(self) -> bool:
        curves = self.progress.curves
        if len(curves) < 2 or not self._due("curves", CURVES_EVERY, time.monotonic()):
            return False
        with self.server.viser.atomic():
            self.panel.show_curves(curves.known())
        return True

    def _show_first_seen(self) -> None:
        """What the model sees, once somebody has asked for it and a step has been seen: that need
        not wait until its cost is a small share of the time, as what follows does."""
        if not self._watching or self._seen_shown:
            return
        if self._is_free or self.budget.allows(True, time.monotonic()):
            begun = time.monotonic()
            if self._show_seen():
                self._spend(begun, asked=True)

    def _show_seen(self) -> bool:
        if not self._watching or not self._due("seen", SEEN_EVERY, time.monotonic()):
            return False
        try:
            with undisturbed(self.system, self.trainer):
                seen = self.system.guidance.seen()
        except Exception as error:  # such as too little memory to decode
            threestudio.warn(f"what the model sees could not be shown: {error}")
            return True
        self._seen_shown = self._seen_shown or bool(seen)
        rows = {name: _in_a_row(images[:VIEWS]) for name, images in (seen or {}).items()}
        with self.server.viser.atomic():
            self.panel.show_seen(rows)
        return True

    # --- buttons ----------------------------------------------------------------------------------

    def _do(self, name: str, client_id: int | None) -> None:
        if name == "pause" and self.interventions is not None:
            self.paused = not self.paused
            self._told.pop("status", None)
        elif name == "stop" and self.interventions is not None:
            threestudio.info("a visitor of the view has asked to stop")
            self.stop()
        elif name in ("snapshot", "export"):
            begun = time.monotonic()
            try:
                save = self.saver.snapshot if name == "snapshot" else self.saver.export
                save(client_id)
            except Exception as error:  # a full disk, a mesh without a surface
                text = " ".join(str(error).split())[:300] or type(error).__name__
                threestudio.warn(f"{name}: {text}")
                self.visitors.tell(client_id, f"No {name}", text)
            finally:
                self._spend(begun, asked=True)

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Show the object as it is in the end, where the training has ended by itself."""
        for visitor in self.visitors.all():
            if not visitor.has_seen(self.step) and self._can_draw(visitor):
                self._draw(visitor, "sharp")

    def end(self) -> None:
        """Tell visitors that no more comes, and let go of the system."""
        # viser names a visitor once it has said where its camera is: one may be about to
        if self.interventions is not None and self.server.door.visitors:
            with self.server.viser.atomic():
                self.panel.show_status(self.progress.last_text(), self.progress.part, False)
            self.server.viser.flush()
            time.sleep(LEAVES_IN)
        self.training_cameras.want(False)
        if self._watching:
            self.system.guidance.watch(False)
            self._watching = False


def _unit_rays(trainer: Any) -> bool:
    cfg = getattr(getattr(trainer, "datamodule", None), "cfg", None)
    return bool(getattr(cfg, "rays_d_normalize", True))


def _in_a_row(images: torch.Tensor) -> np.ndarray:
    """Images (B, H, W, 3) in 0..1 side by side."""
    return np.concatenate([to_bytes(image) for image in images], axis=1)
