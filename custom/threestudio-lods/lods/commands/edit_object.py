"""``lods edit`` of an object: a run of ``lods-gs-system``, or of ``lods-mesh-system``, that starts
from a file."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lods.commands.job import OVERLAY_ENDS, as_typed
from lods.commands.make import find_method, has_gpu, mesh_in, refuse_unknown_words
from lods.commands.runs import exported_object, find_run, start
from lods.edits.picture import light_pixels
from lods.edits.settings import level_of, refuse_unseen
from lods.preflight import EDITED, EDITED_MESH, EDITING

OF_PICTURES = ("lr", "draws", "every", "negative_prompt", "region", "cameras")
MOST = 1e6  # of a coordinate
# the files of a run in which its object is, and whether that is a mesh: the first that there is
EXPORTED = {"gaussians.ply": False, "mesh.glb": True, "model.glb": True, "model.obj": True}


def main(args: argparse.Namespace) -> int:
    """Train, and draw the sheet of before and after."""
    from lods.commands.edit import texts

    if wrong := [name for name in OF_PICTURES if getattr(args, name) is not None]:
        option = wrong[0].replace("_", "-")
        raise ValueError(f"--{option} is of a picture, and {args.what} is none: see --help")
    source, target = texts(args, in_config=True)
    method = find_method("lods-edit" if args.method == "edit" else args.method or "dds")
    if f"{method}-guidance" not in EDITING:
        names = ", ".join(name.removesuffix("-guidance") for name in EDITING)
        raise ValueError(f"--method {args.method} edits nothing: the methods that do are {names}")
    box = None if args.box is None else read_box(args.box)
    level = level_of(args.where, args.level)
    what, mesh = object_of(args.what)
    if mesh:
        what = mesh_in(what, str(what))
    words = [*configs(args, source, target, method, mesh), *settings(args, what, mesh, box, level)]
    return start([*words, *args.overrides])


def read_box(text: str) -> list[float]:
    """x0, y0, z0, x1, y1, z1. Raises ``ValueError``, one line."""
    try:
        box = [float(word) for word in text.split(",")]
    except ValueError:
        box = []
    good = len(box) == 6 and all(abs(v) <= MOST for v in box)
    if not good or not all(low < high for low, high in zip(box[:3], box[3:])):
        raise ValueError(
            f"--box {text[:60]!r} is not written X0,Y0,Z0,X1,Y1,Z1, six numbers with X0 < X1, "
            "Y0 < Y1 and Z0 < Z1"
        )
    return box


def object_of(word: str) -> tuple[Path, bool]:
    """The file that is meant, itself or the newest that the run has exported, and whether it is a
    mesh, and no Gaussians. Raises ``ValueError``, one line."""
    from lods.gaussians.mesh_file import FORMATS  # which imports torch

    path = Path(word)
    suffix = path.suffix.lower()
    if suffix.removeprefix(".") in FORMATS:
        if not path.is_file():
            raise ValueError(f"there is no file {word}")
        return path, suffix != ".ply" or " face " in _head(path)
    if path.is_file() and path.suffix != ".ckpt":
        raise ValueError(
            f"{word} is neither a picture, nor a ply file of Gaussians, nor a mesh, nor a run"
        )
    run = find_run(word)
    found = exported_object(run, list(EXPORTED))
    if found is None:
        raise ValueError(f"{run.folder} has no Gaussians and no mesh: there is nothing to edit")
    return found, EXPORTED[found.name]


def _head(path: Path) -> str:
    """The header of a ply file. Raises ``ValueError``, one line, where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 16).partition(b"end_header")[0].decode("latin-1")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def degree_in(path: Path) -> int:
    """The degree of the spherical harmonics in a ply file, by its header. Raises ``ValueError``,
    one line, for one that holds no Gaussians."""
    head = _head(path)
    if not head.startswith("ply") or " f_dc_0" not in head:
        raise ValueError(f"{path} is no ply file of 3D Gaussians")
    rest = head.count(" f_rest_")
    degrees = {0: 0, 9: 1, 24: 2, 45: 3}
    if rest not in degrees:
        raise ValueError(f"{path} has {rest} higher harmonics a Gaussian, and not 0, 9, 24 or 45")
    return degrees[rest]


def configs(
    args: argparse.Namespace, source: str, target: str, method: str, mesh: bool
) -> list[str]:
    """The first words of the training: the configs that suit the model, and the texts."""
    from lods.models import cards, choose

    if args.model is None:
        model, why = choose()
        print(f"model: {model} ({why})", flush=True)
    else:
        model = args.model
        cards.refuse_early(model)
    if not args.allow_unknown_words:
        refuse_unknown_words([source, target], model)
        if args.where is not None:
            refuse_unseen(args.where, model)
    card = cards.all_cards().get(cards.canonical(model))
    names = [f"lods-{'mesh' if mesh else 'gs'}-embedding"]
    small = bool(card and card.overlay) or not has_gpu()
    if small:
        overlay = (
            card.overlay if card and card.overlay else cards.all_cards()[cards.EMBEDDED].overlay
        )
        names.append(f"{overlay}{OVERLAY_ENDS['mesh'] if mesh else ''}")
    kind = "edit-mesh" if mesh else "edit"
    names += [kind, *[f"{kind}-pocket"] * small]
    prompt, told = "system.prompt_processor", cards.has_camera_encoder(model)
    values: dict[str, Any] = {
        f"{prompt}.prompt": as_typed(target),
        f"{prompt}.source_prompt": as_typed(source),
        f"{prompt}.pretrained_model_name_or_path": model,
        "system.guidance_type": f"{method}-guidance",
        "system.guidance.cameras": "tokens" if told else "words",
        "checkpoint.save_top_k": 0,
        "checkpoint.every_n_train_steps": 50,
    }
    if args.allow_unknown_words:
        values[f"{prompt}.allow_unknown_words"] = "true"
    return ["--config", *names, "--train", *(f"{key}={value}" for key, value in values.items())]


def settings(
    args: argparse.Namespace, what: Path, mesh: bool, box: list[float] | None, level: float
) -> list[str]:
    """The settings of the training that the other options mean; ``level`` is that of --where."""
    values: dict[str, Any] = {
        "system.geometry_type": EDITED_MESH if mesh else EDITED,
        "system.geometry.file.path": as_typed(str(what.resolve())),
        "system.exporter.fmt": "glb" if mesh else "ply",
    }
    if not mesh:
        values["system.geometry.sh_degree"] = degree = degree_in(what)
        if degree:
            values["system.optimizer.params"] = "{geometry.shN: {lr: 2.5e-4}}"
    if box is not None:
        values["system.geometry.box"] = json.dumps(box)
    if args.mask is not None:
        light_pixels(args.mask, f"--mask {args.mask}")
        values["system.geometry.mask"] = as_typed(str(args.mask.resolve()))
    for name in ("azimuth", "elevation"):
        if getattr(args, name) is not None:
            if args.mask is None:
                raise ValueError(f"--{name} is the side of --mask here, which is not there")
            values[f"system.geometry.mask_{name}"] = getattr(args, name)
    if args.where is not None:
        values |= {"system.where": as_typed(args.where), "system.where_level": level}
    if args.steps is not None:
        values["trainer.max_steps"] = args.steps
    if args.scale is not None:
        values["system.guidance.guidance_scale"] = args.scale
    if args.seed is not None:
        values["seed"] = args.seed
    if args.out is not None:
        # "." and ".." have no name of their own
        out = args.out if args.out.name not in ("", "..") else Path(os.path.abspath(args.out))
        values |= {"exp_root_dir": out.parent, "name": as_typed(out.name)}
    words = [f"{key}={value}" for key, value in values.items()]
    return [*words, *([] if args.gpu is None else ["--gpu", str(args.gpu)])]
