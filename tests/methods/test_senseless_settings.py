"""Values and options that would have no effect, or a wrong one late in a run."""

import importlib

import pytest
import torch

from threestudio import find


@pytest.fixture
def make(lods, tiny_sd):
    def build(short, **fields):
        model = tiny_sd(sample_size=4)
        return find(f"lods-{short}-guidance")({"pretrained_model_name_or_path": model, **fields})

    return build


@pytest.mark.parametrize(
    "short, fields, text",
    [
        ("lora", {"prompt_scale": 0.0}, "prompt_scale must be a number above 0"),
        (
            "lora",
            {"prompt_scale": float("inf")},
            "above 0 and at most 1000000, not .inf",
        ),
        ("lora", {"lora_scale": 0.0}, "lora_scale must not be 0: the LoRA would never"),
        (
            "vsd",
            {"lora_scale": float("nan")},
            "must be a number from -1000 to 1000, not .nan",
        ),
        ("sds", {"grad_clip": 0.0}, "grad_clip must be a number above 0"),
        (
            "sds",
            {"grad_clip": [0, 1.0, -1.0, 50]},
            r"grad_clip must be .*schedule.*, not \[0, 1, -1",
        ),
        (
            "sdi",
            {"inversion_scale": float("inf")},
            "inversion_scale must be .*, not .inf",
        ),
        # fine at the start, and too late to find out at step 300
        (
            "embedding",
            {"min_step_percent": 0.4, "max_step_percent": [0, 0.98, 0.3, 300]},
            r"not 0.4 and 0.3 \(at step 300\)",
        ),
        (
            "embedding",
            {"min_step_percent": [100, 0.02, 0.9, 200], "max_step_percent": [0, 0.98, 0.3, 900]},
            r"\(at step 200\)",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused_at_once(make, short, fields, text):
    with pytest.raises(ValueError, match=text) as caught:
        make(short, **fields)
    assert "\n" not in str(caught.value)


def test_schedules_that_make_sense_are_not(make):
    make("sds", grad_clip=[0, 2.0, 0.5, 10], max_step_percent=[0, 0.98, 0.3, 300])
    make("lora", min_step_percent=[0, 0.02, 0.3, 300], max_step_percent=[0, 0.98, 0.3, 300])


def test_one_model_by_two_names_is_loaded_once(lods, make, tiny_sd, monkeypatch):
    module = importlib.import_module("lods.methods.learned_lora")
    name = tiny_sd(sample_size=4)
    monkeypatch.setattr(module, "canonical", lambda x: name if x == "another" else x)
    guidance = make("lora", pretrained_model_name_or_path_lora="another")
    assert guidance.lora_model is guidance.model


def test_a_folder_beside_the_extension_has_one_name(lods, tmp_path, monkeypatch):
    cards = importlib.import_module("lods.models.cards")
    folder = cards.CARDS.parent / cards.all_cards()["pocket-shapes"].folder
    monkeypatch.chdir(folder.parent)
    for name in (
        "pocket-shapes",
        str(folder),
        folder.name,
        f"../{folder.parent.name}/{folder.name}",
    ):
        assert cards.canonical(name) == "pocket-shapes"
    assert cards.canonical(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "visible, gpu, want",
    [(None, 2, "2"), ("", 0, "-1"), ("5,7", 1, "7"), ("5,7", -1, "-1"), ("5,7", 2, None)],
)
def test_the_playground_sees_the_gpu_that_is_asked_for(lods, monkeypatch, visible, gpu, want):
    playground = importlib.import_module("lods.playground")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if want is None:
        with pytest.raises(ValueError, match="--gpu 2: CUDA_VISIBLE_DEVICES=5,7 leaves 2"):
            playground._visible(gpu)
    else:
        assert playground._visible(gpu) == want


@pytest.mark.parametrize("turned", [False, True])
def test_a_radius_is_the_largest_of_all_cameras(lods, turned):
    """Whichever camera comes last."""
    strategies = importlib.import_module("lods.gaussians.strategies")
    args = {"refine_scale2d_stop_iter": 100, "refine_start_iter": 50, "refine_every": 100}
    strategy = strategies.default_strategy()(**args)
    state = strategy.initialize_state(scene_scale=1.0)
    radii = torch.tensor([[[40, 3], [2, 2], [0, 0]], [[10, 4], [0, 9], [5, 1]]], dtype=torch.int32)
    means2d = torch.zeros(2, 3, 2, requires_grad=True)
    means2d.grad = torch.zeros(2, 3, 2)
    info = {"means2d": means2d, "radii": radii.flip(0) if turned else radii, "width": 20}
    info |= {"height": 10, "n_cameras": 2, "gaussian_ids": None}
    params = {"means": torch.zeros(3, 3)}
    strategy.step_post_backward(params, {}, state, 1, info)
    # of the pixels of the longer side; (0, 9) is seen by no camera
    assert state["radii"].tolist() == pytest.approx([2.0, 0.1, 0.25])
