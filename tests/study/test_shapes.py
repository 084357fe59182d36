"""The world of shapes and the model pocket-shapes."""

import ast
import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pocket.shapes import autoencoder, data, make, raycast, report, scenes
from pocket.shapes.judge import load, verdict
from pocket.tokenizer import save_tokenizer
from tests.runs import ROOT

MODEL = ROOT / "custom/threestudio-lods/lods/models/pocket-shapes"


def _inside(kind, param, p):
    """Whether local points (N, 3) are in the unit shape, straight from its definition."""
    x, y, z = p.T
    ring = np.hypot(x, y)
    return {
        raycast.SPHERE: lambda: (p**2).sum(1) <= 1,
        raycast.DOME: lambda: ((p**2).sum(1) <= 1) & (z >= 0),
        raycast.BOX: lambda: np.abs(p).max(1) <= 1,
        raycast.FRUSTUM: lambda: (np.abs(z) <= 1) & (ring <= 1 + (param - 1) * (z + 1) / 2),
        raycast.WEDGE: lambda: (np.abs(x) <= 1) & (z >= -1) & (np.abs(y) <= (1 - z) / 2),
        raycast.TORUS: lambda: (ring - 1) ** 2 + z**2 <= param**2,
    }[kind]()


@pytest.mark.parametrize(
    "kind, param",
    [
        (raycast.SPHERE, 0.0),
        (raycast.DOME, 0.0),
        (raycast.BOX, 0.0),
        (raycast.FRUSTUM, 1.0),
        (raycast.FRUSTUM, 0.3),
        (raycast.FRUSTUM, 0.0),
        (raycast.FRUSTUM, 1.5),
        (raycast.WEDGE, 0.0),
        (raycast.TORUS, 0.4),
    ],
)
def test_rays_hit_shapes_where_they_begin(kind, param):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        o = rng.normal(size=3)
        o *= 4 / np.linalg.norm(o)
        d = rng.normal(size=3) * 0.7 - o / 2
        n = np.zeros(3)
        t = raycast._hit(kind, param, o, d, n)
        steps = np.linspace(0, 6, 6001)
        inside = steps[_inside(kind, param, o + steps[:, None] * d)]
        if len(inside) < 5:  # a graze, or a miss
            continue
        hits += 1
        assert t == pytest.approx(inside[0], abs=8e-3)
        assert n @ d < 0  # the normal faces the ray
        # a small step along the normal leaves the shape, against it enters
        n = n / np.linalg.norm(n)
        hit = o + t * d
        assert not _inside(kind, param, (hit + 0.02 * n)[None])[0]
    assert hits > 50


def test_silhouette_of_a_ball_has_its_area():
    ball = scenes.Scene()
    ball.add(raycast.SPHERE, (0, 0, 0), 1.0, (1, 1, 1))
    camera = data.Camera(20.0, 30.0, 50.0, 0.8, np.zeros(3))
    _, opacity = data.draw(np.random.default_rng(0), ball, camera)
    # The camera sees the ball of radius 0.87 under the half angle arcsin(r / distance).
    distance = 1 / (0.8 * np.sin(np.radians(25)))
    radius = np.tan(np.arcsin(0.87 / distance)) / np.tan(np.radians(25))
    assert opacity.mean() == pytest.approx(np.pi * radius**2 / 4, rel=0.01)


def test_view_words_follow_the_prompt_processors_rules(tiny_sd):
    processor = importlib.import_module("threestudio.models.prompt_processors.base")
    rng = np.random.default_rng(0)
    elevation = torch.from_numpy(rng.uniform(-10, 90, 500))
    azimuth = torch.from_numpy(rng.uniform(-180, 180, 500))
    directions = _directions(processor, tiny_sd)
    said = torch.zeros(500, dtype=torch.long)
    for i, direction in enumerate(directions):
        mask = direction.condition(elevation, azimuth, torch.ones(500))
        said[mask] = i
    ours = [data.view_of(float(e), float(a)) for e, a in zip(elevation, azimuth)]
    assert said.tolist() == ours
    assert [d.name for d in directions] == list(data.VIEWS)


def _directions(processor, tiny_sd):
    import threestudio

    made = threestudio.find("stable-diffusion-prompt-processor")(
        {
            "prompt": "a car",
            "pretrained_model_name_or_path": tiny_sd(),
            "front_threshold": 45.0,
            "back_threshold": 45.0,
        }
    )
    return made.directions


def test_pictures_depend_on_the_seed_only():
    one, _, labels = data.make(7, seed=5, workers=1, chunk=3)
    two, _, _ = data.make(7, seed=5, workers=2, chunk=3)
    other, _, _ = data.make(7, seed=6, workers=1, chunk=3)
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert labels.shape == (7, 4)


def test_a_turn_is_one_object_from_three_sides():
    images, _, labels = data.make(20, seed=5, workers=1, one=data.turn)
    assert images.shape == (20, 3, 64, 64, 3)
    assert (labels[:, :, 3] == [1, 0, 2]).all()  # front, side, back
    assert (labels[:, :, :3] == labels[:, :1, :3]).all()
    assert all(scenes.KINDS[k].front for k in labels[:, 0, 0])
    flat = torch.from_numpy(images.reshape(-1, 64, 64, 3)).permute(0, 3, 1, 2) / 255
    said = verdict(load(), flat)
    assert (said["view"] == labels[:, :, 3].ravel()).mean() >= 0.85
    assert (said["kind"] == labels[:, :, 0].ravel()).mean() >= 0.85


@pytest.mark.slow
def test_the_phase_of_view_words_goes_on_from_the_average(tmp_path, monkeypatch):
    """Two steps at once, and one step, a stop, and another, end in the same weights."""
    from pocket.shapes import diffusion, views

    images, _, labels = data.make(8, seed=0, workers=1)
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    torch.manual_seed(0)
    torch.save({"model": autoencoder.build().state_dict()}, tmp_path / "vae.pt")
    diffusion.train(tmp_path, steps=1, batch=4)
    base = torch.load(tmp_path / "unet_state.pt", weights_only=True)["ema"]

    save, seen = diffusion.save_state, []

    def stopping(path, **state):
        save(path, **state)
        seen.append(state["step"])
        if len(seen) == 1:
            raise KeyboardInterrupt

    file, arguments = tmp_path / "views_state.pt", dict(count=4, workers=1, plain=2, turns=1)
    monkeypatch.setattr(diffusion, "EVERY", 1)
    monkeypatch.setattr(diffusion, "save_state", stopping)
    with pytest.raises(KeyboardInterrupt):
        views.train(tmp_path, 2, **arguments)
    views.train(tmp_path, 2, **arguments)
    assert seen == [1, 2]
    stopped = torch.load(file, weights_only=True)
    file.unlink()
    views.train(tmp_path, 2, **arguments)
    at_once = torch.load(file, weights_only=True)
    for name, value in at_once["ema"].items():
        assert torch.equal(value, stopped["ema"][name]), name
        assert not value.is_floating_point() or torch.isfinite(value).all()
    moved = [n for n, v in at_once["model"].items() if not torch.equal(v, base[n])]
    assert any(n.startswith("0.") for n in moved) and any(n.startswith("1.") for n in moved)


@pytest.mark.slow
def test_sides_of_an_object_differ_in_the_view_word_only(tmp_path, monkeypatch):
    from pocket.shapes import diffusion, views

    images, _, labels = data.make(8, seed=0, workers=1)
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    torch.manual_seed(0)
    torch.save({"model": autoencoder.build().state_dict()}, tmp_path / "vae.pt")
    diffusion.train(tmp_path, steps=1, batch=4)
    kept = []
    monkeypatch.setattr(views, "fit", lambda file, name, models, draw, *a, **k: kept.append(draw))
    views.train(tmp_path, 2, count=4, workers=1, plain=3, turns=2)
    x, noise, t, ids = kept[0](0)
    assert len(x) == len(noise) == len(t) == len(ids) == 3 + 2 * 3
    for turn in (slice(3, 6), slice(6, 9)):
        assert (noise[turn] == noise[turn][:1]).all() and (t[turn] == t[turn][0]).all()
        assert (t[turn] >= 200).all() and not torch.equal(x[turn][0], x[turn][2])
    assert not torch.equal(noise[3], noise[6]) and not torch.equal(noise[0], noise[1])


def test_every_word_is_one_token(tmp_path):
    from pocket.shapes.diffusion import WORDS

    # Words whose pieces are merges of others, in both orders, are what breaks a naive table.
    words = ["hat", "chair", "ai", "cha", "that", *WORDS]
    tokenizer = save_tokenizer(tmp_path, words, 16)
    broken = [w for w in words if len(tokenizer.tokenize(w)) != 1 and w.isalpha()]
    assert broken == []
    assert len(tokenizer("x " * 50, truncation=True, max_length=16).input_ids) == 16


def test_what_the_training_writes_is_readable_by_old_versions(tmp_path, monkeypatch):
    from pocket.shapes import diffusion
    from tests.models.test_model_folders import readable_by_old_versions

    models = torch.nn.ModuleList(
        diffusion.build_models(save_tokenizer(tmp_path / "tokenizer", diffusion.WORDS, 16))
    )
    torch.save({"ema": models.state_dict()}, tmp_path / "views_state.pt")
    monkeypatch.setattr(diffusion, "load_vae", lambda work: autoencoder.build())
    diffusion.save_pipeline(tmp_path, tmp_path / "out")
    assert readable_by_old_versions(tmp_path / "out")


def test_the_shipped_vocabulary_is_that_of_the_captions_and_of_the_tokenizer():
    from transformers import CLIPTokenizer

    from pocket.shapes.diffusion import vocabulary

    listed = json.loads((MODEL / "vocabulary.json").read_text())
    assert listed == vocabulary() and listed["objects"] == list(scenes.KIND_NAMES)
    words = {word for names in listed.values() for name in names for word in name.split()}
    said = [data.caption(np.random.default_rng(i), i % 20, i % 8, i % 4) for i in range(160)]
    used = {w.strip(",").lower() for text in said for w in text.split()}
    assert used == words - {"the"}  # a word without meaning, which has a token of its own
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    pieces = {word: len(tokenizer.tokenize(word)) for word in (*words, "cars", "pink", "boat")}
    assert {word for word, n in pieces.items() if n > 1} == {"3d", "cars", "pink", "boat"}


def test_whitening_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    vae = autoencoder.build().eval()
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        autoencoder.whiten(vae, x)
        after = vae.encode(x).latent_dist
        mean = before.mean.mean((0, 2, 3), keepdim=True)
        std = before.mean.std((0, 2, 3), keepdim=True)
        assert not torch.allclose(before.mean, after.mean, atol=0.1)
        assert torch.allclose(after.mean, (before.mean - mean) / std, atol=1e-4)
        assert torch.allclose(after.std, torch.tensor(autoencoder.POSTERIOR_STD), rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)


@pytest.fixture(scope="module")
def pipeline():
    return report.load_pipeline(MODEL)


def test_the_model_is_small_and_loads_like_any_other(pipeline):
    size = sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file())
    assert size < 30e6
    assert pipeline.unet.config.sample_size == 16
    assert pipeline.tokenizer.model_max_length == 16


@pytest.mark.slow
def test_the_model_obeys_words(pipeline):
    judge = load()
    words = ["a hamburger", "a blue car, front view", "a red mushroom", "a snowman, front view"]
    images = report.generate(pipeline, words * 3, seed=3)
    said = verdict(judge, torch.from_numpy(images).permute(0, 3, 1, 2))
    kinds = [scenes.KIND_NAMES.index(n) for n in ("hamburger", "car", "mushroom", "snowman")]
    assert (said["kind"] == np.array(kinds * 3)).mean() >= 0.8


def test_the_committed_tables_hold_what_is_claimed():
    with open(report.RESULTS / "accuracy.csv") as file:
        rows = {r["source"]: r for r in csv.DictReader(file)}
    for name in ("object", "color", "view"):
        assert float(rows["true renders"][name]) >= 0.9, "the judge itself has to be good"
    samples = {name: float(rows["samples"][name]) for name in ("object", "color", "view")}
    assert samples["object"] >= 0.95 and samples["color"] >= 0.8 and samples["view"] >= 0.75
    with open(report.RESULTS / "noise.csv") as file:
        bins = list(csv.DictReader(file))
    assert len(bins) == 10


def test_a_stock_pipeline_runs_as_it_is_loaded():
    """Its parts come in one dtype, though two libraries choose it."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32


@pytest.mark.parametrize(
    "prompt, want",
    [
        ("A DSLR image of a Red Car", ("car", "red")),
        ("a car", ("car", None)),
        ("a white house with a red roof", "one colour at most"),
        ("a red hamburger", "comes in its own colours only"),
        ("a car and a house", "exactly one of"),
    ],
)
def test_what_a_prompt_asks_for(prompt, want):
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            data.asked(prompt)
    else:
        kind, color = data.asked(prompt)
        assert scenes.KIND_NAMES[kind] == want[0]
        assert (scenes.COLOR_NAMES[color] if color >= 0 else None) == want[1]


def test_folders_that_were_made_before_imports_moved_are_still_used(tmp_path):
    """The pictures are the same; this is what their recipe was at first."""
    options = dict(seed=0, pictures=48000, turns=6000, vae_steps=6200)
    (tmp_path / "made_with.json").write_text(json.dumps({**options, "world": "a2e858bdf30c"}))
    make.check_work(tmp_path, **options)


def test_another_world_is_another_recipe(monkeypatch):
    before, read = make.world(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"# a change")
    assert make.world() != before


def test_neither_the_host_nor_the_study_is_imported():
    for file in Path(make.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"threestudio", "evaluation", "benchmarks", "tests"}, file.name


def test_output_that_cannot_be_written_ends_no_training():
    code = (
        "import os; from pocket.tools import say; say(1)\n"
        "nobody, there = os.pipe(); os.close(nobody); os.dup2(there, 1)\n"
        "say(2); say(3); open('done', 'w')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'done'", "os.environ['DONE']")],
        env=os.environ | {"DONE": os.devnull},
        cwd=ROOT,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1\n", b"")


def test_a_text_encoder_without_all_of_its_weights_is_refused(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    weights = load_file(folder / "text_encoder/model.safetensors")
    weights.pop("text_model.final_layer_norm.bias")
    save_file(weights, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder lacks 1 tensors, such as"):
        report.load_pipeline(folder)


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    make.check_work(tmp_path, seed=0, pictures=10)
    make.check_work(tmp_path, seed=0, pictures=10)
    with pytest.raises(ValueError, match="made with seed 0, not 1: give another --work"):
        make.check_work(tmp_path, seed=1, pictures=10)


def test_folders_that_were_made_before_the_code_was_moved_are_still_of_this_world():
    """The digest that they have kept; another is right only if the pictures become others."""
    assert make.world() == "a2e858bdf30c"


def test_another_model_leaves_this_one_its_judge(tmp_path, monkeypatch):
    done = []
    for module, name in (("diffusion", "save_pipeline"), ("judge", "train"), ("report", "report")):
        monkeypatch.setattr(
            f"pocket.shapes.{module}.{name}", lambda *a, n=module, **k: done.append(n)
        )
    for module in ("autoencoder", "views", "diffusion"):
        monkeypatch.setattr(f"pocket.shapes.{module}.train", lambda *a, **k: None)
    monkeypatch.setattr("pocket.shapes.diffusion.encode_all", lambda *a: None)
    monkeypatch.chdir(ROOT)
    (tmp_path / "train.npz").touch()
    monkeypatch.setattr("sys.argv", ["make", "--work", str(tmp_path), "--out", str(tmp_path / "p")])
    threads = torch.get_num_threads()
    make.main()
    assert done == ["diffusion"]
    monkeypatch.setattr("sys.argv", ["make", "--work", str(tmp_path)])
    make.main()
    torch.set_num_threads(threads)
    assert done == ["diffusion", "diffusion", "judge", "report"]
