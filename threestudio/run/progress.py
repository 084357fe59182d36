"""How far a run is: a line for a person, and a file for a program."""

import contextlib
import sys
import time
from pathlib import Path

from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from threestudio.utils.files import whole_file


class CustomProgressBar(ProgressBar):
    """One line for the whole training, however long an epoch is: step, loss, time left. Evaluation
    on its own gets a line too; the validations between training steps do not.

    On a terminal the line is redrawn in place, at most every 0.1 s; in a log file a line is
    written every 10 s. `refresh_rate`: consider it only every so many steps.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self._bar: tqdm | None = None
        self._enabled = True
        self._interval = 0.1 if sys.stderr.isatty() else 10.0
        self._drawn_at = 0.0

    def disable(self) -> None:
        """Called by Lightning on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of :meth:`disable`."""
        self._enabled = True

    def _open(self, description: str, total, initial: int = 0, unit: str = "step") -> None:
        self._close()
        self._bar = tqdm(
            desc=description,
            total=total if total and 0 < total < float("inf") else None,
            initial=initial,
            unit=unit,
            disable=not self._enabled,
            dynamic_ncols=True,
            mininterval=0,  # the throttling is done here, where reading the loss is saved too
        )
        self._drawn_at = time.monotonic()

    def _advance(self, n: int, outputs=None, final: bool = False) -> None:
        now = time.monotonic()
        if self._bar is None or n <= self._bar.n:
            return
        if not final and (now - self._drawn_at < self._interval or n % self.refresh_rate):
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._bar.set_postfix_str(f"loss={float(loss):.4g}", refresh=False)
        self._bar.update(n - self._bar.n)
        self._drawn_at = now

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def print(self, *args, sep: str = " ", **kwargs) -> None:
        """Print above the bar."""
        tqdm.write(sep.join(str(arg) for arg in args), file=sys.stderr)

    # --- training -------------------------------------------------------------------------------

    def on_train_start(self, trainer, pl_module) -> None:
        self._open("training", trainer.max_steps, initial=trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        last = trainer.global_step == trainer.max_steps
        self._advance(trainer.global_step, outputs, final=last)

    def on_train_end(self, trainer, pl_module) -> None:
        self._close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        if trainer.state.fn == "fit":
            self._advance(trainer.global_step, final=True)
        self._close()

    # --- evaluation -----------------------------------------------------------------------------

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.state.fn == "validate":
            self._open("validating", sum(trainer.num_val_batches), unit="view")

    def on_test_start(self, trainer, pl_module) -> None:
        self._open("rendering", sum(trainer.num_test_batches), unit="view")

    def on_predict_start(self, trainer, pl_module) -> None:
        self._open("exporting", sum(trainer.num_predict_batches), unit="view")

    def _on_eval_batch_end(self, trainer, batch_idx: int) -> None:
        if trainer.state.fn != "fit" and self._bar is not None:
            self._advance(batch_idx + 1, final=batch_idx + 1 == self._bar.total)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, loader=0) -> None:
        self._on_eval_batch_end(trainer, batch_idx)

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, loader=0) -> None:
        self._on_eval_batch_end(trainer, batch_idx)

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, loader=0) -> None:
        self._on_eval_batch_end(trainer, batch_idx)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.state.fn == "validate":
            self._close()

    def on_test_end(self, trainer, pl_module) -> None:
        self._close()

    def on_predict_end(self, trainer, pl_module) -> None:
        self._close()


class ProgressCallback(Callback):
    """Keeps one line about the run's progress in the file `save_path`, for a program that watches
    it (``launch.py --gradio``)."""

    def __init__(self, save_path) -> None:
        super().__init__()
        self.save_path = Path(save_path)
        self._written_at = 0.0

    @rank_zero_only
    def write(self, message: str) -> None:
        """Replace the line. A disk that is full costs a line, not the run."""
        with contextlib.suppress(OSError):
            self.save_path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.save_path) as tmp:  # not through a link
                tmp.write_text(message)
        self._written_at = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        done = trainer.global_step / max(trainer.max_steps, 1)
        if done >= 1 or time.monotonic() - self._written_at > 0.2:
            self.write(f"Generation progress: {100 * min(done, 1):.2f}%")

    def on_validation_start(self, trainer, pl_module) -> None:
        self.write("Rendering validation image ...")

    def on_test_start(self, trainer, pl_module) -> None:
        self.write("Rendering video ...")

    def on_predict_start(self, trainer, pl_module) -> None:
        self.write("Exporting mesh assets ...")
