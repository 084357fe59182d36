"""The command line that trains, validates, tests and exports: ``launch.py`` and programs like it.

What is heavy is imported when most mistakes in the command line and the config have been told.
"""

import contextlib
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threestudio.run.arguments import HOME, Call, Program, find_config, parse_args
from threestudio.run.messages import again, explain_error, report, report_interrupt
from threestudio.run.signals import EarlySignal
from threestudio.run.streams import print_anything, steady_streams


def main(
    argv: Sequence[str] | None = None,
    prog: str = "launch.py",
    home: str | Path = HOME,
    asked: str = "",
) -> int:
    """Run the command line `argv`; returns the exit status: 2 after a mistake or a full disk, 130
    after Ctrl-C and 143 after SIGTERM (128 + the signal's number, as shells and schedulers know
    it), at whatever moment they come.

    `prog`: what is typed to call the program, the name of a Python file or the words of an
    installed command; messages that tell how to go on use it. `home`: the folder in which
    ``custom/`` and ``configs/`` are. `asked`: the command that a user has typed, if it was another
    one that calls this program; the page of a run shows it.
    """
    print_anything()
    argv = list(sys.argv[1:] if argv is None else argv)
    call = parse_args(argv, Program(prog, Path(home).resolve()), asked)
    with steady_streams():
        return _guarded(call)


def _guarded(call: Call) -> int:
    from threestudio.run.quiet import quieten

    verbose = call.args.verbose
    quiet = contextlib.nullcontext() if verbose else warnings.catch_warnings()
    with quiet, EarlySignal() as early:
        quieten(verbose)
        try:
            from threestudio.run.gpus import seeing_gpus

            with seeing_gpus(call.args.gpu) as gpus:
                return run(call, gpus)
        except KeyboardInterrupt:
            print(again(call))
            return early.status
        except Exception as error:
            message = explain_error(error, call.program.home)
            extensions = sys.modules.get("threestudio.utils.extensions")
            if extensions is not None:  # the run got so far, and has not told of failures yet
                extensions.report_failures()
            if message is None:
                raise
            if verbose:
                traceback.print_exc()
            print(f"error: {message}", file=sys.stderr)
            return 2
        except BaseException as error:
            if not hasattr(error, "status"):
                raise
            print("interrupted")  # again, while the first signal was dealt with
            return error.status


def run(call: Call, gpus: list[str]) -> int:
    """Do what the command line says, on these GPUs. Returns the exit status."""
    from threestudio.run.preflight import preflight
    from threestudio.run.viewer import options as viewing

    args = call.args
    args.config = [find_config(word, call.program) for word in args.config]
    options = viewing.read(args)
    roots = _extension_folders(call)
    preflight(args.config, call.overrides, call.mode, roots, args.verbose)
    from threestudio.run.imports import uncollected

    with uncollected():
        import pytorch_lightning as pl

        import threestudio
        from threestudio.run import interventions
        from threestudio.run.config_check import check_names
        from threestudio.run.explain import why_stopped
        from threestudio.run.folder import RunFolder, checkpoint_folder, settle
        from threestudio.run.interrupt import Interrupted, InterruptGuard
        from threestudio.run.quiet import quieten
        from threestudio.run.trainer import make_trainer
        from threestudio.utils.config import config_to_primitive
        from threestudio.utils.misc import choose_device, get_rank, is_first_process

        quieten(args.verbose)  # again: importing Lightning has set its loggers up
        _load_extensions(roots, args.verbose)
        if args.replay is not None:
            interventions.read(args.replay)  # a mistake in it is told now
        cfg, counters, named = _load(call, gpus, roots)
    viewer = None if options is None else (options, _listen(options, cfg.n_gpus))
    trainer_args = config_to_primitive(cfg.trainer)
    trainer_args.pop("callbacks", None)
    check_names(pl.Trainer.__init__, trainer_args, "trainer")
    trainer_args = choose_device(trainer_args)
    # all processes build the same system, of which DDP expects as many Gaussians
    pl.seed_everything(cfg.seed, workers=True)

    # who only looks holds no folder: results may be written into it meanwhile
    first = is_first_process() and not args.view
    with InterruptGuard() as guard, RunFolder(first) as folder:
        try:
            settle(folder, cfg, args.config, call.overrides, args.train)
            data = threestudio.find(cfg.data_type)(cfg.data)
            save_dir = os.path.join(cfg.trial_dir, "save")
            # it imports the model's libraries
            with uncollected(), _first_picture(call, cfg, save_dir, first):
                kind = threestudio.find(cfg.system_type)
                system = kind(cfg.system, resumed=cfg.resume is not None)
            system.checkpoint_name = f"checkpoint {cfg.resume}"  # for an error to name
            system.set_save_dir(save_dir)
            if get_rank():  # and see other cameras and noise
                pl.seed_everything(cfg.seed + get_rank(), workers=True)
            trainer = make_trainer(call, cfg, guard, trainer_args, system, named, viewer)
            if trainer.is_global_zero and not args.view:
                _begin_trial(call, cfg.trial_dir)
            _execute(call, cfg, counters, guard, folder, trainer, system, data)
        except BaseException as error:
            folder.discard((checkpoint_folder(cfg), os.path.join(cfg.trial_dir, "save")))
            if isinstance(error, Interrupted):
                if args.view:  # which is how it ends
                    return 0
                return report_interrupt(call, cfg, error)
            reason = why_stopped(error, cfg, checkpoint_folder(cfg))
            if reason is None:
                raise
            raise reason from error
        if trainer.is_global_zero:
            report(call, cfg, system)
    return 0


# --- set-up -------------------------------------------------------------------------------------


def _extension_folders(call: Call) -> list[Path]:
    """Those whose code is run: nothing in the current folder is, unless it is asked for."""
    from threestudio.utils import extensions
    from threestudio.utils.errors import UserError
    from threestudio.utils.extensions import find_extensions

    for folder in call.args.extensions:
        if not os.path.isdir(folder):
            raise UserError(f"--extensions {folder}: there is no such folder")
    roots = [call.program.home / "custom", *map(Path, call.args.extensions)]
    here = Path.cwd() / "custom"
    if not any(os.path.realpath(root) == os.path.realpath(here) for root in roots):
        names = [name for name, _ in find_extensions(here)]
        extensions.left_out[:] = names
        if names:
            print(
                f"not loaded: {', '.join(names)[:200]} in {here} (--extensions custom loads them)",
                file=sys.stderr,
            )
    return list(dict.fromkeys(roots))


def _load_extensions(roots: list[Path], verbose: bool) -> None:
    """Those that fail are named later, at the end of start-up or before the error that ends it."""
    from threestudio.utils.extensions import load_custom_modules

    for root in roots:
        for error in load_custom_modules(root).values():
            if error is not None and verbose:
                traceback.print_exception(error)


def _load(call: Call, gpus: list[str], roots: list[Path]) -> tuple[Any, tuple | None, list]:
    """``(config, counters, callbacks)``: the config, checked as far as it can be before anything
    is built, ``(epoch, global_step)`` of the checkpoint in `resume`, or None, and the callbacks
    that the config names."""
    from threestudio.run.config_check import check_parts
    from threestudio.run.folder import resume_of_copy
    from threestudio.run.gpus import count_gpus
    from threestudio.run.named_callbacks import find_callbacks
    from threestudio.run.preflight import ask_extensions, read_config
    from threestudio.run.resume import check_structure
    from threestudio.utils.checkpoint_files import find_checkpoint, read_checkpoint
    from threestudio.utils.misc import find_last_path

    args, overrides, mode = call.args, call.overrides, call.mode
    cfg = read_config(args.config, overrides, mode, count_gpus(gpus, args.gpu))
    if cfg.n_gpus > 1:  # which the first time nobody knew
        ask_extensions(cfg, mode, roots, args.verbose)
    check_parts(cfg, mode)
    named = find_callbacks(cfg, args.config, overrides)
    if cfg.resume is None:
        return cfg, None, named
    cfg.resume = resume_of_copy(cfg, args.config, overrides, args.train)
    cfg.resume = find_checkpoint(find_last_path(cfg.resume))
    checkpoint = read_checkpoint(cfg.resume)
    check_structure(checkpoint, cfg.resume, mode)
    return cfg, (checkpoint["epoch"], checkpoint["global_step"]), named


# --- the run ------------------------------------------------------------------------------------


def _listen(options: Any, n_gpus: int) -> Any:
    """The socket of the view, before anything is loaded: a port that is taken costs no time, and
    who comes early is served once there is something to see."""
    from threestudio.run.viewer.server import listen
    from threestudio.utils.errors import UserError

    if n_gpus > 1:
        raise UserError("--viewer shows a run of one process: add --gpu 0, or leave it out")
    return listen(options)


def _first_picture(call: Call, cfg: Any, save_dir: str, first: bool) -> Any:
    """The context in which the system is built: a training draws its first picture there."""
    from threestudio.run.first_picture import drawn_early, is_wanted

    if not (first and call.args.train and is_wanted(cfg, save_dir)):
        return contextlib.nullcontext()
    silent = call.args.gradio or not cfg.trainer.get("enable_progress_bar", True)

    def tell(path: str) -> None:
        if not silent:  # as for the previews that follow
            print(f"preview: {path}", file=sys.stderr, flush=True)

    return drawn_early(cfg, save_dir, tell)


def _begin_trial(call: Call, trial_dir: str) -> None:
    """Write the command into the run's folder, now that nothing in the config can fail any more."""
    import threestudio
    from threestudio.utils.errors import UserError
    from threestudio.utils.files import remove_leftovers, whole_file

    args = call.args
    logs = os.path.join(trial_dir, "logs")
    if args.gradio and os.path.islink(logs):  # the folder may be somebody else's
        raise UserError(f"{logs} is a link, and would be written through: remove it")
    if args.train:  # anything else may look at a run that goes on
        remove_leftovers(trial_dir)
    words = call.program.words
    if words[0] == "python":  # by the path that was typed
        words = ["python", sys.argv[0] or call.program.name]
    name = "cmd.txt" if args.train else f"cmd-{call.mode}.txt"
    with whole_file(os.path.join(trial_dir, name)) as tmp:
        text = f"{shlex.join([*words, *call.argv])}\n{args}\n"
        tmp.write_text(text, encoding="utf-8", errors="backslashreplace")
    if args.gradio:
        handler = logging.FileHandler(logs)
        handler.handleError = lambda record: None  # a full disk costs a line, not the run
        threestudio.logger.addHandler(handler)
        print(
            "--gradio: no page is opened here; a program can follow the run in the files "
            f"{os.path.join(trial_dir, 'progress')} and logs beside it"
        )


def _execute(call: Call, cfg, counters, guard, folder, trainer, system, data) -> None:
    from threestudio.run.interrupt import Interrupted

    args = call.args
    if not args.train:
        system.set_resume_status(*counters)
        tasks = {"validate": trainer.validate, "test": trainer.test, "export": trainer.predict}
        tasks["view"] = trainer.predict  # which begins to show, and never gets to a view
        tasks[call.mode](system, datamodule=data, ckpt_path=cfg.resume)
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
