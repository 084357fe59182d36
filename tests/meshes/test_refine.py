"""The second stage: image to image by a denoiser that knows the truth, and a fitted texture."""

import itertools

import lods
import numpy as np
import pytest
import torch
from lods.assets import Mesh
from lods.cameras import Cameras
from lods.gaussians.cameras import orbit
from lods.meshes.initialize import textured
from lods.meshes.parameters import TexturedMesh
from lods.methods import sampling
from lods.models.ideal import IdealModel, sd_schedule
from lods.models.memory import ModelSettings
from lods.models.renders import write

from tests.ideal_model import IdealModel as OnePicture
from tests.meshes.scenes import sphere

SIZE, VIEWS, DISTANCE, FOVY, ELEVATION = 28, 4, 3.0, 50.0, 15.0


def ball(size=48):
    vertices, faces = sphere(2)
    return textured(Mesh(vertices.float(), faces), size)


@pytest.fixture(scope="module")
def truth():
    """A ball whose colours are waves of the place."""
    mesh = ball()
    rows, columns = torch.meshgrid(
        torch.linspace(0, 9, 48), torch.linspace(0, 9, 48), indexing="ij"
    )
    mesh.texture = torch.stack([rows.sin(), columns.cos(), (rows + columns).sin()], -1) / 2 + 0.5
    return TexturedMesh(mesh).requires_grad_(False)


def looks(mesh):
    """(images (V, H, W, 3) before black, alphas)."""
    image, alpha, _ = mesh.render(orbit(VIEWS, DISTANCE, ELEVATION), SIZE, SIZE, FOVY)
    return image, alpha


@pytest.fixture(scope="module")
def denoiser(truth, tmp_path_factory):
    """The ideal denoiser of the true ball's renders."""
    pictures = (torch.cat(looks(truth), -1) * 255).round().byte().numpy()
    azimuths = np.arange(VIEWS) * 360 / VIEWS
    cameras = [(ELEVATION, azimuth, DISTANCE, FOVY) for azimuth in azimuths]
    folder = tmp_path_factory.mktemp("renders")
    renders = write(folder, {("ball", None): (cameras, pictures)})
    return IdealModel(renders, settings=ModelSettings(cameras="tokens", ideal_neighbours=1))


def cameras():
    full = torch.ones(VIEWS)
    azimuth = torch.arange(VIEWS) * 360 / VIEWS
    return Cameras(ELEVATION * full, azimuth, DISTANCE * full, fovy=FOVY * full)


def test_a_wrong_texture_reaches_the_truth(truth, denoiser):
    """Of inverted colours, in 40 steps of a strength from 0.5 to 0.1: every view is the true one's
    before any background, and nothing of it was fitted to the truth itself."""
    torch.manual_seed(0)
    wrong = truth.mesh()
    wrong.texture = 1 - wrong.texture
    mesh = TexturedMesh(wrong)
    strength = [0, 0.5, 0.1, 40]
    method = lods.load(
        "lods-refine",
        denoiser,
        "a ball",
        min_step_percent=strength,
        max_step_percent=strength,
        refine_steps=6,
    )
    optimizer = torch.optim.Adam(mesh.groups(texture=0.1))
    (true, _alpha), before = looks(truth), looks(mesh)[0].detach()
    for step in range(40):
        method.step(step)
        optimizer.param_groups[0]["lr"] = 0.1 * 0.2 ** (step / 40)
        image, opacity = looks(mesh)
        behind = torch.rand(VIEWS, 1, 1, 3)
        images = (image + (1 - opacity) * behind).permute(0, 3, 1, 2)
        optimizer.zero_grad()
        method(images, cameras()).total.backward()
        optimizer.step()
        mesh.limit_colours()
    error = ((looks(mesh)[0] - true) ** 2).mean().item()
    assert error < 1e-3 < 1e-2 < ((before - true) ** 2).mean().item()  # 30 dB over black


def one_picture():
    """The method with the model that believes in one picture under each text; scale 2."""
    plain = {"guidance_scale": 2.0, "view_dependent_prompting": False}
    return lods.load("lods-refine", OnePicture(), "a red car", **plain)


def test_pictures_are_led_to_what_the_model_makes_of_them_pixel_by_pixel():
    """1/2 sum (x - x')^2 / B, x' decoded from cfg_s of the two pictures that the model believes in;
    for a render of another size at the model's."""
    method = one_picture()
    y, n = (method.prompts.plain(text).view(3, 4, 4) for text in ("prompt", "null"))
    refined = method.model.decode(n + 2 * (y - n))
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = method(images)
    assert torch.allclose(losses.total, 0.5 * (images - refined).square().sum() / 3, rtol=1e-3)
    (slope,) = torch.autograd.grad(losses.total, images)
    assert torch.allclose(slope, (images - refined) / 3, atol=1e-4)
    large = images.detach().repeat_interleave(2, 2).repeat_interleave(2, 3).requires_grad_()
    losses = method(large)
    (slope,) = torch.autograd.grad(losses.total, large)
    each = slope.view(3, 3, 4, 2, 4, 2).sum((3, 5))
    assert torch.allclose(each, (images - refined) / 3, atol=1e-4)


def test_latents_alone_are_led_in_their_own_space():
    method = one_picture()
    y, n = (method.prompts.plain(text).view(3, 4, 4) for text in ("prompt", "null"))
    method(torch.rand(2, 3, 4, 4))  # which leaves nothing behind
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(method(latents=z).total, z)
    assert torch.allclose(slope, (z - n - 2 * (y - n)) / 2, atol=1e-3)


def test_the_strength_falls_with_the_steps():
    method = lods.load("lods-refine", OnePicture(), "a red car")
    bounds = []
    for step in (0, 25, 50, 99):
        method.step(step)
        bounds.append((method.min_step, method.max_step))
    assert bounds == [(200, 200), (125, 125), (50, 50), (50, 50)]


def test_sampling_turns_a_normal_prior_by_the_angles_of_its_steps():
    """For z ~ N(0, 1) the noise in x_t is sigma x_t, so that a step from the angle a to b, alpha =
    cos and sigma = sin, multiplies by cos(a - b)."""
    schedule = sd_schedule()
    steps = torch.tensor([[900, 300], [500, 299], [20, 150]])
    x = torch.randn(2, 1, 3, 3)

    def predict(x, t):
        return schedule.alpha_sigma(t)[1].view(-1, 1, 1, 1) * x

    angles = [torch.atan2(*reversed(schedule.alpha_sigma(t))) for t in steps] + [torch.zeros(2)]
    turned = torch.stack([(a - b).cos() for a, b in itertools.pairwise(angles)]).prod(0)
    found = sampling.denoised(schedule, predict, x, steps)
    assert torch.allclose(found, turned.view(2, 1, 1, 1) * x, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "calls"), [((0.2, 0.1), 10), ((0.011, 0.01), 1), ((0.99, 0.5), 50)]
)
def test_image_to_image_takes_its_share_of_the_steps_and_gives_back_what_is_known(parts, calls):
    model, z, told = OnePicture(), torch.randn(2, 3, 4, 4), []

    def predict(x, t):
        told.append(t)
        return model.noise_of(x, z, t)

    t = torch.tensor([int(1000 * part) for part in parts])
    found = sampling.image_to_image(model, predict, z, t, 50)
    assert torch.allclose(found, z, atol=1e-3) and len(told) == calls
    assert torch.equal(told[0], t) and all((a > b).all() for a, b in itertools.pairwise(told))
