"""The command ``lods``: it finds the module of the word after it, and runs that.

The commands are in :mod:`lods.commands`. Nothing heavy is imported before their arguments have been
checked.
"""

import contextlib
import importlib
import sys
from collections.abc import Sequence

from lods import __version__, host
from lods.files import told
from lods.settings import nearest

# each command: its module in lods.commands, whose ``main(argv, command)`` returns an exit status,
# and what the help says of it
COMMANDS = {
    "make": ("make", "make 3D objects of one prompt or many"),
    "train": ("train", "train with configs of your own: the options of launch.py"),
    "resume": ("runs", "go on with the training of a run"),
    "test": ("runs", "render the views and the video of a run again"),
    "view": ("view", "show a run in a browser, one that is being trained too"),
    "export": ("runs", "write the object of a run as glb, ply, obj, ..."),
    "report": ("report", "a page of a run, or of several side by side: one HTML file"),
    "2d": ("playground", "distil pictures, not objects: lods 2d lora, lods 2d embedding"),
    "edit": ("edit", "change a picture, or Gaussians, by a text"),
    "compare": ("compare", "compare methods on a grid of prompts and seeds: evaluate.py"),
    "studio": ("studio", "a page in the browser that makes objects and shows them"),
    "merge": ("merge", "one YAML from several, for launchers that take one"),
    "doctor": ("doctor", "what works on this machine, and what would make the rest work"),
}
HELP = """\
usage: lods COMMAND ...

Text to 3D by score distillation. To begin with:

    lods make "a blue backpack"

{commands}

lods COMMAND --help shows the options of a command, lods --version the version.
A RUN is a run's folder, a checkpoint of it, or a piece of its name below outputs/.
"""


def one_line(text: str) -> str:
    """A text in one line. It may quote names from elsewhere, and what is not printed in them would
    be commands to the terminal."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 after a mistake, 128 + N after signal N."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with _steady_streams():
        try:
            return _run(argv)
        except ValueError as error:  # what the user can mend; its text is one line
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            return 2
        except OSError as error:  # such as a full disk, or a name that is too long
            print(f"error: {one_line(told(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"    {name:<9}{text}" for name, (_, text) in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"lods {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS) or f": they are {', '.join(COMMANDS)}"
        raise ValueError(f"lods has no command {command!r}{hint}")
    found = importlib.import_module(f"lods.commands.{COMMANDS[command][0]}")
    return found.main(rest, f"lods {command}")


def _steady_streams() -> contextlib.AbstractContextManager[None]:
    """What launch.py does about streams that cannot be written; nothing where there is no host."""
    try:
        streams = host.module("threestudio.run.streams")
    except ValueError:
        return contextlib.nullcontext()
    streams.print_anything()
    return streams.steady_streams()


if __name__ == "__main__":
    sys.exit(main())
