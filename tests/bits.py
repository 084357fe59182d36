"""Shows that a change leaves training bit for bit as it was, from the command line only.

    python -m tests.bits save build/bits-before                       # at the old commit
    python -m tests.bits save build/bits-after --like build/bits-before   # at the new one
    python -m tests.bits compare build/bits-before build/bits-after

``save`` trains four steps of every case from a fixed seed on one thread and keeps all that was
learnt: the state dictionaries of the system and of its optimizers. The cases are eight methods on
Gaussians, four on the radiance field, a run that is resumed after two steps, and both 2D
playgrounds. With ``--like`` the configurations are those that the other folder has kept, so that
a change of the shipped YAML is not taken for a change of the arithmetic; and its checkpoint of
step 2 is resumed too, so that old checkpoints are seen to work. ``--tree`` names the checkout to
run, for a commit that has no such script.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ON_GAUSSIANS = ("embedding", "lora", "sds", "csd", "vsd", "nfsd", "bridge", "sdi")
ON_RADIANCE_FIELD = ("embedding", "lora", "sds", "vsd")
SMALL = [
    'system.prompt_processor.prompt="a red mushroom"',
    "data.width=32",
    "data.height=32",
    "data.batch_size=2",
    "data.eval_width=32",
    "data.eval_height=32",
    "data.n_test_views=2",
    "data.n_val_views=1",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "use_timestamp=false",
]


def _run(tree: Path, *command: str) -> None:
    env = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env |= {"NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")


def model_of(tree: Path) -> str:
    """The card of the model of shapes in this checkout: up to version 0.2 it was called pocket."""
    folder = tree / "custom/threestudio-lods/lods/models/pocket-shapes"
    return folder.name if folder.is_dir() else "pocket"


def cases(model: str) -> dict[str, list[str]]:
    """The runs of ``launch.py`` with this card, by name: their configurations and overrides."""
    found = {}
    for canvas, overlay, methods in (
        ("gs", f"configs/{model}.yaml", ON_GAUSSIANS),
        ("ngp", f"configs/{model}-ngp.yaml", ON_RADIANCE_FIELD),
    ):
        for method in methods:
            base = "lora" if method in ("lora", "vsd") else "embedding"
            configs = ["--config", f"configs/lods-{canvas}-{base}.yaml", overlay]
            guidance = f"system.guidance_type=lods-{method}-guidance"
            # the bridge leaves its first stage after two steps
            stage = ["system.guidance.bridge_start=2"] if method == "bridge" else []
            found[f"{canvas}-{method}"] = [*configs, guidance, *stage]
    return found


def _train(tree: Path, case: list[str], folder: Path, steps: int, resume: str = "") -> None:
    """Train up to step ``steps`` and keep the last checkpoint and the configuration."""
    root = folder / "runs"
    name = [f"exp_root_dir={root}", "name=bits", "tag=t"]
    more = [f"resume={resume}"] if resume else []
    steps_key = f"trainer.max_steps={steps}"
    _run(tree, "launch.py", *case, "--train", *SMALL, *name, steps_key, *more)
    run = root / "bits" / "t"
    shutil.copy(run / "ckpts" / "last.ckpt", folder / f"step{steps}.ckpt")
    shutil.copy(run / "configs" / "parsed.yaml", folder / "parsed.yaml")
    shutil.rmtree(root)


def save(tree: Path, out: Path, like: Path | None, only: str) -> None:
    """Train every case whose name holds ``only`` in the checkout ``tree``; keep it in ``out``."""
    model = model_of(tree)
    # which a configuration or a checkpoint that was kept may know by another name
    parts = ("prompt_processor", "guidance")
    named = [f"system.{part}.pretrained_model_name_or_path={model}" for part in parts]
    for name, case in cases(model).items():
        if only not in name:
            continue
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        if like is not None:
            case = ["--config", str(like / name / "parsed.yaml"), *named]
        _train(tree, case, folder, 4)
        if name.endswith(("gs-embedding", "gs-vsd", "ngp-lora")):
            resumed = out / f"{name}-resumed"
            resumed.mkdir(exist_ok=True)
            _train(tree, case, resumed, 2)
            _train(tree, case, resumed, 4, str(resumed / "step2.ckpt"))
            if like is not None:
                old = like / f"{name}-resumed"
                from_old = out / f"{name}-from-old"
                from_old.mkdir(exist_ok=True)
                _train(tree, case, from_old, 4, str(old / "step2.ckpt"))
        print(name, flush=True)
    for kind in ("lora", "embedding"):
        if only in f"2d-{kind}":
            target = out / f"2d-{kind}"
            options = ["--model", model, "--steps", "4", "--gpu", "-1", "--output", str(target)]
            _run(tree, f"2dplayground_{kind}.py", *options)
            print(f"2d-{kind}", flush=True)


def _tensors(folder: Path) -> dict:
    """Name -> tensor of all that a case has kept."""
    import torch
    from safetensors.torch import load_file

    found: dict = {}

    def add(prefix: str, value) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}", inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                add(f"{prefix}.{i}", inner)

    for path in sorted(folder.glob("step4.ckpt")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        add("system", content["state_dict"])
        add("optimizer", content["optimizer_states"])
    for path in sorted(folder.glob("*.safetensors")):
        add(path.stem, load_file(path))
    return found


def compare(a: Path, b: Path) -> int:
    """Print a line a case of ``a``; returns how many differ."""
    import torch

    differing = 0
    names = sorted(p.name for p in a.iterdir() if p.is_dir())
    pairs = [(name, name) for name in names]
    pairs += [
        (name, f"{name.removesuffix('-resumed')}-from-old")
        for name in names
        if name.endswith("-resumed") and (b / f"{name.removesuffix('-resumed')}-from-old").is_dir()
    ]
    for left, right in pairs:
        one, two = _tensors(a / left), _tensors(b / right)
        wrong = [key for key in one if key not in two or not torch.equal(one[key], two[key])]
        wrong += [key for key in two if key not in one]
        differing += bool(wrong) or not one
        verdict = f"DIFFERS in {', '.join(wrong[:4])}" if wrong else "equal"
        print(f"{right}: {len(one)} tensors, {verdict if one else 'NOTHING KEPT'}")
    print(f"{len(pairs) - differing} of {len(pairs)} equal")
    return differing


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bits", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("save", help="train all cases and keep what was learnt")
    saving.add_argument("folder", type=Path)
    saving.add_argument("--like", type=Path, help="take the configurations of this folder")
    saving.add_argument("--tree", type=Path, default=ROOT, help="the checkout to run")
    saving.add_argument("--only", default="", help="cases whose name holds this text")
    comparing = commands.add_parser("compare", help="compare two folders, tensor by tensor")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    if args.command == "save":
        like = args.like.resolve() if args.like else None
        save(args.tree.resolve(), args.folder.resolve(), like, args.only)
        return 0
    return compare(args.before, args.after)


if __name__ == "__main__":
    sys.exit(main())
