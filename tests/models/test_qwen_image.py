"""Models shaped like Qwen-Image are told what diffusers tells them."""

import pytest
import torch
from lods.learned.lora import RowLora
from lods.models import memory, qwen_image
from lods.models.cards import Location
from lods.models.qwen_image import QwenImageModel

from tests.stock_flows import edited, load, noisy, pipeline_of, token_counts

TEXTS = ["a red car", "a blue house and a {red} car " * 3]


@pytest.fixture(scope="module")
def model(tiny_flow):
    return load(tiny_flow("qwen"))


@pytest.fixture(scope="module")
def stock(tiny_flow):
    """The pipeline of diffusers, with a scheduler that takes a sigma as it is."""
    return pipeline_of("qwen", tiny_flow("qwen"))


@pytest.mark.parametrize(
    ("t", "scale", "width"), [(60, 1.0, 16), (60, 4.0, 16), (900, 1.0, 16), (900, 4.0, 8)]
)
def test_a_step_of_the_stock_pipeline_is_what_the_noise_means(model, stock, t, scale, width):
    """Texts of two lengths, packing, places, time, sign at once; with guidance the sampler scales
    each token of the guided velocity to the norm of that under the prompt."""
    assert isinstance(model, QwenImageModel) and not model.no_null
    assert model.latent_shape == (4, 8, 8) and model.image_size == 16
    x_t, times = noisy(model)[..., : width // 2], torch.full((2,), t)
    alpha, sigma = (x[0].item() for x in model.schedule.alpha_sigma(times))
    want = stock(
        prompt=TEXTS,
        negative_prompt=["", ""],
        true_cfg_scale=scale,
        latents=stock._pack_latents(x_t, *x_t.shape),
        height=16,
        width=width,
        num_inference_steps=1,
        sigmas=[sigma],
        output_type="latent",
    ).images
    want = stock._unpack_latents(want, 16, width, stock.vae_scale_factor).squeeze(2)
    texts = model.text([*TEXTS, ""])
    with torch.no_grad():
        v, null = (
            (model.predict(x_t, times, each) - x_t) / alpha for each in (texts[:2], texts[[2, 2]])
        )
    assert (v - null).abs().amax((1, 2, 3)).min() > 1e-3
    guided = stock._pack_latents(null + scale * (v - null), *x_t.shape)
    norm = stock._pack_latents(v, *x_t.shape).norm(dim=-1, keepdim=True)
    guided = guided * norm / guided.norm(dim=-1, keepdim=True)
    v = stock._unpack_latents(guided, 16, width, stock.vae_scale_factor).squeeze(2)
    torch.testing.assert_close(x_t - sigma * v, want, rtol=1e-4, atol=1e-4)


def test_texts_are_those_of_the_pipeline(model, stock):
    texts = [*TEXTS, "", "car " * 600]
    got, lengths = model.text_layout.unpack(model.text(texts)), []
    for rows, mask, text in zip(got.tokens, got.mask, texts):
        want, _ = stock.encode_prompt(text, device="cpu", max_sequence_length=512)
        lengths.append(want.shape[1])
        assert mask[: lengths[-1]].all() and not mask[lengths[-1] :].any()
        torch.testing.assert_close(rows[mask], want[0], rtol=1e-4, atol=1e-4)
    assert lengths[2] < lengths[0] < lengths[1] < lengths[3] == 512


def test_a_text_is_counted_as_cut_from_the_first_token_that_is(model, stock):
    """Of 512; the marks of the chat format count after the text, not before it."""
    marks = len(stock.tokenizer(stock.prompt_template_encode.format("")).input_ids)
    fit = 512 - (marks - stock.prompt_template_encode_start_idx)
    counts = token_counts(model, ["car " * n for n in (0, fit, fit + 1)])
    rows = model.text_shape[0]
    assert counts == [rows - fit, rows, rows + 1]


def test_the_transformer_sees_no_more_rows_than_the_longest_text_fills(model):
    texts, seen = model.text(["a red car", ""]), []
    hook = model.network.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.predict(noisy(model), torch.tensor([100, 900]), texts)
    hook.remove()
    parts = model.text_layout.unpack(texts)
    longest = int(parts.mask.sum(1).max())
    assert 0 < longest < 512
    torch.testing.assert_close(seen[0], parts.tokens[:, :longest])


def test_embeddings_of_another_chat_format_are_others(model, monkeypatch):
    plan = model.text_plan(Location(model.name))
    monkeypatch.setattr(qwen_image, "template", lambda: ("{} as a drawing", 0))
    assert model.text_plan(Location(model.name)).note != plan.note


def test_a_lora_is_on_every_projection_of_the_attention(tiny_flow):
    model = load(tiny_flow("qwen"))
    wanted = {
        f"{name}.lora_{part}.weight"
        for name, layer in model.network.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".attn." in name
        for part in "AB"
    }
    lora = RowLora(model.lora_network(), 1, model.lora_sites)
    assert len(wanted) == 16 and set(lora.state_dict()) == wanted


def test_half_of_it_is_bfloat16():
    settings = memory.ModelSettings()
    dtype = memory.weights_dtype(settings, torch.device("cuda"), QwenImageModel.half)
    assert dtype == torch.bfloat16


def test_a_picture_goes_through_the_video_vae_as_one_frame(model):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, deviation = (
        torch.tensor(model.vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std")
    )
    torch.manual_seed(0)
    got = model.encode(images.requires_grad_())
    got.square().sum().backward()
    assert images.grad.abs().sum() > 0
    with torch.no_grad():
        torch.manual_seed(0)
        plain = model.vae.encode(images[:, :, None] * 2 - 1).latent_dist.sample()
        torch.testing.assert_close(got, (plain[:, :, 0] - mean) / deviation)
        want = (model.vae.decode(plain).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(model.decode(got.detach()), want, rtol=1e-4, atol=1e-5)


def test_tiles_of_the_video_vae_have_gradients(tiny_flow):
    model = load(tiny_flow("qwen"), enable_vae_tiling=True)
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    model.encode(images).square().sum().backward()
    assert model.vae.use_tiling and images.grad.abs().sum() > 0


def test_pictures_have_1024_pixels_unless_the_config_says(model):
    from types import SimpleNamespace

    assert model.side_of(SimpleNamespace(config={}), None)[1] == 1024 // 8
    assert model.side_of(SimpleNamespace(config={"sample_size": 64}), None)[1] == 64


@pytest.mark.parametrize(
    "file, fields, said",
    [
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "told more than a text"),
        ("transformer/config.json", {"zero_cond_t": True}, r"\(zero_cond_t\), which is told more"),
        ("transformer/config.json", {"use_additional_t_cond": True}, r"\(use_additional_t_cond\)"),
        ("transformer/config.json", {"use_layer3d_rope": True}, r"\(use_layer3d_rope\), which is"),
        ("transformer/config.json", {"guidance_embeds": True}, "was distilled .* take qwen-image$"),
        ("transformer/config.json", {"sample_size": "big"}, "sample_size is big, not 1 to"),
        ("vae/config.json", {"latents_std": [1.0]}, "of other lengths than its 4 channels"),
        ("text_encoder/config.json", {"model_type": "llama"}, "is a llama, and Qwen-Image has a"),
    ],
)
def test_what_is_no_plain_qwen_image_is_refused_in_one_line(
    tiny_flow, tmp_path, file, fields, said
):
    with pytest.raises(ValueError, match=said) as error:
        load(edited(tiny_flow("qwen"), tmp_path, file, **fields)).text(["a car"])
    assert "\n" not in str(error.value)
