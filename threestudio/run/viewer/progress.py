"""How far a training is: the line of text beside the picture, and the curves."""

from typing import Any

from threestudio.run.viewer.curves import Curves

METRICS = {"loss": "train/loss", "gradient norm": "train/grad_norm"}  # of the trainer
SMOOTH = 0.9  # how much of the mean duration of a step is kept when the next has been taken


class Progress:
    """``note`` adds a point to ``curves``. What is done between ``end_step`` and ``begin_step`` is
    not counted as time of a step; ``skip`` leaves the step that is being taken out."""

    def __init__(self, system: Any, trainer: Any) -> None:
        self.system, self.trainer = system, trainer
        self.curves = Curves()
        self._mean: float | None = None  # seconds of a step
        self._begun: float | None = None

    @property
    def step(self) -> int:
        """Steps behind the current weights."""
        return int(self.system.true_global_step)

    @property
    def part(self) -> float:
        """The part of the steps that is done, 0 where their number is not known."""
        return self.step / self.trainer.max_steps if self.trainer.max_steps > 0 else 0.0

    def end_step(self, now: float) -> None:
        """A step has been taken, at `now` seconds."""
        if self._begun is not None:
            took, before = now - self._begun, self._mean
            self._mean = took if before is None else SMOOTH * before + (1 - SMOOTH) * took
        self._begun = None

    def begin_step(self, now: float) -> None:
        """The next step begins."""
        self._begun = now

    def skip(self) -> None:
        """The step that is being taken does not count."""
        self._begun = None

    def note(self) -> None:
        """Add losses, the norm of the gradient and the number of Gaussians to the curves."""
        metrics = self.trainer.callback_metrics
        values = {name: float(metrics[key]) for name, key in METRICS.items() if key in metrics}
        for name, value in getattr(self.system, "loss_terms", {}).items():
            values[name.replace("_", " ")] = float(value)
        if (count := self._gaussians()) is not None:
            values["Gaussians"] = float(count)
        self.curves.add(self.step, values)

    def text(self) -> str:
        """The step, its duration, the time left and the number of Gaussians, as far as known."""
        step, last = self.step, self.trainer.max_steps
        words = [f"step {step:,}" + (f" of {last:,}" if last > 0 else "")]
        if self._mean:
            words.append(f"{_seconds(self._mean)} a step")
            if last > 0:
                words.append(f"{_clock((last - step) * self._mean)} left")
        if (count := self._gaussians()) is not None:
            words.append(f"{count:,} Gaussians")
        return " · ".join(words)

    def last_text(self) -> str:
        """The line of text once no more steps are taken."""
        last = f" of {self.trainer.max_steps:,}" if self.trainer.max_steps > 0 else ""
        return f"Ended at step {self.step:,}{last}. `lods view` shows this run again."

    def _gaussians(self) -> int | None:
        count = getattr(getattr(self.system, "geometry", None), "count", None)
        return count if isinstance(count, int) else None


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
