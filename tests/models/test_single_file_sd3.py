"""A Stable Diffusion 3 in one file of the original code is the model of the folder with the same
weights."""

import pytest
import torch
from safetensors.torch import save_file

from tests.single_file_sd3 import NETWORK, NOTED, T5, original, transformer_tensors, write_file
from tests.single_file_sd3 import write_folder as write_sd3

TEXTS = ["", "a photo of a cat", "An old church, 2 windows; it's grey!"]


@pytest.fixture(scope="module")
def folder(lods, tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd35"), newer=True)


@pytest.fixture(scope="module")
def file(folder):
    return write_file(folder, folder / "model.safetensors")


def check_equal(lods, folder, file):
    one, two = (lods.models.load(str(path), "cpu") for path in (folder, file))
    assert one.image_size == two.image_size == 16 and one.latent_shape == two.latent_shape
    assert one.prediction_type == two.prediction_type == "flow"
    assert (one.scaling_factor, one.shift) == (two.scaling_factor, two.shift) == (1.5305, 0.0609)
    t = torch.tensor([10, 500, 999])
    assert all(map(torch.equal, one.schedule.alpha_sigma(t), two.schedule.alpha_sigma(t)))
    texts = one.text(TEXTS)
    assert torch.equal(texts, two.text(TEXTS)) and texts.shape[1:] == two.text_shape
    assert not torch.allclose(texts[1], texts[2])
    x = torch.randn(3, *one.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = one.predict(x, t, texts)
        assert torch.equal(eps, two.predict(x, t, texts))
        assert not torch.allclose(eps, one.predict(x, t, texts.flip(0)))
        assert torch.equal(one.decode(x[:1]), two.decode(x[:1]))


def test_a_file_predicts_what_its_folder_does_bit_for_bit(lods, folder, file):
    check_equal(lods, folder, file)


@pytest.mark.slow
def test_a_file_without_the_parts_of_the_newer_one_does_so_too(lods, tmp_path):
    folder = write_sd3(tmp_path)
    check_equal(lods, folder, write_file(folder, tmp_path / "model.safetensors"))


PUBLISHED = {
    "medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192},
    "35-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "35-large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_published_transformers_are_read_from_their_shapes(lods, kind):
    from diffusers import SD3Transformer2DModel
    from lods.models.checkpoint_sd3 import transformer_config

    fields = {
        **{"patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64},
        **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048},
        "caption_projection_dim": 64 * PUBLISHED[kind]["num_attention_heads"],
        **PUBLISHED[kind],
    }
    with torch.device("meta"):
        network = SD3Transformer2DModel(sample_size=128, **fields)
    shapes = {k: tuple(v.shape) for k, v in transformer_tensors(network.state_dict()).items()}
    found = transformer_config(shapes)
    want = {"dual_attention_layers": (), "qk_norm": None, **fields}
    assert {k: found[k] for k in want} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in want.items()
    }


def test_a_t5_in_the_file_is_left_out_and_said_so(lods, folder, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("lods.models.checkpoint_weights.log.info", told.append)
    extra = {f"{T5}shared.weight": torch.zeros(8, 4)}
    model = lods.models.load(str(write_file(folder, tmp_path / "t5.safetensors", extra)), "cpu")
    assert [line for line in told if "T5 text encoder is left out" in line]
    tokens = model.text_layout.unpack(model.text(["a cat"])).tokens
    assert tokens[:, :77].any() and not tokens[:, 77:].any()


def without(tensors, *prefixes):
    return {k: v for k, v in tensors.items() if not k.startswith(prefixes)}


CUT = {
    "texts": (("text_encoders.",), r"no text encoder \(clip_l, clip_g\).*incl_clips"),
    "one": (("text_encoders.clip_g.",), r"no text encoder \(clip_g\)"),
    "vae": (("first_stage_model.",), "no autoencoder: give the model's diffusers folder"),
    "layer": ((f"{NETWORK}joint_blocks.1.x_block.mlp.fc1",), "is incomplete"),
    "embedder": ((f"{NETWORK}y_embedder.",), "is damaged, or of another kind"),
}


@pytest.mark.parametrize("part", CUT)
def test_a_file_without_a_part_is_refused_with_what_to_give(lods, folder, tmp_path, part):
    lost, said = CUT[part]
    path = tmp_path / "cut.safetensors"
    tensors = without(original(folder), *lost)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=NOTED)
    with pytest.raises(ValueError, match=said) as error:
        lods.models.load(str(path), "cpu")
    assert "\n" not in str(error.value) and "cut.safetensors" in str(error.value)


def test_the_network_alone_is_refused_with_what_to_give(lods, folder, tmp_path):
    """A file of the transformer, whose names begin at its blocks."""
    path = tmp_path / "alone.safetensors"
    tensors = {
        name.removeprefix(NETWORK): value.contiguous()
        for name, value in original(folder).items()
        if name.startswith(NETWORK)
    }
    save_file(tensors, path)
    with pytest.raises(ValueError, match="network of a Stable Diffusion 3 and no autoencoder"):
        lods.models.load(str(path), "cpu")


@pytest.mark.parametrize("width, places", [(64, 63), (72, 64)])
def test_a_transformer_of_an_unusual_shape_is_refused(width, places):
    """Places of no square, or a width that is no whole number of heads."""
    from lods.models.checkpoint_parts import Unfit
    from lods.models.checkpoint_sd3 import transformer_config

    shapes = {
        f"{NETWORK}x_embedder.proj.weight": (width, 4, 2, 2),
        f"{NETWORK}pos_embed": (1, places, width),
    }
    with pytest.raises(Unfit, match=f"of {width} numbers for {places} places"):
        transformer_config(shapes)


def test_a_file_that_does_not_say_its_size_has_1024_pixels(lods, folder, tmp_path):
    path = tmp_path / "unsaid.safetensors"
    save_file({name: value.contiguous() for name, value in original(folder).items()}, path)
    model = lods.models.load(str(path), "cpu")
    assert model.image_size == 1024 and model.latent_shape == (4, 512, 512)


def test_a_prediction_type_is_refused_for_a_flow_in_one_file(lods, file):
    with pytest.raises(ValueError, match=r"model_prediction=epsilon: .* is a flow model"):
        lods.models.load(str(file), "cpu", model_prediction="epsilon")
