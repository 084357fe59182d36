"""``lods report``: the page of a run, or of several side by side."""

from pathlib import Path

from lods import host
from lods.commands.parser import Parser
from lods.commands.runs import find_run

ABOUT = """\
Write a page of a run, finished or stopped, or of several side by side: one HTML file that needs no
network, with the object to turn, its views, curves, settings, and the command that repeats it.

    lods report mushroom
    lods report outputs/lods-gs-embedding/*snowman* --out snowmen.html

(The report of a comparison of methods is written by lods compare report.)
"""
NAME = "report.html"


def main(argv: list[str], command: str) -> int:
    parser = Parser(command, ABOUT)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="its folder, a checkpoint of it, or a piece of its name",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page; of one run {NAME} in its folder, of several {NAME} in this one",
    )
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out {args.out}: a page ends in .html")
    folders = list(dict.fromkeys(find_run(word).folder for word in args.runs))
    target = args.out if args.out or len(folders) == 1 else Path(NAME)
    # the settings' defaults are those of the classes that the extensions bring
    extensions = host.module("threestudio.utils.extensions")
    page = host.module("threestudio.run.page")
    page.check(folders, target)
    extensions.load_custom_modules(host.home() / "custom")
    try:
        made = page.write_page(folders, target)
    except OSError as error:
        raise ValueError(
            f"{error.filename or target} cannot be written: {error.strerror}"
        ) from None
    print(made)
    return 0
