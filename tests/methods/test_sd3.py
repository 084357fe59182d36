"""Every method on a tiny random Stable Diffusion 3: steps, files, a resumed run, exports."""

import copy
import functools
import json

import lods
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.few_steps import LEARNING, METHODS, OWN, cameras, check_resuming, images, trained


@pytest.fixture(scope="module")
def make(tiny_sd3):
    """``make(name, **settings)``: a method on one model, shared by those that have no LoRA."""

    def build(name, folder=None, **settings):
        settings = {**OWN.get(name, {}), **settings}
        return lods.load(name, folder or tiny_sd3(), "a red car", device="cpu", **settings)

    return build


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_moves_the_pictures(make, name):
    method = make(name)
    assert (trained(method) - images()).abs().max() > 1e-3


@pytest.mark.parametrize("name", LEARNING)
def test_two_steps_and_a_resumed_one_are_three_steps(make, name, tmp_path):
    build = functools.partial(make, name, prior_inner_steps=1)
    check_resuming(build, tmp_path / "state.pt", images(), cameras())


@pytest.mark.parametrize("name", LEARNING)
def test_a_learned_part_is_taken_back(make, name, tmp_path):
    method = make(name)
    trained(method)
    path = method.save(tmp_path / "learned.safetensors")
    with safe_open(path, "pt") as file:
        assert float(file.metadata()["moved"]) > 0
    again = make(name)
    again.load(path)
    one = dict(method.named_parameters())
    for key, value in again.named_parameters():
        if "camera" not in key:
            torch.testing.assert_close(value, one[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dual", [False, True])
def test_stock_diffusers_takes_the_lora(make, tiny_sd3, tmp_path, dual):
    from diffusers import StableDiffusion3Pipeline

    folder = tiny_sd3(dual=dual)
    method = make("lods-lora", folder, lora_scale=0.7)
    with torch.no_grad():
        for key, value in method.lora.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    method.save(tmp_path / "lora.safetensors")
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    texts = method.model.text(["a car", ""])
    with torch.no_grad():
        plain = method.model.predict(x_t, t, texts)
        want = method.predict_learned(x_t, t, texts)
        none = {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **none)
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        parts = method.model.text_layout.unpack(texts)
        v = pipeline.transformer(
            hidden_states=x_t,
            encoder_hidden_states=parts.tokens,
            pooled_projections=parts.pooled,
            timestep=method.model.schedule.told(t),
        ).sample
    assert (want - plain).abs().max() > 1e-2
    got = method.model.schedule.to_noise(v, x_t, t, "flow")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_alpha_that_peft_notes_of_a_transformer_counts(make, tmp_path):
    """alpha = 8 over rank 4, which diffusers writes under the name of the network."""
    own = {name: value + 1 for name, value in make("lods-lora").lora.state_dict().items()}
    noted = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    path = tmp_path / "peft.safetensors"
    tensors = {f"transformer.{name}": value for name, value in own.items()}
    save_file(tensors, path, {"lora_adapter_metadata": noted})
    again = make("lods-lora", lora_scale=0.25)
    again.load(path)
    for name, value in again.lora.state_dict().items():
        factor = 2 / 0.25 if "lora_B" in name else 1.0
        torch.testing.assert_close(value, own[name] * factor)


def test_the_lora_is_on_the_attention_of_picture_and_text(make, tiny_sd3):
    keys = set(make("lods-lora", tiny_sd3(dual=True)).lora.state_dict())
    for layer in ("attn.to_q", "attn.add_k_proj", "attn.to_add_out", "attn2.to_out.0"):
        assert f"transformer_blocks.0.{layer}.lora_A.weight" in keys


def test_the_lora_of_another_family_is_refused(make, tiny_sd, tmp_path):
    other = lods.load("lods-lora", tiny_sd(), "a red car", device="cpu")
    path = other.save(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="not a LoRA of the attention of this transformer"):
        make("lods-lora").load(path)


def test_the_rows_of_a_lora_are_those_of_calls_of_their_own(make):
    method = make("lods-lora", lora_scale=0.5)
    with torch.no_grad():
        for key, value in method.lora.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
        conditions = method.prompts.conditions(cameras())
        y, n = conditions.prompt, conditions.null
        eps_c, eps_u = method.predict_with_lora(x_t, t, conditions, [y], n)
        torch.testing.assert_close(eps_c, method.model.predict(x_t, t, y), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(eps_u, method.predict_learned(x_t, t, n), rtol=1e-4, atol=1e-5)
        assert (eps_u - method.model.predict(x_t, t, n)).abs().max() > 1e-2


@pytest.mark.parametrize("what", ["all", "tokens", "pooled"])
def test_what_is_learned_of_the_null_text(make, what, tmp_path):
    method = make("lods-embedding", learned_text=what)
    start = method.embedding.detach().clone()
    torch.testing.assert_close(start, method.model.text([""])[0], rtol=1e-4, atol=1e-4)
    trained(method)
    now = method.embedding.detach()
    moved = {"tokens": now[:-1] != start[:-1], "pooled": now[-1, :40] != start[-1, :40]}
    assert {part for part, which in moved.items() if which.any()} == (
        {"tokens", "pooled"} if what == "all" else {what}
    )
    path = method.save(tmp_path / "embedding.safetensors")
    again = make("lods-embedding", learned_text=what)
    again.load(path)
    assert torch.equal(again.embedding, now)
    copied = make("lods-embedding", learned_text=what)
    copied.load_state_dict(copy.deepcopy(method.state_dict()))
    assert torch.equal(copied.embedding, now)


def test_the_pooled_vector_of_a_model_without_one_is_refused(tiny_sd):
    with pytest.raises(ValueError, match="learned_text=pooled: this model takes no pooled"):
        lods.load("lods-embedding", tiny_sd(), "a car", device="cpu", learned_text="pooled")


@pytest.mark.parametrize(
    "setting",
    ["enable_gradient_checkpointing", "enable_channels_last_format", "enable_vae_slicing"],
)
def test_settings_for_memory_change_nothing(make, setting):
    torch.manual_seed(0)
    plain = trained(make("lods-embedding"))
    torch.manual_seed(0)
    torch.testing.assert_close(
        trained(make("lods-embedding", **{setting: True})), plain, rtol=1e-3, atol=1e-3
    )


def test_the_guess_that_is_shown_is_what_the_velocity_means(make):
    method = make("lods-sds")
    method.watch()
    trained(method, 1)
    sight, model = method.sight, method.model
    s = model.schedule.alpha_sigma(sight.t)[1].view(-1, 1, 1, 1)
    eps = sight.predictions["guess under the prompt"]
    v = (eps - sight.x_t) / (1 - s)
    want = model.decode(sight.x_t - s * v)
    torch.testing.assert_close(method.seen()["guess under the prompt"], want, rtol=1e-3, atol=1e-3)
