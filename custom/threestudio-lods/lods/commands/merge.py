"""``lods merge``: see :mod:`lods.merge`."""

import lods.merge


def main(argv: list[str], command: str) -> int:
    return lods.merge.main(argv, command)
