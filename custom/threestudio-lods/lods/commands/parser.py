"""Command lines whose mistakes cost one line."""

import argparse
from pathlib import Path
from typing import NoReturn

from lods import host


class Parser(argparse.ArgumentParser):
    """As argparse's, with one line for a mistake, and without abbreviated options."""

    def __init__(self, command: str, description: str, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=command,
            description=description,
            formatter_class=form,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help shows the options)\n")


def count(text: str) -> int:
    """A number from 1 to 1,000,000, for ``type=``."""
    value = int(text)
    if not 1 <= value <= 1_000_000:
        raise ValueError
    return value


count.__name__ = "number from 1 to 1000000"  # argparse names it in its message


def add_viewer(parser: argparse.ArgumentParser) -> None:
    """The options of the live view, as launch.py has them; :func:`with_port` comes before."""
    host.module("threestudio.run.viewer.options").add_arguments(parser)


def with_port(argv: list[str]) -> list[str]:
    """``argv``, in which a lone ``--viewer`` does not take the word after it for its port."""
    return host.module("threestudio.run.viewer.options").with_port(argv)


def viewer_words(args: argparse.Namespace) -> list[str]:
    """The options of the live view for ``lods train``, checked."""
    options = host.module("threestudio.run.viewer.options")
    options.read(args)
    return options.words(args)


def made_folder(option: str, path: Path) -> None:
    """Make the folder that an option names, before anything is computed. Raises ``ValueError``
    for one that cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be made a folder: {error.strerror}") from None
