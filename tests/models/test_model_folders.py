"""Model folders: pocket-shapes is the same model in every version of the libraries, and a
network without all of its weights is refused, whoever loads it."""

import json
import logging
import shutil

import pytest
import torch
from lods.models.unet import UNetModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import threestudio
from pocket.portable import make_portable
from tests.runs import ROOT

SHAPES = ROOT / "custom" / "threestudio-lods" / "lods" / "models" / "pocket-shapes"
# What pocket-shapes gave in September 2026 with transformers 5.23 and diffusers 0.42, and before
# its files were rewritten. `python -m tests.models.test_model_folders` records it anew.
RECORDED = ROOT / "tests" / "data" / "shapes_outputs.safetensors"
TEXTS = ("a DSLR image of a hamburger, front view", "", "a photo of a xyzzy", "a Snowman's hat, 3d")
ENCODER = "text_encoder/model.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def processor(name, model, **fields):
    cfg = {"pretrained_model_name_or_path": str(model), "prompt": "a car", "use_cache": False}
    return threestudio.find(name)({**cfg, **fields})


@torch.no_grad()
def outputs():
    """Embeddings of the texts, and on one noisy latent the UNet's noise, the VAE's picture and the
    mean of its latents."""
    made = processor("lods-prompt-processor", SHAPES)
    embeddings = made.encode(list(TEXTS))[0]
    prior = UNetModel.from_pretrained("pocket-shapes")
    latents = torch.linspace(-2, 2, 4 * 16 * 16).sin().view(1, 4, 16, 16)
    noise = prior.predict(latents, torch.tensor([400]), embeddings[:1])
    picture = prior.decode(latents)
    mean = prior.vae.encode(picture * 2 - 1).latent_dist.mean
    return {
        "embeddings": embeddings,
        "noise": noise,
        "picture": picture[:, :, ::4, ::4].contiguous(),
        "latents": mean,
    }


@pytest.fixture(scope="module")
def computed(lods):
    return outputs()


@pytest.mark.parametrize("name", ["embeddings", "noise", "picture", "latents"])
def test_the_model_of_shapes_is_the_same_in_every_version(computed, name):
    torch.testing.assert_close(computed[name], load_file(RECORDED)[name], rtol=1e-4, atol=1e-5)


def test_the_hosts_text_encoder_is_the_extensions(computed):
    plain = processor("stable-diffusion-prompt-processor", SHAPES).encode(list(TEXTS))[0]
    assert torch.equal(plain, computed["embeddings"])


def keys(file):
    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def readable_by_old_versions(folder):
    merges = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["merges"]
    return all(isinstance(m, str) for m in merges) and all(
        key.startswith("text_model.") for key in keys(folder / ENCODER)
    )


def test_the_committed_folder_is_readable_by_old_versions():
    assert readable_by_old_versions(SHAPES)


def test_rewriting_keeps_tensors_and_other_keys_and_is_done_once(tmp_path):
    file = tmp_path / "text_encoder_2" / "model.safetensors"
    file.parent.mkdir()
    given = {
        "embeddings.w": torch.eye(3),
        "encoder.w": torch.randn(3).half(),
        "text_projection.weight": torch.eye(2),
    }
    save_file(given, file, metadata={"format": "pt"})
    make_portable(tmp_path)
    once = file.read_bytes()
    make_portable(tmp_path)
    assert file.read_bytes() == once
    found = load_file(file)
    assert set(found) == {
        "text_model.embeddings.w",
        "text_model.encoder.w",
        "text_projection.weight",
    }
    assert torch.equal(found["text_model.encoder.w"], given["encoder.w"])
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"format": "pt"}


# --- networks without all of their weights ---


def without(source, folder, file, lost=None):
    """A copy of a model whose ``file`` lacks one tensor (all tensors, if ``lost`` is "all", which
    have other names)."""
    shutil.copytree(source, folder, symlinks=True)
    path = folder / file
    tensors = load_file(path)
    if lost == "all":
        tensors = {f"somewhere.{key}": value for key, value in tensors.items()}
    else:
        tensors.pop(sorted(tensors)[len(tensors) // 2])
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def denoise(model):
    UNetModel.from_pretrained(str(model))


def guide(model):
    threestudio.find("stable-diffusion-guidance")({"pretrained_model_name_or_path": str(model)})


def plain(model):
    processor("stable-diffusion-prompt-processor", model)


def ours(model):
    processor("lods-prompt-processor", model)


def ours_in_upstream(model, tmp_path, monkeypatch):
    hosts = threestudio.find("stable-diffusion-prompt-processor")
    monkeypatch.setattr(hosts, "spawn_func", staticmethod(lambda *a: None), raising=False)
    made = processor("lods-prompt-processor", SHAPES)
    monkeypatch.delattr(hosts, "load_part")
    made.cfg.pretrained_model_name_or_path = str(model)
    made.spawn_func(str(model), ["a car"], str(tmp_path))


@pytest.mark.parametrize("lost", ["one", "all"])
@pytest.mark.parametrize(
    "load, file",
    [
        (plain, ENCODER),
        (ours, ENCODER),
        (denoise, f"unet/{WEIGHTS}"),
        (denoise, f"vae/{WEIGHTS}"),
        (guide, f"unet/{WEIGHTS}"),
        (guide, f"vae/{WEIGHTS}"),
    ],
)
def test_a_network_without_all_of_its_weights_is_refused(lods, tiny_sd, tmp_path, load, file, lost):
    model = without(tiny_sd(), tmp_path / "model", file, lost)
    with pytest.raises(ValueError, match=r"missing|lack|needs complete") as caught:
        load(model)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_upstream_too_gets_no_random_text_encoder(lods, tmp_path, monkeypatch):
    model = without(SHAPES, tmp_path / "model", ENCODER, "all")
    with pytest.raises(ValueError, match="tensors of a CLIPTextModel are missing"):
        ours_in_upstream(model, tmp_path, monkeypatch)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_both_encoders_of_sdxl_are_looked_at(lods, tiny_sd, tmp_path, part):
    model = without(tiny_sd(kind="sdxl"), tmp_path / "model", f"{part}/model.safetensors")
    with pytest.raises(ValueError, match=f"{part} lack 1"):
        ours(model)


def test_the_clip_of_an_evaluation_is_looked_at(tmp_path):
    from evaluation.run import load_clip
    from tests.study.test_evaluation import make_tiny_clip

    whole = make_tiny_clip(tmp_path / "clip")
    load_clip(str(whole))
    with pytest.raises(ValueError, match="lack 1 of the tensors of a CLIPModel"):
        load_clip(str(without(whole, tmp_path / "other", "model.safetensors")))


def test_the_judge_is_looked_at(tmp_path, monkeypatch):
    from pocket.shapes import judge

    tensors = load_file(judge.WEIGHTS)
    tensors.pop("heads.kind.bias")
    save_file(tensors, tmp_path / "judge.safetensors")
    monkeypatch.setattr(judge, "WEIGHTS", tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match=r"heads\.kind\.bias"):
        judge.load()


def test_shap_es_text_encoder_is_looked_at(lods, tmp_path, monkeypatch):
    from diffusers import ShapEPipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=4, max_position_embeddings=5,
    )  # fmt: skip
    whole = tmp_path / "whole"
    encoder = CLIPTextModelWithProjection(config)
    encoder.save_pretrained(whole / "text_encoder", safe_serialization=True)
    model = without(whole, tmp_path / "shap-e", ENCODER)
    monkeypatch.setattr(ShapEPipeline, "load_config", lambda *a: {"_class_name": "ShapEPipeline"})
    shap_e = {"prompt": "x", "pretrained_model_name_or_path": str(model)}
    with pytest.raises(ValueError, match="1 tensors of a CLIPTextModelWithProjection are missing"):
        threestudio.find("lods-gaussians")({"init_type": "shap-e", "shap_e": shap_e})


if __name__ == "__main__":
    from threestudio.utils.extensions import load_extension

    load_extension(ROOT / "custom" / "threestudio-lods")
    save_file(outputs(), RECORDED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_variant_that_is_not_there_is_not_called_an_error(lods, tiny_sd, dtype):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("diffusers")
    log.addHandler(handler)
    try:
        UNetModel.from_pretrained(str(tiny_sd()), dtype=dtype)
    finally:
        log.removeHandler(handler)
    assert said == []
