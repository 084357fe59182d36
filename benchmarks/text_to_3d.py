"""Text to 3D with pocket-shapes, judged: does every view show the object that was asked for?

``python benchmarks/text_to_3d.py`` trains each prompt with each configuration through ``launch.py``
(one process a run, as a user would), takes 12 of the test views evenly around the object, asks the
judge of ``pocket/shapes/judge.py`` which object and which colour they show, and writes one row a
run to ``benchmarks/results/text_to_3d.csv``. Runs already in the file for this commit are not
repeated.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import ROOT, commit, cpu_name, write_table

from pocket.shapes.data import asked
from pocket.shapes.judge import load, verdict
from pocket.shapes.scenes import KIND_NAMES

# configuration -> the overlay that scales it to pocket-shapes
CONFIGS = {
    "lods-gs-embedding": "pocket-shapes",
    "lods-gs-lora": "pocket-shapes",
    "lods-ngp-embedding": "pocket-shapes-ngp",
    "lods-ngp-lora": "pocket-shapes-ngp",
}
PROMPTS = (
    "a DSLR image of a hamburger",
    "a blue car",
    "a red mushroom",
    "a DSLR image of a snowman",
    "a photo of a traffic cone",
)
VIEWS = 12


def run(config: str, prompt: str, seed: int, out: Path, overrides) -> tuple[Path, float, float]:
    """Train once; returns (folder of the run, wall seconds, peak memory in MiB)."""
    folder = out / f"{config}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower())}-{seed}"
    command = [
        *(sys.executable, str(ROOT / "launch.py"), "--train"),
        *("--config", *(str(ROOT / f"configs/{name}.yaml") for name in (config, CONFIGS[config]))),
        f"system.prompt_processor.prompt={prompt}",
        *(f"seed={seed}", f"exp_root_dir={folder}", "use_timestamp=false", "tag=run", "name=r"),
        *overrides,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        tail = (folder / "log.txt").read_text()[-500:]
        raise SystemExit(f"{' '.join(command)}\nfailed: {tail}")
    newest = max((folder / "r").glob("run*"))  # of several, run-002 and so on
    return newest, time.time() - start, usage.ru_maxrss / 1024


def views(folder: Path) -> tuple[torch.Tensor, int]:
    """VIEWS test frames (VIEWS, 3, H, W) evenly around the object, and the step they are of."""
    test = max(folder.glob("save/it*-test"), key=lambda p: int(re.findall(r"\d+", p.name)[0]))
    frames = sorted(test.glob("*.png"), key=lambda p: int(p.stem))
    # the last frame repeats the first
    picks = np.round(np.arange(VIEWS) * (len(frames) - 1) / VIEWS).astype(int)
    images = np.stack([np.asarray(Image.open(frames[i]).convert("RGB")) for i in picks])
    step = int(re.findall(r"\d+", test.name)[0])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, step


def train_seconds(folder: Path) -> float:
    """From the first checkpointed configuration to the last checkpoint."""
    begin = (folder / "configs" / "parsed.yaml").stat().st_mtime
    return (folder / "ckpts" / "last.ckpt").stat().st_mtime - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/text_to_3d")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/text_to_3d.csv")
    parser.add_argument("overrides", nargs="*", help="key=value for launch.py, after a --")
    args = parser.parse_args()
    try:
        wanted = {prompt: asked(prompt) for prompt in args.prompts}
    except ValueError as error:
        parser.error(str(error))
    judge, version = load(), commit()  # once: the tree may be committed to during a long run
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    known = {(r["config"], r["prompt"], r["seed"], r["commit"]) for r in rows}
    for config in args.configs:
        for prompt in args.prompts:
            for seed in args.seeds:
                kind, color = wanted[prompt]
                if (config, prompt, str(seed), version) in known:
                    continue
                folder, seconds, peak = run(config, prompt, seed, args.work, args.overrides)
                images, step = views(folder)
                said = verdict(judge, images)
                seen = [KIND_NAMES[k] for k in said["kind"]]
                row = {
                    "config": config,
                    "prompt": prompt,
                    "seed": seed,
                    "object_accuracy": round(float((said["kind"] == kind).mean()), 4),
                    "color_accuracy": ""
                    if color < 0
                    else round(float((said["color"] == color).mean()), 4),
                    "seen_as": "; ".join(f"{n} {seen.count(n)}" for n in sorted(set(seen))),
                    "seconds": round(seconds, 1),
                    "train_seconds": round(train_seconds(folder), 1),
                    "peak_mib": round(peak),
                    "steps": step,
                    "cpu": cpu_name(),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "commit": version,
                }
                rows.append(row)
                print(row, flush=True)
                write_table(args.out, rows)
    for config in args.configs:
        mine = [r for r in rows if r["config"] == config and r["commit"] == version]
        right = np.mean([float(r["object_accuracy"]) for r in mine])
        colors = [float(r["color_accuracy"]) for r in mine if r["color_accuracy"] != ""]
        print(
            f"{config}: object {right:.1%} of {VIEWS} views over {len(mine)} runs"
            + (f", colour {np.mean(colors):.1%} over {len(colors)}" if colors else "")
        )


if __name__ == "__main__":
    main()
