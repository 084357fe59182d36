"""Lightning's loggers, such that a log which cannot be written does not end a training."""

import os
from collections.abc import Callable
from importlib.util import find_spec

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

import threestudio
from threestudio.utils.files import disk_advice, disk_error


class Lenient:
    """Mixin, before a logger: what the disk refuses is a warning, once."""

    _refused = False

    def _try(self, method: Callable, *args, **kwargs) -> None:
        try:
            method(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            known = disk_error(error) or (error if isinstance(error, OSError) else None)
            if known is None:
                raise
            if not self._refused:
                threestudio.warn(f"the log has gaps from here on: {disk_advice(known)}")
            self._refused = True

    def log_metrics(self, *args, **kwargs) -> None:
        self._try(super().log_metrics, *args, **kwargs)

    def log_hyperparams(self, *args, **kwargs) -> None:
        self._try(super().log_hyperparams, *args, **kwargs)

    def save(self) -> None:
        self._try(super().save)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)


class LenientCSVLogger(Lenient, CSVLogger):
    """``metrics.csv``, whose rows so far survive a failed write."""

    @rank_zero_only
    def save(self) -> None:
        self._try(self._save)

    def _save(self) -> None:
        path = self.experiment.metrics_file_path  # which makes the folder
        before = b""
        if os.path.exists(path):
            with open(path, "rb") as file:
                before = file.read()
        try:
            CSVLogger.save(self)
        except OSError:
            if before:
                with open(path, "wb") as file:
                    file.write(before)
            raise


class LenientTensorBoardLogger(Lenient, TensorBoardLogger):
    """TensorBoard's event files."""


def make_loggers(folder: str) -> list:
    """The loggers of a run in `folder`: CSV, and TensorBoard's where that is installed."""
    loggers: list = [LenientCSVLogger(folder, name="csv_logs")]
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        loggers.append(LenientTensorBoardLogger(folder, name="tb_logs"))
    return loggers
