"""Before anything is loaded: can the models that the config names be had, can they read its prompt,
and can it be trained on so many GPUs?

The launcher of this repository asks it early, through ``preflight.py`` beside the package, before
torch is imported; upstream's does not know it, and finds out when the models are loaded.
"""

import sys
from typing import Any, NamedTuple

from lods.declared import settings_of
from lods.models import cards
from lods.models.additions import Additions
from lods.models.vocabulary import FORCE, Vocabulary


class Kind(NamedTuple):
    """What a system makes, in words; the geometries that it is meant for, the first its default;
    options that no other kind has; and the overlay for the embedded model."""

    words: str
    geometries: tuple[str, ...]
    options: tuple[str, ...]
    overlay: str


GAUSSIANS = "lods-gs-system"
EDITED = "lods-edited-gaussians"
MESHES = "lods-mesh-system"
EDITED_MESH = "lods-edited-mesh"
SYSTEMS = {  # which load their models in every mode
    GAUSSIANS: Kind(
        "Gaussians",
        ("lods-gaussians", EDITED),
        ("strategy", "geometry.sh_degree", "geometry.ball.n_points", "geometry.init_opacity"),
        "pocket.yaml",
    ),
    "lods-ngp-system": Kind(
        "a radiance field",
        ("implicit-volume", "volume-grid"),
        ("geometry.pos_encoding_config", "renderer.num_samples_per_ray"),
        "pocket-ngp.yaml",
    ),
    MESHES: Kind(
        "a textured mesh",
        ("lods-mesh", EDITED_MESH),
        ("geometry.texture_size", "geometry.free_vertices", "geometry.ball.subdivisions"),
        "pocket-mesh.yaml",
    ),
}
# which Gaussians and meshes have, and radiance fields have not
EXPLICIT = ("lr_schedule", "geometry.init_type", "geometry.ball")
# the processors whose prompt is checked: the first is these systems' default, the second is the
# host's own, which can be given a model of this extension
PROCESSORS = ("lods-prompt-processor", "stable-diffusion-prompt-processor")
EXPORTER = "lods-gaussian-exporter"
EXPORTS = ("ply", "points", "glb", "splat", "compressed-ply", "spz")  # what it writes
LEARNING = ("lods-embedding-guidance", "lods-lora-guidance", "lods-vsd-guidance")
# methods that change what is there
EDITING = tuple(f"lods-{name}-guidance" for name in ("dds", "drf", "edit", "pds", "ssd"))
EDIT = (
    "system.guidance_type={} edits what is there, Gaussians or a mesh: lods edit FILE --from TEXT "
    f"--to TEXT makes such a run ({GAUSSIANS} with geometry_type={EDITED}, or {MESHES} with "
    f"{EDITED_MESH}, and geometry.init_type=file)"
)
NO_SOURCE_PROMPT = "an edit needs a text of what is there before: give source_prompt='a cat'"
PERP_NEG = (
    "use_perp_neg needs prompts with words for the view (system.guidance.view_dependent_prompting="
    "true, and cameras words or both), or set system.prompt_processor.use_perp_neg=false"
)
INNER_STEPS = (
    "prior_inner_steps would teach the learned part of each GPU something else: train on one GPU "
    "(--gpu 0), or set system.guidance.prior_inner_steps=0"
)


def preflight(cfg: Any, mode: str) -> None:
    """Raise ``ValueError``, one line, for what cannot be trained by several processes, for a model
    that is no folder, card or hub id, for a card (``lods/models/cards.yaml``) or hub id that is not
    on this machine while there is no network, and for a prompt in which the model knows no object.

    What is not certain is left to the run: systems of other extensions, and everything on the hub
    where a connection to it can be opened.
    """
    if cfg.system_type in SYSTEMS:
        check_kind(cfg)
        check_edit(cfg)
        if mode == "train":
            refuse_training(cfg)
        check_distilled(cfg.system)
        for name in model_names(cfg.system):
            cards.refuse_early(name)
        check_additions(cfg.system)
        check_cameras(cfg.system)
        if mode == "train":
            check_views(cfg)
        check_exports(cfg)
    if cfg.get("resume") is None:  # what has been trained stays of use
        check_prompt(cfg)


def check_kind(cfg: Any) -> None:
    """Raise ``ValueError``, one line, for options of one kind of system in the config of another:
    an overlay of the other kind."""
    own = SYSTEMS[cfg.system_type]
    if cfg.system.get("geometry_type", own.geometries[0]) not in own.geometries:
        return  # of another extension, whose options are its own
    foreign = [
        (key, other) for other in SYSTEMS.values() if other is not own for key in other.options
    ]
    if own.geometries[0] == "implicit-volume":
        foreign += [(key, SYSTEMS[GAUSSIANS]) for key in EXPLICIT]
    for key, other in foreign:
        section, _, name = key.rpartition(".")
        if name in _section(cfg.system, section):
            raise ValueError(
                f"system.{key} is of {other.words}, and {cfg.system_type} makes {own.words}: take "
                f"the overlay configs/{own.overlay}, or leave the key out"
            )


def check_edit(cfg: Any) -> None:
    """Raise ``ValueError``, one line, for a guidance that edits where there is nothing to edit, or
    no text of what is there."""
    system = cfg.system
    if (kind := system.get("guidance_type")) not in EDITING:
        return
    start = _part(system, "geometry").get("init_type")
    kinds = {GAUSSIANS: EDITED, MESHES: EDITED_MESH}
    edited = system.get("geometry_type") == kinds.get(cfg.system_type, "")
    if not edited or start not in ("file", "run", "none"):
        raise ValueError(EDIT.format(kind))
    if _part(system, "prompt_processor").get("source_prompt") is None:
        raise ValueError(f"{NO_SOURCE_PROMPT} (system.prompt_processor.source_prompt)")


def check_exports(cfg: Any) -> None:
    """Raise ``ValueError``, one line, for a format that the exporter of Gaussians does not have."""
    default = EXPORTER if cfg.system_type == GAUSSIANS else None
    if cfg.system.get("exporter_type", default) == EXPORTER:
        wrong = unknown_export(_part(cfg.system, "exporter").get("fmt"))
        if wrong:
            raise ValueError(f"system.exporter.fmt {wrong}")


def unknown_export(fmt: Any) -> str:
    """What is wrong with ``fmt``, a format or a list of them; nothing if the exporter has all."""
    if fmt is None:
        return ""
    for each in [fmt] if isinstance(fmt, str) or not hasattr(fmt, "__iter__") else fmt:
        if each not in EXPORTS:
            return f"has {str(each)[:40]!r}: the formats are {', '.join(EXPORTS)}"
    return ""


def check_cameras(system: Any) -> None:
    """Raise ``ValueError``, one line, for a guidance of this extension whose model is to be told
    cameras and has no encoder of them, and for Perp-Neg, which needs words for the view, in prompts
    without them."""
    guidance, told = _part(system, "guidance"), _part(system, "guidance").get("cameras", "words")
    if not str(system.get("guidance_type")).startswith("lods-"):
        return
    words = guidance.get("view_dependent_prompting")
    words = told != "tokens" if words is None else words
    if _part(system, "prompt_processor").get("use_perp_neg") is True and not words:
        raise ValueError(PERP_NEG)
    if told in ("tokens", "both"):
        for name in model_names(system, ("guidance",)):
            if cards.local_folder(name) and not cards.has_camera_encoder(name):
                raise ValueError(cards.no_camera_encoder(name, told, "system.guidance."))


def check_distilled(system: Any) -> None:
    """Raise ``ValueError``, one line, for the card of a model without a null prediction, which all
    our methods need: before it is asked whether it is here, or has to be downloaded."""
    kind = str(system.get("guidance_type"))
    if settings_of(kind) is None:  # none of ours
        return
    for name in model_names(system, ("guidance",)):
        card = cards.find_card(name)
        if card and card.no_null:
            raise ValueError(f"system.guidance_type={kind} needs a null prediction: {card.no_null}")


def check_additions(system: Any) -> None:
    """Raise ``ValueError``, one line, for LoRA files or textual inversions that are not there, or
    that only one of prompt processor and guidance adds to the model."""
    found = []
    for part in ("prompt_processor", "guidance"):
        kind = str(system.get(f"{part}_type") or "lods-")
        if kind.startswith("lods-") and ":" not in kind:
            options = _part(system, part)
            added = options.get("model_lora"), options.get("model_embeddings")
            found.append(Additions.of(*added, f"system.{part}."))
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(different(*map(str, found)))


def different(texts: str, model: str) -> str:
    """One line for prompts and a model to which different files are added."""
    return (
        f"the prompts are embedded with {texts or 'nothing'} added to the model, and the guidance "
        f"adds {model or 'nothing'}: give system.guidance the same model_lora and "
        "model_embeddings as system.prompt_processor"
    )


def check_views(cfg: Any) -> None:
    """Raise ``ValueError``, one line, for a model of several views that is not told their cameras,
    or that would be given a batch that is not so many pictures of each object."""
    guidance, size = _part(cfg.system, "guidance"), _part(cfg, "data").get("batch_size")
    sizes = list(size) if hasattr(size, "__iter__") and not isinstance(size, str) else [size]
    for name in model_names(cfg.system, ("guidance",)):
        views = cards.views_of(name)
        if not views or views < 1:
            continue
        if guidance.get("cameras", "words") == "words":
            raise ValueError(
                f"system.guidance.cameras=words: {name!r} sees {views} views at once, and is told "
                "their cameras: set system.guidance.cameras=tokens"
            )
        if any(isinstance(each, int) and each % views for each in sizes):
            raise ValueError(
                f"data.batch_size={size}: {name!r} sees {views} views of an object at once: set "
                "data_type=lods-multiview-camera-datamodule, and data.batch_size to a multiple of "
                f"{views}"
            )


def check_prompt(cfg: Any) -> None:
    """Raise ``ValueError``, one line, for an empty prompt, and for one without any object that the
    model of the prompt processor knows, where its ``vocabulary.json`` lists them.

    Of the host's own prompt processor, which does not look at words, the words that the model
    lacks are named here.
    """
    system = cfg.system
    kind = system.get("prompt_processor_type")
    kind = kind or (PROCESSORS[0] if cfg.system_type in SYSTEMS else None)
    options = _part(system, "prompt_processor")
    name, prompt = (options.get(k) for k in ("pretrained_model_name_or_path", "prompt"))
    if kind not in PROCESSORS or "prompt" not in options:
        return
    if not isinstance(prompt, str):
        shown = "null" if prompt is None else str(prompt)[:40]
        raise ValueError(
            f"system.prompt_processor.prompt is {shown}, which is not a text in YAML: write it in "
            "quotes"
        )
    if not prompt.strip():
        raise ValueError(
            "the prompt is empty: set system.prompt_processor.prompt, for example "
            "'a DSLR image of a hamburger'"
        )
    folder = cards.local_folder(name) if name and isinstance(name, str) else None
    vocabulary = Vocabulary.read(folder) if folder else None
    if vocabulary is None or prompt.startswith("lib:"):  # which the host looks up
        return
    own, force = kind == PROCESSORS[0], FORCE
    if not own:
        force = f"system.prompt_processor_type={PROCESSORS[0]} {force}"
    refusal = vocabulary.refusal(prompt, force)
    if refusal and not (own and options.get("allow_unknown_words")):
        raise ValueError(refusal)
    warning = "" if own else vocabulary.warning([prompt], prompt)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def refuse_training(cfg: Any) -> None:
    """Raise ``ValueError`` if the config would densify, or let the method learn by itself, in
    several processes, or densify with accumulated gradients."""
    system, trainer = cfg.system, _part(cfg, "trainer")
    # of the original's YAML, see lods/threestudio/systems/original.py
    default = "default" if system.get("radius") is not None else "none"
    strategy = _part(system, "strategy").get("name", default)
    several = processes(cfg) > 1
    if cfg.system_type == GAUSSIANS and strategy != "none":
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


def _section(config: Any, path: str) -> Any:
    """The section at this path of names and dots, or an empty one."""
    for name in path.split(".") if path else ():
        config = _part(config, name)
    return config


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


def model_names(system: Any, parts: Any = ("prompt_processor", "guidance")) -> list[str]:
    """What :func:`named_models` finds, each name once."""
    return list(dict.fromkeys(named_models(system, parts).values()))


def named_models(system: Any, parts: Any = ("prompt_processor", "guidance")) -> dict[str, str]:
    """What the prompt processor and the guidance of this extension load, or one of the two
    ``parts``, as far as the config says it: the names of the models by their keys in the config."""
    keys = {"prompt_processor": ["pretrained_model_name_or_path"]}
    keys["guidance"] = list(keys["prompt_processor"])
    if system.get("guidance_type") in ("lods-lora-guidance", "lods-vsd-guidance"):
        keys["guidance"].append("pretrained_model_name_or_path_lora")
    found: dict[str, str] = {}
    for part, names in ((part, keys[part]) for part in parts):
        kind = str(system.get(f"{part}_type") or ("lods-" * (part == "prompt_processor")))
        if kind.startswith("lods-") and ":" not in kind:  # a mixin may load something else
            values = _part(system, part).get
            found |= {
                f"system.{part}.{name}": value
                for name in names
                if isinstance(value := values(name), str) and value
            }
    return found
