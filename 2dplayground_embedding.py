"""Distil a few images from a prompt with LODS and a learned embedding; ``--help`` says how."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "custom" / "threestudio-lods"))

from lods.playground import main

from threestudio.run.streams import steady_streams

if __name__ == "__main__":
    with steady_streams():
        status = main("embedding")
    sys.exit(status)
