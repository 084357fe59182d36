"""A model in one file of the original codes is the model of the folder with the same weights."""

import gc
import json
import struct
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.single_files import KINDS, original, unet_name, write_file, write_folder

slow = pytest.mark.slow
OTHERS = [pytest.param(kind, marks=slow) for kind in KINDS[1:]]
TEXTS = ["", "a photo of a cat", "An old church, 2 windows; it's grey!"]


@pytest.fixture(scope="module")
def models(lods, tmp_path_factory):
    """(folder, file) of each kind."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = write_folder(tmp_path_factory.mktemp(kind), kind)
            file = write_file(folder, kind, folder / f"{kind}.safetensors")
            if kind == "sd2":
                with open(file.with_suffix(".yaml"), "w") as yaml:
                    yaml.write('model:\n  params:\n    parameterization: "eps"\n')
            made[kind] = folder, file
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Anything that would be fetched from the hub is a failure."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError(f"the hub was asked: {args} {kwargs}")

    for name in ("hf_hub_download", "snapshot_download", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, refuse, raising=False)


@pytest.mark.parametrize("kind", ["sd1", *OTHERS])
def test_a_file_predicts_what_its_folder_does_bit_for_bit(lods, models, kind):
    folder, file = models(kind)
    one, two = (lods.models.load(str(path), "cpu") for path in (folder, file))
    assert one.image_size == two.image_size == 16 and one.latent_shape == two.latent_shape
    assert one.prediction_type == two.prediction_type == "epsilon"
    assert one.scaling_factor == two.scaling_factor
    assert torch.equal(one.schedule.alphas_cumprod, two.schedule.alphas_cumprod)
    texts = one.text(TEXTS)
    assert torch.equal(texts, two.text(TEXTS)) and texts.shape[1:] == two.text_shape
    assert not torch.allclose(texts[1], texts[2])
    x, t = torch.randn(3, *one.latent_shape), torch.tensor([10, 500, 999])
    assert torch.equal(one.predict(x, t, texts), two.predict(x, t, texts))
    image = torch.rand(1, 3, 16, 16)
    latents = []
    for model in (one, two):
        torch.manual_seed(1)
        latents.append(model.encode(image))
    assert torch.equal(*latents)
    assert torch.equal(one.decode(x[:1]), two.decode(x[:1]))


def test_clip_splits_texts_as_openai_does(tmp_path, lods):
    from lods.models.clip_tokens import write_tokenizer
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, "!")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49408 and tokenizer.pad_token_id == 0
    # the ids that CLIP's own code gives
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    write_tokenizer(tmp_path / "v1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "v1")
    assert tokenizer("Hello World!").input_ids == [49406, 3306, 1002, 256, 49407]


PUBLISHED = {
    "sd1": (
        {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2},
        {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
        ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    ),
    "sd2": (
        {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2},
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    ),
    "sdxl": (
        {"block_out_channels": (320, 640, 1280), "layers_per_block": 2},
        {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    ),
}
WEIGHTS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("kind", ["sd1", *OTHERS])
def test_the_published_unets_are_read_from_their_shapes(lods, kind):
    from diffusers import UNet2DConditionModel
    from lods.models.checkpoint_layout import unet_config

    sizes, more, down = PUBLISHED[kind]
    up = tuple(block.replace("Down", "Up") for block in reversed(down))
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=down, up_block_types=up, **sizes, **more
        ).state_dict()
    assert sum(value.numel() for value in unet.values()) == WEIGHTS[kind]
    shapes = {
        f"model.diffusion_model.{unet_name(k, unet, 2)}": tuple(v.shape) for k, v in unet.items()
    }
    found = unet_config(shapes, heads=8 if kind == "sd1" else None)
    wanted = {**sizes, **more, "down_block_types": down, "up_block_types": up}
    assert {k: found[k] for k in wanted} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items()
    }


class Says(torch.nn.Module):
    """A network that knows pictures of one colour around 0, with this spread, and nothing else: the
    posterior mean z of such a picture given x = alpha z + sigma eps, in closed form."""

    dtype = torch.float32

    def __init__(self, kind):
        super().__init__()
        self.kind, self.config = kind, SimpleNamespace(in_channels=4, cross_attention_dim=8)

    def forward(self, x, t, encoder_hidden_states):
        alpha, sigma, spread = 0.0683, 0.9977, 0.5  # at the last timestep of Stable Diffusion
        mean = x.mean((2, 3), keepdim=True)  # of many pixels, whose noise has 1/n of the variance
        noise = sigma**2 / x[0, 0].numel()
        z = (alpha * spread**2 * mean / (alpha**2 * spread**2 + noise)).expand_as(x)
        eps = (x - alpha * z) / sigma
        return SimpleNamespace(sample=eps if self.kind == "epsilon" else alpha * eps - sigma * z)


def test_a_network_is_asked_what_it_predicts(lods):
    from lods.models.checkpoint_weights import FOLLOWS, ask

    assert ask(Says("epsilon")) > 0.9
    assert abs(ask(Says("v_prediction"))) < FOLLOWS


UNNOTED = {"modelspec.resolution": "none"}
V = {"v_pred": torch.tensor([])}


@pytest.mark.parametrize(
    ("metadata", "extra", "setting", "expected", "latents"),
    [
        ({}, {}, "auto", "v_prediction", 8),  # random weights do not follow noise
        ({}, {}, "epsilon", "epsilon", 8),
        pytest.param(
            {"modelspec.prediction_type": "epsilon"}, {}, "auto", "epsilon", 8, marks=slow
        ),
        pytest.param(UNNOTED, V, "auto", "v_prediction", 768 // 2, marks=slow),
        pytest.param(UNNOTED, {}, "epsilon", "epsilon", 512 // 2, marks=slow),
    ],
    ids=["asked", "set", "metadata", "tensor", "size"],
)
def test_what_a_file_of_stable_diffusion_2_predicts(
    lods, models, tmp_path, metadata, extra, setting, expected, latents
):
    """And the size of its pictures, whose autoencoder halves them once."""
    folder, _ = models("sd2")
    file = tmp_path / "x.safetensors"
    noted = {"modelspec.resolution": "16x16", **metadata}
    save_file({k: v.contiguous() for k, v in original(folder, "sd2").items()} | extra, file, noted)
    model = lods.models.load(str(file), "cpu", model_prediction=setting)
    assert (model.prediction_type, model.latent_size) == (expected, latents)
    assert model.image_size == 2 * latents


@slow
def test_a_last_step_of_noise_alone_is_noted_in_the_file(lods, models, tmp_path):
    folder, _ = models("sd1")
    tensors = {k: v.contiguous() for k, v in original(folder, "sd1").items()}
    file = tmp_path / "zero.safetensors"
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(tensors | marks, file, {"modelspec.resolution": "16x16"})
    model = lods.models.load(str(file), "cpu")
    assert model.prediction_type == "v_prediction"
    assert model.schedule.alphas_cumprod[-1] == 0


def header(tensors):
    content = {n: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for n, s in tensors.items()}
    data = json.dumps(content).encode()
    return struct.pack("<Q", len(data)) + data


BAD = {
    "missing.safetensors": (None, "cannot be read"),
    "model.ckpt": (b"\x80\x04", "is a pickle, which can run code"),
    "short.safetensors": (b"abc", "not a complete safetensors file"),
    "text.safetensors": (b"\x10" + b"\0" * 7 + b"not json at all!", "not a complete safetensors"),
    "long.safetensors": (struct.pack("<Q", 2**60), "not a complete safetensors file"),
    "other.safetensors": (header({"layer.0.weight": [3]}), "not a diffusion model of a known kind"),
    "empty.safetensors": (header({}), "it is empty"),
    "lora.safetensors": (header({"lora_unet_x.lora_down.weight": [4, 4]}), "give it as model_lora"),
    "lycoris.safetensors": (header({"lora_unet_x.hada_w1_a": [4, 4]}), "give it as model_lora"),
    "word.safetensors": (header({"emb_params": [2, 768]}), "give it as model_embeddings"),
    "part.safetensors": (header({"down_blocks.0.x.weight": [2]}), "one part of a diffusers folder"),
    "vae.safetensors": (
        header({"encoder.conv_in.weight": [2]}),
        "an autoencoder without a network",
    ),
    "sd3.safetensors": (
        header({"model.diffusion_model.joint_blocks.0.x": [2]}),
        "the network of a Stable Diffusion 3 and no autoencoder: give the model's diffusers folder",
    ),
    "flux.safetensors": (
        header({"model.diffusion_model.double_blocks.0.x": [2]}),
        "a FLUX in one file, which is not read: give its diffusers folder",
    ),
    "scaled.safetensors": (
        header({"model.diffusion_model.input_blocks.0.0.scale_weight": [1]}),
        "weights of 8 bits with scales beside them: take the file with those of 16 bits",
    ),
    "inpaint.safetensors": (
        header({"model.diffusion_model.input_blocks.0.0.weight": [320, 9, 3, 3]}),
        "a UNet that takes 9 channels",
    ),
    "bare.safetensors": (
        header({"model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3]}),
        "no autoencoder",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_model_is_told_in_one_line(lods, tmp_path, name):
    from lods.models.cards import refuse_early

    content, said = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for ask in (refuse_early, lambda path: lods.models.load(path, "cpu")):
        with pytest.raises(ValueError, match=said) as error:
            ask(str(tmp_path / name))
        assert "\n" not in str(error.value) and name in str(error.value)


def test_an_incomplete_file_is_refused(lods, models, tmp_path):
    folder, _ = models("sd1")
    lost = "model.diffusion_model.middle_block.1.norm.weight"
    tensors = {k: v.contiguous() for k, v in original(folder, "sd1").items() if k != lost}
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut\.safetensors' is incomplete") as e:
        lods.models.load(str(tmp_path / "cut.safetensors"), "cpu")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["sd1", OTHERS[-1]])
def test_text_encoders_leave_memory_after_the_texts_are_embedded(lods, models, kind, monkeypatch):
    from lods.models import text

    seen = []

    def remember(load):
        def wrapped(*args, **kwargs):
            module = load(*args, **kwargs)
            seen.append(weakref.ref(module))
            return module

        return wrapped

    monkeypatch.setattr(text, "load_complete", remember(text.load_complete))
    folder, file = models(kind)
    for path in (folder, file):
        model = lods.models.load(str(path), "cpu")
        model.text(["a cat"])
        gc.collect()
        assert len(seen) == 1 + (kind == "sdxl") and all(each() is None for each in seen)
        seen.clear()


@slow
def test_a_file_trains_in_threestudio_like_its_folder(lods, models):
    """Prompt processor and guidance, as a run makes them."""
    import threestudio

    prompts = []
    for path in models("sdxl"):
        processor = threestudio.find("lods-prompt-processor")(
            {"pretrained_model_name_or_path": str(path), "prompt": "a cat", "use_cache": False}
        )
        prompts.append(processor().text_embeddings)
    assert torch.equal(*prompts)


def test_weights_are_read_from_the_file_alone(lods, models):
    """The folder that stands for a file holds none."""
    from lods.models.checkpoint import folder_of

    folder = folder_of(str(models("sd1")[1]))
    import os

    names = [name for _, _, files in os.walk(folder) for name in files]
    assert names and not [name for name in names if name.endswith((".safetensors", ".bin"))]
    assert load_file(models("sd1")[1])
