"""What accompanies a run: snapshots of config and code, and a progress bar."""

import contextlib
import os
import sys
import time
from pathlib import Path

from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

import threestudio
from threestudio.utils import extensions
from threestudio.utils.checkpoint import LastCheckpoint
from threestudio.utils.config import dump_config
from threestudio.utils.files import disk_error, whole_file
from threestudio.utils.git import NoGit, tracked_files
from threestudio.utils.run_folder import checkpoint_folder
from threestudio.utils.snapshot import (
    MAX_BYTES,
    copy_files,
    extension_files,
    is_linked,
    is_plain,
    make_plain_folder,
)
from threestudio.utils.typing import *


class ReportFailures(Callback):
    """:func:`.extensions.report_failures` when all is set up and the work begins: told while
    loading, it would be scrolled away by what comes after it."""

    def _report(self, trainer, pl_module) -> None:
        extensions.report_failures()

    on_sanity_check_start = on_train_start = _report
    on_validation_start = on_test_start = on_predict_start = _report


class SharedFolder(Callback):
    """All processes of a run write into the folder that the first of them has made: the others
    learn its name here."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    def setup(self, trainer, pl_module, stage: str) -> None:
        if trainer.world_size == 1:
            return
        mine = self.cfg.trial_dir, checkpoint_folder(self.cfg)
        trial_dir, ckpts = trainer.strategy.broadcast(mine)
        if (trial_dir, ckpts) == mine:
            return
        self.cfg.trial_dir = trial_dir
        pl_module.set_save_dir(os.path.join(trial_dir, "save"))
        for callback in trainer.callbacks:  # ModelCheckpoint asks the first process itself
            if isinstance(callback, LastCheckpoint):
                callback.path = Path(ckpts, callback.path.name)


class VersionedCallback(Callback):
    """Writes into `save_root`, or with `use_version` into a new folder ``version_N`` in it, which
    is made when its number is first asked for."""

    def __init__(self, save_root, version: Optional[int] = None, use_version: bool = True) -> None:
        self.save_root = str(save_root)
        self.use_version = use_version
        self._version = version

    @property
    def version(self) -> int:
        """The number of the folder: the one given, else the first that is free."""
        while self._version is None:
            os.makedirs(self.save_root, exist_ok=True)
            names = os.listdir(self.save_root)
            numbers = [int(n[8:]) for n in names if n.startswith("version_") and n[8:].isdigit()]
            number = max(numbers, default=-1) + 1
            with contextlib.suppress(FileExistsError):  # another run was quicker
                os.mkdir(os.path.join(self.save_root, f"version_{number}"))
                self._version = number
        return self._version

    @property
    def savedir(self) -> str:
        """The folder to write into."""
        if not self.use_version:
            return self.save_root
        return os.path.join(self.save_root, f"version_{self.version}")


class ConfigSnapshotCallback(VersionedCallback):
    """Saves ``parsed.yaml`` (the config with everything merged and resolved, enough to relaunch)
    and ``raw.yaml`` (a copy of `config_path`; of several, ``raw.yaml``, ``raw_1.yaml``, ...)."""

    def __init__(
        self,
        config_path: Union[str, List[str]],
        cfg: DictConfig,
        save_root,
        version: Optional[int] = None,
        use_version: bool = True,
    ) -> None:
        super().__init__(save_root, version, use_version)
        self.config_paths = [config_path] if isinstance(config_path, str) else list(config_path)
        # read now: a file may change before the fit starts, and raw.yaml may be its own source
        self.raw = [Path(path).read_bytes() for path in self.config_paths]
        self.cfg = cfg

    @rank_zero_only
    def save_config_snapshot(self) -> None:
        """Write the files. Raises ``OSError`` where their folder is a link."""
        make_plain_folder(self.savedir, self.savedir)
        with whole_file(os.path.join(self.savedir, "parsed.yaml")) as tmp:
            dump_config(tmp, self.cfg)
        for i, raw in enumerate(self.raw):
            with whole_file(Path(self.savedir, f"raw_{i}.yaml" if i else "raw.yaml")) as tmp:
                tmp.write_bytes(raw)

    def on_fit_start(self, trainer, pl_module) -> None:
        self.save_config_snapshot()


class CodeSnapshotCallback(VersionedCallback):
    """Copies the code: of the current folder the files that git tracks, and the extensions that are
    loaded. Left out are ``load``, ``outputs`` and the folders in `exclude` (of runs: their copies
    of the code would be copied), links, and files over 1 MB (weights, pictures). What prevents a
    snapshot is one warning. See :mod:`.snapshot`.
    """

    def __init__(
        self,
        save_root,
        version: Optional[int] = None,
        use_version: bool = True,
        exclude: Iterable[str] = (),
    ) -> None:
        super().__init__(save_root, version, use_version)
        self.exclude = list(exclude)

    def get_file_list(self) -> List[str]:
        """Paths of the tracked files, relative to the current folder. Raises ``NoGit``."""
        outside = {Path(folder).resolve() for folder in (self.save_root, *self.exclude)}
        here = Path.cwd().resolve()
        outside -= {here, *here.parents}  # results in the repository's own folder, or around it
        return [
            name
            for name in tracked_files(here)
            if name.split("/")[0] not in ("load", "outputs")
            and is_plain(here, name)
            and os.path.getsize(name) <= MAX_BYTES
            and not outside & set(Path(here, name).parents)
        ]

    @rank_zero_only
    def save_code_snapshot(self) -> None:
        """Copy the files. Raises ``OSError``, and ``NoGit`` when only the extensions could be."""
        here = Path.cwd()
        for name, path in extensions.loaded.items():
            inside = here in path.absolute().parents
            folder = path.absolute().parent.relative_to(here) if inside else Path("custom")
            source, part = (path.parent, "") if path.is_file() else (path, name)
            copy_files(source, extension_files(path), self.savedir, Path(folder, part))
        copy_files(here, self.get_file_list(), self.savedir)

    def on_fit_start(self, trainer, pl_module) -> None:
        try:
            self.save_code_snapshot()
            linked = [name for name, path in extensions.loaded.items() if is_linked(path)]
            if linked:
                names = ", ".join(linked)
                threestudio.info(f"the snapshot of the code is without what is a link: {names}")
        except NoGit as error:
            only = " but of the extensions" if extensions.loaded else ""
            threestudio.warn(f"no snapshot of the code{only}: it needs a git repository ({error})")
        except OSError as error:
            if disk_error(error):
                raise
            threestudio.warn(f"no snapshot of the code: {error.filename}: {error.strerror}")


class CustomProgressBar(ProgressBar):
    """One line for the whole training, however long an epoch is: step, loss, time left. Evaluation
    on its own gets a line too; the validations between training steps do not.

    On a terminal the line is redrawn in place, at most every 0.1 s; in a log file a line is
    written every 10 s. `refresh_rate`: consider it only every so many steps.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self._bar: Optional[tqdm] = None
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
