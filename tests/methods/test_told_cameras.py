"""Methods whose model is told the cameras themselves: each row of each call its own, in closed
form, and what follows for prompts and files."""

import lods
import pytest
import torch
from lods import scores
from lods.cameras import Cameras
from lods.methods.conditions import Conditions
from torch.nn.functional import silu

from tests.hostile import one_line
from tests.ideal_model import FIELDS, GRADIENTS, SCALED, IdealModel, S, sight

NAMES = list(GRADIENTS)
LEARNING = ["embedding", "lora", "vsd"]
T, PROMPT = 500, "a red car"
FIXED = {"min_step_percent": T / 1000, "max_step_percent": T / 1000}
SHAPE = (3, 4, 4)


def views(n=3, **changes):
    """Cameras that differ in all of their numbers."""
    numbers = {
        "elevation": torch.linspace(-10, 80, n),
        "azimuth": torch.linspace(-170, 120, n),
        "distance": torch.linspace(3.2, 4.0, n),
        "fovy": torch.linspace(44, 36, n),
        "c2w": torch.randn(n, 4, 4, generator=torch.Generator().manual_seed(4)),
    }
    return Cameras(**{**numbers, **changes})


def latents(n=3, channels=3):
    return torch.randn(n, channels, 4, 4, generator=torch.Generator().manual_seed(1))


def load(name, other=False, cameras="tokens", **fields):
    """A method on the ideal model; ``other``: its LoRA is on another one."""
    fields = {**FIELDS.get(name, {}), **fields}
    if name in SCALED:
        fields = {"guidance_scale": S, **fields}
    if other:
        fields["pretrained_model_name_or_path_lora"] = "sibling"
    return lods.load(name, IdealModel(cameras=cameras), PROMPT, **FIXED, **fields)


def gradient(method, z, cameras):
    z = z.clone().requires_grad_()
    losses = method(latents=z, cameras=cameras)
    (found,) = torch.autograd.grad(losses.terms["loss_sds"], z)
    return len(z) * found


def unit(model):
    """w(t) alpha / sigma, at the one t."""
    alpha, sigma = model.schedule.alpha_sigma(torch.tensor([T]))
    return sigma**2 * alpha / sigma


def pictures(method, cameras):
    """What the model believes in under the four texts, for each camera."""
    k, v = sight(cameras)
    texts = ("prompt", "null", "source", "bad")
    return [k * method.prompts.plain(text).view(1, *SHAPE) + v for text in texts]


def shake(method):
    """Give the learned part something to say."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def learned_picture(method, cameras, texts=None):
    """What the learned prediction believes in, for each camera, by the formulas of its class;
    ``texts`` (B, 1, D): in place of the method's own text for a LoRA."""
    k, v = sight(cameras)
    if hasattr(method, "learnable_embedding"):
        return k * method.learnable_embedding.view(1, *SHAPE) + v
    if texts is None:
        texts = method.prompts.plain("prompt" if hasattr(method, "camera") else "null")
    a, b = (method.lora.state_dict()[f"to_v.lora_{part}.weight"] for part in "AB")
    mean = texts.view(-1, a.shape[1])
    mean = mean + method.cfg.lora_scale * mean @ (b @ a).T
    if hasattr(method, "camera"):  # of VSD, added to the time
        one, two = method.camera.linear_1, method.camera.linear_2
        mean = mean + two(silu(one(cameras.c2w.flatten(1))))
    return k * mean.view(-1, *SHAPE) + v


# --- closed forms ---------------------------------------------------------------------------------


def test_all_four_numbers_of_a_camera_count():
    k, v = sight(views())
    for name in ("elevation", "azimuth", "distance", "fovy"):
        other = views(**{name: getattr(views(), name) + 1})
        assert (sight(other)[1] - v).abs().amax((1, 2, 3)).min() > 1e-3
    assert len(k.unique()) == 3


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_has_the_gradient_of_its_own_camera(name):
    method, z = load(name), latents()
    wanted = unit(method.model) * GRADIENTS[name](z, *pictures(method, views()))
    torch.testing.assert_close(gradient(method, z, views()), wanted, rtol=2e-3, atol=1e-3)


OTHERS = [
    ("embedding", False),
    *((name, other) for name in LEARNING[1:] for other in (False, True)),
]
IDS = [f"{name}{' of another model' * other}" for name, other in OTHERS]


@pytest.mark.parametrize(("name", "other"), OTHERS, ids=IDS)
def test_what_is_learned_is_told_the_camera_of_its_row(name, other):
    method, z = load(name, other), latents()
    shake(method)
    y, n, *_ = pictures(method, views())
    e = learned_picture(method, views())
    assert (e - (y if name == "vsd" else n)).abs().max() > 0.1
    lods_gradient = (z - e) / S + e - y
    wanted = unit(method.model) * (e - n + S * (n - y) if name == "vsd" else lods_gradient)
    torch.testing.assert_close(gradient(method, z, views()), wanted, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", LEARNING[:2])
def test_towards_guided_samples_all_three_predictions_are_told_it(name):
    method, z = load(name, prompt_scale=3.0), latents()
    shake(method)
    y, n, *_ = pictures(method, views())
    e, y = learned_picture(method, views()), n + 3 * (y - n)
    wanted = unit(method.model) * ((z - e) / S + e - y)
    torch.testing.assert_close(gradient(method, z, views()), wanted, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("name", "other"), OTHERS, ids=IDS)
def test_the_loss_of_what_is_learned_is_that_of_the_camera_of_each_draw(name, other, draws):
    """mean (alpha / sigma)^2 (z - e)^2, e the learned picture for the camera, t as it is drawn."""
    fields = {"lora_cfg_training": False} if name == "vsd" else {}
    method, z = load(name, other, lora_n_timestamp_samples=draws, **fields), latents()
    shake(method)
    torch.manual_seed(5)
    t = torch.randint(1000, (draws * len(z),))
    alpha, sigma = method.model.schedule.alpha_sigma(t)
    torch.manual_seed(5)
    (loss,) = (v for k, v in method(latents=z, cameras=views()).terms.items() if k != "loss_sds")
    square = (z - learned_picture(method, views())).square().mean((1, 2, 3)).repeat(draws)
    torch.testing.assert_close(loss, ((alpha / sigma) ** 2 * square).mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_of_sds_are_told_it(name):
    first = {"sds_steps": 2, "sds_scale": 20.0}
    if name == "bridge":
        first = {"bridge_start": 2, "bridge_sds_scale": 20.0}
    method, z = load(name, **first), latents()
    y, n, *_ = pictures(method, views())
    wanted = unit(method.model) * ((z - n) / 20 + n - y)
    wanted = wanted * (S if method.grows_with_scale else 1)
    torch.testing.assert_close(gradient(method, z, views()), wanted, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "other"), [("sds", False), *OTHERS], ids=["sds", *IDS])
def test_the_negatives_of_perp_neg_are_told_it(name, other):
    method, z, cameras = load(name, other, cameras="both"), latents(), views()
    shake(method)
    k, v = sight(cameras)
    rows = torch.randn(4, 3, 1, 48, generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([[-0.5, -0.1], [-0.2, -0.3], [0.0, -0.7]])
    y, n, *negatives = (k * text.view(3, *SHAPE) + v for text in rows)
    conditions = Conditions(rows[0], rows[1], (rows[2], rows[3]), weights, cameras=cameras)
    with torch.no_grad():
        t = torch.full((3,), T)
        x_t, eps = method.diffuse(z, t, conditions)
        found = method.gradient(x_t, t, eps, conditions)
    # all predictions are (x_t - alpha m) / sigma: Perp-Neg acts on the pictures m alike
    text = rows[0] if name == "vsd" else rows[1]
    e = n if name == "sds" else learned_picture(method, cameras, text)
    against = n if name in ("sds", "vsd") else e
    composed = scores.perp_neg(y, against, negatives, weights)
    wanted = {
        "sds": z - n + S * (n - composed),
        "vsd": e - n + S * (n - composed),
    }.get(name, (z - e) / S + e - composed)
    torch.testing.assert_close(found, unit(method.model) * wanted, rtol=2e-3, atol=1e-3)


# --- a network ------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_sd):
    """``tiny(name, cameras)``: a method on a random UNet with an encoder of cameras."""

    def build(name, cameras="tokens", **fields):
        own = {"bridge": {"bridge_start": 0}, "sdi": {"inversion_steps": 2}}.get(name, {})
        folder = tiny_sd(sample_size=4, camera_tokens=2)
        return lods.load(name, folder, PROMPT, device="cpu", cameras=cameras, **own, **fields)

    return build


@pytest.mark.parametrize("name", NAMES)
def test_a_network_gives_another_gradient_for_another_camera(tiny, name):
    method, z, found = tiny(name), latents(channels=4), []
    for cameras in (views(), views(), views(fovy=torch.full((3,), 39.0))):
        torch.manual_seed(0)
        found.append(gradient(method, z, cameras))
    assert torch.equal(found[0], found[1]) and found[0].isfinite().all()
    assert (found[0] - found[2]).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("name", LEARNING)
def test_the_cameras_are_no_part_of_what_is_learned(tiny, name, tmp_path):
    """The state and the file are those of words, and both are taken back."""
    words, method, again = (tiny(name, told) for told in ("words", "tokens", "tokens"))
    shapes = {key: value.shape for key, value in words.state_dict().items()}
    assert {key: value.shape for key, value in method.state_dict().items()} == shapes
    shake(method)
    method(latents=latents(channels=4), cameras=views()).total.backward()
    assert all(p.grad.any() for p in method.parameters())
    again.load_state_dict(method.state_dict())
    from_file = tiny(name)
    from_file.load(method.save(tmp_path / "learned.safetensors"))
    found = []
    for each in (method, again, from_file):
        torch.manual_seed(0)
        cameras = views(c2w=None)  # VSD's own embedding of it is in checkpoints only
        found.append(gradient(each, latents(channels=4), cameras))
    assert torch.equal(found[0], found[1])
    if name != "vsd":
        torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cameras", "asked", "words"),
    [
        ("words", None, True),
        ("words", True, True),
        ("words", False, False),
        ("tokens", None, False),
        ("tokens", False, False),
        ("both", None, True),
        ("both", True, True),
    ],
)
def test_words_for_the_view_go_with_what_the_model_is_told(tiny, cameras, asked, words):
    given = {} if asked is None else {"view_dependent_prompting": asked}
    method = tiny("bridge", cameras, **given)
    front_and_back = views(2, azimuth=torch.tensor([0.0, 180.0]), elevation=torch.zeros(2))
    seen = method.prompts.conditions(front_and_back, ["source"])
    for rows, text in ((seen.prompt, "prompt"), (seen.others["source"], "source")):
        assert torch.equal(rows[0], rows[1]) != words
        assert torch.equal(rows[0], method.prompts.plain(text)) != words
    assert seen.cameras is front_and_back


@pytest.mark.parametrize(
    ("cameras", "asked", "said"),
    [
        ("tokens", True, "cameras=tokens goes with prompts that have no words for the view"),
        ("both", False, "cameras=both goes with prompts that have words for the view"),
    ],
)
def test_a_contradiction_is_one_line_before_anything_is_loaded(
    tiny_sd, monkeypatch, cameras, asked, said
):
    monkeypatch.setattr("lods.models.latent.load_weights", lambda *a: pytest.fail("loaded"))
    model, words = tiny_sd(sample_size=4, camera_tokens=2), {"view_dependent_prompting": asked}
    with pytest.raises(ValueError, match=said) as caught:
        lods.load("sds", model, PROMPT, cameras=cameras, **words)
    one_line(caught)
    with pytest.raises(ValueError, match=said):  # also where the model is given
        lods.load("sds", IdealModel(cameras=cameras), PROMPT, **words)


def test_a_model_that_is_given_is_told_what_it_was_loaded_for(tiny_sd):
    folder = tiny_sd(sample_size=4, camera_tokens=2)
    model = lods.models.load(folder, "cpu", cameras="tokens")
    method = lods.load("sds", model, PROMPT)
    assert not method.prompts.view_words
    assert gradient(method, latents(channels=4), views()).any()


@pytest.mark.parametrize("name", NAMES)
def test_without_cameras_a_call_is_one_line(name):
    method = load(name)
    with pytest.raises(ValueError, match=r"with cameras=tokens .* give cameras=") as caught:
        method(latents=latents())
    one_line(caught)
    with pytest.raises(ValueError, match="with its field of view") as caught:
        method(latents=latents(), cameras=views(fovy=None))
    one_line(caught)
