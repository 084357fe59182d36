"""An adapter that lets a Stable Diffusion see six views: its attention, its cameras, its file."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path

import lods
import pytest
import torch
from lods.learned.lora import RowLora
from lods.models import cards
from lods.models.families import load_family
from lods.models.memory import ModelSettings
from lods.models.view_adapter import AdaptedModel, RowsOfViews
from safetensors.torch import load_file

from tests.few_steps import check_resuming, images, trained
from tests.tiny_models import LEVELS, adapter_tensors, make_tiny_adapted, write_view_adapter

VIEWS = 6
AZIMUTHS = [0.0, 45.0, 90.0, 180.0, 270.0, 315.0]


def loaded(folder, **settings):
    return load_family(str(folder), torch.device("cpu"), ModelSettings("tokens", **settings))


def around(rows=VIEWS, elevation=0.0):
    azimuth = torch.tensor(AZIMUTHS * (rows // VIEWS + 1))[:rows]
    return lods.Cameras(torch.full((rows,), elevation), azimuth, torch.full((rows,), 3.0))


def inputs(rows=VIEWS, width=32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, 8, 8, generator=g)
    return x, torch.full((rows,), 400), torch.randn(rows, 16, width, generator=g)


@pytest.fixture(scope="module")
def model(tiny_adapted):
    return loaded(tiny_adapted())


def changed(folder, tmp_path, **changes):
    """A copy, of whose adapter the tensors with these pieces in their names are multiplied."""
    there = tmp_path / "changed"
    shutil.copytree(folder, there)
    tensors = adapter_tensors(there)
    for piece, factor in changes.items():
        tensors |= {name: factor * tensors[name] for name in tensors if piece in name}
    write_view_adapter(there, tensors)
    return there


def stock(folder):
    """The UNet of the folder as diffusers has it, without the adapter."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


# --- what it computes -----------------------------------------------------------------------------


@torch.no_grad()
def test_without_what_it_adds_it_is_the_stock_unet_on_each_view(tiny_adapted, tmp_path):
    folder = changed(tiny_adapted(), tmp_path, to_out_mv=0.0, **{"adapter.": 0.0})
    x, t, texts = inputs()
    found = loaded(folder).predict(x, t, texts, around())
    assert torch.equal(found, stock(folder)(x, t, encoder_hidden_states=texts).sample)


@torch.no_grad()
def test_the_camera_is_told_by_the_encoder_of_diffusers(tiny_adapted, tmp_path):
    """In pictures of six numbers, which are by hand those of the makers' code."""
    from diffusers import T2IAdapter

    folder = changed(tiny_adapted(), tmp_path, to_out_mv=0.0)
    unet, x, t, texts = stock(folder), *inputs()
    encoder = T2IAdapter(6, unet.config.block_out_channels, 1, 8)
    encoder.load_state_dict(
        {k: v for k, v in adapter_tensors(folder).items() if k[:7] == "adapter"}
    )
    turn = torch.deg2rad(torch.tensor(AZIMUTHS) - 90)  # in its axes the front is at -90 degrees
    place = torch.stack([turn.cos(), turn.sin(), torch.zeros(VIEWS)], dim=-1)
    told = (torch.cat([-place, place], dim=-1) + 1) / 2  # where it looks, and where it is
    levels = encoder(told[:, :, None, None].expand(-1, -1, 64, 64))
    wanted = unet(x, t, texts, down_intrablock_additional_residuals=levels).sample
    found = loaded(folder).predict(x, t, texts, around())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - unet(x, t, texts).sample).abs().max() > 1e-2


def test_a_camera_is_where_it_looks_and_where_it_is(model):
    front, right = model.numbers(around())[[0, 2]].tolist()
    assert front == pytest.approx([0.5, 1, 0.5, 0.5, 0, 0.5], abs=1e-6)
    assert right == pytest.approx([0, 0.5, 0.5, 1, 0.5, 0.5], abs=1e-6)
    above = model.numbers(around(elevation=30.0))[0].tolist()
    low, half = 0.5 - 0.25 * 3**0.5, 0.5 + 0.25 * 3**0.5
    assert above == pytest.approx([0.5, half, 0.25, 0.5, low, 0.75], abs=1e-6)


@torch.no_grad()
def test_tokens_look_at_their_own_row_in_all_views():
    """By hand, one token after the other."""
    torch.manual_seed(0)
    views, side, heads = 3, 4, 2
    attention = RowsOfViews(16, 16, views)
    x = torch.randn(2 * views, side * side, 16)
    found = attention.of_views(x, heads).reshape(2, views, side, side, 16)
    q, k, v = (
        to(x).reshape(2, views, side, side, heads, 8)
        for to in (attention.to_q_mv, attention.to_k_mv, attention.to_v_mv)
    )
    for o, view, row, column in itertools.product(range(2), range(views), range(side), range(side)):
        heard = []
        for head in range(heads):
            keys = k[o, :, row, :, head].reshape(-1, 8)
            scores = (keys @ q[o, view, row, column, head] / 8**0.5).softmax(0)
            heard.append(scores @ v[o, :, row, :, head].reshape(-1, 8))
        wanted = attention.to_out_mv[0](torch.cat(heard))
        torch.testing.assert_close(found[o, view, row, column], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_views_that_change_places_change_their_predictions_places(model):
    x, t, texts = inputs()
    order = torch.tensor([2, 0, 5, 3, 1, 4])
    plain = model.predict(x, t, texts, around())
    cameras = lods.Cameras(*(value[order] for value in around().views))
    moved = model.predict(x[order], t, texts[order], cameras)
    torch.testing.assert_close(moved, plain[order], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_view_changes_the_others_of_its_object_and_no_other_object(model):
    x, t, texts = inputs(2 * VIEWS)
    before = model.predict(x, t, texts, around(2 * VIEWS))
    x[1] += 1.0
    change = (model.predict(x, t, texts, around(2 * VIEWS)) - before).abs().amax((1, 2, 3))
    assert (change[:VIEWS] > 1e-5).all() and (change[VIEWS:] < 1e-6).all()


def test_there_is_more_noise_than_in_the_base_model(model, tiny_adapted):
    from diffusers import DDPMScheduler

    base = DDPMScheduler.from_pretrained(tiny_adapted(), subfolder="scheduler").alphas_cumprod
    found = model.schedule.alphas_cumprod
    ratio = (base / (1 - base)) / (found / (1 - found))
    wanted = 8 ** (torch.arange(1000) / 999)
    torch.testing.assert_close(ratio, wanted, rtol=1e-3, atol=0)
    assert (found.diff() < 0).all()


@torch.no_grad()
def test_slices_of_attention_leave_the_views_together(tiny_adapted, model):
    sliced = loaded(tiny_adapted(), enable_attention_slicing=True)
    x, t, texts = inputs()
    wanted = model.predict(x, t, texts, around())
    torch.testing.assert_close(sliced.predict(x, t, texts, around()), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_lora_is_on_the_base_models_attention(tiny_adapted):
    model = loaded(tiny_adapted())
    lora = RowLora(model.lora_network(), 2)
    plain = stock(tiny_adapted())
    assert {name for name, _ in lora.named_parameters()} == {
        name for name, _ in RowLora(plain, 2).named_parameters()
    }
    x, t, texts = inputs()
    before = model.predict(x, t, texts, around())
    for name, value in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    with lora.strength(1.0):
        found = model.predict(x, t, texts, around())
    assert (found - before).abs().max() > 1e-2


def test_the_encoder_is_as_deep_as_the_unet(tmp_path):
    """Stable Diffusion has two layers in each block."""
    folder = make_tiny_adapted(tmp_path, unet={**LEVELS, "layers_per_block": 2})
    assert len(loaded(folder).network.camera_adapter.adapter.body[0].resnets) == 2


@torch.no_grad()
def test_what_is_added_has_the_weights_dtype(tiny_adapted, model):
    short = loaded(tiny_adapted(), weights_dtype="bfloat16")
    assert {weight.dtype for weight in short.network.parameters()} == {torch.bfloat16}
    x, t, texts = inputs()
    found, wanted = (each.predict(x, t, texts, around()) for each in (short, model))
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_the_file_of_a_card_is_asked_for_at_its_revision(tiny_adapted, monkeypatch):
    """In the adapter's repository, beside the base model's folder."""
    card = dataclasses.replace(
        cards.all_cards()["mvadapter-sd21"], ids=("new/adapter", "old/adapter"), revision="v1"
    )
    folder, asked = tiny_adapted(), []
    base = shutil.copytree(folder, f"{folder}-base", ignore=lambda *_: ["mv_adapter"])
    [path] = Path(folder, "mv_adapter").iterdir()

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    AdaptedModel.load_network(cards.Location(base, None, card), torch.float32)
    assert asked == [("new/adapter", "mvadapter_t2mv_sd21.safetensors", "v1")]


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lods-sds", "lods-embedding", "lods-lora"])
def test_methods_run_over_the_views(tiny_adapted, name, tmp_path):
    def make():
        more = {} if name == "lods-sds" else {"prior_inner_steps": 1}
        fields = {"cameras": "tokens", "recon_std_rescale": 0.5, **more}
        return lods.load(name, tiny_adapted(), "a red car", device="cpu", **fields)

    method = make()
    x = trained(method, x=images(VIEWS), seen=around())
    assert (x - images(VIEWS)).abs().amax((1, 2, 3)).min() > 1e-3
    if name == "lods-lora":
        check_resuming(make, tmp_path / "state.pt", images(VIEWS), around())


# --- what is refused ------------------------------------------------------------------------------


def test_it_is_known_to_see_six_views_before_it_is_loaded(tiny_adapted):
    for name in (tiny_adapted(), "mvadapter-sd21"):
        assert cards.views_of(name) == VIEWS and cards.has_camera_encoder(name)


def test_words_for_the_view_alone_are_refused(tiny_adapted):
    with pytest.raises(ValueError, match="is told their cameras: set cameras=tokens"):
        load_family(tiny_adapted(), torch.device("cpu"), ModelSettings())


def test_other_batches_are_refused(model):
    with pytest.raises(ValueError, match="4 pictures are no multiple of 6"):
        model.predict(*inputs(4), around(4))


def lost(tensors):
    del tensors["adapter.conv_in.weight"]


def narrow(tensors):
    name = next(name for name in tensors if "to_k_mv" in name)
    tensors[name] = tensors[name][1:]


def strange(tensors):
    tensors["something.else"] = torch.zeros(2)


def told_a_picture(tensors):
    tensors["down_blocks.0.attentions.0.processor.to_q_ref.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lost, "does not fit the unet (see camera_adapter.adapter.conv_in.weight)"),
        (narrow, "to_k_mv.weight): take mvadapter_t2mv_sd21.safetensors"),
        (strange, "does not fit the unet (see something.else)"),
        (told_a_picture, "told a picture beside the text"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tiny_adapted, tmp_path, change, message):
    folder = tmp_path / "changed"
    shutil.copytree(tiny_adapted(), folder)
    [path] = (folder / "mv_adapter").iterdir()
    tensors = load_file(path)
    change(tensors)
    write_view_adapter(folder, tensors)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        loaded(folder)
    assert "\n" not in str(error.value)


def test_two_files_are_one_too_many(tiny_adapted, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(tiny_adapted(), folder)
    shutil.copy(next((folder / "mv_adapter").iterdir()), folder / "mv_adapter" / "x.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 \.safetensors files, not the one"):
        loaded(folder)


def test_an_adapter_on_a_model_of_another_kind_is_refused(tiny_sd3, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(tiny_sd3(), folder)
    (folder / "mv_adapter").mkdir()
    with pytest.raises(ValueError, match="is a SD3Transformer2DModel with mv_adapter; known are"):
        loaded(folder)
