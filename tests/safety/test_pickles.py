"""No file of others runs code: checkpoints, weights, caches, models, points, training states."""

import ast
import importlib
import json
import shutil
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch

import threestudio
from tests.hostile import Bomb, one_line
from tests.runs import ROOT, launch
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension

load_extension(ROOT / "tests" / "toy_extension.py")
toy = importlib.import_module("toy_extension")

EMPTY = {"state_dict": {}, "epoch": 0, "global_step": 1}
LIFT = {
    "geometry_type": "toy-geometry",
    "material_type": "no-material",
    "material": {"n_output_dims": 0},
    "background_type": "solid-color-background",
    "renderer_type": "toy-renderer",
}
RUN = "{name: toy, tag: t, use_timestamp: false, data_type: toy-data, system_type: toy-system}"


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = Bomb("exploded")
    yield bomb
    assert not bomb.exploded()


# --- checkpoints and weights ---


@pytest.mark.parametrize("mode", ["--train", "--test", "--export"])
def test_resume(bomb, capfd, mode):
    bomb.save("evil.ckpt", **EMPTY)
    Path("toy.yaml").write_text(RUN)
    assert launch(["toy.yaml"], ["resume=evil.ckpt"], mode) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: checkpoint evil.ckpt cannot be loaded")
    assert not Path("outputs").exists()


def test_weights_of_a_system_and_of_a_module(bomb):
    bomb.save("evil.ckpt", state_dict={"geometry.points": torch.zeros(2)}, epoch=0, global_step=1)
    for build in (
        lambda: toy.ToySystem({"weights": "evil.ckpt"}),
        lambda: toy.ToyGeometry({"weights": "evil.ckpt:geometry"}),
        lambda: toy.ToyLift3D({**LIFT, "geometry": {"weights": "evil.ckpt:geometry"}}),
    ):
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            build()
        one_line(caught)


def test_geometry_convert_from(bomb):
    """The bomb in the checkpoint, then in the config beside it."""
    bomb.save("run/ckpts/last.ckpt", **EMPTY)
    config = Path("run/configs/parsed.yaml")
    config.parent.mkdir()
    good = "{tag: t, system_type: toy-lift3d-system, system: {geometry_type: toy-geometry}}"
    evil = f"tag: !!python/object/apply:os.system [touch '{bomb.marker}']"
    for text, message in ((good, "cannot be loaded"), (evil, "is not valid YAML")):
        config.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            toy.ToyLift3D({**LIFT, "geometry_convert_from": "run/ckpts/last.ckpt"})
        one_line(caught)


@pytest.mark.parametrize("kind", ["embedding", "lora"])
def test_what_a_prior_has_learnt(bomb, lods, tiny_sd, kind):
    bomb.save("prior.pt", **EMPTY)
    cfg = {"pretrained_model_name_or_path": tiny_sd(), "weights": "prior.pt:guidance"}
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        threestudio.find(f"lods-{kind}-guidance")(cfg)
    one_line(caught)


# --- text embeddings ---


def test_the_embedding_cache(bomb, tiny_sd):
    cfg = {"pretrained_model_name_or_path": tiny_sd(tokens=24), "prompt": "a red car"}
    processor = threestudio.find("stable-diffusion-prompt-processor")
    first = processor(cfg)()
    files = sorted(Path(".threestudio_cache/text_embeddings").iterdir())
    for i, file in enumerate(files):  # the old caches of threestudio are <hash>.pt
        (bomb.pickle if i % 2 else bomb.save)(file)
        bomb.save(file.with_suffix(".pt"), embedding=torch.zeros(24, 32))
    assert torch.equal(processor(cfg)().text_embeddings_vd, first.text_embeddings_vd)


# --- model folders ---

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
PICKLED = {"text_encoder": "pytorch_model.bin"}


@pytest.fixture
def folder(tiny_sd, bomb):
    """A copy of a model, in the folder "model"."""
    return Path(shutil.copytree(tiny_sd(tokens=24), "model"))


def load_text_encoder():
    cfg = {"pretrained_model_name_or_path": "model", "prompt": "a car", "use_cache": False}
    return threestudio.find("stable-diffusion-prompt-processor")(cfg)


def load_part(part):
    if part in ("text_encoder", "tokenizer"):
        return load_text_encoder()
    return threestudio.find("lods-sds-guidance")({"pretrained_model_name_or_path": "model"})


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("evil", [True, False])
def test_pickled_weights_of_a_model_are_not_read(bomb, folder, lods, part, evil):
    """Not even harmless ones: which are, only reading them would tell."""
    from safetensors.torch import load_file

    load_part(part)
    path = folder / part / WEIGHTS[part]
    weights = load_file(path)
    pickled = folder / part / PICKLED.get(part, "diffusion_pytorch_model.bin")
    path.unlink()
    if evil:
        bomb.save(pickled, **weights)
    else:
        torch.save(weights, pickled)
    with pytest.raises(ValueError, match=r"safetensors|text_encoder") as caught:
        load_part(part)
    assert "model" in one_line(caught)


def test_shards_that_are_not_safetensors(bomb, folder):
    path = folder / "text_encoder" / WEIGHTS["text_encoder"]
    path.unlink()
    bomb.save(path.with_name("shard.bin"))
    for name in ("shard.bin", "../../elsewhere.safetensors", 3):
        index = {"metadata": {}, "weight_map": {"text_model.final_layer_norm.bias": name}}
        path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"names weights that are not \.safetensors") as caught:
            load_text_encoder()
        one_line(caught)


def code(bomb):
    return f"import os\nos.system(\"touch '{bomb.marker}'\")\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "part, name, extra",
    [
        ("text_encoder", "config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("text_encoder", "config.json", {"attn_implementation": "someone/kernel"}),
        (
            "tokenizer",
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        ),
    ],
)
def test_a_text_model_with_code_of_its_own(bomb, folder, part, name, extra):
    scope: dict = {}
    exec(code(bomb), scope)
    assert bomb.exploded()  # so that the files below are no duds
    for where in (folder, folder / part):
        (where / "evil.py").write_text(code(bomb))
    path = folder / part / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    with pytest.raises(UserError, match="which is never run") as caught:
        load_text_encoder()
    assert next(iter(extra)) in one_line(caught)


def test_the_libraries_are_told_to_run_no_code(bomb, folder, monkeypatch):
    """What decides for a model on the hub, whose files are not looked at first."""
    import transformers

    asked = []
    for cls in (transformers.AutoTokenizer, transformers.CLIPTextModel):
        load = cls.from_pretrained
        monkeypatch.setattr(
            cls,
            "from_pretrained",
            lambda *args, load=load, **kwargs: asked.append(kwargs) or load(*args, **kwargs),
        )
    load_text_encoder()
    assert asked[0]["trust_remote_code"] is False and asked[1]["use_safetensors"] is True


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_an_image_model_with_code_of_its_own(bomb, folder, lods, part):
    """Ignored: nothing of ours asks for it."""
    for where in (folder, folder / part):
        (where / "evil.py").write_text(code(bomb))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Evil"]}))
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))
    load_part(part)


@pytest.mark.parametrize(
    "part, name",
    [
        ("text_encoder", "config.json"),
        ("tokenizer", "tokenizer.json"),
        ("tokenizer", "tokenizer_config.json"),
        ("unet", "config.json"),
        ("vae", "config.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("content", [b"not json", b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000, b""])
def test_configs_of_a_model_that_are_not_json(folder, lods, part, name, content):
    (folder / part / name).write_bytes(content)
    with pytest.raises(ValueError, match="model") as caught:
        load_part(part)
    one_line(caught)


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": "StableDiffusionPipeline"},
        {"_class_name": "ShapEPipeline", "prior": ["evil", "Evil"]},
    ],
)
def test_shap_e_takes_nothing_from_elsewhere(bomb, lods, monkeypatch, index):
    folder = Path("shap-e")
    (folder / "prior").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for where in (Path(), folder, folder / "prior"):
        (where / "evil.py").write_text(code(bomb))
    monkeypatch.syspath_prepend(str(Path.cwd()))  # "evil" can be imported
    with pytest.raises(ValueError, match=r"model_index\.json") as caught:
        start_from_shap_e()
    one_line(caught)


def start_from_shap_e():
    cfg = {"prompt": "x", "pretrained_model_name_or_path": "shap-e"}
    return threestudio.find("lods-gaussians")({"init_type": "shap-e", "shap_e": cfg})


def test_shap_e_reads_pickled_weights_as_data(bomb, lods, monkeypatch):
    """The hub has some of Shap-E's weights only so; libraries of 2023 would run them."""
    import diffusers

    bomb.save("weights.bin")
    monkeypatch.setattr(
        diffusers.ShapEPipeline, "load_config", lambda name: {"_class_name": "ShapEPipeline"}
    )

    def load(*args, **kwargs):
        return torch.load("weights.bin", weights_only=False)

    monkeypatch.setattr(diffusers.ShapEPipeline, "from_pretrained", load)
    files = importlib.import_module("lods.models.files")
    monkeypatch.setattr(files, "load_complete", lambda *args, **kwargs: None)
    before = torch.load
    with pytest.raises(ValueError, match="UnpicklingError"):
        start_from_shap_e()
    assert torch.load is before


# --- points and meshes ---


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb", "gltf", "off", "stl", "pkl", "npy"])
def test_a_pickle_as_initial_shape(bomb, lods, suffix):
    for write in (bomb.pickle, bomb.save):
        path = write(f"evil.{suffix}")
        with pytest.raises(ValueError, match=r"evil\.") as caught:
            threestudio.find("lods-gaussians")({"init_type": "file", "file": {"path": str(path)}})
        one_line(caught)


# --- training of pocket-shapes ---


def test_the_training_scripts_of_pocket_shapes(bomb, tmp_path, monkeypatch):
    from pocket.shapes import autoencoder, diffusion, judge

    monkeypatch.setattr(judge, "WEIGHTS", tmp_path / "judge.safetensors")
    images, labels = np.zeros((4, 128, 128, 3), np.uint8), np.zeros((4, 4), np.int64)
    np.savez("train.npz", images=images, labels=labels)
    np.savez("judge.npz", images=images, masks=images[..., 0], labels=labels)
    jobs = {
        "vae_state.pt": lambda: autoencoder.train(tmp_path, steps=1),
        "vae.pt": lambda: diffusion.load_vae(tmp_path),
        "latents.pt": lambda: diffusion.encode_all(tmp_path),
        "views_state.pt": lambda: diffusion.save_pipeline(tmp_path, tmp_path / "out"),
        "judge_state.pt": lambda: judge.train(tmp_path, steps=1),
    }
    monkeypatch.setattr(diffusion, "save_tokenizer", lambda *a: None)
    monkeypatch.setattr(diffusion, "build_models", lambda tokenizer: [])
    for name, job in jobs.items():
        bomb.save(name, model={}, optimizer={}, ema={}, step=0)
        with pytest.raises(UnpicklingError, match="Weights only"):
            job()

    for name, job in (
        ("train.npz", lambda: autoencoder.train(tmp_path, steps=1)),
        ("judge.npz", lambda: judge.train(tmp_path, steps=1)),
    ):
        for state in ("vae.pt", "vae_state.pt"):
            Path(state).unlink(missing_ok=True)
        np.savez(name, images=np.array([bomb], dtype=object))
        np.load(name, allow_pickle=True)["images"]
        assert bomb.exploded()
        with pytest.raises(ValueError, match="allow_pickle=False"):
            job()


# --- the source ---

SHIPPED = (
    *("launch.py", "evaluate.py", "2dplayground_*.py"),
    *("threestudio", "custom", "pocket", "evaluation", "benchmarks"),
)


def test_nothing_in_the_source_reads_pickles_or_evaluates_text():
    """Every call in the shipped code; the tests above cannot know a reader that comes later."""
    files = [
        f for p in SHIPPED for q in ROOT.glob(p) for f in (q.rglob("*.py") if q.is_dir() else [q])
    ]
    assert len(files) > 80
    found, loads = [], 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            bad = name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "joblib.load")
            bad |= name.startswith(("pickle.", "dill.", "marshal.", "shelve."))
            bad |= given.get("shell") == "True" or given.get("allow_pickle") == "True"
            bad |= given.get("trust_remote_code", "False") != "False"
            if name == "torch.load":
                loads += 1
                bad |= given.get("weights_only") != "True"
            # the cache of compiled kernels, which looks at a checksum and at its folder first
            bad &= not (file.name == "kernel_cache.py" and name == "pickle.loads")
            if bad:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not found and loads >= 4, found
