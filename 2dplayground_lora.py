"""Distil a few images from a prompt with LODS and a learnt LoRA; ``--help`` says how."""

import sys
from pathlib import Path

from threestudio.run.streams import steady_streams
from threestudio.utils.extensions import load_extension

if __name__ == "__main__":
    extension = Path(__file__).resolve().parent / "custom" / "threestudio-lods"
    with steady_streams():
        status = load_extension(extension, submodule="playground").main("lora")
    sys.exit(status)
