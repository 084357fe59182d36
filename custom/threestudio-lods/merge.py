"""One YAML from a configuration and its overlays: the command of ``lods/merge.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lods.merge import main

if __name__ == "__main__":
    sys.exit(main())
