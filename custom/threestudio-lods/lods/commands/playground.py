"""``lods 2d``: the two 2D playgrounds, see :mod:`lods.playground`."""

from lods.commands.parser import Parser

KINDS = ("lora", "embedding")
ABOUT = """\
Distil a few pictures from a prompt.

    lods 2d lora --prompt "a blue backpack"

lods 2d lora --help and lods 2d embedding --help show the options.
"""


def main(argv: list[str], command: str) -> int:
    parser = Parser(command, ABOUT)
    parser.add_argument("kind", choices=KINDS, help="what is learned beside the pictures")
    kind = parser.parse_args(argv[:1]).kind
    from lods import playground

    return playground.main(kind, argv[1:], f"{command} {kind}")
