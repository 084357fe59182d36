"""Weights of others: what does not fit is one line; and weights that change are noticed."""

import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import threestudio
from tests.hostile import one_line
from tests.runs import ROOT
from threestudio.models.prompt_processors.stable_diffusion_prompt_processor import (
    StableDiffusionPromptProcessor,
)
from threestudio.run.checkpoint import AtomicCheckpointIO
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.misc import load_module_weights
from threestudio.utils.safe_models import weights_identity

load_extension(ROOT / "tests" / "toy_extension.py")
toy = importlib.import_module("toy_extension")


# --- checkpoints ---


def gaussians(n=6, **cfg):
    return threestudio.find("lods-gaussians")({"init_type": "ball", "ball": {"n_points": n}, **cfg})


def save(path, state, **more):
    AtomicCheckpointIO().save_checkpoint(
        {"state_dict": state, "epoch": 0, "global_step": 3, **more}, path
    )
    return path


def gaussian_state(**changed):
    state = {f"geometry.{k}": v.detach().clone() for k, v in gaussians(9).gaussians().items()}
    return {**state, **{f"geometry.{k}": v for k, v in changed.items()}}


def with_value(shape, value):
    tensor = torch.zeros(shape)
    tensor[4] = value
    return tensor


BAD_GAUSSIANS = {
    "nan": ({"means": with_value((9, 3), torch.nan)}, "means has 3 values .* not finite"),
    "inf": ({"opacities": with_value((9,), torch.inf)}, "opacities has 1 values"),
    "number": ({"scales": torch.zeros(8, 3)}, "do not agree in number"),
    "width": ({"quats": torch.zeros(9, 3)}, "quats has shape"),
    "dimensions": ({"means": torch.tensor(3.0)}, "not a table of 2 dimension"),
    "whole numbers": ({"means": torch.zeros(9, 3, dtype=torch.long)}, "whole numbers, not real"),
    "complex": ({"sh0": torch.zeros(9, 1, 3, dtype=torch.cfloat)}, "complex numbers, not real"),
    "text": ({"means": "nine"}, "not a table"),
    "harmonics": ({"shN": torch.zeros(9)}, "not a table of 3"),
    "claims": ({"means": torch.zeros(1).expand(10**12, 3)}, "claims more values"),
    "all claim": (
        {
            name: torch.zeros(1).expand(10**11, *shape)
            for name, shape in {
                "means": (3,),
                "scales": (3,),
                "quats": (4,),
                "opacities": (),
                "sh0": (1, 3),
            }.items()
        },
        "claims more values",
    ),
}


@pytest.mark.parametrize("case", BAD_GAUSSIANS)
def test_gaussians_of_a_checkpoint(lods, tmp_path, case):
    changed, message = BAD_GAUSSIANS[case]
    path = save(tmp_path / "a.ckpt", gaussian_state())
    good = gaussians(weights=f"{path}:geometry")
    assert good.count == 9  # taken over, whatever the config says
    path = save(tmp_path / "b.ckpt", gaussian_state(**changed))
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=message) as caught:
        gaussians(weights=f"{path}:geometry")
    one_line(caught)


def test_half_precision_is_only_another_precision(lods, tmp_path):
    state = {k: v.half() for k, v in gaussian_state().items()}
    path = save(tmp_path / "a.ckpt", state)
    means = gaussians(weights=f"{path}:geometry").means
    assert means.dtype == torch.float32 and torch.equal(means, state["geometry.means"].float())


def test_another_shape_is_one_line_with_the_first_keys(tmp_path):
    system = toy.ToySystem({})
    state = {k: torch.zeros(7, 7) for k in system.state_dict()}
    path = str(save(tmp_path / "a.ckpt", state))
    with pytest.raises(UserError, match=r"size mismatch for body\.0\.weight") as caught:
        toy.ToySystem({"weights": path})
    assert "(and 1 more)" in one_line(caught) and "body.1.weight" in str(caught.value)
    with pytest.raises(UserError, match=r"does not fit ToySystem: .*nothing.*Unexpected|Missing"):
        system.load_state_dict({"nothing": torch.zeros(1)})
    many = {f"key{i}": torch.zeros(1) for i in range(500)}
    with pytest.raises(UserError) as caught:
        system.load_state_dict(many)
    one_line(caught)
    path = str(save(tmp_path / "b.ckpt", {"geometry.points": torch.zeros(5)}))
    with pytest.raises(UserError, match="does not fit ToyGeometry: size mismatch for points"):
        toy.ToyGeometry({"weights": f"{path}:geometry"})
    (tmp_path / "configs").mkdir()
    (tmp_path / "ckpts").mkdir()
    Path(path).rename(tmp_path / "ckpts" / "b.ckpt")
    (tmp_path / "configs" / "parsed.yaml").write_text(
        "{tag: t, system: {geometry_type: toy-geometry}}"
    )
    with pytest.raises(UserError, match=r"ckpts/b\.ckpt does not fit ToyGeometry") as caught:
        toy.ToyLift3D(
            {
                "geometry_type": "toy-grown-geometry",
                "geometry_convert_from": str(tmp_path / "ckpts" / "b.ckpt"),
            }
        )
    one_line(caught)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.cfloat])
def test_numbers_of_another_kind(kind):
    system = toy.ToySystem({})
    before = {k: v.clone() for k, v in system.state_dict().items()}
    state = {k: torch.zeros_like(v, dtype=kind) for k, v in before.items()}
    with pytest.raises(UserError, match=r"body\.0\.weight holds .* not real") as caught:
        system.load_state_dict(state)
    one_line(caught)
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"state_dict": [], "epoch": 0, "global_step": 1},
        {"state_dict": {3: torch.zeros(1)}, "epoch": 0, "global_step": 1},
        {"state_dict": {}, "epoch": "x", "global_step": 1},
        {"state_dict": {}, "epoch": 0, "global_step": -1},
        torch.zeros(3),
    ],
)
def test_what_is_no_checkpoint_of_a_run(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt") as caught:
        load_module_weights(tmp_path / "a.ckpt")
    one_line(caught)


@pytest.mark.parametrize("state", [{}, {"torch": 3}, {"torch": torch.zeros(3)}, "x", {"numpy": []}])
def test_random_states_that_are_none(state):
    from threestudio.utils.misc import capture_rng_state, restore_rng_state

    good = capture_rng_state()
    bad = state if isinstance(state, str) else {**good, **state} if state else {}
    with pytest.raises(UserError, match="random states cannot be restored") as caught:
        restore_rng_state(bad)
    one_line(caught)
    restore_rng_state(good)


def test_a_densification_state_that_is_none(lods):
    densify = importlib.import_module("lods.gaussians.densify")
    for stored in ("x", {}, {"name": "default", "state": [1]}):
        with pytest.raises(ValueError, match="densification state is damaged"):
            densify.Densifier("default", {}).load_state_dict(stored, "cpu")


# --- the key of the embedding cache ---


@pytest.fixture
def cached(tiny_sd, tmp_path, monkeypatch):
    """``embed(model="model")`` with the cache; "model" and "other" are folders that differ in
    their weights only, with files of the same sizes and times."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("model", 0), ("other", 1)):
        shutil.copytree(tiny_sd(tokens=24, seed=seed), name)
    for path in Path("model").rglob("*"):
        os.utime(path, ns=(10**18, 10**18))
        os.utime(Path("other", *path.parts[1:]), ns=(10**18, 10**18))

    def embed(model="model"):
        cfg = {"pretrained_model_name_or_path": model, "prompt": "a red car"}
        return StableDiffusionPromptProcessor(cfg)().text_embeddings

    return embed


WEIGHTS = Path("text_encoder/model.safetensors")


def test_the_cache_notices_other_weights_of_the_same_size_and_time(cached):
    first, other = cached(), cached("other")
    assert not torch.equal(first, other)
    assert Path("model", WEIGHTS).stat().st_size == Path("other", WEIGHTS).stat().st_size
    shutil.copy2(Path("other", WEIGHTS), Path("model", WEIGHTS))  # keeps mtime
    assert torch.equal(cached(), other)


def test_the_cache_notices_weights_without_any_times(cached, monkeypatch):
    """Where a file system or an archive gives every file the same times."""

    class Timeless:
        def __getattr__(self, name):
            return getattr(os, name)

        def stat(self, path):
            return SimpleNamespace(st_size=os.stat(path).st_size, st_mtime_ns=0, st_ctime_ns=0)

    module = importlib.import_module("threestudio.utils.safe_models")
    monkeypatch.setattr(module, "os", Timeless())
    first = cached()
    weights = load_file(Path("model", WEIGHTS))
    save_file({k: v * 1.5 for k, v in weights.items()}, Path("model", WEIGHTS), {"format": "pt"})
    assert not torch.equal(cached(), first)


def test_a_change_between_the_samples_is_noticed(tmp_path):
    """Of a file too large to be sampled everywhere, by the time that copying cannot keep."""
    path = tmp_path / "weights.safetensors"
    data = bytearray(10**6)
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    before = weights_identity(str(path))
    assert weights_identity(str(path)) == before and len(before) < 300_000
    data[8000] = 1
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    assert weights_identity(str(path)) != before


def test_the_cache_notices_another_tokenizer(cached):
    first = cached()
    path = Path("model/tokenizer/tokenizer.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    red, car = (next(k for k in vocabulary if k.startswith(w)) for w in ("red", "blue"))
    vocabulary[red], vocabulary[car] = vocabulary[car], vocabulary[red]
    size = path.stat().st_size
    path.write_text(json.dumps(content))
    os.utime(path, ns=(10**18, 10**18))
    assert not torch.equal(cached(), first) and size > 0


def test_the_cache_knows_the_revision_of_a_hub_model(cached, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    seen = []
    for revision, source in (("a" * 40, "model"), ("b" * 40, "other"), ("a" * 40, "model")):
        folder = repository / "snapshots" / revision
        if not folder.exists():
            shutil.copytree(source, folder)
        (repository / "refs" / "main").write_text(revision)
        cfg = SimpleNamespace(pretrained_model_name_or_path="owner/name")
        me = SimpleNamespace(cfg=cfg, parts=StableDiffusionPromptProcessor.parts)
        key = StableDiffusionPromptProcessor.fingerprint(me)
        assert key is not None
        seen.append(key)
    assert seen[0] == seen[2] != seen[1]
