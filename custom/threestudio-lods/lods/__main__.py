"""``python -m lods`` is the command ``lods``."""

import sys

from lods.cli import main

if __name__ == "__main__":
    sys.exit(main())
