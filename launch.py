"""Train, validate, test or export an experiment.

    python launch.py --train --config configs/lods-gs-embedding.yaml configs/pocket.yaml \\
        system.prompt_processor.prompt="a car"

Options of the config are overridden by key=value; several configs are merged from left to right.
"""

import argparse
import contextlib
import inspect
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help shows the options)\n")


def parse_args(argv):
    """``(args, overrides)`` of a command line."""
    parser = _Parser(
        prog="launch.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        action="append",
        metavar="YAML",
        help="config file; several are merged, later ones win",
    )
    parser.add_argument(
        "--gpu",
        default="0",
        help="GPUs to use, such as 0 or 0,1 (default 0; without a CUDA device the CPU is used)",
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="train, then test")
    mode.add_argument("--validate", action="store_true", help="render the validation views")
    mode.add_argument("--test", action="store_true", help="render the test views and the video")
    mode.add_argument("--export", action="store_true", help="export the 3D object")
    parser.add_argument(
        "--gradio",
        action="store_true",
        help="for a program that watches the run: keep its state in the file 'progress' of the "
        "run's folder instead of drawing a bar, and export after training",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="log everything, and show where errors come from"
    )
    parser.add_argument(
        "--typecheck",
        action="store_true",
        help="not supported, and refused: a config may hold a schedule where a number is declared",
    )
    args, overrides = parser.parse_known_args(argv)
    words = [word for group in args.config for word in group]
    # '--config x.yaml key=value' is read as two files by argparse
    from threestudio.utils.hints import split_config_words

    args.config, first = split_config_words(words)
    overrides = first + overrides
    if not args.config:
        parser.error("--config needs a file")
    if args.typecheck:  # jaxtyping's hook checks dataclasses too, and schedules break them
        parser.error("--typecheck is not supported: leave it out")
    return args, overrides


# --- output -------------------------------------------------------------------------------------

_NOISE = (  # of libraries, about things that are as they should be here
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*resuming from a checkpoint that ended.*",
    ".*callbacks used to create the checkpoint.*",
    ".*The dirpath has changed from.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*LeafSpec.*is deprecated.*",
    ".*in eval mode at the start of training.*",
    ".*torchvision.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*`training_step` returned `None`.*",
    ".*predict returned None.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
)


# what everything imports, by the names of the modules
_PACKAGES = {
    "torch",
    "omegaconf",
    "pytorch_lightning",
    "diffusers",
    "transformers",
    "peft",
    "numba",
}


class _NotLightning(logging.Filter):
    """Drops what Lightning tells about itself (extensions log through the same logger)."""

    def filter(self, record):
        own = "pytorch_lightning" in record.pathname or "lightning_fabric" in record.pathname
        return record.levelno >= logging.WARNING or not own


def _quieten(verbose: bool) -> None:
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        for handler in (logger, *logger.handlers):
            for old in [f for f in handler.filters if isinstance(f, _NotLightning)]:
                handler.removeFilter(old)
            if not verbose:
                handler.addFilter(_NotLightning())
    if not verbose:
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


# --- set-up -------------------------------------------------------------------------------------


def _extension_folders() -> list:
    return list(dict.fromkeys([HERE / "custom", Path.cwd() / "custom"]))


def _load_extensions(verbose: bool) -> None:
    """Those that fail are named later, at the end of start-up or before the error that ends it."""
    from threestudio.utils.extensions import load_custom_modules

    for root in _extension_folders():
        for error in load_custom_modules(root).values():
            if error is not None and verbose:
                traceback.print_exception(error)


def _check_names(function, values, where: str) -> None:
    """Refuse arguments that `function` does not have, naming the nearest it has."""
    from threestudio.utils.errors import UserError, nearest

    names = set(inspect.signature(function).parameters) - {"self", "callbacks", "plugins"}
    for key in values:
        if key not in names:
            raise UserError(f"{where} has no option {key!r}{nearest(key, names)}")


def _make_callbacks(args, cfg, guard, trainer_args: dict) -> list:
    from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint

    from threestudio.utils import callbacks
    from threestudio.utils.checkpoint import LastCheckpoint
    from threestudio.utils.restore import RestoreCheck

    # first, so that it comes before the progress bar
    made: list = [callbacks.ReportFailures(), RestoreCheck(cfg.resume)]
    if args.gradio:
        made.append(callbacks.ProgressCallback(os.path.join(cfg.trial_dir, "progress")))
    elif trainer_args.get("enable_progress_bar", True):
        made.append(callbacks.CustomProgressBar())
    if not args.train:
        return made
    made += [
        callbacks.CodeSnapshotCallback(
            os.path.join(cfg.trial_dir, "code"),
            use_version=False,
            exclude=[cfg.exp_root_dir, cfg.exp_dir],
        ),
        callbacks.ConfigSnapshotCallback(
            args.config, cfg, os.path.join(cfg.trial_dir, "configs"), use_version=False
        ),
    ]
    if trainer_args.get("logger", True):
        made.append(LearningRateMonitor(logging_interval="step"))
    if trainer_args.get("enable_checkpointing", True):
        options = dict(cfg.checkpoint)
        _check_names(ModelCheckpoint.__init__, options, "checkpoint")
        options.pop("save_last", None)  # LastCheckpoint does that, and always
        options = {"dirpath": os.path.join(cfg.trial_dir, "ckpts"), **options}
        # a resumed run writes over its own files (Lightning before 2.2 always does)
        if "enable_version_counter" in inspect.signature(ModelCheckpoint).parameters:
            options.setdefault("enable_version_counter", False)
        every = options.get("every_n_train_steps")
        made += [
            ModelCheckpoint(**options),
            LastCheckpoint(_last_path(cfg), guard, every_n_train_steps=every),
        ]
    return made


# --- the run ------------------------------------------------------------------------------------

_MODES = ("train", "validate", "test", "export")


def _mode(args) -> str:
    return next(mode for mode in _MODES if getattr(args, mode))


def _load(args, overrides):
    """``(config, counters)``: the config, checked as far as it can be before anything is built,
    and ``(epoch, global_step)`` of the checkpoint in `resume`, or None."""
    import torch

    from threestudio.utils.checkpoint import find_checkpoint, read_checkpoint
    from threestudio.utils.misc import find_last_path
    from threestudio.utils.preflight import read_config
    from threestudio.utils.restore import check_structure

    n_gpus = len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) if torch.cuda.is_available() else 1
    cfg = read_config(args.config, overrides, _mode(args), n_gpus)
    if cfg.resume is None:
        return cfg, None
    cfg.resume = find_checkpoint(find_last_path(cfg.resume))
    checkpoint = read_checkpoint(cfg.resume)
    check_structure(checkpoint, cfg.resume, _mode(args))
    return cfg, (checkpoint["epoch"], checkpoint["global_step"])


def _checkpoint_folder(cfg) -> str:
    return cfg.checkpoint.get("dirpath") or os.path.join(cfg.trial_dir, "ckpts")


def _last_path(cfg) -> str:
    return os.path.join(_checkpoint_folder(cfg), "last.ckpt")


def _make_trainer(args, cfg, guard, trainer_args: dict, system):
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    from threestudio.systems.base import BaseLift3DSystem
    from threestudio.utils.checkpoint import AtomicCheckpointIO
    from threestudio.utils.config import config_to_primitive
    from threestudio.utils.errors import UserError
    from threestudio.utils.loggers import make_loggers

    loggers: list | bool = False
    if args.train and trainer_args.get("logger", True):
        loggers = [*make_loggers(cfg.trial_dir), *system.get_loggers()]
    defaults = {
        "default_root_dir": cfg.trial_dir,
        "inference_mode": False,  # a system may need gradients to render (normals)
        "enable_model_summary": False,
        "enable_checkpointing": args.train,
    }
    rendering = config_to_primitive(cfg.system).get("exporter", {}).get("save_video")
    if not rendering and type(system).predict_step is BaseLift3DSystem.predict_step:
        defaults["limit_predict_batches"] = 1  # an export renders no views: do not make them all
    if args.gradio:
        # else Lightning draws a bar of its own
        trainer_args = {**trainer_args, "enable_progress_bar": False}
    plugins = [AtomicCheckpointIO()]
    try:
        # torchrun comes first, as in Lightning; SLURM's files for requeueing would be loaded by
        # whatever runs in that folder next
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))
        return pl.Trainer(
            callbacks=_make_callbacks(args, cfg, guard, trainer_args),
            plugins=plugins,
            **{
                **defaults,
                **trainer_args,
                "logger": loggers,
            },
        )
    except UserError:
        raise
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"trainer or checkpoint options: {text}") from error


def _execute(args, cfg, counters, guard, trainer, system, data) -> None:
    from threestudio.utils.checkpoint import Interrupted

    if not args.train:
        system.set_resume_status(*counters)
        tasks = {"validate": trainer.validate, "test": trainer.test, "export": trainer.predict}
        tasks[_mode(args)](system, datamodule=data, ckpt_path=cfg.resume)
        return
    if counters and counters[1] >= trainer.max_steps >= 0:
        print(
            f"{cfg.resume} is at step {counters[1]} of {trainer.max_steps}: nothing is left to "
            "train (a larger trainer.max_steps continues it)"
        )
    trainer.fit(system, datamodule=data, ckpt_path=cfg.resume)
    if guard.requested:  # too late to stop a step, in time to leave out the test
        raise Interrupted(trainer.global_step, guard.signum)
    trainer.test(system, datamodule=data, verbose=args.verbose)
    if args.gradio:
        trainer.predict(system, datamodule=data)


def run(args, overrides, argv) -> int:
    """Do what the command line says. Returns the exit status."""
    from threestudio.utils.preflight import preflight

    preflight(args.config, overrides, _mode(args), _extension_folders(), args.verbose)
    import pytorch_lightning as pl

    import threestudio
    from threestudio.utils.checkpoint import Interrupted, InterruptGuard
    from threestudio.utils.config import config_to_primitive
    from threestudio.utils.explain import why_stopped
    from threestudio.utils.misc import choose_device, get_rank

    _quieten(args.verbose)  # again: importing Lightning has set its loggers up
    _load_extensions(args.verbose)
    cfg, counters = _load(args, overrides)
    trainer_args = config_to_primitive(cfg.trainer)
    _check_names(pl.Trainer.__init__, trainer_args, "trainer")
    trainer_args = choose_device(trainer_args)
    pl.seed_everything(cfg.seed + get_rank(), workers=True)

    with InterruptGuard() as guard:
        new_folder = not os.path.exists(cfg.trial_dir)
        try:
            data = threestudio.find(cfg.data_type)(cfg.data)
            system = threestudio.find(cfg.system_type)(cfg.system, resumed=cfg.resume is not None)
            system.checkpoint_name = f"checkpoint {cfg.resume}"  # for an error to name
            system.set_save_dir(os.path.join(cfg.trial_dir, "save"))
            trainer = _make_trainer(args, cfg, guard, trainer_args, system)
            if trainer.is_global_zero:
                _begin_trial(args, argv, cfg.trial_dir)
            _execute(args, cfg, counters, guard, trainer, system, data)
        except BaseException as error:
            if new_folder:
                _discard_trial(cfg)
            if isinstance(error, Interrupted):
                return _report_interrupt(error, args, cfg)
            reason = why_stopped(error, cfg, _checkpoint_folder(cfg))
            if reason is None:
                raise
            raise reason from error
    if trainer.is_global_zero:
        _report(args, cfg, system)
    return 0


def _begin_trial(args, argv, trial_dir: str) -> None:
    """Make the run's folder, now that nothing in the config can fail any more."""
    import threestudio
    from threestudio.utils.files import remove_leftovers, whole_file

    os.makedirs(trial_dir, exist_ok=True)
    if args.train:  # anything else may look at a run that goes on
        remove_leftovers(trial_dir)
    command = shlex.join(["python", sys.argv[0] or "launch.py", *argv])
    with whole_file(os.path.join(trial_dir, "cmd.txt")) as tmp:
        tmp.write_text(f"{command}\n{args}\n", encoding="utf-8", errors="backslashreplace")
    if args.gradio:
        handler = logging.FileHandler(os.path.join(trial_dir, "logs"))
        handler.handleError = lambda record: None  # a full disk costs a line, not the run
        threestudio.logger.addHandler(handler)


def _discard_trial(cfg) -> None:
    """Remove the folder of a run that ended before it had any result."""
    folders = Path(_checkpoint_folder(cfg)), Path(cfg.trial_dir, "save")
    results = [path for folder in folders for path in folder.rglob("*")]
    if not any(path.is_file() for path in results):
        shutil.rmtree(cfg.trial_dir, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs are in it
            os.rmdir(cfg.exp_dir)


def _report(args, cfg, system) -> None:
    print(f"\nresults in {cfg.trial_dir}")
    summary = getattr(system, "result_summary", None)
    for line in summary() if summary is not None else []:
        print(f"  {line}")
    if args.train and os.path.exists(_last_path(cfg)):
        print(f"  checkpoint: {_last_path(cfg)}")


def _report_interrupt(stop, args, cfg) -> int:
    from threestudio.utils.misc import get_rank

    last = _last_path(cfg)
    if get_rank():  # the first process speaks for all
        return stop.status
    if stop.step is not None:
        more = "" if args.gpu == "0" else f" --gpu {shlex.quote(args.gpu)}"
        more += " --gradio" * args.gradio
        parsed = shlex.quote(os.path.join(cfg.trial_dir, "configs", "parsed.yaml"))
        print(
            f"interrupted at step {stop.step}; resume with: "
            f"python launch.py --config {parsed} --train{more} {shlex.quote(f'resume={last}')}"
        )
    elif os.path.exists(last):
        print(f"interrupted; the last checkpoint is {last}")
    else:
        print("interrupted; nothing had been trained yet")
    return stop.status


# --- errors -------------------------------------------------------------------------------------


def _explain(error: BaseException) -> "str | None":
    """One line for a mistake that the user can mend, None for any other error."""
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return (
            f"the package {error.name} is not installed for {sys.executable}: activate the "
            "environment of `make demo` (. .venv/bin/activate), or pip install -r requirements.txt"
        )
    from threestudio.utils.errors import UserError

    if isinstance(error, UserError):  # told without the imports below, which take seconds
        return " ".join(str(error).split())
    from threestudio.utils.explain import explain

    return explain(error, (HERE / "threestudio", HERE / "custom"))


class _EarlySignal:
    """Context in which SIGTERM, like SIGINT, raises KeyboardInterrupt: for the time when nothing
    is trained. `status` is the exit status that goes with the signal."""

    status = 128 + signal.SIGINT

    def _handle(self, signum, frame):
        self.status = 128 + signum
        raise KeyboardInterrupt

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def main(argv=None) -> int:
    """Run the command line `argv`; returns the exit status: 2 after a mistake or a full disk, 130
    after Ctrl-C and 143 after SIGTERM (128 + the signal's number, as shells and schedulers know
    it), at whatever moment they come."""
    from threestudio.utils.streams import print_anything

    print_anything()
    argv = list(sys.argv[1:] if argv is None else argv)
    args, overrides = parse_args(argv)
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", args.gpu)
    quiet = contextlib.nullcontext() if args.verbose else warnings.catch_warnings()
    with quiet, _EarlySignal() as early:
        _quieten(args.verbose)
        try:
            return run(args, overrides, argv)
        except KeyboardInterrupt:
            print("interrupted; nothing had been trained yet")
            return early.status
        except Exception as error:
            message = _explain(error)
            extensions = sys.modules.get("threestudio.utils.extensions")
            if extensions is not None:  # the run got so far, and has not told of failures yet
                extensions.report_failures()
            if message is None:
                raise
            if args.verbose:
                traceback.print_exc()
            print(f"error: {message}", file=sys.stderr)
            return 2
        except BaseException as error:
            if not hasattr(error, "status"):
                raise
            print("interrupted")  # again, while the first signal was dealt with
            return error.status


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of Python's own shutdown
    sys.exit(status)
