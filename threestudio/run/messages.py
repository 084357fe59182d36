"""What a run tells at its end: where its results are, how it goes on, or what went wrong."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from threestudio.run.arguments import Call
from threestudio.run.folder import last_checkpoint
from threestudio.run.viewer import options as viewer

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


def report(call: Call, cfg: Any, system: Any) -> None:
    """Print where the results are, after the page that shows them is made."""
    print(f"\nresults in {cfg.trial_dir}")
    summary = getattr(system, "result_summary", None)
    for line in summary() if summary is not None else []:
        print(f"  {line}")
    if call.args.train and os.path.exists(last_checkpoint(cfg)):
        print(f"  checkpoint: {last_checkpoint(cfg)}")
    if cfg.report and call.mode != "validate":
        from threestudio.run.page import try_page

        made = try_page(cfg.trial_dir)
        if made is not None:
            print(f"  page: {made}")


def report_interrupt(call: Call, cfg: Any, stop: Any) -> int:
    """Print what an interruption has cost, and how to go on. Returns the exit status."""
    from threestudio.utils.misc import get_rank

    if not get_rank():  # the first process speaks for all
        print(_how_to_go_on(call, cfg, stop))
    return stop.status


def _how_to_go_on(call: Call, cfg: Any, stop: Any) -> str:
    """What an interruption has cost, and the command that continues."""
    from threestudio.run.named_callbacks import said_again

    args, last = call.args, last_checkpoint(cfg)
    if not args.train or not os.path.exists(last):
        return again(call)
    mode = "--test" if stop.trained and not args.gradio else "--train"
    more = [] if args.gpu is None else ["--gpu", args.gpu]
    more += [word for folder in args.extensions for word in ("--extensions", folder)]
    more += ["--gradio"] * args.gradio
    if mode == "--train":
        more += viewer.words(args) + ([] if args.replay is None else ["--replay", args.replay])
    parsed = os.path.join(cfg.trial_dir, "configs", "parsed.yaml")
    if not os.path.exists(parsed):  # stopped in its set-up: it resumes what the command names
        return again(call)
    more += [f"resume={last}", *said_again(cfg)]
    command = shlex.join([*call.program.words, "--config", parsed, mode, *more])
    if stop.step is not None:
        return f"interrupted at step {stop.step}; resume with: {command}"
    what = "in the final rendering" if stop.trained else f"the last checkpoint is {last}"
    return f"interrupted; {what}; continue with: {command}"


def again(call: Call) -> str:
    """For what has left nothing behind, or begins anew where it had begun."""
    if call.args.train and not any(word.startswith("resume=") for word in call.argv):
        return "interrupted; nothing had been trained yet"
    return f"interrupted; start again with: {shlex.join([*call.program.words, *call.argv])}"


def explain_error(error: BaseException, home: Path) -> str | None:
    """One line for a mistake that the user can mend, None for any other error."""
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return (
            f"the package {error.name} is not installed for {sys.executable}: activate the "
            "environment of `make demo` (. .venv/bin/activate), or pip install -r requirements.txt"
        )
    from threestudio.utils.errors import UserError

    if isinstance(error, UserError):  # told without the imports below, which take seconds
        return " ".join(str(error).split())
    from threestudio.run.explain import explain

    return explain(error, (Path(__file__).resolve().parents[1], home / "custom"))
