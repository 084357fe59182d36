"""Models of other kinds, settings without effect, and input that is refused."""

import math
import shutil

import pytest
import torch
from omegaconf import OmegaConf

import threestudio
from tests.guidance_oracles import random_prompt, side_view
from tests.methods.guidances import ALL, EMBEDDING, LORA, PLAIN, SDS, VSD, images, make, total

__all__ = ["make"]  # a fixture


def test_sizes_are_the_models(make, tiny_sd):
    folder = tiny_sd(width=48, tokens=12, sample_size=4)
    guidance = make(EMBEDDING, pretrained_model_name_or_path=folder)
    assert guidance.learnable_embedding.shape == (12, 48)
    out = guidance(images(size=30), random_prompt(tokens=12, width=48), *side_view(2))
    assert out["loss_sds"].isfinite()
    assert (guidance.model.latent_size, guidance.model.image_size) == (4, 8)
    with pytest.raises(ValueError, match="have width 32, the guidance's model takes 48"):
        make(LORA, pretrained_model_name_or_path=folder).initialize(random_prompt())
    with pytest.raises(ValueError, match=r"is \(16, 48\), the learned one \(12, 48\)"):
        make(EMBEDDING, pretrained_model_name_or_path=folder).initialize(random_prompt(width=48))


def test_decode_inverts_the_scale_of_encode(make):
    model = make(SDS).model
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = (model.vae.decode(z / 0.7).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(z), expected)
    assert model.decode(z).shape == (2, 3, 16, 16)


def test_fp16_variant_folder(make, tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd())
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.half()
    pipeline.save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    guidance = make(SDS, pretrained_model_name_or_path=str(tmp_path))
    assert guidance.model.unet.dtype == torch.float32  # a CPU computes in float32
    x, t, e = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32)
    reference = make(SDS).model
    with torch.no_grad():
        got, want = (d.predict(x, t, e) for d in (guidance.model, reference))
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ALL)
def test_missing_model_is_one_clear_line(make, tmp_path, name):
    for model, text in {
        str(tmp_path / "nowhere"): "there is no model folder",
        "": "there is no model folder",
        "nobody/no-such-model": "offline, set pretrained_model_name_or_path to a downloaded",
        str(tmp_path): "has no unet/config.json",
    }.items():
        with pytest.raises(ValueError, match=text) as error:
            make(name, pretrained_model_name_or_path=model)
        assert repr(model) in str(error.value) and "\n" not in str(error.value)


def test_broken_models_are_one_clear_line(make, tiny_sd, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_sd(), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"unet cannot be read .* complete \.safetensors") as error:
        make(SDS, pretrained_model_name_or_path=str(folder))
    assert "\n" not in str(error.value)
    other = tmp_path / "other"
    (other / "unet").mkdir(parents=True)
    (other / "unet" / "config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    with pytest.raises(ValueError, match="is a UNet3DConditionModel"):
        make(SDS, pretrained_model_name_or_path=str(other))


def test_bad_input_is_refused(make):
    guidance = make(SDS)
    with pytest.raises(ValueError, match=r"takes \(B, H, W, 3\)"):
        guidance(images(channels=4), random_prompt(), *side_view(2))
    with pytest.raises(ValueError, match=r"takes \(B, H, W, 4\) with rgb_as_latents=True"):
        guidance(images(), random_prompt(), *side_view(2), rgb_as_latents=True)
    for name in PLAIN:
        with pytest.raises(ValueError, match=r"guidance_scale must be a .*number above 0"):
            make(name, guidance_scale=0)
        with pytest.raises(ValueError, match="weighting_strategy must be one of"):
            make(name, weighting_strategy="sdss")
        with pytest.raises(ValueError, match="samples must be a whole number from 1 "):
            make(name, lora_n_timestamp_samples=0)
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        make(SDS, guidance_scale=math.inf)


@pytest.mark.parametrize("written", [".inf", "inf", "1e3"])
def test_scales_as_the_command_line_writes_them(make, written):
    cfg = OmegaConf.from_dotlist([f"guidance_scale={written}"])
    guidance = make(LORA, **cfg)
    assert guidance.cfg.guidance_scale == float(written.lstrip("."))


def test_fields_without_effect_are_warned_about_once(make, monkeypatch):
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    make(LORA, guidance_scale_lora=7.5, lora_cfg_training=True, camera_condition_type="extrinsics")
    make(EMBEDDING, prompt_scale=2.0)
    assert said == []
    make(
        EMBEDDING,
        guidance_scale_lora=3.0,
        lora_cfg_training=False,
        camera_condition_type="mvp",
        enable_sequential_cpu_offload=True,
    )
    assert len(said) == 4 and all("has no effect" in line for line in said)
    said.clear()
    for name in (SDS, VSD):
        make(name, prompt_scale=2.0)
        assert said.pop() == "guidance: prompt_scale=2.0 has no effect" and not said
    make(VSD, lora_cfg_training=False, camera_condition_type="mvp")
    make(VSD, lora_scale=0.5, lora_rank=2, lora_n_timestamp_samples=2)
    make(EMBEDDING, embedding_start="source", lora_n_timestamp_samples=2)
    assert said == []  # there they have one
    for name, field in ((EMBEDDING, "lora_rank"), (SDS, "lora_n_timestamp_samples")):
        make(name, **{field: 2})
        assert said.pop() == f"guidance: {field}=2 has no effect" and not said
    make(LORA, embedding_start="source")
    assert said.pop().endswith("embedding_start=source has no effect") and not said
    for field, other in (
        ("timestep_schedule_steps", "timestep_schedule=random"),
        ("sds_scale", "sds_steps=0"),
        ("prior_inner_lr", "prior_inner_steps=0"),
    ):
        make(LORA, **{field: 7})
        assert f"{field}=7" in said[0] and said.pop().endswith(f"no effect with {other}")
    make(LORA, sds_scale=5.0, sds_steps=2)
    assert said == []


def test_the_scale_of_lods_is_told_of_where_it_multiplies(make, monkeypatch):
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    make(LORA, guidance_scale=1000.0)
    make(SDS, guidance_scale=100.0)
    assert said == []
    make(VSD, guidance_scale=1000.0)
    assert len(said) == 1 and "guidance_scale=1000 is of the configurations of LODS" in said[0]


@pytest.mark.parametrize("name", ALL)
def test_memory_switches_change_memory_only(make, name):
    results = []
    for on in (False, True):
        torch.manual_seed(6)
        guidance = make(name, enable_attention_slicing=on, enable_channels_last_format=on)
        if on:
            weight = guidance.model.unet.conv_in.weight
            assert weight.is_contiguous(memory_format=torch.channels_last)
            processors = guidance.model.unet.attn_processors.values()
            assert {type(p).__name__ for p in processors} == {"SlicedAttnProcessor"}
        torch.manual_seed(7)
        rgb = images().requires_grad_()
        out = guidance(rgb, random_prompt(), *side_view(2))
        total(out).backward()
        results.append([total(out).detach(), rgb.grad, *[p.grad for p in guidance.parameters()]])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hook", ["gradient", "texts", "check"])
def test_a_mixin_of_a_hook_that_the_method_has_now_is_refused(make, registered, hook):
    threestudio.register("old-mixin")(type("Old", (), {hook: lambda self, *args: None}))
    with pytest.raises(ValueError, match=rf"^Old\.{hook} would never be called"):
        make(f"{SDS}:old-mixin")


def test_a_mixin_of_what_is_called_of_a_guidance_is_taken(make, registered):
    mixin = type("Black", (), {"encode": lambda self, rgb, as_latents: torch.zeros(2, 4, 8, 8)})
    threestudio.register("black-mixin")(mixin)
    guidance = make(f"{SDS}:black-mixin")
    seen = []
    guidance.method.distil = lambda latents, conditions: seen.append(latents) or latents
    guidance(images(), random_prompt(), *side_view(2))
    assert not seen[0].any()
