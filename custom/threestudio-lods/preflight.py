"""Before anything is loaded: can the models that the config names be had, and can it be trained
on so many GPUs?

``launch.py`` of this repository executes this file alone and early; upstream's does not know it,
and finds out when the models are loaded.
"""

import importlib.util
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SYSTEMS = ("lods-gs-system", "lods-ngp-system")  # both load their models in every mode
LEARNING = ("lods-embedding-guidance", "lods-lora-guidance", "lods-vsd-guidance")
INNER_STEPS = (
    "prior_inner_steps would teach the prior of each GPU something else: train on one GPU "
    "(--gpu 0), or set system.guidance.prior_inner_steps=0"
)


def preflight(cfg: Any, mode: str) -> None:
    """Raise ``ValueError``, one line, for what cannot be trained by several processes, for a model
    that is no folder, card or hub id, and for a card (``models/cards.yaml``) or hub id that is not
    on this machine while there is no network.

    What is not certain is left to the run: systems of others, and everything of the hub where a
    connection to it can be opened.
    """
    if cfg.system_type not in SYSTEMS:
        return
    if mode == "train":
        refuse_training(cfg)
    names = model_names(cfg.system)
    if names:
        cards = _load(HERE / "guidance" / "cards.py")
        for name in names:
            cards.refuse_early(name)


def refuse_training(cfg: Any) -> None:
    """Raise ``ValueError`` if the config would densify, or teach the prior by itself, in several
    processes, or densify with accumulated gradients."""
    system, trainer = cfg.system, _part(cfg, "trainer")
    # of the original's YAML, see system/original.py
    default = "default" if system.get("radius") is not None else "none"
    strategy = _part(system, "strategy").get("name", default)
    several = processes(cfg) > 1
    if cfg.system_type == SYSTEMS[0] and strategy != "none":
        refuse_densification(several, trainer.get("accumulate_grad_batches", 1))
    inner = _part(system, "guidance").get("prior_inner_steps")
    if several and inner and system.get("guidance_type") in LEARNING:
        raise ValueError(INNER_STEPS)


def refuse_densification(several: bool, batches_per_step: Any) -> None:
    """Raise ``ValueError`` if Gaussians cannot be densified by such a training."""
    if batches_per_step not in (None, 1):
        raise ValueError(
            "densification needs every step: set trainer.accumulate_grad_batches=1 (and a "
            "larger data.batch_size), or system.strategy.name=none"
        )
    if several:
        raise ValueError(
            "densification would change the Gaussians of each GPU differently: train on one GPU "
            "(--gpu 0), or set system.strategy.name=none"
        )


def _part(config: Any, name: str) -> Any:
    """A section of a config; an empty one for what is none, of which the run complains."""
    found = config.get(name)
    return found if hasattr(found, "get") else {}


def processes(cfg: Any) -> int:
    """How many processes will train; at least, where ``n_gpus`` is not known yet and 1."""
    trainer, numbers = _part(cfg, "trainer"), []
    for key in ("devices", "num_nodes"):
        value = str(trainer.get(key))
        numbers.append(int(value) if value.isascii() and value.isdigit() else 0)
    devices, nodes = numbers
    if trainer.get("accelerator") != "cpu":  # there are no more of them than are visible
        gpus = cfg.get("n_gpus") or 1
        devices = min(devices or gpus, gpus)
    return max(devices, 1) * max(nodes, 1)


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
