"""The command line of a run: which program was called, with which options. Imports no torch."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from threestudio.run.terminal import PROTOCOLS
from threestudio.run.viewer import options as viewer
from threestudio.utils.errors import UserError, nearest

HOME = Path(__file__).resolve().parents[2]
_DESCRIPTION = """\
Train, validate, test or export an experiment.

    {command} --train --config my.yaml system.prompt_processor.prompt="a car"

A config is a file, or the name of one that is shipped{shipped}.
Its options are overridden by key=value; several configs are merged from left to right.
"""
_MODES = ("train", "validate", "test", "export", "view")


@dataclass(frozen=True)
class Program:
    """The program that was called: its name, as messages and its help show it, and its home, the
    folder in which ``custom/`` (extensions) and ``configs/`` (YAML files found by name) are."""

    name: str = "launch.py"
    home: Path = HOME

    @property
    def words(self) -> list[str]:
        """What is typed to call it: ``python launch.py``, or the words of an installed command."""
        return ["python", self.name] if self.name.endswith(".py") else self.name.split()

    @property
    def shipped(self) -> list[str]:
        """The names of the configs in its home."""
        return sorted(path.stem for path in (self.home / "configs").glob("*.yaml"))


@dataclass(frozen=True)
class Call:
    """One call of a program: its words as they were typed, and what they mean. ``asked``: the
    command of another program that has made this call; "" where there is none."""

    program: Program
    argv: list[str]
    args: argparse.Namespace
    overrides: list[str]
    asked: str = ""

    @property
    def mode(self) -> str:
        """ "train", "validate", "test", "export" or "view"."""
        return next(mode for mode in _MODES if getattr(self.args, mode))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help shows the options)\n")


def parse_args(argv: Sequence[str], program: Program = Program(), asked: str = "") -> Call:
    """The command line `argv` of `program`. A mistake in it ends the program with status 2 and one
    line; the configs are not looked for yet (see :func:`find_config`)."""
    parser = _make_parser(program)
    args, overrides = parser.parse_known_args(viewer.with_port(argv))
    words = [word for group in args.config for word in group]
    # '--config x.yaml key=value' is read as two files by argparse
    args.config, first = split_config_words(words)
    overrides = first + overrides
    if not args.config:
        parser.error("--config needs a file")
    if "=" in overrides:
        parser.error("a lone '=': write key=value without spaces around the sign")
    if (args.viewer is not None or args.replay is not None) and not (args.train or args.view):
        parser.error("--viewer and --replay are for --train")
    if args.view:
        args.viewer = viewer.AUTO if args.viewer is None else args.viewer
        if args.replay is not None:
            parser.error("--replay is for --train")
    if args.typecheck:  # jaxtyping's hook checks dataclasses too, and schedules break them
        parser.error("--typecheck is not supported: leave it out")
    return Call(program, list(argv), args, overrides, asked)


def _make_parser(program: Program) -> _Parser:
    shipped = f":\n{', '.join(program.shipped)}" if program.shipped else ""
    parser = _Parser(
        prog=program.name,
        description=_DESCRIPTION.format(command=" ".join(program.words), shipped=shipped),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        action="append",
        metavar="YAML",
        help="config file, or the name of a shipped one; several are merged, later ones win",
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
    mode.add_argument(
        "--view", action="store_true", help="show the 3D object in a browser, see --viewer"
    )
    viewer.add_arguments(parser)
    parser.add_argument(
        "--replay",
        metavar="FILE",
        help="make the changes of an interventions.jsonl again at the same steps: those that were "
        "made in the view of another run",
    )
    script = program.name.endswith(".py")
    always = f"in custom/ beside {program.name}" if script else "that come with this program"
    parser.add_argument(
        "--extensions",
        action="append",
        default=[],
        metavar="FOLDER",
        help=f"also load the extensions in FOLDER, whose code is run (those {always} always are)",
    )
    parser.add_argument(
        "--gradio",
        action="store_true",
        help="for a program that starts and watches the run, as threestudio's web app does (it is "
        "not part of this repository, and no page is opened): the state is in the file 'progress' "
        "of the run's folder instead of a bar, the log in 'logs', and training ends with an export",
    )
    parser.add_argument(
        "--show-previews",
        choices=("auto", *PROTOCOLS),
        help="draw each validation picture in the terminal too, if it is one that shows pictures: "
        "auto finds out which kind, the others say it",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="log everything, and show where errors come from"
    )
    parser.add_argument(
        "--typecheck",
        action="store_true",
        help="not supported, and refused: a config may hold a schedule where a number is declared",
    )
    return parser


def split_config_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """``(files, overrides)`` of what follows ``--config``: files come first, and after the first
    ``key=value`` only a word that ends like one is a file (it may be a word of a prompt)."""
    files, overrides = [], []
    for word in words:
        named = word.endswith((".yaml", ".yml")) and ("=" not in word or os.path.exists(word))
        early = not overrides and ("=" not in word or os.path.isfile(word))
        (files if named or early else overrides).append(word)
    return files, overrides


def find_config(word: str, program: Program) -> str:
    """The config file that `word` after ``--config`` means: a file by its path, from the current
    folder or else from the home of `program`; or by a name without a folder and an ending, one that
    is shipped in ``configs/`` there.

    Raises :class:`UserError`, with the nearest name, for a name that nothing there has. A path of
    no file is returned as it is: its reader says what is wrong with it.
    """
    is_name = os.path.basename(word) == word and not word.endswith((".yaml", ".yml"))
    if os.path.exists(word) and not (is_name and os.path.isdir(word)):
        return word
    home = program.home
    for file in (home / word, *[home / "configs" / f"{word}.yaml"] * is_name):
        if file.is_file():
            return str(file)
    if not is_name:
        return word
    known = program.shipped
    hint = nearest(word, known) or f"; those are {', '.join(known)}" * bool(known)
    raise UserError(f"--config {word}: there is neither such a file nor a shipped config{hint}")
