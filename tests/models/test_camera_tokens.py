"""A camera as rows of the text embedding: its features, and its files."""

import json
import math

import pytest
import torch
from lods.models.camera_tokens import CameraTokens
from lods.models.cards import has_camera_encoder

from tests.hostile import Bomb, one_line

WIDTH = 12


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return CameraTokens(width=WIDTH)


def cameras(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_the_features_of_a_camera_are_in_closed_form(encoder):
    elevation, azimuth = 20.0, -75.0
    turns = [wave(math.radians(k * azimuth)) for k in (1, 2, 4, 8) for wave in (math.sin, math.cos)]
    tilts = [wave(math.radians(k * elevation)) for k in (1, 2, 4) for wave in (math.sin, math.cos)]
    expected = torch.tensor([[*turns, *tilts, (3.8 - 3.6) / 0.4, (37.0 - 40.0) / 4.0]])
    found = encoder.features(cameras([elevation, azimuth, 3.8, 37.0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_the_middle_of_the_ranges_is_zero(encoder):
    assert encoder.features(cameras([0, 0, 3.6, 40.0]))[0, -2:].tolist() == [0, 0]


def test_the_rows_are_a_perceptron_of_the_features(encoder):
    rows = cameras([10, 30, 3.5, 40], [70, -160, 3.9, 43])
    state, f = encoder.state_dict(), encoder.features(rows)
    hidden = f @ state["linear_1.weight"].T + state["linear_1.bias"]
    hidden = hidden / (1 + torch.exp(-hidden))
    expected = hidden @ state["linear_2.weight"].T + state["linear_2.bias"]
    torch.testing.assert_close(encoder(rows), expected.reshape(2, 2, WIDTH))


@pytest.mark.parametrize("turns", [-2, -1, 1, 3])
def test_a_turn_later_all_is_the_same(encoder, turns):
    here = cameras([12, -137, 3.5, 40], [5, 0, 3.5, 40], [60, 180, 3.7, 36])
    later = here + torch.tensor([0, 360.0 * turns, 0, 0])
    assert torch.equal(encoder(here), encoder(later))


def test_other_cameras_have_other_rows(encoder):
    here = cameras([12, -137, 3.5, 40])
    for place, change in enumerate((1.0, 1.0, 0.1, 1.0)):
        there = here.clone()
        there[0, place] += change
        assert not torch.allclose(encoder(here), encoder(there), atol=1e-4)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 3), (3, 1)])
def test_a_camera_becomes_so_many_rows_of_the_text_s_width(tokens, rows):
    made = CameraTokens(width=WIDTH, tokens=tokens)
    assert made(torch.zeros(rows, 4)).shape == (rows, tokens, WIDTH)


def test_the_rows_are_differentiable_in_the_weights_and_in_the_camera(encoder):
    rows = cameras([12, -137, 3.5, 40]).requires_grad_()
    encoder(rows).square().sum().backward()
    assert rows.grad is not None and (rows.grad != 0).all()
    assert all((weight.grad != 0).any() for weight in encoder.parameters())


def test_the_rows_are_float32_also_within_an_autocast(encoder):
    rows = cameras([12, -137, 3.5, 40])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(rows), encoder(rows.double()))
        assert encoder(rows).dtype == torch.float32


def test_what_is_loaded_is_what_was_saved(tmp_path):
    made = CameraTokens(
        width=8,
        tokens=3,
        hidden=16,
        azimuth_frequencies=[1, 3],
        elevation_frequencies=[2],
        distance=[2.0, 0.5],
        fovy=[30.0, 10.0],
    )
    part = made.save(tmp_path)
    assert sorted(path.name for path in part.iterdir()) == ["config.json", "model.safetensors"]
    loaded = CameraTokens.load(tmp_path)
    rows = cameras([12, -137, 2.5, 40], [3, 4, 5, 6])
    assert torch.equal(made(rows), loaded(rows))
    assert loaded.config == made.config and loaded.config.distance == [2.0, 0.5]


def test_to_load_one_draws_no_random_numbers(tmp_path, encoder):
    encoder.save(tmp_path)
    before = torch.random.get_rng_state()
    loaded = CameraTokens.load(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(weight.requires_grad for weight in loaded.parameters())


def test_only_a_folder_with_an_encoder_has_one(tmp_path, encoder):
    assert not has_camera_encoder(str(tmp_path)) and not has_camera_encoder("sd15")
    with pytest.raises(ValueError, match="has no camera_encoder"):
        CameraTokens.load(tmp_path)
    encoder.save(tmp_path)
    assert has_camera_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"width": 0}, r"width must be a whole number in \[1, 65536\], not 0"),
        ({"width": "wide"}, "width must be a whole number"),
        ({"width": 13}, r"does not fit its config.json: linear_2.weight is \(24, 256\)"),
        ({"tokens": 1_000_000}, r"tokens must be a whole number in \[1, 64\]"),
        ({"tokens": True}, "tokens must be a whole number"),
        ({"hidden": 65536}, r"linear_1.weight is \(256, 16\) and should be \(65536, 16\)"),
        ({"azimuth_frequencies": [1, 2]}, "linear_1.weight is"),
        ({"azimuth_frequencies": [0.5, 1, 2, 4]}, "must be 1 to 64 whole numbers"),
        ({"azimuth_frequencies": [1] * 100_000}, "must be 1 to 64 whole numbers"),
        ({"elevation_frequencies": []}, "must be 1 to 64 whole numbers"),
        ({"elevation_frequencies": 3}, "elevation_frequencies must be a list"),
        ({"distance": [3.6]}, "a number and a spread above 0"),
        ({"distance": [3.6, 0]}, "a number and a spread above 0"),
        ({"distance": [3.6, math.nan]}, "a number and a spread above 0"),
        ({"fovy": [math.inf, 4.0]}, "a number and a spread above 0"),
        ({"fovy": [10**400, 4.0]}, "a number and a spread above 0"),
        ({"fovy": ["40", 4.0]}, "a number and a spread above 0"),
        ({"sample_size": 32}, "there is no setting sample_size"),
        ({"hidden": None}, "hidden is empty"),
    ],
)
def test_a_wrong_config_is_one_line(encoder, tmp_path, change, line):
    path = encoder.save(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=line) as caught:
        CameraTokens.load(tmp_path)
    assert "download the model again" in one_line(caught)


@pytest.mark.parametrize("name", ["width", "fovy", "azimuth_frequencies"])
def test_a_config_without_a_field_is_one_line(encoder, tmp_path, name):
    path = encoder.save(tmp_path) / "config.json"
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"it has no {name}") as caught:
        CameraTokens.load(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_config_is_one_line(encoder, tmp_path, content):
    path = encoder.save(tmp_path) / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not JSON .*the model folder is damaged"):
        CameraTokens.load(tmp_path)


def test_damaged_weights_are_one_line(encoder, tmp_path):
    path = encoder.save(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors") as caught:
        CameraTokens.load(tmp_path)
    one_line(caught)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        CameraTokens.load(tmp_path)


def test_weights_that_are_not_finite_are_one_line(encoder, tmp_path):
    with torch.no_grad():
        encoder.linear_1.bias[3] = math.nan
    encoder.save(tmp_path)
    with pytest.raises(ValueError, match=r"not finite, in 'linear_1\.bias'") as caught:
        CameraTokens.load(tmp_path)
    one_line(caught)


def test_weights_of_something_else_are_one_line(encoder, tmp_path):
    other = torch.nn.Linear(3, 4)
    from safetensors.torch import save_file

    path = encoder.save(tmp_path) / "model.safetensors"
    save_file(dict(other.state_dict()), path)
    with pytest.raises(ValueError, match=r"linear_1\.weight is absent and should be") as caught:
        CameraTokens.load(tmp_path)
    one_line(caught)
    save_file({**encoder.state_dict(), "more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"more is \(1,\) and should be absent") as caught:
        CameraTokens.load(tmp_path)
    one_line(caught)


def test_a_pickle_in_place_of_the_weights_is_not_run(encoder, tmp_path):
    bomb = Bomb(tmp_path / "marker")
    path = encoder.save(tmp_path / "model") / "model.safetensors"
    bomb.save(path, **encoder.state_dict())
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        CameraTokens.load(tmp_path / "model")
    assert not bomb.exploded()


def test_weights_in_half_precision_are_taken_as_float32(encoder, tmp_path):
    from safetensors.torch import save_file

    path = encoder.save(tmp_path) / "model.safetensors"
    save_file({name: value.half() for name, value in encoder.state_dict().items()}, path)
    loaded = CameraTokens.load(tmp_path)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.linear_1.weight, encoder.linear_1.weight.half().float())


def test_a_save_that_fails_leaves_the_last_one(encoder, tmp_path, monkeypatch):
    part = encoder.save(tmp_path)
    before = {path.name: path.read_bytes() for path in part.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        CameraTokens(encoder.config).save(tmp_path)
    assert {path.name: path.read_bytes() for path in part.iterdir()} == before


@pytest.mark.parametrize(
    ("values", "line"),
    [({"width": 0}, "width must be"), ({"width": 8, "hiden": 3}, r"hiden \(did you mean 'hidden'")],
)
def test_one_is_not_made_of_wrong_fields(values, line):
    with pytest.raises(ValueError, match=line):
        CameraTokens(**values)
