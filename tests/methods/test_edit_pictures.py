"""``lods edit`` of pictures, with a tiny model in place of a real one."""

import csv
import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from lods import cli
from lods.edits import region as regions
from lods.edits import run as loop
from lods.edits.picture import Picture
from lods.methods import predictions
from lods.methods.conditions import Conditions
from lods.models import VariancePreserving
from PIL import Image

from tests.flow_model import GaussianModel
from tests.ideal_model import CHANNELS, SIZE

METHODS = ["dds", "pds", "ssd", "drf", "lods-edit"]


@pytest.fixture
def picture(tmp_path):
    """A picture of 8 x 8, as large as the tiny model's."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def edit(tiny_sd, tmp_path, monkeypatch, capsys):
    """``edit(what, *flags)`` in an empty folder: the exit status; ``edit.said()``: its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    texts = ["--from", "a cat", "--to", "a dog", "--model", tiny_sd(sample_size=4)]
    texts += ["--steps", "3", "--every", "2", "--draws", "2"]
    capsys.readouterr()  # what making the model has said

    def run(what, *flags):
        words = [str(word) for word in flags]
        given = {word for word in words if word.startswith("--")}
        new = [] if os.path.isdir(what) else texts
        pairs = [new[i : i + 2] for i in range(0, len(new), 2)]
        kept = [word for pair in pairs if pair[0] not in given for word in pair]
        try:
            return cli.main(["edit", str(what), *kept, *words])
        except SystemExit as stop:  # of argparse
            return stop.code

    run.said = lambda: capsys.readouterr().err
    return run


def state_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "state.safetensors")


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


# --- the folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_written(edit, picture, tmp_path, method):
    out = tmp_path / "out"
    assert edit(picture, "--method", method, "--out", out) == 0, edit.said()
    names = {"config.json", "metrics.csv", "picture.png", "sheet.png", "source.png", "region.png"}
    names |= {"00002.png", "state.safetensors"}
    learned = {"embedding.safetensors"} if method == "lods-edit" else set()
    assert {path.name for path in out.iterdir()} == names | learned
    with open(out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["moved"]) > 0
    config = json.loads((out / "config.json").read_text())
    assert (config["source_prompt"], config["prompt"], config["steps"]) == ("a cat", "a dog", 3)
    assert np.array_equal(pixels_of(out / "source.png"), pixels_of(picture))
    sheet, size = pixels_of(out / "sheet.png"), pixels_of(out / "picture.png").shape
    assert np.array_equal(sheet[:, :8], pixels_of(picture)) and size == (8, 8, 3)
    assert np.array_equal(sheet[:, 10:18], pixels_of(out / "picture.png"))


def test_an_edit_begins_at_its_source(edit, picture, tmp_path):
    for steps in (1, 3):
        assert edit(picture, "--steps", steps, "--lr", 1e-12, "--out", tmp_path / str(steps)) == 0
    first, last = (state_of(tmp_path / name) for name in ("1", "3"))
    assert torch.equal(first["source_latents"], last["source_latents"])
    assert (last["latents"] - last["source_latents"]).abs().max() < 1e-9


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[-1:])
def test_one_that_goes_on_is_one_that_never_stopped(edit, picture, tmp_path, method):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert edit(picture, "--method", method, "--steps", 4, "--out", whole) == 0
    assert edit(picture, "--method", method, "--steps", 2, "--out", parts) == 0
    assert edit(parts, "--steps", 4) == 0, edit.said()
    one, two = state_of(whole), state_of(parts)
    assert one.keys() == two.keys() and len(one) > 2
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (whole / "picture.png").read_bytes() == (parts / "picture.png").read_bytes()
    with open(parts / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert json.loads((parts / "config.json").read_text())["steps"] == 4


def test_a_signal_ends_the_step_and_saves_and_the_edit_goes_on(
    edit, picture, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert edit(picture, "--steps", 4, "--every", 9, "--out", whole) == 0
    assert threading.current_thread() is threading.main_thread()
    fresh = predictions.fresh_noise
    drawn = []

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == 2:  # in the middle of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return fresh(*args)

    with monkeypatch.context() as patched:
        patched.setattr(predictions, "fresh_noise", interrupted)
        assert edit(picture, "--steps", 4, "--every", 9, "--out", parts) == 128 + signal.SIGTERM
    assert edit(parts) == 0, edit.said()
    one, two = state_of(whole), state_of(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_that_is_taken_stays_as_it_is(edit, picture, tmp_path):
    for _ in range(2):
        assert edit(picture, "--steps", 1, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out-002" / "picture.png").is_file()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("mine", "mine holds 'picture.png' and no run: results could go over what is there"),
        (".", ". holds 'cat.png' and no run"),
        ("cat.png", "cat.png is no folder: name another one for the results"),
        ("cat.png/inner", "cat.png is no folder"),
    ],
)
def test_files_of_somebody_stay_as_they_are(edit, picture, tmp_path, monkeypatch, out, said):
    """It is said before a model is loaded."""
    monkeypatch.setattr("lods.edits.job._load", lambda found: pytest.fail("loaded"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "picture.png").write_bytes(picture.read_bytes())
    before = picture.read_bytes()
    assert edit(picture, "--out", out) == 2
    text = edit.said()
    assert said in text and len(text.splitlines()) == 1
    assert picture.read_bytes() == (tmp_path / "mine" / "picture.png").read_bytes() == before
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_an_edit_may_go_into_the_current_folder(edit, picture, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for _ in range(2):
        assert edit(picture, "--steps", 1, "--out", ".") == 0, edit.said()
    names = {path.parent.name for path in tmp_path.glob("*/picture.png")}
    assert names == {"empty", "empty-002"}


def test_a_disk_that_becomes_full_is_one_line(edit, picture, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""
    import safetensors.torch

    def full(*args, **kwargs):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert edit(picture, "--steps", 1, "--out", tmp_path / "out") == 2
    [line] = [line for line in edit.said().splitlines() if line.startswith("error: ")]
    assert line == f"error: {tmp_path / 'out' / 'state.safetensors'}: No space left on device"


# --- regions --------------------------------------------------------------------------------------


def checked_outside(out, picture, inside):
    before, after = pixels_of(picture), pixels_of(out / "picture.png")
    assert np.array_equal(before[~inside], after[~inside])
    assert not np.array_equal(before[inside], after[inside])
    state = state_of(out)
    moved = (state["latents"] - state["source_latents"])[0].abs().sum(0) > 0
    assert np.array_equal(np.kron(moved, np.ones((2, 2), bool)), grown(inside))


def grown(inside):
    """The pixels of the latents' cells (2 x 2 pixels) that the region touches."""
    return np.kron(inside.reshape(4, 2, 4, 2).any((1, 3)), np.ones((2, 2), bool))


def test_outside_of_a_box_not_a_bit_changes(edit, picture, tmp_path):
    out, inside = tmp_path / "out", np.zeros((8, 8), bool)
    inside[2:7, 1:4] = True
    assert edit(picture, "--region", "1,2,4,7", "--lr", 1, "--out", out) == 0, edit.said()
    checked_outside(out, picture, inside)


def test_outside_of_a_mask_not_a_bit_changes(edit, picture, tmp_path):
    out, inside = tmp_path / "out", np.tri(8, dtype=bool)
    Image.fromarray(inside.astype(np.uint8) * 200).save(tmp_path / "mask.png")
    flags = ["--mask", tmp_path / "mask.png", "--lr", 1, "--out", out]
    assert edit(picture, *flags) == 0, edit.said()
    checked_outside(out, picture, inside)
    assert np.array_equal(np.asarray(Image.open(out / "region.png")) > 0, inside)


def test_without_a_region_everything_may_change(edit, picture, tmp_path):
    assert edit(picture, "--lr", 1, "--out", tmp_path / "out") == 0
    state = state_of(tmp_path / "out")
    assert (state["latents"] != state["source_latents"]).all()


def test_words_bound_what_changes(edit, picture, tmp_path):
    out = tmp_path / "out"
    flags = ["--where", "a cat", "--level", 0.95, "--lr", 1, "--out", out]
    assert edit(picture, *flags) == 0, edit.said()
    inside = np.asarray(Image.open(out / "region.png")) > 0
    assert inside.any() and not inside.all()
    checked_outside(out, picture, inside)


def test_words_are_where_the_model_depends_on_them():
    """Its pictures under two texts differ in the left half only."""
    table = VariancePreserving((1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0))
    model = GaussianModel(table, 0.5)
    null = model.text(["n"]).view(1, CHANNELS, SIZE, SIZE)
    words = null.clone()
    words[..., :2] += 1
    rows = [each.view(1, 1, -1) for each in (words, null)]
    found = regions.word_map(model, null, rows[0], Conditions(rows[0], rows[1]))
    assert found.shape == (SIZE, SIZE) and found.max() == 1
    assert (found[:, 0] > 0.9).all() and (found[:, 3] < 0.01).all()
    region = regions.region_of_words(found, 0.5, 8)
    assert region[:, :3].all() and not region[:, 5:].any()


def test_the_seam_is_inside():
    source = np.zeros((64, 64, 3), np.uint8)
    edited = np.full((64, 64, 3), 200, np.uint8)
    inside = np.zeros((64, 64), bool)
    inside[:, 20:] = True
    found = regions.blended(edited, source, inside)[10, :, 0]
    assert (found[:20] == 0).all() and found[20] == 100 and (found[21:] == 200).all()


# --- pictures of other shapes ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (5, 5), (40, 40), (64, 1)])
def test_a_picture_of_another_shape_comes_back_in_its_own(tmp_path, size):
    width, height = size
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    picture = Picture.read(tmp_path / "red.png", 16)
    red = picture.cut(picture.pixels)
    assert red.shape[:2] == picture.box[::-1] and max(red.shape[:2]) == 16
    assert min(red.shape[:2]) == max(1, round(16 * min(size) / max(size)))
    assert (np.abs(red.astype(int) - [255, 0, 0]) < 30).all() or min(size) == 1
    whole = picture.mask(np.ones((height, width), bool)) if min(size) > 1 else None
    assert whole is None or np.array_equal(whole, padded(picture))


def padded(picture):
    inside = np.zeros(picture.pixels.shape[:2], bool)
    picture.cut(inside)[:] = True
    return inside


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (Picture.read(tmp_path / "clear.png", 8).pixels == 255).all()


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_a_picture_of_16_bits_is_as_bright_as_one_of_8(tmp_path, name):
    ramp = np.arange(0, 256, 32, dtype=np.uint16)[None].repeat(8, 0)
    Image.fromarray(257 * ramp).save(tmp_path / name)
    assert np.array_equal(Picture.read(tmp_path / name, 8).pixels[..., 1], ramp)
    light = regions.mask_region(tmp_path / name, (8, 8))
    assert np.array_equal(light, ramp >= 128)


def test_details_come_back_unless_they_are_left_out(edit, picture, tmp_path):
    found = {}
    for part in ("0", "1"):
        folder = tmp_path / f"details{part}"
        assert edit(picture, "--steps", "1", "--details", part, "--out", folder) == 0
        found[part] = pixels_of(folder / "picture.png")
    assert (found["0"] != found["1"]).any()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--to", "a cat"], "--from and --to are the same: there is nothing to change"),
        (["--to", "  "], "--to is missing: say what is there, and what shall be there"),
        (["--to", "a dog " * 2000], "--to has 12000 characters: 5000 are the most"),
        (["--from", "a \udcff"], "--from is not a text in UTF-8"),
        (["--where", "x" * 5001], "--where has 5001 characters"),
        (["--negative-prompt", "x" * 5001], "--negative-prompt has 5001 characters"),
        (["--method", "sds"], "--method lods-sds edits nothing: the methods that do are dds, pds"),
        (["--method", "ddss"], "there is no method 'ddss' (did you mean"),
        (["--region", "1,2,3"], "--region '1,2,3' is not written X0,Y0,X1,Y1, in whole pixels"),
        (["--region", "5,0,5,8"], "--region 5,0,5,8 is no box in a picture of 8 x 8"),
        (["--region", "-1,0,5,8"], "--region -1,0,5,8 is no box in a picture of 8 x 8"),
        (["--mask", "none.png"], "there is no picture --mask none.png"),
        (["--mask", "small.png"], "--mask small.png is 4 x 4, and the picture 8 x 8"),
        (["--mask", "dark.png"], "--mask dark.png is dark everywhere"),
        (["--region", "0,0,4,4", "--where", "a"], "--region and --where exclude each other"),
        (["--level", "0.5"], "--level is of --where, which is not there"),
        (["--where", "a cat", "--level", "2"], "--level 2 is not from 0 to 1"),
        (["--lr", "0"], "--lr must be a number in (0, 1e6], not 0"),
        (["--scale", "nan"], "--scale must be a number in (0, 1e9], not .nan"),
        (["--seed", "-1"], "--seed must be a whole number in [0, 4294967295], not -1"),
        (["--steps", "0"], "invalid number from 1 to 1000000"),
        (["--azimuth", "999"], "--azimuth must be a number in [-360, 360], not 999"),
        (["--cameras", "tokens"], "has no folder camera_encoder: set cameras=words"),
        (["--box", "0,0,0,1,1,1"], "--box is of an object"),
        (["seed=1"], "KEY=VALUE is of an object"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(edit, picture, tmp_path, flags, said):
    Image.new("L", (4, 4), 255).save(tmp_path / "small.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "dark.png")
    assert edit(picture, *flags) == 2
    text = edit.said()
    assert said in text and len(text.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.png", None, "there is no picture"),
        ("text.png", b"no picture", "cannot be read as a picture"),
        (
            "program.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
            "cannot be read as a",
        ),
        ("cut.png", "half", "cannot be read as a picture"),
        ("bomb.png", (16_000, 16_000), "has too many pixels"),
        ("wide.png", (20_000, 1), "16384 pixels a side are the most"),
    ],
)
def test_a_file_that_is_no_picture_is_one_line(edit, picture, tmp_path, name, content, said):
    path = tmp_path / name
    if content == "half":
        path.write_bytes(picture.read_bytes()[:100])
    elif isinstance(content, tuple):
        Image.new("1", content).save(path)
    elif content is not None:
        path.write_bytes(content)
    assert edit(path) == 2
    text = edit.said()
    assert said in text and len(text.splitlines()) == 1


def test_a_folder_that_was_tampered_with_is_one_line(edit, picture, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    assert edit(picture, "--steps", 1, "--out", out) == 0
    assert edit(out) == 2 and "is done, at step 1: --steps asks for more" in edit.said()
    assert edit(out, "--lr", 1) == 2 and "--lr is settled in" in edit.said()
    config = (out / "config.json").read_text()
    for changed, said in (
        (
            config.replace('"steps": 1', '"steps": -1'),
            "steps must be a whole number in [1, 1000000]",
        ),
        (config.replace("lods-dds", "lods-sds"), "edits nothing"),
        (config.replace('"seed"', '"sed"'), "there is no setting sed"),
        ("[]", "is not the settings of an edit"),
        ("{", "is not the settings of an edit"),
        (config.replace('"width": 8', '"width": 4'), "source.png is not of this edit"),
    ):
        (out / "config.json").write_text(changed)
        assert edit(out, "--steps", 2) == 2
        text = edit.said()
        assert said in text and len(text.splitlines()) == 1
    (out / "config.json").write_text(config)
    state = load_file(out / "state.safetensors")
    metadata = {"format": "lods-edit-state", "step": "1"}
    for tensors, meta, said in (
        (state, {}, "is not the state of an edit"),
        ({**state, "latents": torch.zeros(3)}, metadata, "does not fit this edit: latents is (3,)"),
        ({**state, "method.x": torch.zeros(3)}, metadata, "is of another method"),
        ({**state, "optimizer.0.x": torch.zeros(3)}, metadata, "does not fit this edit"),
    ):
        save_file(tensors, out / "state.safetensors", metadata=meta)
        assert edit(out, "--steps", 2) == 2
        text = edit.said()
        assert said in text and len(text.splitlines()) == 1
    (out / "state.safetensors").unlink()
    assert edit(out, "--steps", 2) == 2 and "has no state.safetensors" in edit.said()


def test_the_sheet_shows_where_nothing_may_change():
    grey = np.full((4, 64, 3), 100, np.uint8)
    inside = np.zeros((4, 64), bool)
    inside[:, :32] = True
    change = loop.sheet(grey, grey, inside)[:, -64:]
    assert (change[:, :32] == 128).all() and (change[:, 32:] == 96).all()
