"""Models that see several views at once: their attention, their cameras, their published layout."""

import json
import re
import shutil

import lods
import pytest
import torch
from lods.learned.lora import RowLora
from lods.models import cards, multiview_keys
from lods.models.families import load_family
from lods.models.memory import ModelSettings
from lods.models.multiview import JointViews
from safetensors.torch import load_file, save_file

from tests.tiny_models import make_tiny_multiview

TOLD = ModelSettings(cameras="tokens")
# the published layout, a tenth of its width
PUBLISHED = {
    "_class_name": "MultiViewUNetModel",
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 2,
    "attention_resolutions": [2, 1],
    "channel_mult": [1, 2, 2],
    "num_head_channels": 16,
    "context_dim": 32,
    "camera_dim": 16,
    "transformer_depth": 1,
}


def loaded(folder, **settings):
    return load_family(str(folder), torch.device("cpu"), ModelSettings("tokens", **settings))


def inputs(rows=8, width=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=g)
    return x, torch.full((rows,), 400), torch.randn(rows, 16, width, generator=g)


def around(rows=8, elevation=20.0, distance=3.0):
    azimuth = 30.0 + 90.0 * torch.arange(rows) + (torch.arange(rows) // 4) * 17.0
    return lods.Cameras(torch.full((rows,), elevation), azimuth, torch.full((rows,), distance))


def picked(cameras, rows):
    return lods.Cameras(*(value[rows] for value in cameras.views))


@pytest.fixture(scope="module")
def model(tiny_multiview):
    return loaded(tiny_multiview())


def test_one_view_without_cameras_is_the_stock_unet_to_the_last_bit(tmp_path):
    from diffusers import UNet2DConditionModel

    folder = make_tiny_multiview(tmp_path, views=1)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if name.startswith("class_embedding.linear_2"):
            tensors[name].zero_()
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "unet" / "config.json").read_text())
    for name in ("class_embed_type", "projection_class_embeddings_input_dim", "num_frames"):
        del config[name]
    stock = UNet2DConditionModel.from_config({**config, "_class_name": "UNet2DConditionModel"})
    stock.load_state_dict({k: v for k, v in tensors.items() if "class_embedding" not in k})
    x, t, texts = inputs(3)
    with torch.no_grad():
        found = loaded(folder).predict(x, t, texts, around(3))
        wanted = stock.eval()(x, t, encoder_hidden_states=texts).sample
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_views_that_change_places_change_their_predictions_places(model):
    x, t, texts = inputs(4)
    order = torch.tensor([2, 0, 3, 1])
    cameras = around(4)
    plain = model.predict(x, t, texts, cameras)
    moved = model.predict(x[order], t, texts[order], picked(cameras, order))
    torch.testing.assert_close(moved, plain[order], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_view_changes_the_others_of_its_object_and_no_other_object(model):
    x, t, texts = inputs(8)
    before = model.predict(x, t, texts, around())
    x[1] += 1.0
    change = (model.predict(x, t, texts, around()) - before).abs().amax((1, 2, 3))
    assert (change[:4] > 1e-4).all() and (change[4:] < 1e-6).all()


@torch.no_grad()
def test_a_camera_changes_its_view_most(model):
    x, t, texts = inputs(4)
    cameras = around(4)
    before = model.predict(x, t, texts, cameras)
    cameras.azimuth[2] += 40.0
    change = (model.predict(x, t, texts, cameras) - before).abs().mean((1, 2, 3))
    assert change.argmax() == 2 and (change > 0).all()


def test_joint_attention_is_stock_attention_over_all_tokens():
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    attention = Attention(16, heads=2, dim_head=8)
    x = torch.randn(6, 5, 16)
    with torch.no_grad():
        attention.set_processor(JointViews(3))
        found = attention(x)
        attention.set_processor(AttnProcessor2_0())
        wanted = attention(x.reshape(2, 15, 16)).reshape(6, 5, 16)
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_a_lora_acts_on_the_rows_that_it_is_on_for(tiny_multiview):
    model = loaded(tiny_multiview())
    lora = RowLora(model.lora_network(), 2)
    x, t, texts = inputs(8)
    plain = model.predict(x, t, texts, around())
    for name, value in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    with lora.strength(torch.tensor([0.0] * 4 + [1.0] * 4)):
        found = model.predict(x, t, texts, around())
    with lora.strength(1.0):
        whole = model.predict(x, t, texts, around())
    torch.testing.assert_close(found[:4], plain[:4])
    torch.testing.assert_close(found[4:], whole[4:])
    assert (found[4:] - plain[4:]).abs().max() > 1e-2


@torch.no_grad()
def test_slices_of_attention_leave_the_views_together(tiny_multiview, capsys):
    sliced = loaded(tiny_multiview(), enable_attention_slicing=True)
    x, t, texts = inputs(4)
    wanted = loaded(tiny_multiview()).predict(x, t, texts, around(4))
    torch.testing.assert_close(sliced.predict(x, t, texts, around(4)), wanted, atol=1e-5, rtol=1e-4)


def test_poses_are_rotations_and_directions():
    near, far = around(4, distance=1.5), around(4, distance=40.0)
    poses = near.poses().reshape(4, 4, 4)
    torch.testing.assert_close(poses, far.poses().reshape(4, 4, 4))
    up, turn = torch.deg2rad(near.elevation), torch.deg2rad(near.azimuth)
    place = torch.stack([up.cos() * turn.cos(), up.cos() * turn.sin(), up.sin()], dim=-1)
    torch.testing.assert_close(poses[:, :3, 3], place)
    torch.testing.assert_close(poses[:, :3, 2], place)  # backward, away from the origin
    eye = torch.eye(3).expand(4, 3, 3)
    torch.testing.assert_close(poses[:, :3, :3] @ poses[:, :3, :3].mT, eye)
    c2w = torch.randn(2, 4, 4)
    given = lods.Cameras(*torch.zeros(3, 2), c2w=c2w)
    moved = given.poses().reshape(2, 4, 4)
    torch.testing.assert_close(moved[:, :3, 3].norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(moved[:, :, :3], c2w[:, :, :3])


# --- the published layout -------------------------------------------------------------------------


def published_name(name, fields):
    """diffusers' name in the published layout."""
    blocks = {new: (old, {v: k for k, v in within.items()})
              for old, new, within in multiview_keys.prefixes(fields)}  # fmt: skip
    outer = {new: old for old, new in multiview_keys.OUTER.items()}
    module, _, leaf = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{leaf}"
    [new] = [block for block in blocks if module == block or module.startswith(block + ".")]
    old, within = blocks[new]
    rest = module[len(new) + 1 :]
    return ".".join(filter(None, (old, within.get(rest, rest), leaf)))


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_multiview):
    """(a folder in the published layout, one of ours with the same weights)."""
    from diffusers import UNet2DConditionModel

    ours, there = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("published")
    for folder in (ours, there):
        shutil.copytree(tiny_multiview(), folder, dirs_exist_ok=True)
    fields = multiview_keys.fields(PUBLISHED, "x")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        unet = UNet2DConditionModel.from_config(fields)
    unet.save_pretrained(ours / "unet")
    config = json.loads((ours / "unet" / "config.json").read_text())
    (ours / "unet" / "config.json").write_text(
        json.dumps(config | {"_class_name": "MultiViewUNet", "num_frames": 4})
    )
    (there / "unet" / "config.json").write_text(json.dumps(PUBLISHED))
    tensors = {published_name(k, fields): v.contiguous() for k, v in unet.state_dict().items()}
    save_file(tensors, there / "unet" / "diffusion_pytorch_model.safetensors")
    return there, ours


@torch.no_grad()
def test_the_published_layout_predicts_the_same(published):
    state = torch.get_rng_state()
    x, t, texts = inputs(4)
    found, wanted = (loaded(each).predict(x, t, texts, around(4)) for each in published)
    assert torch.equal(found, wanted) and found.std() > 0.01
    assert torch.equal(torch.get_rng_state(), state)


def test_diffusers_own_converter_agrees_on_the_names(published):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    there, _ = published
    tensors = load_file(there / "unet" / "diffusion_pytorch_model.safetensors")
    # the file is made by the same table, which a wrong line would leave without these names
    block = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    assert {f"input_blocks.1.0.{each}.weight" for each in block} <= tensors.keys()
    assert {f"{each}_embed.{n}.bias" for each in ("time", "camera") for n in (0, 2)} <= set(tensors)
    # convolutions between levels: after a level with attention and, above, after one without
    places = ("input_blocks.3.0.op", "output_blocks.2.1.conv", "output_blocks.5.2.conv")
    assert {f"{each}.weight" for each in places} <= tensors.keys()
    fields = multiview_keys.fields(PUBLISHED, "x")
    ours = multiview_keys.renamed(tensors, fields)
    # which has the classes' embedding where the published one has the camera's
    theirs = {
        f"model.diffusion_model.{k.replace('camera_embed.', 'label_emb.0.')}": v
        for k, v in tensors.items()
    }
    wanted = convert_ldm_unet_checkpoint(theirs, fields)
    assert ours.keys() == wanted.keys() and len(ours) > 200
    assert all(ours[name] is wanted[name] for name in wanted)


def test_the_published_config_is_stable_diffusion_2_told_cameras():
    """Field by field, and by the number of its weights, those for the camera included."""
    from diffusers import UNet2DConditionModel

    config = {
        **PUBLISHED,
        "image_size": 32,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "context_dim": 1024,
    }
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    fields = multiview_keys.fields(config, "x")
    assert fields == {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "transformer_layers_per_block": 1,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 16,
    }
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(fields)
    camera = (16 + 1) * 1280 + (1280 + 1) * 1280
    assert sum(each.numel() for each in network.parameters()) == 865_910_724 + camera
    deeper = multiview_keys.fields({**config, "transformer_depth": 2}, "x")
    assert deeper["transformer_layers_per_block"] == 2


def changed(folder, tmp_path, **fields):
    there = tmp_path / "changed"
    shutil.copytree(folder, there)
    file = there / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return there


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ip_dim": 16}, "told a picture beside the text"),
        ({"channel_mult": "many"}, "has channel_mult=many: the model folder is damaged"),
        ({"num_res_blocks": 1}, "do not fit its config.json"),
        ({"num_frames": 0}, "num_frames=0, not 1 to 64"),
        ({"context_dim": None}, "has context_dim=None"),
    ],
)
def test_a_published_folder_that_does_not_serve_is_one_line(published, tmp_path, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        loaded(changed(published[0], tmp_path, **fields))
    assert "\n" not in str(error.value)


# --- what is refused ------------------------------------------------------------------------------


def test_words_for_the_view_alone_are_refused(tiny_multiview):
    with pytest.raises(ValueError, match="is told their cameras: set cameras=tokens"):
        load_family(tiny_multiview(), torch.device("cpu"), ModelSettings())


def test_it_is_known_to_understand_cameras_before_it_is_loaded(tiny_multiview):
    assert cards.has_camera_encoder(tiny_multiview()) and cards.has_camera_encoder("mvdream-sd21")


@pytest.mark.parametrize(
    "rows, cameras, message",
    [
        (4, None, "give cameras="),
        (4, 3, "there are 3 cameras for 4 pictures"),
        (6, 6, "6 pictures are no multiple of 4"),
    ],
)
def test_calls_that_make_no_sense_are_one_line(model, rows, cameras, message):
    with pytest.raises(ValueError, match=message):
        model.predict(*inputs(rows), cameras and around(cameras))
