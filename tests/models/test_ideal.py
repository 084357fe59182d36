"""The ideal denoiser: its answers against other ways to compute them, and where SDS goes on it."""

import itertools
import json

import lods
import numpy as np
import pytest
import torch
from lods.cameras import Cameras
from lods.models import ideal, renders

from tests.hostile import one_line

SIZE = 6
SOLID = np.zeros((1, 4), np.float32) + [10, 30, 3.6, 40]


def pictures(count, seed=0, opaque=True):
    rgba = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 4)).astype(np.uint8)
    if opaque:
        rgba[..., 3] = 255
    rgba[..., :3] = np.minimum(rgba[..., :3], rgba[..., 3:])
    return rgba


def folder(path, **objects):
    """Renders of objects by name: (cameras, pictures)."""
    views = {(name.replace("_", " "), None): given for name, given in objects.items()}
    return renders.write(path, views)


def around(count):
    """Cameras from azimuth 0 on."""
    cameras = np.tile([15.0, 0.0, 3.6, 40.0], (count, 1))
    cameras[:, 1] = np.arange(count) * 360 / count
    return cameras


def model_of(path, cameras="words", **settings):
    return lods.models.load(str(path), "cpu", cameras=cameras, **settings)


def as_latents(rgba):
    return torch.from_numpy(rgba[..., :3].transpose(0, 3, 1, 2)).float() / 127.5 - 1


def cameras_of(numbers):
    elevation, azimuth, distance, fovy = torch.tensor(np.array(numbers)).float().T
    return Cameras(elevation, azimuth, distance, fovy=fovy)


# --- the posterior mean ---------------------------------------------------------------------------


def test_of_one_opaque_render_the_noise_is_what_leads_to_it(tmp_path):
    rgba = pictures(1)
    folder(tmp_path, ball=(SOLID, rgba))
    model, z = model_of(tmp_path), as_latents(rgba)
    eps, t = torch.randn(1, 3, SIZE, SIZE), torch.tensor([400])
    seen_noise = model.predict(model.add_noise(z, eps, t), t, model.text(["a ball"]))
    torch.testing.assert_close(seen_noise, eps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("t", [20, 500, 980])
def test_two_opaque_renders_are_weighed_by_a_logistic_function(tmp_path, t):
    rgba = pictures(2)
    folder(tmp_path, ball=(around(2), rgba))
    model, (one, two) = model_of(tmp_path), as_latents(rgba).double()
    t = torch.tensor([t])
    alpha, sigma = (float(value) for value in model.schedule.alpha_sigma(t))
    # half way, with noise: close enough that both count
    x_t = (alpha * (one + two) / 2)[None] + 0.1 * sigma * torch.randn(1, 3, SIZE, SIZE)
    apart = [((x_t / alpha - z) ** 2).sum() * alpha**2 / (2 * sigma**2) for z in (one, two)]
    weight = torch.sigmoid(apart[1] - apart[0])
    wanted = weight * one + (1 - weight) * two
    found = model.mean(x_t.float(), t, model.text(["a ball"]))[0]
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


def test_backgrounds_are_those_of_an_enumeration(tmp_path, monkeypatch):
    monkeypatch.setattr(ideal, "LEVELS", 3)
    rgba = pictures(2, seed=4, opaque=False)
    folder(tmp_path, ball=(around(2), rgba))
    model, t = model_of(tmp_path), torch.tensor([700])
    alpha, sigma = (float(value) for value in model.schedule.alpha_sigma(t))
    parts = rgba.astype(np.float64).transpose(0, 3, 1, 2) / 255
    candidates, prior = [], []
    for part in parts:
        colours = [((1.0, 1.0, 1.0), 0.5)]
        colours += [(b, 0.5 / 27) for b in itertools.product((0.0, 0.5, 1.0), repeat=3)]
        for b, share in colours:
            background = np.array(b)[:, None, None]
            candidates.append(2 * (part[:3] + (1 - part[3:]) * background) - 1)
            prior.append(share)
    z = np.stack(candidates)
    x_t = alpha * z[5] + sigma * np.random.default_rng(1).normal(size=z[5].shape)
    apart = ((x_t / alpha - z) ** 2).sum((1, 2, 3)) * alpha**2 / (2 * sigma**2)
    weights = np.array(prior) * np.exp(apart.min() - apart)
    wanted = np.tensordot(weights / weights.sum(), z, 1)
    found = model.mean(torch.from_numpy(x_t)[None].float(), t, model.text(["a ball"]))[0]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    assert np.sort(weights / weights.sum())[-2] > 0.02  # more than one counts


def test_more_renders_than_a_chunk_give_what_one_chunk_gives(tmp_path, monkeypatch):
    folder(tmp_path, ball=(around(9), pictures(9, opaque=False)))
    x_t, t = 0.3 * torch.randn(2, 3, SIZE, SIZE), torch.tensor([900, 990])
    model = model_of(tmp_path)
    texts = model.text(["a ball", "a ball, side view"])
    whole = model.mean(x_t, t, texts)
    monkeypatch.setattr(ideal, "CHUNK", 2)
    torch.testing.assert_close(model_of(tmp_path).mean(x_t, t, texts), whole)


def test_gradients_flow_to_the_noisy_picture_and_to_the_text(tmp_path):
    folder(tmp_path, ball=(around(3), pictures(3, opaque=False)), cup=(SOLID, pictures(1, 5)))
    model, t = model_of(tmp_path), torch.tensor([990])
    x_t = (0.2 * torch.randn(1, 3, SIZE, SIZE)).double().requires_grad_()
    text = model.text([""]).double().mul(0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e: model.mean(x, t, e), (x_t, text), eps=1e-4)


# --- what a text and a camera allow ---------------------------------------------------------------


def test_a_text_allows_what_it_names(tmp_path):
    views = {(name, colour): (SOLID, pictures(1)) for name, colour in (
        ("dog", None), ("hot dog", None), ("dog", "red"), ("cat", None))}  # fmt: skip
    text = ideal.NamedObjects(renders.write(tmp_path, views).objects)
    all_views, front = [1, 1, 1, 1], [0, 1, 0, 0]
    wanted = {
        "a dog": [1, 0, 0, 0, *all_views],
        "a Red DOG": [0, 0, 1, 0, *all_views],
        "a photo of a hot dog, front view": [0, 1, 0, 0, *front],
        "a red cat": [0, 0, 0, 1, *all_views],  # which does not come in red
        "a cat and a dog": [1, 0, 0, 1, *all_views],
        "": [1, 1, 0, 1, *all_views],
        "hotdogs": [1, 1, 0, 1, *all_views],
    }
    assert text.shape == (1, 8)
    assert text(list(wanted))[:, 0].tolist() == list(wanted.values())


def test_words_for_the_view_allow_the_renders_of_that_view(tmp_path):
    rgba = pictures(4)
    folder(tmp_path, ball=(around(4), rgba))  # front, side, back, side
    model, z = model_of(tmp_path), as_latents(rgba)
    mean = model.mean(z[:1], torch.tensor([990]), model.text(["a ball, back view"]))
    torch.testing.assert_close(mean, z[2:3], atol=1e-5, rtol=0)


def test_a_camera_allows_the_nearest_renders_of_each_object(tmp_path):
    rgba = pictures(12)
    folder(tmp_path, ball=(around(12), rgba))
    model, z, t = model_of(tmp_path, "tokens", ideal_neighbours=1), as_latents(rgba), 900
    found = model.mean(z[:1], torch.tensor([t]), model.text([""]), cameras_of([[10, 88, 3.5, 40]]))
    torch.testing.assert_close(found, z[3:4], atol=1e-5, rtol=0)
    folder(tmp_path / "two", ball=(around(12)[2:4], rgba[2:4]))
    two, only = model_of(tmp_path, "tokens", ideal_neighbours=2), model_of(tmp_path / "two")
    x_t, late = torch.zeros(1, 3, SIZE, SIZE), torch.tensor([999])
    both = two.mean(x_t, late, model.text([""]), cameras_of([[15, 75, 3.6, 40]]))
    torch.testing.assert_close(both, only.mean(x_t, late, model.text([""])))


@pytest.mark.parametrize(
    "other, wanted",
    [
        ((0, 90, 3.6, 40), np.pi / 2),
        ((90, 77, 3.6, 40), np.pi / 2),
        ((0, 0, 7.2, 40), np.log(2)),
        ((0, 0, 3.6, 2 * np.degrees(np.arctan(2 * np.tan(np.radians(20))))), np.log(2)),
        ((0, 720, 3.6, 40), 0.0),
    ],
)
def test_cameras_are_as_far_as_a_point_of_the_unit_ball_moves(other, wanted):
    here = torch.tensor([0.0, 0.0, 3.6, 40.0]).double()
    found = ideal.camera_distances(here, torch.tensor([other]).double())
    assert float(found) == pytest.approx(wanted, abs=1e-6)


# --- as a model of methods ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_sds_leaves_the_only_picture_as_it_is(tmp_path, scale):
    rgba = pictures(1)
    folder(tmp_path, ball=(SOLID, rgba))
    method = lods.load("lods-sds", str(tmp_path), prompt="a ball", guidance_scale=scale)
    z = as_latents(rgba).requires_grad_()
    method(latents=z).terms["loss_sds"].backward()
    assert float(z.grad.abs().max()) < 1e-4


def test_sds_from_noise_reaches_the_true_view_of_each_camera(tmp_path):
    rgba = pictures(2, opaque=False)
    rgba[..., 3] = np.where(np.arange(SIZE) < 4, 255, 0)  # a solid object, and white beside it
    rgba[..., :3] = np.minimum(rgba[..., :3], rgba[..., 3:])
    folder(tmp_path, ball=(around(2), rgba), cup=(around(2), pictures(2, 8)))
    torch.manual_seed(0)
    method = lods.load(
        *("lods-sds", str(tmp_path)), prompt="a ball", cameras="tokens", guidance_scale=1.0,
        ideal_neighbours=1, max_step_percent=[0, 0.9, 0.1, 150],
    )  # fmt: skip
    images = torch.rand(2, 3, SIZE, SIZE, requires_grad=True)
    cameras = cameras_of(around(2))
    optimizer = torch.optim.Adam([images], lr=0.05, betas=(0.9, 0.95))
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.97**step
        method.step(step)
        optimizer.zero_grad()
        method(images, cameras).terms["loss_sds"].backward()
        optimizer.step()
    found = images.detach()
    object_, beside = found[..., :4], found[..., 4:]
    true = torch.from_numpy(rgba[..., :4, :3]).permute(0, 3, 1, 2).float() / 255
    assert float((object_ - true).abs().max()) < 1e-3
    # beside it any one colour is true
    assert float((beside - beside.mean((2, 3), keepdim=True)).abs().max()) < 5e-3


def test_lods_with_an_embedding_learns_on_it(tmp_path):
    folder(tmp_path, ball=(SOLID, pictures(1)), cup=(SOLID, pictures(1, 5)))
    method = lods.load("lods-embedding", str(tmp_path), prompt="a ball")
    images = torch.rand(2, 3, SIZE, SIZE, requires_grad=True)
    losses = method(images)
    sum(losses.terms.values()).backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().max() > 0
    learned = [p.grad for p in method.parameters()]
    assert learned and all(g is not None and torch.isfinite(g).all() for g in learned)


@pytest.mark.parametrize("method", ["lods-lora", "lods-vsd"])
def test_a_lora_has_no_place_in_it(tmp_path, method):
    folder(tmp_path, ball=(SOLID, pictures(1)))
    with pytest.raises(ValueError, match="no network") as error:
        lods.load(method, str(tmp_path), prompt="a ball")
    one_line(error)


def test_what_cannot_be_answered_is_refused(tmp_path):
    folder(tmp_path, ball=(SOLID, pictures(1)))
    model, x, t = model_of(tmp_path, "tokens"), torch.zeros(1, 3, SIZE, SIZE), torch.tensor([9])
    with pytest.raises(ValueError, match="fovy") as error:
        model.predict(x, t, model.text(["a ball"]))
    one_line(error)
    with pytest.raises(ValueError, match="allows none") as error:
        model.predict(x, t, torch.zeros(1, *model.text_shape), cameras_of(SOLID))
    one_line(error)


def test_a_prompt_without_any_of_its_objects_is_refused(tmp_path):
    folder(tmp_path, fire_hydrant=(SOLID, pictures(1)))
    with pytest.raises(ValueError, match="names no object") as error:
        lods.load("lods-sds", str(tmp_path), prompt="a spaceship")
    one_line(error)
    assert "fire hydrant" in str(error.value)


def test_a_run_embeds_its_prompt_as_the_library_does(tmp_path):
    import threestudio

    folder(tmp_path, ball=(SOLID, pictures(1)), cup=(SOLID, pictures(1, 5)))
    texts = {"prompt": "a shiny ball", "negative_prompt": ""}
    processor = threestudio.find("lods-prompt-processor")
    utils = processor({"pretrained_model_name_or_path": str(tmp_path), **texts})()
    wanted = model_of(tmp_path).text([*texts.values(), "a shiny ball, back view"])
    assert torch.equal(utils.text_embeddings, wanted[:1])
    assert torch.equal(utils.uncond_text_embeddings, wanted[1:2])
    assert torch.equal(utils.text_embeddings_vd[2], wanted[2])


# --- the folder -----------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    rgba = pictures(23, opaque=False)
    cameras = around(23).astype(np.float32)
    read = folder(tmp_path, ball=(cameras, rgba), hot_dog=(SOLID, pictures(1)))
    assert [each.name for each in read.objects] == ["ball", "hot dog"] and read.size == SIZE
    np.testing.assert_allclose(read.objects[0].cameras, cameras, atol=1e-4)
    assert np.array_equal(read.views(read.objects[0]), rgba)


DAMAGE = {
    "size": -1,
    "objects": [],
    "name": " ",
    "colour": 3,
    "file": "../ball.webp",
    "columns": 0,
    "cameras": [[0, 0, float("nan"), 40]],
}


@pytest.mark.parametrize("key", DAMAGE)
def test_a_damaged_list_is_refused(tmp_path, key):
    folder(tmp_path, ball=(SOLID, pictures(1)))
    file = tmp_path / "renders.json"
    content = json.loads(file.read_text())
    (content if key in content else content["objects"][0])[key] = DAMAGE[key]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="make them anew") as error:
        renders.Renders.read(tmp_path)
    one_line(error)


@pytest.mark.parametrize("damage", ["gone", "other size", "no picture"])
def test_a_damaged_sheet_is_refused(tmp_path, damage):
    read = folder(tmp_path, ball=(SOLID, pictures(1)))
    sheet = tmp_path / "ball.webp"
    if damage == "gone":
        sheet.unlink()
    elif damage == "no picture":
        sheet.write_bytes(b"RIFF")
    else:
        renders.write(tmp_path / "x", {("ball", None): (around(2), pictures(2))})
        sheet.write_bytes((tmp_path / "x" / "ball.webp").read_bytes())
    with pytest.raises(ValueError, match="make it anew") as error:
        read.views(read.objects[0])
    one_line(error)


def test_its_setting_is_refused_for_a_model_with_a_network():
    with pytest.raises(ValueError, match="ideal_neighbours=2 is a setting of ideal denoisers") as e:
        lods.models.load("pocket-shapes", "cpu", ideal_neighbours=2)
    one_line(e)
