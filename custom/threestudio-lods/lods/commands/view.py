"""``lods view``: a run in a browser."""

import webbrowser

from lods import host
from lods.commands.parser import Parser, add_viewer, viewer_words, with_port
from lods.commands.runs import find_run, start

ABOUT = """\
Show a run in a browser, to turn it and to save pictures and files of it.

Of a run that is being trained with --viewer it prints the address; any other is loaded from its
last checkpoint and shown until Ctrl-C.
"""


def main(argv: list[str], command: str) -> int:
    parser = Parser(command, ABOUT)
    parser.add_argument(
        "run", metavar="RUN", help="its folder, a checkpoint of it, or a piece of its name"
    )
    parser.add_argument("--gpu", help="GPU to use, such as 0")
    add_viewer(parser)
    args = parser.parse_args(with_port(argv))
    args.viewer = "auto" if args.viewer is None else args.viewer
    run = find_run(args.run)
    server = host.module("threestudio.run.viewer.server")
    if run.checkpoint == run.folder and (found := server.running(run.folder)):
        print(f"view: {found['url']}")
        if args.viewer_open:
            webbrowser.open(found["url"])
        return 0
    words = [*run.words, "--view", *viewer_words(args)]
    return start([*words, *([] if args.gpu is None else ["--gpu", args.gpu])])
