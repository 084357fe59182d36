"""The guidance as a module: losses and their gradients, what is learnt, saved, loaded, refused."""

import importlib
import io
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from lods.methods.conditions import Conditions
from omegaconf import OmegaConf

import threestudio
from tests.guidance_oracles import distil, random_prompt, side_view
from threestudio import find

EMBEDDING, LORA, SDS = PRIORS = [
    "lods-embedding-guidance",
    "lods-lora-guidance",
    "lods-sds-guidance",
]
VSD = "lods-vsd-guidance"
LEARNING = [EMBEDDING, LORA, VSD]
ALL = [*PRIORS, VSD, *(f"lods-{name}-guidance" for name in ("csd", "nfsd", "bridge", "sdi", "ism"))]
DRAWN = ALL[:-2]  # those whose noise is drawn, not found by inversion


@pytest.fixture(scope="module")
def make(lods, tiny_sd):
    def build(name, prediction_type="epsilon", **fields):
        fields.setdefault("pretrained_model_name_or_path", tiny_sd(prediction_type=prediction_type))
        if "bridge" in name:
            fields.setdefault("bridge_start", 0)  # its own gradient from the first step on
        return find(name)(fields)

    return build


@pytest.fixture(scope="module")
def model_module(lods):
    return importlib.import_module("lods.models.unet")


def images(n=2, size=16, channels=3, seed=1):
    return torch.rand(n, size, size, channels, generator=torch.Generator().manual_seed(seed))


def total(out):
    return sum(v for k, v in out.items() if k.startswith("loss_"))


# --- losses and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("as_latents", [False, True])
def test_gradient_of_the_loss_is_the_jacobian_times_g(make, monkeypatch, as_latents, size):
    guidance = make(SDS)
    g = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(guidance.method, "distil", lambda *args: g)
    rgb = images(size=size, channels=4 if as_latents else 3).requires_grad_()
    torch.manual_seed(3)
    out = guidance(rgb, random_prompt(), *side_view(2), rgb_as_latents=as_latents)
    (grad,) = torch.autograd.grad(out["loss_sds"], rgb)
    # the encoder, written out: resize, 2 x - 1, a posterior sample, the scale of the tiny model
    torch.manual_seed(3)
    x = F.interpolate(rgb.permute(0, 3, 1, 2), (8, 8) if as_latents else (16, 16), mode="bilinear")
    if not as_latents:
        x = 0.7 * guidance.model.vae.encode(2 * x - 1).latent_dist.sample()
    (expected,) = torch.autograd.grad(x, rgb, g / 2)
    assert expected.abs().max() > 1e-4
    rounding = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=rounding)
    torch.testing.assert_close(out["loss_sds"], 0.5 * g.square().sum() / 2)
    torch.testing.assert_close(out["grad_norm"], g.norm())


@pytest.mark.parametrize("name", ALL)
def test_images_of_any_size_get_a_gradient(make, name):
    guidance = make(name)
    rgb = images(size=40).requires_grad_()
    out = guidance(rgb, random_prompt(), *side_view(2))
    total(out).backward()
    assert rgb.grad.isfinite().all() and rgb.grad.abs().max() > 0
    assert all(p.grad is not None for p in guidance.parameters() if p.requires_grad)
    assert all(p.grad is None for p in guidance.model.vae.parameters())
    own = {EMBEDDING: {"loss_embedding"}, LORA: {"loss_lora"}, VSD: {"loss_lora"}}
    assert {k for k in out if k.startswith("loss_")} == {"loss_sds"} | own.get(name, set())
    assert (out["min_step"], out["max_step"]) == (20, 980)


def test_what_is_dropped_is_said_once_and_again_when_it_is_all(make, monkeypatch):
    guidance, warnings = make(SDS), []
    monkeypatch.setattr("threestudio.warn", warnings.append)
    some = torch.ones(2, 4, 8, 8)
    some[0, 0, 0, :4] = math.inf
    for bad, said in ((some, 0), (some, 1), (some * math.nan, 1), (some * math.nan, 2), (some, 2)):
        monkeypatch.setattr(guidance.method, "gradient", lambda *args, bad=bad: bad)
        distil(guidance, torch.zeros_like(bad), None)
        assert len(warnings) == said, warnings  # a step's share is known at the next one
    assert "0.781 % of a gradient's elements" in warnings[0] and "100 %" in warnings[1]


@pytest.mark.parametrize("name", DRAWN)
def test_not_finite_is_dropped_and_the_rest_clipped(make, monkeypatch, name):
    guidance = make(name, grad_clip=OmegaConf.create([0, 2.0, 0.5, 10]))
    bad = torch.full((1, 4, 8, 8), 7.0)
    bad[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -7.0])
    monkeypatch.setattr(guidance.method, "gradient", lambda *args: bad)
    for step, clip in [(0, 2.0), (10, 0.5)]:
        guidance.do_update_step(0, step)
        got = distil(guidance, torch.zeros(1, 4, 8, 8), None)
        assert got[0, 0, 0, :5].tolist() == [0, 0, 0, -clip, clip]
    unclipped = make(name)
    monkeypatch.setattr(unclipped.method, "gradient", lambda *args: bad)
    assert distil(unclipped, torch.zeros(1, 4, 8, 8), None).max() == 7


@pytest.mark.parametrize("name", ALL)
def test_unet_calls_per_step(make, name):
    """All predictions of the gradient in one call, those of an inversion and the loss of what is
    learnt in others, with ``lora_n_timestamp_samples`` draws per image."""
    fields = {"min_step_percent": 0.5, "max_step_percent": 0.5, "inversion_steps": 3}
    guidance, rows = make(name, lora_n_timestamp_samples=3, **fields), []
    guidance.model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    guidance(images(n=2), random_prompt(), *side_view(2))
    calls = {EMBEDDING: [6, 4], LORA: [6, 4], VSD: [6, 6], "lods-nfsd-guidance": [6]}
    # three steps under two texts; from 0 to 450 in three steps of up to 200, and one more
    calls |= {"lods-sdi-guidance": [4] * 4, "lods-ism-guidance": [2] * 4 + [4]}
    assert rows == calls.get(name, [4])


def test_more_draws_have_the_same_mean_and_less_noise(make):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    few, many = [], []
    torch.manual_seed(0)
    for values, n in ((few, 1), (many, 16)):
        guidance = make(LORA, lora_n_timestamp_samples=n)
        zero = lambda x_t, t: torch.zeros_like(x_t)  # noqa: E731
        for _ in range(64):
            values.append(guidance.denoising_loss(z, zero))
    few, many = torch.stack(few), torch.stack(many)
    assert many.mean() == pytest.approx(1, abs=0.02) and few.mean() == pytest.approx(1, abs=0.06)
    assert many.std() < 0.5 * few.std()


@pytest.mark.parametrize("name", DRAWN)
def test_timesteps_stay_within_the_schedule(make, name, monkeypatch):
    schedule = OmegaConf.create([5, 1.0, 0.5, 6])
    guidance, seen = make(name, min_step_percent=0.4, max_step_percent=schedule), []
    monkeypatch.setattr(
        guidance.method, "gradient", lambda x_t, t, *rest: seen.append(t) or torch.zeros_like(x_t)
    )
    for step, low, high in [(0, 400, 999), (6, 400, 500)]:
        guidance.do_update_step(0, step)
        assert (guidance.min_step, guidance.max_step) == (low, high)
        seen.clear()
        distil(guidance, torch.zeros(4000, 1, 1, 1), None)
        assert (seen[0].min(), seen[0].max()) == (low, high)
    guidance.method.cfg.min_step_percent = 0.6
    with pytest.raises(ValueError, match="min_step_percent <= max_step_percent"):
        guidance.do_update_step(0, 6)


@pytest.mark.parametrize("dependent", [True, False])
def test_view_dependent_prompting(make, monkeypatch, dependent):
    guidance, prompt, seen = make(SDS, view_dependent_prompting=dependent), random_prompt(), []
    monkeypatch.setattr(
        guidance.method, "distil", lambda z, given: seen.append(given) or torch.zeros_like(z)
    )
    guidance(images(), prompt, torch.zeros(2), torch.tensor([0.0, 90.0]), torch.ones(2))
    y, null, plain = seen[0].prompt, seen[0].null, prompt.text_embeddings[0]
    assert torch.equal(y[0], plain + 1 if dependent else plain)  # the front view
    assert torch.equal(y[1], plain)
    assert torch.equal(null[0], prompt.uncond_text_embeddings[0])


# --- what is learnt -------------------------------------------------------------------------------


def test_only_what_is_learnt_is_in_the_state(make):
    assert not make(SDS).state_dict()
    assert set(make(EMBEDDING).state_dict()) == {"learnable_embedding", "initialized"}
    guidance = make(LORA)
    unet = {n for n, _ in guidance.model.unet.named_modules()}
    for key in guidance.state_dict():
        head, path, part, weight = key.split(".", 1)[0], *key.split(".", 1)[1].rsplit(".", 2)
        assert (head, weight) == ("lora", "weight") and part in ("lora_A", "lora_B")
        assert path in unet  # the key names the layer that it belongs to


def test_embedding_starts_as_the_negative_prompt_once(make):
    prompt, other = random_prompt(0), random_prompt(1)
    guidance = make(EMBEDDING)
    shape = guidance.learnable_embedding.shape  # known before any prompt
    guidance.initialize(prompt)
    null = prompt.uncond_text_embeddings[0]
    assert torch.equal(guidance.learnable_embedding, null) and null.shape == shape
    with torch.no_grad():
        guidance.learnable_embedding.add_(1)
    guidance.initialize(other)
    assert torch.equal(guidance.learnable_embedding, null + 1)

    loaded, fresh = make(EMBEDDING), make(EMBEDDING)
    loaded.load_state_dict(guidance.state_dict())
    for module in (loaded, fresh):
        module(images(), other, *side_view(2))
    assert torch.equal(loaded.learnable_embedding, null + 1)  # goes on with what was learnt
    assert torch.equal(fresh.learnable_embedding, other.uncond_text_embeddings[0])


@pytest.mark.parametrize(
    "prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*ALL, "inner"])
def test_two_and_two_steps_are_four(make, name, prediction_type):
    def start():
        torch.manual_seed(4)
        fields = {"prior_inner_steps": 2} if name == "inner" else {}
        fields["inversion_steps"] = 3
        guidance = make(VSD if name == "inner" else name, prediction_type, **fields)
        particle = torch.rand(2, 12, 12, 3).requires_grad_()
        groups = [{"params": [particle], "lr": 0.1}]
        if learnt := list(guidance.parameters()):
            groups.append({"params": learnt, "lr": 0.01})
        return guidance, particle, torch.optim.AdamW(groups)

    def train(guidance, particle, optimizer, steps):
        for step in steps:
            guidance.do_update_step(0, step)
            optimizer.zero_grad()
            total(guidance(particle, random_prompt(), *side_view(2))).backward()
            optimizer.step()

    whole = start()
    train(*whole, range(4))
    first = start()
    train(*first, range(2))
    file = io.BytesIO()
    torch.save(
        [first[0].state_dict(), first[1], first[2].state_dict(), torch.get_rng_state()], file
    )
    file.seek(0)
    state, particle, optimizer_state, rng = torch.load(file, weights_only=True)
    guidance, resumed, optimizer = start()
    torch.manual_seed(99)
    guidance.load_state_dict(state)
    with torch.no_grad():
        resumed.copy_(particle)
    optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(rng)
    train(guidance, resumed, optimizer, range(2, 4))
    assert torch.equal(resumed, whole[1]) and not torch.equal(resumed, first[1])
    for (key, one), other in zip(guidance.state_dict().items(), whole[0].state_dict().values()):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", LEARNING)
def test_learning_lowers_the_loss(make, name):
    guidance, prompt = make(name), random_prompt()
    guidance.initialize(prompt)
    z, texts = torch.randn(2, 4, 8, 8), prompt.get_text_embeddings(*side_view(2)).chunk(2)
    conditions = Conditions(*texts)
    learnt = list(guidance.parameters())
    optimizer = torch.optim.Adam(learnt, lr=0.1)
    values = []
    for _ in range(12):
        torch.manual_seed(0)  # always the same (t, noise), so that the loss must fall
        (loss,) = guidance.learn(z, conditions).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.97 * values[0]


@pytest.mark.parametrize("name", LEARNING)
def test_gradient_scale_of_half_precision_cancels(make, name, monkeypatch, model_module):
    """float16 needs its gradients enlarged inside the UNet; nothing of that may be seen outside."""
    plain = make(name)
    load = model_module.UNetModel.from_pretrained

    def scaled_load(*args, **kwargs):
        model = load(*args, **kwargs)
        model.grad_scale = 64.0
        return model

    monkeypatch.setattr(model_module.UNetModel, "from_pretrained", scaled_load)
    scaled = make(name)
    seen = []
    scaled.model.unet.conv_out.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0])
    )
    plain.model.unet.conv_out.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0])
    )
    scaled.load_state_dict(plain.state_dict())
    grads = []

    def differentiate(guidance):
        torch.manual_seed(5)
        guidance.zero_grad()
        total(guidance(images(), random_prompt(), *side_view(2))).backward()
        grads.append([p.grad.clone() for p in guidance.parameters()])

    differentiate(plain)
    differentiate(scaled)
    torch.testing.assert_close(seen[1], 64 * seen[0])
    torch.testing.assert_close(grads[0], grads[1])
    # a GradScaler enlarges them already, and both factors together overflow in float16
    scaled.loss_is_scaled()
    differentiate(scaled)
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(grads[0], grads[2])
    # but not those of updates inside of a step, which the trainer does not see
    inside = make(name, prior_inner_steps=1)
    inside.loss_is_scaled()
    assert inside.model.grad_scale == 64


# --- models, fields, errors -----------------------------------------------------------------------


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
    (other / "unet" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="is a FluxTransformer2DModel"):
        make(SDS, pretrained_model_name_or_path=str(other))


def test_bad_input_is_refused(make):
    guidance = make(SDS)
    with pytest.raises(ValueError, match=r"takes \(B, H, W, 3\)"):
        guidance(images(channels=4), random_prompt(), *side_view(2))
    with pytest.raises(ValueError, match=r"takes \(B, H, W, 4\) with rgb_as_latents=True"):
        guidance(images(), random_prompt(), *side_view(2), rgb_as_latents=True)
    for name in PRIORS:
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
