"""Extensions as others write them (``tests/extensions``), through ``launch.py``, unchanged."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trimesh

import threestudio
from tests.runs import ROOT, launch, read, same
from threestudio.utils.extensions import load_custom_modules
from threestudio.utils.loss import tv_loss
from threestudio.utils.misc import set_device_type

EXTENSIONS = ROOT / "tests" / "extensions"
SCORE = EXTENSIONS / "threestudio-noise-score" / "configs" / "score.yaml"
RING = EXTENSIONS / "threestudio-ring-cameras" / "configs" / "ring.yaml"
SPLATS = EXTENSIONS / "threestudio-splats" / "configs" / "splats.yaml"
TWO = EXTENSIONS / "threestudio-two-optimizers" / "configs" / "two.yaml"
RUNS = {  # name of the run -> its configs, optimizer steps per batch
    "noise-score": ([SCORE], 1),
    "ring": ([SCORE, RING], 1),
    "splats": ([SPLATS], 1),
    "two-optimizers": ([TWO], 2),
}


@pytest.fixture
def go(tmp_path, monkeypatch, tiny_sd):
    """``go(run, tag, *overrides, mode="--train")``, in a folder with all the extensions: the
    folder of the run, and in it the last checkpoint."""
    (tmp_path / "custom").mkdir()
    for folder in EXTENSIONS.iterdir():
        (tmp_path / "custom" / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(name, tag, *overrides, mode="--train"):
        files = [str(f) for f in RUNS[name][0]]
        model = f"system.prompt_processor.pretrained_model_name_or_path={tiny_sd()}"
        prompt = "system.prompt_processor.prompt=a red car"
        options = [prompt, model, "use_timestamp=false", f"tag={tag}", *overrides]
        assert launch(files, options, mode, "--extensions", "custom") == 0
        folder = Path("outputs", name, tag)
        return folder, folder / "ckpts" / "last.ckpt"

    yield run
    set_device_type(None)


@pytest.mark.parametrize("name", RUNS)
def test_train_resume_and_test(go, name):
    def steps(batches):
        return f"trainer.max_steps={batches * RUNS[name][1]}"

    no_test = "trainer.limit_test_batches=0"
    _, whole = go(name, "whole", steps(4), no_test)
    folder, last = go(name, "parts", steps(2), no_test)
    start = read(last)
    torch.manual_seed(99)  # whatever happened in the process before
    go(name, "parts", steps(4), f"resume={last}")
    expected, got = read(whole), read(last)
    step = 4 * RUNS[name][1]
    assert (start["global_step"], got["global_step"]) == (step // 2, step)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng_state", "batch_steps"):
        same(got[key], expected[key], key)
    moved = [k for k, v in got["state_dict"].items() if not torch.equal(v, start["state_dict"][k])]
    assert moved and got["optimizer_states"][0]["state"], "something was trained after the resume"
    if name == "two-optimizers":
        assert len(got["optimizer_states"]) == 2 and len(got["lr_schedulers"]) == 1
        assert len(got["state_dict"]["geometry._xyz"]) == 24 + 5, "the points have grown"
        assert {k.split(".")[0] for k in moved} == {"geometry", "background"}

    pictures = folder / "save" / f"it{step}-test"
    assert (folder / "save" / f"it{step}-test.mp4").stat().st_size > 0
    before = {p.name: p.read_bytes() for p in pictures.iterdir()}
    assert sorted(before) == ["0.png", "1.png", "2.png"]
    for picture in pictures.iterdir():
        picture.unlink()
    go(name, "parts", steps(4), f"resume={last}", mode="--test")
    assert {p.name: p.read_bytes() for p in pictures.iterdir()} == before


def test_export_by_an_exporter_of_the_extension(go):
    off = ["trainer.limit_test_batches=0", "trainer.limit_val_batches=0", "trainer.max_steps=1"]
    folder, last = go("splats", "p", *off)
    go("splats", "p", f"resume={last}", mode="--export")
    mesh = trimesh.load(folder / "save" / "it1-export" / "splats.obj", process=False)
    state = read(last)["state_dict"]
    assert len(mesh.vertices) == 3 * 24
    centres = torch.tensor(mesh.vertices).float().view(24, 3, 3).mean(1)
    torch.testing.assert_close(
        centres, state["geometry._xyz"] + torch.tensor([0, 0, -0.1 / 3]), rtol=0, atol=1e-4
    )


def test_loading_is_harmless_when_repeated():
    assert set(load_custom_modules(EXTENSIONS).values()) == {None}
    before = dict(threestudio.__modules__)
    assert set(load_custom_modules(EXTENSIONS).values()) == {None}
    assert threestudio.__modules__ == before
    assert len([n for n, c in before.items() if c.__module__.startswith("threestudio-splats")]) == 7


def test_a_name_of_an_extension_before_one_is_loaded(monkeypatch):
    load_custom_modules(EXTENSIONS)
    with pytest.raises(KeyError, match="no module is registered as 'noise-scores'") as error:
        threestudio.find("noise-scores")
    assert "no extension is loaded" not in str(error.value)
    every = threestudio.__modules__
    own = {n: c for n, c in every.items() if c.__module__.startswith("threestudio.")}
    monkeypatch.setattr(threestudio, "__modules__", own)
    with pytest.raises(KeyError, match=r"no extension is loaded; .*load_custom_modules"):
        threestudio.find("noise-score-system")
    assert threestudio.find("mesh-exporter") is every["mesh-exporter"]


def test_a_system_composed_of_mixins():
    load_custom_modules(EXTENSIONS)
    composed = threestudio.find("noise-score-system:smooth-depth,smooth-picture")
    parts = [threestudio.find(n) for n in ("smooth-depth", "smooth-picture", "noise-score-system")]
    assert composed.__mro__[1:4] == tuple(parts)
    loss = SimpleNamespace(lambda_tv=2.0, lambda_depth_tv=3.0)
    rgb, depth = torch.rand(2, 4, 5, 3), torch.rand(2, 4, 5, 1)
    system = SimpleNamespace(cfg=SimpleNamespace(loss=loss), C=lambda value: value)
    bound = type("Bound", (composed,), {"__init__": lambda self: None, "cfg": None, "C": None})
    both = object.__new__(bound)
    bound.cfg, bound.C = system.cfg, staticmethod(system.C)
    got = both.extra_loss({"comp_rgb": rgb, "depth": depth})
    expected = 2 * tv_loss(rgb.permute(0, 3, 1, 2)) + 3 * tv_loss(depth.permute(0, 3, 1, 2))
    torch.testing.assert_close(got, expected)
