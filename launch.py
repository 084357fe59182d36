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
import signal
import sys
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
        help="GPUs to use, such as 0 or 0,1: places in CUDA_VISIBLE_DEVICES where it is set. "
        "Without this option all of that list, or GPU 0; without a CUDA device the CPU",
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="train, then test")
    mode.add_argument("--validate", action="store_true", help="render the validation views")
    mode.add_argument("--test", action="store_true", help="render the test views and the video")
    mode.add_argument("--export", action="store_true", help="export the 3D object")
    parser.add_argument(
        "--extensions",
        action="append",
        default=[],
        metavar="FOLDER",
        help="also load the extensions in FOLDER, whose code is run (those in custom/ beside "
        "launch.py always are)",
    )
    parser.add_argument(
        "--gradio",
        action="store_true",
        help="for a program that starts and watches the run, as threestudio's web app does (it is "
        "not part of this repository, and no page is opened): the state is in the file 'progress' "
        "of the run's folder instead of a bar, the log in 'logs', and training ends with an export",
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
    if "=" in overrides:
        parser.error("a lone '=': write key=value without spaces around the sign")
    # shipped configs are found from every folder
    args.config = [
        str(HERE / file) if not os.path.exists(file) and os.path.isfile(HERE / file) else file
        for file in args.config
    ]
    if args.typecheck:  # jaxtyping's hook checks dataclasses too, and schedules break them
        parser.error("--typecheck is not supported: leave it out")
    return args, overrides


# --- set-up -------------------------------------------------------------------------------------


def _extension_folders(args) -> list:
    """Those whose code is run: nothing in the current folder is, unless it is asked for."""
    from threestudio.utils.errors import UserError
    from threestudio.utils.extensions import find_extensions

    for folder in args.extensions:
        if not os.path.isdir(folder):
            raise UserError(f"--extensions {folder}: there is no such folder")
    roots = [HERE / "custom", *map(Path, args.extensions)]
    here = Path.cwd() / "custom"
    if not any(os.path.realpath(root) == os.path.realpath(here) for root in roots):
        names = [name for name, _ in find_extensions(here)]
        if names:
            print(
                f"not loaded: {', '.join(names)[:200]} in {here} (--extensions custom loads them)",
                file=sys.stderr,
            )
    return list(dict.fromkeys(roots))


def _load_extensions(roots, verbose: bool) -> None:
    """Those that fail are named later, at the end of start-up or before the error that ends it."""
    from threestudio.utils.extensions import load_custom_modules

    for root in roots:
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
    from pytorch_lightning.callbacks import LearningRateMonitor

    from threestudio.utils import callbacks
    from threestudio.utils.best_checkpoints import BestCheckpoints, ModelCheckpoint
    from threestudio.utils.checkpoint import LastCheckpoint
    from threestudio.utils.restore import RestoreCheck

    # first, so that it comes before the progress bar
    made: list = [
        callbacks.ReportFailures(),
        callbacks.SharedFolder(cfg),
        RestoreCheck(cfg.resume),
    ]
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
            BestCheckpoints(**options),
            LastCheckpoint(_last_path(cfg), guard, every_n_train_steps=every),
        ]
    return made


# --- the run ------------------------------------------------------------------------------------

_MODES = ("train", "validate", "test", "export")


def _mode(args) -> str:
    return next(mode for mode in _MODES if getattr(args, mode))


def _load(args, overrides, gpus, roots):
    """``(config, counters)``: the config, checked as far as it can be before anything is built,
    and ``(epoch, global_step)`` of the checkpoint in `resume`, or None."""
    from threestudio.utils.checkpoint import find_checkpoint, read_checkpoint
    from threestudio.utils.config_check import check_parts
    from threestudio.utils.gpus import count_gpus
    from threestudio.utils.misc import find_last_path
    from threestudio.utils.preflight import ask_extensions, read_config
    from threestudio.utils.restore import check_structure
    from threestudio.utils.run_folder import resume_of_copy

    cfg = read_config(args.config, overrides, _mode(args), count_gpus(gpus, args.gpu))
    if cfg.n_gpus > 1:  # which the first time nobody knew
        ask_extensions(cfg, _mode(args), roots, args.verbose)
    check_parts(cfg, _mode(args))
    if cfg.resume is None:
        return cfg, None
    cfg.resume = resume_of_copy(cfg, args.config, overrides, args.train)
    cfg.resume = find_checkpoint(find_last_path(cfg.resume))
    checkpoint = read_checkpoint(cfg.resume)
    check_structure(checkpoint, cfg.resume, _mode(args))
    return cfg, (checkpoint["epoch"], checkpoint["global_step"])


def _last_path(cfg) -> str:
    from threestudio.utils.run_folder import checkpoint_folder

    return os.path.join(checkpoint_folder(cfg), "last.ckpt")


def _make_trainer(args, cfg, guard, trainer_args: dict, system):
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    from threestudio.systems.base import BaseLift3DSystem
    from threestudio.utils.checkpoint import AtomicCheckpointIO
    from threestudio.utils.config import config_to_primitive
    from threestudio.utils.errors import UserError
    from threestudio.utils.loggers import make_loggers
    from threestudio.utils.run_folder import checkpoint_folder

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
    plugins = [AtomicCheckpointIO(checkpoint_folder(cfg))]
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


def _execute(args, cfg, counters, guard, folder, trainer, system, data) -> None:
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
    try:
        with folder.results(cfg.trial_dir):
            trainer.test(system, datamodule=data, verbose=args.verbose)
            if args.gradio:
                trainer.predict(system, datamodule=data)
    except Interrupted as stop:
        stop.trained = True
        raise


def run(args, overrides, argv, gpus) -> int:
    """Do what the command line says, on these GPUs. Returns the exit status."""
    from threestudio.utils.preflight import preflight

    roots = _extension_folders(args)
    preflight(args.config, overrides, _mode(args), roots, args.verbose)
    import pytorch_lightning as pl

    import threestudio
    from threestudio.utils.checkpoint import Interrupted, InterruptGuard
    from threestudio.utils.config import config_to_primitive
    from threestudio.utils.explain import why_stopped
    from threestudio.utils.misc import choose_device, get_rank, is_first_process
    from threestudio.utils.quiet import quieten
    from threestudio.utils.run_folder import RunFolder, checkpoint_folder, settle

    quieten(args.verbose)  # again: importing Lightning has set its loggers up
    _load_extensions(roots, args.verbose)
    cfg, counters = _load(args, overrides, gpus, roots)
    trainer_args = config_to_primitive(cfg.trainer)
    _check_names(pl.Trainer.__init__, trainer_args, "trainer")
    trainer_args = choose_device(trainer_args)
    # all processes build the same system, of which DDP expects as many Gaussians
    pl.seed_everything(cfg.seed, workers=True)

    with InterruptGuard() as guard, RunFolder(is_first_process()) as folder:
        try:
            settle(folder, cfg, args.config, overrides, args.train)
            data = threestudio.find(cfg.data_type)(cfg.data)
            system = threestudio.find(cfg.system_type)(cfg.system, resumed=cfg.resume is not None)
            system.checkpoint_name = f"checkpoint {cfg.resume}"  # for an error to name
            system.set_save_dir(os.path.join(cfg.trial_dir, "save"))
            if get_rank():  # and see other cameras and noise
                pl.seed_everything(cfg.seed + get_rank(), workers=True)
            trainer = _make_trainer(args, cfg, guard, trainer_args, system)
            if trainer.is_global_zero:
                _begin_trial(args, argv, cfg.trial_dir)
            _execute(args, cfg, counters, guard, folder, trainer, system, data)
        except BaseException as error:
            folder.discard((checkpoint_folder(cfg), os.path.join(cfg.trial_dir, "save")))
            if isinstance(error, Interrupted):
                return _report_interrupt(error, args, argv, cfg)
            reason = why_stopped(error, cfg, checkpoint_folder(cfg))
            if reason is None:
                raise
            raise reason from error
        if trainer.is_global_zero:
            _report(args, cfg, system)
    return 0


def _begin_trial(args, argv, trial_dir: str) -> None:
    """Write the command into the run's folder, now that nothing in the config can fail any more."""
    import threestudio
    from threestudio.utils.errors import UserError
    from threestudio.utils.files import remove_leftovers, whole_file

    logs = os.path.join(trial_dir, "logs")
    if args.gradio and os.path.islink(logs):  # the folder may be somebody else's
        raise UserError(f"{logs} is a link, and would be written through: remove it")
    if args.train:  # anything else may look at a run that goes on
        remove_leftovers(trial_dir)
    command = shlex.join(["python", sys.argv[0] or "launch.py", *argv])
    name = "cmd.txt" if args.train else f"cmd-{_mode(args)}.txt"
    with whole_file(os.path.join(trial_dir, name)) as tmp:
        tmp.write_text(f"{command}\n{args}\n", encoding="utf-8", errors="backslashreplace")
    if args.gradio:
        handler = logging.FileHandler(logs)
        handler.handleError = lambda record: None  # a full disk costs a line, not the run
        threestudio.logger.addHandler(handler)
        print(
            "--gradio: no page is opened here; a program can follow the run in the files "
            f"{os.path.join(trial_dir, 'progress')} and logs beside it"
        )


def _report(args, cfg, system) -> None:
    print(f"\nresults in {cfg.trial_dir}")
    summary = getattr(system, "result_summary", None)
    for line in summary() if summary is not None else []:
        print(f"  {line}")
    if args.train and os.path.exists(_last_path(cfg)):
        print(f"  checkpoint: {_last_path(cfg)}")


def _report_interrupt(stop, args, argv, cfg) -> int:
    from threestudio.utils.misc import get_rank

    if not get_rank():  # the first process speaks for all
        print(_how_to_go_on(stop, args, argv, cfg))
    return stop.status


def _how_to_go_on(stop, args, argv, cfg) -> str:
    """What an interruption has cost, and the command that continues."""
    last = _last_path(cfg)
    if not args.train or not os.path.exists(last):
        return _again(args, argv)
    mode = "--test" if stop.trained and not args.gradio else "--train"
    more = [] if args.gpu is None else ["--gpu", args.gpu]
    more += [word for folder in args.extensions for word in ("--extensions", folder)]
    more += ["--gradio"] * args.gradio
    parsed = os.path.join(cfg.trial_dir, "configs", "parsed.yaml")
    if not os.path.exists(parsed):  # stopped in its set-up: it resumes what the command names
        return _again(args, argv)
    command = ["python", "launch.py", "--config", parsed, mode, *more, f"resume={last}"]
    if stop.step is not None:
        return f"interrupted at step {stop.step}; resume with: {shlex.join(command)}"
    what = "in the final rendering" if stop.trained else f"the last checkpoint is {last}"
    return f"interrupted; {what}; continue with: {shlex.join(command)}"


def _again(args, argv) -> str:
    """For what has left nothing behind, or begins anew where it had begun."""
    if args.train and not any(word.startswith("resume=") for word in argv):
        return "interrupted; nothing had been trained yet"
    return f"interrupted; start again with: {shlex.join(['python', 'launch.py', *argv])}"


# --- errors -------------------------------------------------------------------------------------

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


def main(argv=None) -> int:
    """Run the command line `argv`; returns the exit status: 2 after a mistake or a full disk, 130
    after Ctrl-C and 143 after SIGTERM (128 + the signal's number, as shells and schedulers know
    it), at whatever moment they come."""
    from threestudio.utils.signals import steady_streams
    from threestudio.utils.streams import print_anything

    print_anything()
    argv = list(sys.argv[1:] if argv is None else argv)
    args, overrides = parse_args(argv)
    with steady_streams():
        return _guarded(args, overrides, argv)


def _guarded(args, overrides, argv) -> int:
    from threestudio.utils.quiet import quieten
    from threestudio.utils.signals import EarlySignal

    quiet = contextlib.nullcontext() if args.verbose else warnings.catch_warnings()
    with quiet, EarlySignal() as early:
        quieten(args.verbose)
        try:
            from threestudio.utils.gpus import seeing_gpus

            with seeing_gpus(args.gpu) as gpus:
                return run(args, overrides, argv, gpus)
        except KeyboardInterrupt:
            print(_again(args, argv))
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
