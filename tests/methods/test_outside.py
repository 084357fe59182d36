"""What is written outside of the library: methods and model families, without a change of it."""

import math

import lods
import pytest
import torch
from lods import scores
from lods.methods import registry
from lods.models import families

import threestudio
from tests.ideal_model import FIELDS, GRADIENTS, SCALED, IdealModel, S
from tests.runs import ROOT, fit, small_run
from threestudio.utils.extensions import load_extension

EXTENSION = ROOT / "tests" / "extensions" / "threestudio-half-sds"
T, PROMPT = 500, "a red car"


@pytest.fixture
def ideal():
    """The name of a family that is registered for this test."""
    lods.models.register("ideal", lambda name, device, settings: IdealModel(name, device))
    yield "ideal"
    del families.FAMILIES["ideal"]


def latents(n=2):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


# --- a model family -------------------------------------------------------------------------------


def test_all_methods_are_asked_of():
    plain = {name for name, cls in registry.ours().items() if not cls.edits}
    assert {f"lods-{name}" for name in GRADIENTS} == plain


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_family_from_outside_has_the_gradient_in_closed_form(ideal, name):
    fields = dict(FIELDS.get(name, {}))
    if name in SCALED:
        fields["guidance_scale"] = S
    method = lods.load(
        name,
        ideal,
        PROMPT,
        min_step_percent=T / 1000,
        max_step_percent=T / 1000,
        view_dependent_prompting=False,
        **fields,
    )
    z = latents().requires_grad_()
    losses = method(latents=z)
    (gradient,) = torch.autograd.grad(losses.terms["loss_sds"], z)
    pictures = [method.prompts.plain(text) for text in ("prompt", "null", "source", "bad")]
    t = torch.tensor([T])
    alpha, sigma = method.model.schedule.alpha_sigma(t)
    assert float(method.weight(t)) == pytest.approx(float(sigma**2))  # w(t) of DreamFusion
    unit = sigma**2 * alpha / sigma
    wanted = GRADIENTS[name](z.detach(), *(p.view(1, 3, 4, 4) for p in pictures))
    torch.testing.assert_close(2 * gradient, (unit * wanted).expand_as(z), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["embedding", "lora", "vsd"])
def test_what_a_method_learns_of_it_is_the_picture_that_is_there(ideal, name):
    """The loss of the learned part is smallest where its text stands for the latents."""
    torch.manual_seed(0)
    method = lods.load(name, ideal, PROMPT)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
    z, values = latents(1).expand(8, -1, -1, -1), []
    for _ in range(60):
        torch.manual_seed(1)  # always the same (t, noise), so that the loss must fall
        losses = method(latents=z)
        (learned,) = (v for k, v in losses.terms.items() if k != "loss_sds")
        optimizer.zero_grad()
        learned.backward()
        optimizer.step()
        values.append(learned.item())
    assert values[-1] < 0.5 * values[0]


def test_a_registered_family_is_a_model_of_the_host_too(ideal):
    config = {"pretrained_model_name_or_path": ideal}
    guidance = threestudio.find("lods-sds-guidance")(config)
    assert isinstance(guidance.model, IdealModel)


def test_a_taken_name_of_a_family_is_refused(ideal):
    for name in ("ideal", "sd15"):
        with pytest.raises(ValueError, match=f"there is a model '{name}' already"):
            lods.models.register(name, IdealModel)


def test_a_model_may_be_given_as_it_is():
    model = IdealModel()
    method = lods.load("lods-sds", model, PROMPT)
    assert method.model is model
    method(latents=latents())
    assert model.rows == [4]  # both texts in one call
    with pytest.raises(ValueError, match="weights_dtype is a setting of a model that is loaded"):
        lods.load("lods-sds", model, PROMPT, weights_dtype="float32")


# --- a method -------------------------------------------------------------------------------------


def test_ten_lines_are_a_method(registered):
    @lods.register("half-sds")
    class HalfSDS(lods.Method):
        def gradient(self, x_t, t, eps, conditions):
            eps_c, eps_u = self.predict(x_t, t, conditions, conditions.prompt, conditions.null)
            return 0.5 * scores.sds(eps_c, eps_u, eps, self.cfg.guidance_scale, self.weight(t))

    assert "half-sds" in lods.methods.names()
    got = []
    for name in ("half-sds", "lods-sds"):
        method, z = lods.load(name, IdealModel(), PROMPT), latents().requires_grad_()
        torch.manual_seed(3)
        method(latents=z).total.backward()
        got.append(z.grad)
    assert got[0].abs().max() > 0
    torch.testing.assert_close(got[0], got[1] / 2, rtol=1e-4, atol=1e-7)  # rounding of z - g


def test_it_has_the_switches_of_all_methods(registered):
    @lods.register("half-sds")
    class HalfSDS(lods.Method):
        def gradient(self, x_t, t, eps, conditions):
            return torch.full_like(x_t, math.inf)

    method = lods.load("half-sds", IdealModel(), PROMPT, sds_steps=2, grad_clip=1e-3)
    for step, moves in ((0, True), (1, True), (2, False)):
        z = latents().requires_grad_()
        method.step(step)
        method(latents=z).total.backward()
        assert bool(z.grad.any()) == moves  # of its own nothing is finite
        assert z.grad.abs().max() <= 1e-3 / 2 * (1 + 1e-4)


def test_a_taken_name_of_a_method_is_refused(registered):
    kind = type("Mine", (lods.Method,), {})
    lods.register("mine")(kind)
    for name in ("mine", "lods-sds"):
        with pytest.raises(ValueError, match=f"there is a method '{name}' already"):
            lods.register(name)(type("Other", (lods.Method,), {}))


def test_a_method_without_a_gradient_says_so(registered):
    lods.register("empty")(type("Empty", (lods.Method,), {}))
    with pytest.raises(NotImplementedError, match="Empty does not define gradient"):
        lods.load("empty", IdealModel(), PROMPT)(latents=latents())


def test_a_method_in_an_extension_folder_is_a_guidance_type(
    registered, tiny_sd, tmp_path, monkeypatch
):
    """Its YAML names it as ours are named, and a shipped configuration becomes a run of it."""
    monkeypatch.chdir(tmp_path)
    load_extension(EXTENSION)
    files = [str(ROOT / "configs/lods-gs-embedding.yaml"), str(EXTENSION / "configs/half.yaml")]
    ball = ["system.geometry.init_type=ball", "system.geometry.ball={n_points: 60, radius: 0.6}"]
    run = [*small_run(tiny_sd()), *ball, "data.batch_size=1"]
    system, _ = fit(files, run, max_steps=1)
    assert type(system.guidance.method).__name__ == "HalfSDS"
    assert system.guidance.cfg.share == 0.5 and not system.guidance.state_dict()
    with pytest.raises(ValueError, match=r"guidance\.share must be a number above 0"):
        fit(files, [*run, "system.guidance.share=0"], max_steps=1)


@pytest.mark.parametrize("other", [None, "sibling"], ids=["one model", "two models"])
@pytest.mark.parametrize("name", ["lods-embedding", "lods-lora", "lods-vsd"])
def test_a_model_is_told_one_camera_for_every_row(name, other):
    """Also in calls of several texts, and of several draws for each image."""
    fields = {"lora_n_timestamp_samples": 3}
    if name != "lods-embedding":
        fields["pretrained_model_name_or_path_lora"] = other
    model = IdealModel()
    method = lods.load(name, model, PROMPT, **fields)
    views = [torch.zeros(2)] * 3
    method(latents=torch.zeros(2, 3, 4, 4), cameras=lods.Cameras(*views, torch.zeros(2, 4, 4)))
    assert model.rows  # and the model compares them with its cameras
