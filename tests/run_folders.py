"""Folders of runs as a training leaves them, made without one."""

import json
import shlex

import numpy as np
from PIL import Image

PROMPT = "a red mushroom"
NAMES = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"]
NAMES += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]


def gaussians(count=40, seed=0):
    """Rows of a ply in the layout of 3DGS, all of which can be seen."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((count, len(NAMES)), np.float32)
    rows[:, :3] = rng.uniform(-0.5, 0.5, (count, 3))
    rows[:, 6:9] = rng.uniform(-1.5, 1.5, (count, 3))
    rows[:, 9] = rng.uniform(0, 4, count)
    rows[:, 10:13] = rng.uniform(-4, -2, (count, 3))
    rows[:, 13:] = rng.normal(size=(count, 4))
    return rows


def write_gaussians(path, rows, comment=""):
    header = "ply\nformat binary_little_endian 1.0\n" + comment
    header += f"element vertex {len(rows)}\n"
    header += "".join(f"property float {name}\n" for name in NAMES) + "end_header\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode() + rows.astype("<f4").tobytes())


def picture(path, color, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def run_folder(folder, prompt=PROMPT, seed=3, step=30, overrides=()):
    """A finished run of Gaussians with a learned embedding in ``folder``."""
    import yaml
    from safetensors.numpy import save_file

    export = folder / "save" / f"it{step}-export"
    write_gaussians(export / "gaussians.ply", gaussians())
    note = {"model": "pocket-shapes", "moved": "0.125", "moved_is": "|e - e0| / |e0|"}
    save_file(
        {"learnable_embedding": np.ones((4, 6), np.float32)}, export / "prior.safetensors", note
    )
    picture(folder / "save" / f"it{step}-test-sheet.png", "white", (256, 192))
    picture(folder / "save" / f"it{step}-test" / "0.png", "red")
    for at in (10, 20):
        picture(folder / "save" / f"it{at}-0.png", (at, 0, 0), (192, 64))
    (folder / "save" / f"it{step}-test.mp4").write_bytes(b"video")
    settings = {
        "seed": seed,
        "system_type": "system-of-nobody",
        "data": {"eval_width": 64, "eval_height": 64, "eval_camera_distance": 3.6},
        "system": {
            "prompt_processor": {"prompt": prompt, "negative_prompt": ""},
            "guidance_type": "lods-embedding-guidance",
            "guidance": {"guidance_scale": 7.5, "pretrained_model_name_or_path": "pocket-shapes"},
            "geometry_type": "lods-gaussians",
            "background": {"color": [1.0, 1.0, 1.0]},
        },
        "trainer": {"max_steps": step, "log_every_n_steps": 10},
        "resume": None,
    }
    (folder / "configs").mkdir()
    (folder / "configs" / "parsed.yaml").write_text(yaml.safe_dump(settings))
    words = ["python", "launch.py", "--config", "a.yaml", "--train", "--gpu", "0"]
    words += [f"system.prompt_processor.prompt={prompt}", *overrides]
    (folder / "cmd.txt").write_text(f"{shlex.join(words)}\nNamespace(config=['a.yaml'])\n")
    log = folder / "csv_logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(
        "epoch,step,train/loss,train/n_gaussians\n0,9,4.0,40\n0,19,2.5,40\n0,29,1.25,40\n"
    )
    training = {"started": "2026-11-28T21:40:11", "from_step": 0, "to_step": step, "seconds": 12.5}
    training |= {"device": "cpu", "machine": "a processor", "threads": 2}
    training["versions"] = {"torch": "2.13.0", "numpy": "2.4.6"}
    (folder / "run.json").write_text(json.dumps({"trainings": [training]}))
    (folder / "ckpts").mkdir()
    return folder


def make_run(folder):
    """The files by which a run is known."""
    for name, text in (("configs/parsed.yaml", "{}"), ("ckpts/last.ckpt", "x"), ("cmd.txt", "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
