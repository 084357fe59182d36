"""SANA and PixArt-Sigma are told what diffusers' pipelines tell them, masks of texts included."""

import json
import shutil

import lods
import pytest
import torch
from lods.models import memory
from lods.models.pixart import PixArtModel
from lods.models.sana import SanaModel, encode, question

from threestudio import find

TEXTS = ["A Red car ", "", "a blue house on the horse"]
FAMILIES = ("sana", "pixart")


@pytest.fixture
def tiny(tiny_sana, tiny_pixart):
    return {"sana": tiny_sana, "pixart": tiny_pixart}


def load(folder, **settings):
    return lods.models.load(str(folder), "cpu", **settings)


def stock(family, folder):
    import diffusers

    names = {"sana": "SanaPipeline", "pixart": "PixArtSigmaPipeline"}
    pipeline = getattr(diffusers, names[family]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noisy(model, rows=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, *model.latent_shape, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_masks_are_those_of_diffusers(tiny, family):
    folder = tiny[family]()
    model, pipeline = load(folder), stock(family, folder)
    more = {"complex_human_instruction": question().split("\n")} if family == "sana" else {}
    if more:
        import inspect

        asked = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"]
        assert more["complex_human_instruction"] == asked.default and len(asked.default) > 3
    with torch.no_grad():
        rows, mask, null, null_mask = pipeline.encode_prompt(
            TEXTS[::2], negative_prompt="", device="cpu", **more
        )
    got = model.text_layout.unpack(model.text(TEXTS))
    for place, want, counts in (([0, 2], rows, mask), ([1, 1], null, null_mask)):
        assert torch.equal(got.mask[place], counts.bool())
        assert 0 < counts.sum(1).max() < 300
        torch.testing.assert_close(
            got.tokens[place][counts.bool()], want[counts.bool()], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("timestep_scale", [1.0, 0.5])
def test_a_step_of_sanas_pipeline_is_what_the_noise_means(tiny_sana, scale, timestep_scale):
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder, t = tiny_sana(timestep_scale=timestep_scale), 600
    model, pipeline = load(folder), stock("sana", folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x = noisy(model)
    step = {"sigmas": [(t + 0.5) / 1000], "num_inference_steps": 1, "output_type": "latent"}
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    end = pipeline(TEXTS[0], guidance_scale=scale, latents=x.clone(), **step, **size).images
    s = 3 * (t + 0.5) / 1000 / (1 + 2 * (t + 0.5) / 1000)
    want = x + (1 - s) * (x - end) / s
    given = model.text(TEXTS[:2])
    with torch.no_grad():
        eps_c, eps_u = model.predict(x.repeat(2, 1, 1, 1), torch.tensor([t, t]), given).chunk(2)
    torch.testing.assert_close(eps_u + scale * (eps_c - eps_u), want, rtol=1e-4, atol=1e-4)
    assert (eps_c - eps_u).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_a_step_of_pixarts_pipeline_is_what_the_noise_means(tiny_pixart, scale):
    folder, t = tiny_pixart(), 600
    model, pipeline = load(folder), stock("pixart", folder)
    x = noisy(model)
    end = pipeline(
        TEXTS[0],
        guidance_scale=scale,
        latents=x.clone(),
        timesteps=[t],
        num_inference_steps=1,
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
    ).images
    alpha, sigma = (float(each) for each in model.schedule.alpha_sigma(torch.tensor([t])))
    want = (x - alpha * end) / sigma
    given = model.text(TEXTS[:2])
    with torch.no_grad():
        eps_c, eps_u = model.predict(x.repeat(2, 1, 1, 1), torch.tensor([t, t]), given).chunk(2)
    torch.testing.assert_close(eps_u + scale * (eps_c - eps_u), want, rtol=1e-3, atol=1e-3)
    assert (eps_c - eps_u).abs().max() > 1e-2


def test_the_shift_is_that_of_the_solver_in_the_folder(tiny_sana):
    from diffusers import DPMSolverMultistepScheduler

    folder = tiny_sana(shift=2.0)
    solver = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    solver.set_timesteps(10)
    schedule = load(folder).schedule
    parts = [schedule.part_of(float(s)) for s in solver.sigmas[:-1]]
    even = 1 - torch.linspace(1, 1 / 1000, 11).flip(0)[:-1]
    torch.testing.assert_close(torch.tensor(parts), even, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_under_the_mask_changes_nothing(tiny, family):
    model = load(tiny[family]())
    x, t, texts = noisy(model), torch.tensor([500]), model.text(TEXTS[:1])
    assert texts[:, 200:300].abs().max() == 0
    other = texts.clone()
    other[:, 200:300] = 7.0
    seen = texts.clone()
    seen[:, 0] = 7.0
    with torch.no_grad():
        want = model.predict(x, t, texts)
        assert torch.equal(model.predict(x, t, other), want)
        assert not torch.allclose(model.predict(x, t, seen), want, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_a_camera_count(tiny, family):
    folder = tiny[family](camera_tokens=2)
    model, seen = load(folder, cameras="tokens"), []
    model.network.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["encoder_attention_mask"]), with_kwargs=True
    )
    camera = [torch.tensor([float(x)]) for x in (0, 30, 3.6)]
    cameras = lods.Cameras(*camera, fovy=torch.tensor([40.0]))
    model.predict(noisy(model), torch.tensor([500]), model.text(TEXTS[:1]), cameras)
    count = int(model.text_layout.unpack(model.text(TEXTS[:1])).mask.sum())
    assert seen[0].shape == (1, 1, 302) and seen[0][0, 0, 300:].tolist() == [0, 0]
    assert int((seen[0] == 0).sum()) == count + 2 and seen[0].min() == -10_000


@pytest.mark.parametrize("family", FAMILIES)
def test_perp_neg_goes_from_view_to_view_without_a_jump(tiny, family, tmp_path, monkeypatch):
    """The host blends the embeddings of two views, here of texts of different lengths."""
    monkeypatch.chdir(tmp_path)
    folder = tiny[family]()
    processor = find("lods-prompt-processor")(
        {
            "pretrained_model_name_or_path": folder,
            "prompt": "a red car",
            "prompt_front": "a red car",
            "prompt_side": "a red car on the house of the astronaut, side view",
            "use_perp_neg": True,
            "use_cache": False,
        }
    )
    utils, model = processor(), load(folder)
    turned = torch.tensor([0.0, 2e-4, 45.0, 90 - 2e-4, 90.0])
    zeros = torch.zeros_like(turned)
    rows, _ = utils.get_text_embeddings_perp_neg(zeros, turned, zeros + 3)
    blended = rows[: len(turned)]
    x = noisy(model).expand(len(turned), -1, -1, -1)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "attn2.to_q" in name:  # else one token is all that some pixels see, at any weight
                weight.mul_(0.05)
        eps = model.predict(x, torch.full((len(turned),), 500), blended)
        two = model.text(["a red car", "a red car on the house of the astronaut, side view"])
        front, side = model.predict(x[:2], torch.tensor([500, 500]), two)
    apart = float((front - side).abs().max())
    assert apart > 1e-2
    for place, want, within in ((0, front, 1e-3), (1, front, 0.1), (3, side, 0.1), (4, side, 1e-3)):
        assert (eps[place] - want).abs().max() < within * apart, place
    masks = model.text_layout.unpack(two).mask
    assert torch.equal(model.text_layout.unpack(blended).mask[2], masks.any(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "setting",
    ["enable_gradient_checkpointing", "enable_channels_last_format", "enable_vae_slicing"],
)
def test_settings_for_memory_change_nothing(tiny, family, setting):
    folder, found = tiny[family](), []
    for settings in ({}, {setting: True}):
        model = load(folder, **settings)
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        images.requires_grad_()
        torch.manual_seed(0)
        z = model.encode(images)
        model.predict(z, torch.tensor([300, 700]), model.text(TEXTS[:2])).square().sum().backward()
        found.append(images.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(
        found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max())
    )


def test_tiles_of_a_deep_compression_autoencoder_have_gradients(tiny_sana):
    model = load(tiny_sana(), enable_vae_tiling=True)
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    z = model.encode(images)
    z.square().sum().backward()
    assert model.vae.tile_sample_min_height == 8 and z.shape == (1, *model.latent_shape)
    assert images.grad.isfinite().all() and (images.grad.abs().sum((0, 1)) > 0).all()


def test_the_latents_are_the_autoencoders_own(tiny_sana):
    model = load(tiny_sana())
    assert (model.image_size, model.latent_shape) == (16, (4, 4, 4))
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        want = 0.7 * model.vae.encoder(images * 2 - 1)
        torch.testing.assert_close(model.encode(images), want)
        torch.testing.assert_close(
            model.decode(want), (model.vae.decoder(want / 0.7) / 2 + 0.5).clamp(0, 1)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_shorter_weights_run(tiny, family):
    model = load(tiny[family](), weights_dtype="bfloat16")
    assert model.network.dtype == torch.bfloat16
    texts = model.text(TEXTS[:2])
    eps = model.predict(noisy(model, 2), torch.tensor([10, 900]), texts)
    assert eps.dtype == torch.float32 and eps.isfinite().all()
    whole = load(tiny[family]())
    torch.testing.assert_close(
        eps, whole.predict(noisy(model, 2), torch.tensor([10, 900]), texts), rtol=0.1, atol=0.1
    )


def test_sana_is_bfloat16_where_others_are_float16():
    cuda, settings = torch.device("cuda"), memory.ModelSettings()
    assert memory.weights_dtype(settings, cuda, SanaModel.half) == torch.bfloat16
    assert memory.weights_dtype(settings, cuda, PixArtModel.half) == torch.float16
    settings.weights_dtype = "float16"
    assert memory.weights_dtype(settings, cuda, SanaModel.half) == torch.float16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_text_is_counted_as_cut(tiny, family, monkeypatch):
    from lods.models import families, pixart
    from lods.models.cards import resolve

    folder = tiny[family]()
    plan, counts = families.text_plan(resolve(folder)), []
    own = {"sana": encode, "pixart": pixart.encode}[family]

    def keep(texts, load, device):
        found = own(texts, load, device)
        counts.extend(found[1])
        return found

    monkeypatch.setattr(type(load(folder)), "text_plan", classmethod(lambda cls, m: swapped))
    swapped = type(plan)(plan.parts, keep, plan.note)
    model = load(folder)
    rows = model.text_shape[0]
    # with the marks at both ends as many as fit, and one more
    marks = {"sana": 2, "pixart": 2}[family]
    model.text([" ".join(["car"] * (300 - marks)), " ".join(["car"] * (301 - marks)), ""])
    assert counts[0] <= rows < counts[1] and counts[2] < rows


def copied(make, tmp_path, **options):
    folder = tmp_path / "model"
    shutil.copytree(make(**options), folder)
    return folder


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_is_no_plain_sana_is_refused(tiny_sana, tmp_path):
    folder = copied(tiny_sana, tmp_path)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    change(scheduler, use_flow_sigmas=False, prediction_type="epsilon")
    with pytest.raises(ValueError, match="is that of a diffusion") as error:
        load(folder)
    assert "\n" not in str(error.value)
    change(scheduler, _class_name="SCMScheduler")
    with pytest.raises(ValueError, match="is a SCMScheduler; a flow has a FlowMatch"):
        load(folder)
    change(folder / "transformer" / "config.json", guidance_embeds=True)
    with pytest.raises(ValueError, match=r"is a SANA-Sprint, which was distilled.*take sana-1600m"):
        load(folder)


def test_a_pixart_that_is_told_sizes_is_refused(tiny_pixart, tmp_path):
    from diffusers import PixArtTransformer2DModel

    folder = copied(tiny_pixart, tmp_path)
    config = PixArtTransformer2DModel.load_config(folder, subfolder="transformer")
    alpha = PixArtTransformer2DModel.from_config(
        config, use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24
    )
    alpha.save_pretrained(folder / "transformer")
    with pytest.raises(ValueError, match=r"wants the picture's size .* take pixart-sigma"):
        load(folder)
