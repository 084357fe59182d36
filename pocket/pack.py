"""What a training takes to a machine with a GPU, and what comes back, in small files.

    python -m pocket.pack make --work W --to pack.safetensors --megabytes 40
    bash pocket/on_gpu.sh pack.safetensors OUT unet 20000 512     # there; or flow, or views
    python -m pocket.pack take --work W --name unet --from OUT    # here again

``python -m pocket.pack adopt --work W --from FOLDER`` makes finished stages ``vae`` and ``unet`` of
a model's folder, so that the transformer, the four views or the decoder can be trained for the
autoencoder that is shipped, without the first hours; with ``--name unet`` the UNet only, for a
work folder that has the autoencoder already.

The pack holds latents in eight bits (their standard deviation is 1, the step 1/24), all with a
white background and every fourth also with another, the cameras, and the autoencoder in half
precision, and it says what they were made with (:mod:`pocket.recipes`). If that is more than the
limit, the last views of each object are left out. What comes back are the averaged weights in half
precision, in parts of at most 15 MiB.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pocket import recipes
from pocket.autoencoder import build, encoder_digest, load_vae
from pocket.latents import NAMES
from pocket.tools import say, whole_file
from pocket.training import load_state, save_state

STEP = 1 / 24
COLOURED_EVERY = 4  # of the views, one goes along before its coloured background too
PART = 15 << 20  # bytes
NAMES_OF_MODELS = ("unet", "flow", "views")


def make(work: Path, file: Path, megabytes: float) -> int:
    """Write the pack of ``work``; returns how many views of a series it has at most.

    Raises ``ValueError`` if the limit leaves no view.
    """
    from safetensors.torch import save_file

    vae = {f"vae {k}": v.half().contiguous() for k, v in load_vae(work).state_dict().items()}
    room = megabytes * 2**20 - sum(2 * v.numel() for v in vae.values()) - 2**16
    series = {f.stem: np.load(f) for f in sorted((work / "latents").glob("*.npy"))}
    cameras = {f.parent.name: np.load(f) for f in sorted((work / "renders").glob("*/cameras.npy"))}
    if not series:
        raise ValueError(f"{work} has no latents yet: run the stage latents first")
    counts = [len(z) for z in series.values()]
    each = next(iter(series.values()))[0, 0].size
    views = max(counts)
    while views and sum(min(n, views) for n in counts) * each * (1 + 1 / COLOURED_EVERY) > room:
        views -= 1
    if not views:
        raise ValueError(f"{megabytes} MB is too little for the latents: give more --megabytes")
    tensors = dict(vae)
    for key, z in series.items():
        eight = np.clip(np.round(z[:views].astype(np.float32) / STEP), -127, 127).astype(np.int8)
        tensors[f"white {key}"] = torch.from_numpy(np.ascontiguousarray(eight[:, 0]))
        other = np.ascontiguousarray(eight[::COLOURED_EVERY, 1])
        tensors[f"coloured {key}"] = torch.from_numpy(other)
    for slug, values in cameras.items():
        tensors[f"cameras {slug}"] = torch.from_numpy(values[:views])
    with whole_file(file) as tmp:
        save_file(tensors, tmp, {"made_with": json.dumps(recipes.read(work))})
    return views


def unpack(file: Path, work: Path) -> None:
    """Make a work folder of a pack. A view without a coloured background has its white one
    twice."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = load_file(file)
    with safe_open(file, "pt") as stored:
        made = (stored.metadata() or {}).get("made_with")
    vae = {k[4:]: v.float() for k, v in tensors.items() if k.startswith("vae ")}
    work.mkdir(parents=True, exist_ok=True)
    if made is not None:
        with whole_file(work / "made_with.json") as tmp:
            tmp.write_text(made)
        recipes.read(work)  # raises if it is damaged
    save_state(work / "vae.pt", model=vae)
    for name, value in tensors.items():
        kind, _, key = name.partition(" ")
        if kind == "cameras" and key in NAMES:
            _save(work / "renders" / key / "cameras.npy", value.numpy())
        elif kind == "white" and any(key == s or key.startswith(f"{s}-") for s in NAMES):
            z = np.stack([value.numpy()] * 2, axis=1)
            z[::COLOURED_EVERY, 1] = tensors[f"coloured {key}"].numpy()
            _save(work / "latents" / f"{Path(key).name}.npy", z.astype(np.float16) * STEP)


def _save(file: Path, array: np.ndarray) -> None:
    with whole_file(file) as tmp, tmp.open("wb") as stream:
        np.save(stream, array)


def weights(work: Path, name: str, folder: Path) -> list[Path]:
    """Write the averaged weights of a training in half precision to ``folder``, in parts."""
    from safetensors.torch import save

    state = load_state(work / f"{name}_state.pt")
    values = {k: v for k, v in state["model"].items() if v.is_floating_point()}
    average = dict(zip(state["parameters"], state["average"]["shadow_params"], strict=True))
    values = {k: average.get(k, v).half().contiguous() for k, v in values.items()}
    made = json.dumps(recipes.read(work).get(name, {}))
    data = save(values, {"step": str(state["step"]), "made_with": made})
    parts = []
    for k, start in enumerate(range(0, len(data), PART)):
        parts.append(folder / f"{name}.{k}.part")
        with whole_file(parts[-1]) as tmp:
            tmp.write_bytes(data[start : start + PART])
    return parts


def take(work: Path, name: str, folder: Path) -> int:
    """Make a state of the parts in ``folder``, which ``save`` and further training take up;
    returns its step. Replaces none that has seen more steps, or that was made with something else.
    """
    from safetensors.torch import load

    parts = sorted(folder.glob(f"{name}.*.part"), key=lambda f: int(f.name.split(".")[-2]))
    if not parts:
        raise ValueError(f"{folder} has no {name}.0.part")
    data = b"".join(part.read_bytes() for part in parts)
    try:
        values = {k: v.float() for k, v in load(data).items()}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        step = int(header["__metadata__"]["step"])
        recipe = dict(json.loads(header["__metadata__"].get("made_with", "{}")))
    except Exception as error:
        raise ValueError(f"the parts of {name} in {folder} are damaged: {error}") from None
    file = work / f"{name}_state.pt"
    if recipe:
        recipes.check(work, [name], {name: recipe})
    if file.exists() and load_state(file)["step"] > step:
        raise ValueError(f"{file} has seen more than {step} steps: move it away first")
    save_state(file, model=values, step=step, steps=step, falls=step, weights_only=True)
    if recipe:
        recipes.note(work, name, {name: recipe})
    return step


def adopt(work: Path, folder: Path, stages: Sequence[str] = ("vae", "unet")) -> None:
    """Make these stages of ``work`` out of the folder of a model, for the stages that build upon
    them; a training of the UNet would begin with these weights at step 0.

    Raises ``ValueError`` where one of them has begun already, for the folder of another kind of
    model, and for a UNet of another autoencoder than that of ``work``.
    """
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    from pocket.diffusion import Model
    from pocket.latents import tokenizer

    for stage in stages:
        if recipes.begun(work, stage):
            raise ValueError(f"{work} has a stage {stage} already: give another --work")
    try:
        work.mkdir(parents=True, exist_ok=True)
        model, vae = Model(tokenizer(work)), build()
        vae.load_state_dict(load_file(folder / "vae/diffusion_pytorch_model.safetensors"))
        # transformers renames the keys of its files as it reads them
        text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        model.text_encoder.load_state_dict(text.state_dict())
        camera = load_file(folder / "camera_encoder/model.safetensors")
        model.camera_encoder.load_state_dict(camera)
        model.unet.load_state_dict(load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} is no folder of the model pocket: {said}") from None
    if "vae" in stages:
        save_state(work / "vae.pt", model=vae.state_dict())
    elif encoder_digest(load_vae(work).half()) != encoder_digest(vae.half()):
        raise ValueError(f"{folder} and {work} have different autoencoders: adopt both stages")
    if "unet" in stages:
        weights = model.state_dict()
        save_state(
            work / "unet_state.pt", model=weights, step=0, steps=0, falls=0, weights_only=True
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m pocket.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("make", "unpack", "weights", "take", "adopt"))
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument("--name", choices=NAMES_OF_MODELS)
    parser.add_argument("--from", type=Path, dest="source")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--megabytes", type=float, default=40.0)
    args = parser.parse_args(arguments)
    directions = {"make": "to", "unpack": "source", "weights": "to"}
    needed = directions.get(args.what, "source")
    if args.what == "adopt" and args.name not in (None, "unet"):
        parser.error(f"adopt takes no --name but unet, not {args.name}")
    if getattr(args, needed) is None:
        parser.error(f"{args.what} needs --{'from' if needed == 'source' else 'to'}")
    try:
        if args.what == "make":
            views = make(args.work, args.to, args.megabytes)
            say(f"{args.to}: {args.to.stat().st_size / 2**20:.1f} MiB, up to {views} views each")
        elif args.what == "unpack":
            unpack(args.source, args.work)
        elif args.what == "weights":
            say(*weights(args.work, args.name or "unet", args.to))
        elif args.what == "adopt":
            stages = (args.name,) if args.name else ("vae", "unet")
            adopt(args.work, args.source, stages)
            say(f"{args.work}: {' and '.join(stages)} of {args.source}")
        else:
            name = args.name or "unet"
            say(f"{name} after {take(args.work, name, args.source)} steps")
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
