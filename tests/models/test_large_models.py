"""The memory switches reach transformers; frozen weights in fewer bits; gated models."""

import gc
import weakref

import pytest
import torch


def gradients(lods, folder, **settings):
    """Of a LoRA through the prediction, and of a picture through the encoder."""
    torch.manual_seed(3)
    method = lods.load("lods-lora", folder, prompt="a red car", device="cpu", **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in method.lora.named_parameters():
            if "lora_B" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    images.requires_grad_()
    torch.manual_seed(7)
    method(images).total.backward()
    return method, [images.grad, *(p.grad for p in method.lora.parameters())]


@pytest.mark.parametrize(
    "option",
    ["enable_gradient_checkpointing", pytest.param("enable_vae_slicing", marks=pytest.mark.slow)],
)
def test_a_saving_changes_no_gradient_of_a_transformer(lods, tiny_sd3, option):
    _, wanted = gradients(lods, tiny_sd3())
    _, got = gradients(lods, tiny_sd3(), **{option: True})
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(got) > 2


def test_the_blocks_of_a_transformer_are_computed_again(lods, tiny_sd3):
    counts = []
    for again in (False, True):
        torch.manual_seed(3)
        options = {"enable_gradient_checkpointing": again, "device": "cpu"}
        method = lods.load("lods-lora", tiny_sd3(), prompt="a car", **options)
        calls = []
        layer = method.model.network.transformer_blocks[0].ff.net[2]
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        method(torch.rand(2, 3, 16, 16, requires_grad=True)).total.backward()
        counts.append(len(calls))
    assert counts[1] > counts[0] > 0


NAMED = {
    "SD3Transformer2DModel": ("JointTransformerBlock",),
    "FluxTransformer2DModel": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    "QwenImageTransformer2DModel": ("QwenImageTransformerBlock",),
    "SanaTransformer2DModel": ("SanaTransformerBlock",),
    "PixArtTransformer2DModel": ("BasicTransformerBlock",),
    "ZImageTransformer2DModel": ("ZImageTransformerBlock",),
}


@pytest.mark.parametrize("network", NAMED)
def test_every_transformer_of_diffusers_names_its_blocks(lods, network):
    import diffusers
    from lods.models.memory import blocks_of

    cls = getattr(diffusers, network)
    empty = cls.__new__(cls)
    torch.nn.Module.__init__(empty)
    assert blocks_of(empty) == NAMED[network]


def test_text_encoders_of_a_transformer_leave_memory(lods, tiny_sd3, monkeypatch):
    from lods.models import text

    seen, load = [], text.load_complete

    def remember(*args, **kwargs):
        module = load(*args, **kwargs)
        seen.append(weakref.ref(module))
        return module

    monkeypatch.setattr(text, "load_complete", remember)
    method = lods.load("lods-embedding", tiny_sd3(t5=48), prompt="a car", device="cpu")
    gc.collect()
    assert len(seen) >= 3 and all(each() is None for each in seen)
    assert method.prompts is not None


def test_fewer_bits_are_refused_where_they_cannot_be_had(lods, tiny_sd, monkeypatch):
    import importlib.util

    from lods.models import memory

    with pytest.raises(ValueError, match="quantized_weights=4bit needs a CUDA GPU") as error:
        lods.models.load(tiny_sd(), "cpu", quantized_weights="4bit")
    assert "\n" not in str(error.value)
    find = importlib.util.find_spec
    for there, said in ((None, "pip install bitsandbytes"), (True, "exclude each other")):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a, there=there: there if name == "bitsandbytes" else find(name, *a),
        )
        settings = memory.ModelSettings(
            quantized_weights="8bit", enable_sequential_cpu_offload=True
        )
        with pytest.raises(ValueError, match=said):
            memory.check(settings, torch.device("cuda"), "system.guidance.")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_linear_layers_become_those_of_bitsandbytes(lods, tiny_sd, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import bitsandbytes as bnb
    from lods.models import quantized

    model = lods.models.load(tiny_sd(), "cpu")
    kind = bnb.nn.Linear4bit if bits == "4bit" else bnb.nn.Linear8bitLt
    linear = sum(type(m) is torch.nn.Linear for m in model.network.modules())
    assert quantized.quantize(model.network, bits, torch.float32) == linear > 10
    assert sum(isinstance(m, kind) for m in model.network.modules()) == linear
    assert not any(p.requires_grad for p in model.network.parameters())


def test_a_gated_model_without_a_login_is_told_in_one_line(lods, monkeypatch):
    import transformers
    from lods.models.files import load_model_config

    def gated(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", gated)
    with pytest.raises(ValueError, match=r"is gated: accept its terms .*hf auth login$") as error:
        load_model_config("someone/model", "unet")
    assert "\n" not in str(error.value)


def test_doctor_says_what_every_card_needs(lods):
    from lods.commands import doctor
    from lods.models.cards import all_cards

    found = dict(doctor._models())
    assert set(all_cards()) <= set(found)
    assert "GB and more" in found["sdxl"] and "hf download" in found["sdxl"]
    assert "hf download madebyollin/taesd" in found["model_vae=taesd, sd"]
    assert found["quantized_weights"]
