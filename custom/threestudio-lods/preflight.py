"""Before anything is loaded: can the models that the config names be had?

``launch.py`` of this repository executes this file alone and early; upstream's does not know it,
and finds out when the models are loaded.
"""

import importlib.util
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SYSTEMS = ("lods-gs-system", "lods-ngp-system")  # both load their models in every mode


def preflight(cfg: Any, mode: str) -> None:
    """Raise ``ValueError``, one line, for a model that is no folder, card or hub id, and for a card
    (``models/cards.yaml``) or hub id that is not on this machine while there is no network.

    What is not certain is left to the run: systems of others, and everything of the hub where a
    connection to it can be opened.
    """
    if cfg.system_type not in SYSTEMS:
        return
    names = model_names(cfg.system)
    if names:
        cards = _load(HERE / "guidance" / "cards.py")
        for name in names:
            cards.refuse_early(name)


def model_names(system: Any) -> list[str]:
    """What the prompt processor and the guidance of this extension load, as far as the config
    says it; each once."""
    keys = {"prompt_processor": ["pretrained_model_name_or_path"]}
    keys["guidance"] = list(keys["prompt_processor"])
    if system.get("guidance_type") in ("lods-lora-guidance", "lods-vsd-guidance"):
        keys["guidance"].append("pretrained_model_name_or_path_lora")
    found: dict[str, None] = {}
    for part, names in keys.items():
        kind = system.get(f"{part}_type") or ("lods-" if part == "prompt_processor" else "")
        if kind.startswith("lods-") and ":" not in kind:  # a mixin may load something else
            values = (system.get(part) or {}).get
            found |= {value: None for name in names if isinstance(value := values(name), str)}
    return [name for name in found if name]


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"{__name__}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
