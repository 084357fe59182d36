"""Everything that a run imports: the server that runs are forked from imports it once."""

import importlib

from evaluation.machine import ROOT
from threestudio.utils.extensions import load_custom_modules

NEEDED = {
    "evaluation.run": (),
    "diffusers": ("AutoencoderKL", "DDIMScheduler", "DDPMScheduler", "UNet2DConditionModel"),
    "peft": (),
    "scipy.linalg": (),
    "transformers": ("AutoTokenizer", "CLIPTextModel"),
}

for name, lazy in NEEDED.items():
    module = importlib.import_module(name)
    for attribute in lazy:  # imported where it is first asked for
        getattr(module, attribute)
load_custom_modules(ROOT / "custom")
