"""``python -m pocket.shapes.make``: the model ``pocket-shapes`` from nothing, with a fixed seed.

Stages, each resumable and kept under --work: render pictures, train the autoencoder, train text
encoder and UNet together, then once more for the view words, save a ``StableDiffusionPipeline``
folder, train the judge, report.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from pocket import views
from pocket.tools import say, whole_file

OUT = Path("custom/threestudio-lods/lods/models/pocket-shapes")
STAGES = ("data", "vae", "latents", "unet", "views", "save", "judge", "report")
# what the pictures are made with
WORLD = ("data.py", "raycast.py", "scenes.py")
# What has been renamed since the first folders were made, though the pictures are the same: as it
# is now, and as it was.
MOVED = (
    (b"world of shapes", b"pocket world"),
    (b"from pocket.shapes.", b"from pocket."),
    (b"from pocket.tools import kernel", b"from threestudio.utils.kernel_cache import kernel"),
)


def _moved() -> tuple[tuple[bytes, bytes], ...]:
    """MOVED, and what is in views.py now, and was in data.py below its size."""
    code = Path(views.__file__).read_bytes()
    size, words = b"SIZE = 64\n", code[code.index(b"VIEWS = ") :]
    taken = b"from pocket.views import TEMPLATES, VIEWS, view_of  # noqa: F401\n"
    return (taken, b""), (size, size + words), *MOVED


def world() -> str:
    """A digest of the code that draws the pictures."""
    digest = hashlib.sha256()
    for name in WORLD:
        code = (Path(__file__).parent / name).read_bytes()
        for now, before in _moved():
            code = code.replace(now, before)
        digest.update(code)
    return digest.hexdigest()[:12]


def check_work(work: Path, **options) -> None:
    """Raise ``ValueError`` if the files in ``work`` were made with other options or another world;
    each stage takes those that are there."""
    now = {**options, "world": world()}
    file = work / "made_with.json"
    if file.exists():
        before = json.loads(file.read_text())
        other = [f"{k} {before.get(k)}, not {v}" for k, v in now.items() if before.get(k) != v]
        if other:
            raise ValueError(f"{work} was made with {', '.join(other)}: give another --work")
    with whole_file(file) as tmp:
        tmp.write_text(json.dumps(now))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/pocket-shapes"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--stages",
        help=f"of {','.join(STAGES)}; with another --out all but the last two, which replace the "
        "judge of this repository and its tables",
    )
    parser.add_argument("--pictures", type=int, default=48000)
    parser.add_argument("--vae-steps", type=int, default=6200)
    parser.add_argument("--unet-steps", type=int, default=12000)
    parser.add_argument("--turns", type=int, default=6000)
    parser.add_argument("--views-steps", type=int, default=3000)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shipped = args.out.resolve() == OUT.resolve()
    stages = args.stages.split(",") if args.stages else STAGES if shipped else STAGES[:-2]
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))} is not of {', '.join(STAGES)}")
    try:
        check_work(
            args.work, seed=args.seed, pictures=args.pictures, turns=args.turns,
            vae_steps=args.vae_steps,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))

    import torch

    torch.set_num_threads(args.threads)
    data_file = args.work / "train.npz"
    if "data" in stages and not data_file.exists():
        from pocket.shapes.data import make

        images, _, labels = make(args.pictures, args.seed, workers=args.threads)
        with whole_file(data_file) as tmp, tmp.open("wb") as file:
            np.savez(file, images=images, labels=labels)
        say(f"{len(images)} pictures in {data_file}")
    if "vae" in stages:
        from pocket.shapes.autoencoder import train

        train(args.work, steps=args.vae_steps, seed=args.seed)
    if "latents" in stages:
        from pocket.shapes.diffusion import encode_all

        encode_all(args.work)
    if "unet" in stages:
        from pocket.shapes.diffusion import train

        train(args.work, steps=args.unet_steps, seed=args.seed)
    if "views" in stages:
        from pocket.shapes.views import train

        train(args.work, args.views_steps, args.turns, seed=args.seed, workers=args.threads)
    if "save" in stages:
        from pocket.shapes.diffusion import save_pipeline

        save_pipeline(args.work, args.out)
    if "judge" in stages:
        from pocket.shapes.judge import train

        train(args.work, steps=args.judge_steps, seed=args.seed)
    if "report" in stages:
        from pocket.shapes.report import report

        report(args.out)


if __name__ == "__main__":
    main()
