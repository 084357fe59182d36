"""``python -m lods`` is the command ``lods``."""

import os
import sys

if not sys.flags.safe_path and os.path.dirname(os.path.dirname(__file__)) != sys.path[0]:
    # the current folder, of which a file called torch.py is not torch
    del sys.path[0]

from lods.cli import main

if __name__ == "__main__":
    sys.exit(main())
