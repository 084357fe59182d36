"""The controls beside the picture. They are the same for all visitors.

viser calls back from its own threads: nothing here does more than to note what is wanted.
"""

import contextlib
import string
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from threestudio.run.interventions import MAX_PROMPT, PROMPT, RATE, SCALE, Change
from threestudio.run.viewer.budget import AT_REST

BRAND = (41, 98, 180)
TALLEST = 512  # pixels of a picture, by default
PLOT_HEIGHT = 120
MAX_HEADING = 300  # characters of a prompt that are shown as text
CHANGED = {PROMPT: "prompt", SCALE: "guidance scale", RATE: "learning rates ×"}


class Panel:
    """``jobs(name, client_id)`` is told of buttons: "pause", "stop", "snapshot", "export";
    ``ask(what, value, client_id)`` of what is to be changed. With ``training`` false only what a
    finished run has is there."""

    def __init__(
        self,
        server: Any,
        *,
        title: str,
        training: bool,
        prompt: str | None,
        scale: float | None,
        can_export: bool,
        sees: bool,
        splats: bool,
        jobs: Callable[[str, int | None], None],
        ask: Callable[[str, Any, int | None], None],
    ) -> None:
        self.server, self.jobs, self.ask = server, jobs, ask
        self._plots: dict[str, Any] = {}
        self._pictures: dict[str, Any] = {}
        self._questions: dict[int, Any] = {}  # whether to stop, one of each visitor
        self._pictures_lock = threading.Lock()
        self.prompt = self.scale = self.rate = self.see = self.cameras = None
        gui = server.gui
        gui.configure_theme(
            control_width="medium", show_logo=False, show_share_button=False, brand_color=BRAND
        )
        gui.main_panel.dock_right()
        self.heading = gui.add_markdown(_heading(title))
        first = "The first step is being taken: kernels may have to be compiled."
        self.status = gui.add_markdown(first if training else "This run is not being trained.")
        self.bar = gui.add_progress_bar(0.0, visible=training)
        self._buttons(gui, training, can_export)
        tabs = gui.add_tab_group()
        with tabs.add_tab("View"):
            self._view(gui, training, splats)
        if not training:
            return
        with tabs.add_tab("Steer"):
            self._steer(gui, prompt, scale)
        with tabs.add_tab("Model"):
            self._model(gui, sees)
        self.curves_tab = tabs.add_tab("Curves")
        with self.curves_tab:
            self.no_curves = gui.add_markdown("The curves begin with the first steps.")

    # --- what is there ----------------------------------------------------------------------------

    def _button(self, gui, label: str, job: str, hint: str, color=None) -> Any:
        button = gui.add_button(label, hint=hint, color=color)

        @button.on_click
        async def _(event) -> None:
            self.jobs(job, event.client_id)

        return button

    def _buttons(self, gui, training: bool, can_export: bool) -> None:
        self.pause = None
        if training:
            self.pause = self._button(gui, "Pause", "pause", "Wait after this step")
        self._button(gui, "Snapshot", "snapshot", "Save what you see as a PNG in the run's folder")
        if can_export:
            self._button(gui, "Export", "export", "Write the object in the run's folder")
        if training:
            stop = gui.add_button("Stop and save", color="red", hint="End the training")

            @stop.on_click
            async def _(event) -> None:
                self._confirm_stop(event.client)

    def _confirm_stop(self, client: Any) -> None:
        if client is None:
            return
        with contextlib.suppress(Exception):  # of a question that was answered already
            self._questions.pop(client.client_id).close()
        with client.gui.add_modal("End the training?") as modal:
            client.gui.add_markdown(
                "A checkpoint is saved, and the terminal names the command that goes on from it."
            )
            yes = client.gui.add_button("Stop and save", color="red")
            no = client.gui.add_button("Go on training")
        self._questions[client.client_id] = modal

        @yes.on_click
        async def _(event) -> None:
            modal.close()
            self.jobs("stop", client.client_id)

        @no.on_click
        async def _(event) -> None:
            modal.close()

    def _view(self, gui, training: bool, splats: bool) -> None:
        self.tallest = gui.add_slider(
            "Height of pictures",
            min=128,
            max=1440,
            step=16,
            initial_value=TALLEST,
            hint="Pixels of a picture once the camera rests",
        )
        self.splats = None
        if splats:
            self.splats = gui.add_checkbox(
                "Drawn by the browser",
                False,
                hint="Send the Gaussians themselves: fast to turn, without view dependence",
            )
        self.share = None
        if training:
            self.share = gui.add_slider(
                "Share of the time (%)",
                min=1,
                max=90,
                step=1,
                initial_value=round(100 * AT_REST),
                hint="What part of the time the view may take while the camera rests",
            )
            self.cameras = gui.add_checkbox(
                "Training cameras",
                False,
                hint="Where the last batch was seen from, and its images: zoom out to see them",
            )

    def _steer(self, gui, prompt: str | None, scale: float | None) -> None:
        if prompt is not None:
            self.prompt = gui.add_text("Prompt", prompt, multiline=True)
            use = gui.add_button("Use this prompt", hint="Embed it, and go on with it")

            @use.on_click
            async def _(event) -> None:
                self.ask(PROMPT, str(self.prompt.value)[: MAX_PROMPT + 1], event.client_id)

        if scale is not None:
            self.scale = gui.add_slider(
                "Guidance scale",
                min=min(1.0, scale),
                max=max(100.0, 2 * scale),
                step=0.5,
                initial_value=scale,
            )
            self._asks(self.scale, SCALE)
        self.rate = gui.add_slider(
            "Learning rates ×", min=0.0, max=4.0, step=0.05, initial_value=1.0
        )
        self._asks(self.rate, RATE)
        self.history = gui.add_markdown(
            "What is changed here is noted in `interventions.jsonl`, from which `--replay` makes "
            "the same run again."
        )

    def _asks(self, slider: Any, what: str) -> None:
        @slider.on_update
        async def _(event) -> None:
            self.ask(what, slider.value, event.client_id)

    def _model(self, gui, sees: bool) -> None:
        if not sees:
            gui.add_markdown("This guidance does not show what its model sees.")
            return
        self.see = gui.add_checkbox("Show what the model sees", False)
        gui.add_markdown(
            "The noisy images that the model was given at the last step, what it takes for the "
            "clean ones, and the difference of the two guesses, which is where the images are "
            "pulled to (grey: nowhere)."
        )
        self._model_wait = gui.add_markdown(
            "*The pictures come after the next steps that are taken.*", visible=False
        )
        self._model_folder = gui.add_folder("Last step", visible=False)

    # --- what is told -----------------------------------------------------------------------------

    def show_prompt(self, prompt: str) -> None:
        """The heading."""
        self.heading.content = _heading(prompt)

    def show_status(self, text: str, part: float, paused: bool) -> None:
        """The line of text, the bar (0..1), and the name of the button that pauses."""
        if self.status.content != text:
            self.status.content = text
        self.bar.value = 100.0 * min(max(part, 0.0), 1.0)
        label = "Resume" if paused else "Pause"
        if self.pause is not None and self.pause.label != label:
            self.pause.label = label

    def show_changes(self, changes: Sequence[Change]) -> None:
        """What was changed, the last at the top."""
        lines = (f"- step {c.step:,}: {CHANGED[c.what]} {_new(c)}" for c in reversed(changes))
        self.history.content = "\n".join(lines)

    def reset(self, what: str, value: Any) -> None:
        """Put the control of what could not be changed back."""
        control = {PROMPT: self.prompt, SCALE: self.scale, RATE: self.rate}.get(what)
        if control is not None and value is not None and control.value != value:
            control.value = value

    def show_curves(self, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """A plot for each name: steps and values."""
        gui = self.server.gui
        for name, data in series.items():
            if name in self._plots:
                self._plots[name].data = data
                continue
            self.no_curves.visible = False
            with self.curves_tab:
                self._plots[name] = gui.add_uplot(
                    data,
                    series=({"label": "step"}, {"label": name, "stroke": "#2962b4", "width": 2}),
                    title=name,
                    scales={"x": {"time": False}, "y": {}},
                    legend={"show": False},
                    height=PLOT_HEIGHT,
                )

    def await_seen(self, wanted: bool) -> None:
        """Say that pictures are to come, or no longer."""
        if self.see is not None:
            self._model_wait.visible = wanted

    def show_seen(self, pictures: dict[str, np.ndarray]) -> None:
        """A picture for each name, (H, W, 3) of uint8."""
        with self._pictures_lock:
            for name in [name for name in self._pictures if name not in pictures]:
                self._pictures.pop(name).remove()
            for name, image in pictures.items():
                if name in self._pictures:
                    self._pictures[name].image = image
                    continue
                with self._model_folder:
                    self._pictures[name] = self.server.gui.add_image(
                        image, label=name, format="jpeg", jpeg_quality=85
                    )
            self._model_folder.visible = bool(pictures)
            if pictures:
                self._model_wait.visible = False


def as_text(text: str) -> str:
    """Markdown that shows a text as it is. HTML in markdown is made elements by viser's client,
    which trusts it: a frame in it could run code in every visitor's browser, and a text may have
    come from anyone."""
    return "".join(f"\\{c}" if c in string.punctuation else c for c in text if c.isprintable())


def _heading(title: str) -> str:
    return f"**{as_text(title[:MAX_HEADING])}**"


def _new(change: Change) -> str:
    text = str(change.new)
    return f"“{as_text(text[:MAX_HEADING])}”" if change.what == PROMPT else as_text(text)
