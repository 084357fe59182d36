"""``lods.load``: the methods as a user of the library has them, and as the host has them."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import lods
import pytest
import torch
from lods import log
from lods.cameras import Cameras
from lods.methods import registry

import threestudio
from tests.ideal_model import IdealModel

# those that edit take a source too: test_edit_methods.py
NAMES = [name for name, cls in registry.ours().items() if not cls.edits]
LEARNING = ["lods-embedding", "lods-lora", "lods-vsd"]
PROMPT = "a red car"
OWN = {"lods-bridge": {"bridge_start": 0}, "lods-sdi": {"inversion_steps": 2}}


@pytest.fixture
def load(tiny_sd):
    def build(name, **fields):
        return lods.load(name, tiny_sd(sample_size=4), PROMPT, **OWN.get(name, {}), **fields)

    return build


@pytest.fixture
def no_host(monkeypatch):
    """Messages go where they go without a threestudio."""
    monkeypatch.setattr(log, "_host", None)


def cameras(n=2):
    matrices = torch.randn(2, n, 4, 4, generator=torch.Generator().manual_seed(4))
    azimuth = torch.tensor([0.0, 90.0])[:n]
    return Cameras(torch.full((n,), 10.0), azimuth, torch.ones(n), *matrices)


class SameTexts:
    """A prompt processor's output that holds the embeddings of a method of the library."""

    def __init__(self, prompts, text="prompt"):
        self.prompts, self.text = prompts, text
        self.text_embeddings = prompts.plain(text)[None]
        self.uncond_text_embeddings = prompts.plain("null")[None]

    def other_text(self, kind):
        return SameTexts(self.prompts, {"source": "source", "nfsd_negative": "bad"}[kind])

    def get_text_embeddings(self, elevation, azimuth, distances, view_dependent_prompting=True):
        assert view_dependent_prompting
        seen = self.prompts.conditions(Cameras(elevation, azimuth, distances), [self.text])
        text = seen.prompt if self.text == "prompt" else seen.others[self.text]
        return torch.cat([text, seen.null])


def shake(method):
    """Give the learned part something to say; the same for the same names."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(method.named_parameters())):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


# --- one method in two places ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_guidance_of_the_host_is_the_method_bit_for_bit(load, tiny_sd, name):
    method = load(name)
    config = {"pretrained_model_name_or_path": tiny_sd(sample_size=4), **OWN.get(name, {})}
    guidance = threestudio.find(f"{name}-guidance")(config)
    texts = SameTexts(method.prompts)
    guidance.initialize(texts)
    shake(method)
    guidance.load_state_dict(method.state_dict())  # whose keys are the same
    views, results = cameras(), []
    picture = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(5))
    for place in ("host", "library"):
        rgb = picture.clone().requires_grad_()
        torch.manual_seed(6)
        if place == "host":
            matrices = {"c2w": views.c2w, "mvp_mtx": views.mvp}
            out = guidance(rgb, texts, *views.views, **matrices)
            losses = {k: v for k, v in out.items() if k.startswith("loss_")}
            learned = list(guidance.parameters())
        else:
            losses = method(rgb.permute(0, 3, 1, 2), views).terms
            learned = list(method.parameters())
        sum(losses.values()).backward()
        results.append([rgb.grad, *losses.values(), *(p.grad for p in learned)])
    assert results[0][0].any() and len(results[0]) == len(results[1])
    for one, other in zip(*results):
        assert torch.equal(one, other)


# --- a call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_images_and_latents_get_a_gradient_and_so_does_what_is_learned(load, name):
    method = load(name)
    for given in ({"images": torch.rand(2, 3, 20, 12)}, {"latents": torch.randn(2, 4, 4, 4)}):
        (value,) = given.values()
        method.zero_grad()
        losses = method(**{k: v.requires_grad_() for k, v in given.items()}, cameras=cameras())
        assert torch.equal(losses.total, sum(losses.terms.values()))
        losses.total.backward()
        assert value.grad.isfinite().all() and value.grad.any()
        learned = list(method.parameters())
        assert bool(learned) == (name in LEARNING) and all(p.grad is not None for p in learned)
        assert set(losses.numbers) == {"grad_norm", "min_step", "max_step"}


def test_without_cameras_all_see_the_front(load):
    grads = []
    for given in ((), (Cameras(*[torch.zeros(2)] * 3),), (cameras(),)):
        z = torch.ones(2, 4, 4, 4, requires_grad=True)
        torch.manual_seed(0)
        load("lods-sds")(None, *given, latents=z).total.backward()
        grads.append(z.grad)
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0][1], grads[2][1])


def test_a_view_has_words_of_its_own(load):
    method = load("lods-sds")
    elevation = torch.tensor([0.0, 0.0, 0.0, 80.0])
    azimuth = torch.tensor([0.0, 90.0, 180.0, 180.0])
    seen = method.prompts.conditions(Cameras(elevation, azimuth, torch.ones(4)))
    words = [f"{PROMPT}, {view} view" for view in ("front", "side", "back", "overhead")]
    torch.testing.assert_close(seen.prompt, method.model.text(words), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.null[2], method.model.text([""])[0], rtol=1e-5, atol=1e-5)


def test_a_step_moves_the_schedules(load):
    method = load("lods-sds", max_step_percent=[0, 0.98, 0.5, 10], grad_clip=[0, 2.0, 1.0, 10])
    for step, high, clip in ((0, 980, 2.0), (5, 740, 1.5), (10, 500, 1.0), (99, 500, 1.0)):
        method.step(step)
        assert (method.min_step, method.max_step, method.grad_clip) == (20, high, clip)
        assert method(latents=torch.zeros(1, 4, 4, 4)).numbers["max_step"] == high


# --- the learned part, as a file ------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNING)
def test_what_is_learned_is_saved_and_taken_back(load, tmp_path, name):
    method, other = load(name), load(name)
    shake(method)
    path = method.save(tmp_path / "learned.safetensors")
    metadata = other.load(path)
    assert metadata["model"] == method.model.name
    camera = {key for key in method.state_dict() if key.startswith("camera.")}
    for (key, one), two in zip(method.state_dict().items(), other.state_dict().values()):
        if key not in camera:  # of VSD, in checkpoints only
            torch.testing.assert_close(two, one)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in LEARNING])
def test_a_method_that_learns_nothing_writes_nothing(tmp_path, name):
    method = lods.load(name, IdealModel(), PROMPT)
    assert method.save(tmp_path / "file") is None and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="learns nothing: the file x has no use"):
        method.load("x")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method": "lods-lorra"}, "there is no method 'lods-lorra' (did you mean 'lods-lora'?)"),
        ({"method": "nothing"}, "there is no method 'nothing': lods-asd, lods-bridge, "),
        ({"guidence_scale": 3}, "has no setting 'guidence_scale' (did you mean 'guidance_scale'?)"),
        ({"enable_vae_slice": 1}, "(did you mean 'enable_vae_slicing'?)"),
        ({"source_sufix": "x"}, "(did you mean 'source_suffix'?)"),
        ({"guidance_scale": -1}, "guidance_scale must be a number in (0, inf]"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number in (0, inf]"),
        ({"method": "sds", "guidance_scale": float("inf")}, "guidance_scale must be a number in"),
        ({"weighting_strategy": "sd"}, "fantasia3d, velocity, latent, not 'sd' (did you mean"),
        ({"lora_rank": 2.5}, "lora_rank must be a whole number in [1, 1024], not 2.5"),
        ({"weights_dtype": "half"}, "weights_dtype must be one of auto, fastest, float16"),
        ({"max_step_percent": 0.01}, "0 <= min_step_percent <= max_step_percent <= 1, not 0.02"),
        ({"model": "pocket-shaps"}, "no card 'pocket-shaps' (did you mean 'pocket-shapes'?)"),
        ({"model": ""}, "there is no model folder and no card ''"),
        ({"prompt": ""}, "the prompt is empty: give prompt='a DSLR image of a hamburger'"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": None}, "the prompt must be one text, not null"),
        ({"prompt": "a hamburgr"}, "names no object that this model knows ('hamburgr': did you"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(monkeypatch, words, said):
    monkeypatch.setattr("lods.models.latent.load_weights", lambda *a: pytest.fail("loaded"))
    with pytest.raises(ValueError) as caught:
        lods.load(**{"method": "lods-lora", "prompt": PROMPT, **words})
    assert said in str(caught.value) and "\n" not in str(caught.value)


PICTURE, LATENTS = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give either images (B, 3, H, W) in 0..1, or latents="),
        ({"images": PICTURE, "latents": LATENTS}, "give either images"),
        ({"images": PICTURE.permute(0, 2, 3, 1)}, "images are (B, 3, H, W), not (2, 8, 8, 3)"),
        ({"images": PICTURE[0]}, "images are (B, 3, H, W), not (3, 8, 8)"),
        ({"latents": PICTURE}, "latents of this model are (B, 3, 4, 4), not (2, 3, 8, 8)"),
        ({"latents": LATENTS[0]}, "latents of this model are (B, 3, 4, 4), not (3, 4, 4)"),
        ({"images": PICTURE, "cameras": cameras(1)}, "for 2 images must be (2,)"),
    ],
)
def test_a_wrong_call_is_one_line(given, said):
    method = lods.load("lods-sds", IdealModel(), PROMPT)
    with pytest.raises(ValueError) as caught:
        method(**given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_method_without_prompts_says_so():
    method = registry.find("lods-sds")(IdealModel())
    with pytest.raises(ValueError, match=r"no prompt yet: make it by lods\.load, or call start"):
        method(latents=LATENTS)


# --- messages -------------------------------------------------------------------------------------


def test_messages_go_to_the_logger_of_the_library(no_host, caplog):
    caplog.set_level(logging.INFO, logger="lods")
    log.warn("one")
    log.info("two")
    log.debug("three")
    lods.load("lods-sds", IdealModel(), PROMPT, guidance_scale=1000.0)
    told = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    assert told[:2] == [("lods", "WARNING", "one"), ("lods", "INFO", "two")]
    assert len(told) == 3 and "guidance_scale=1000 is of the configurations of LODS" in told[2][2]


def test_only_the_first_process_tells(no_host, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    log.warn("one")
    monkeypatch.setenv("RANK", "0")
    log.warn("two")
    assert [r.getMessage() for r in caplog.records if r.name == "lods"] == ["two"]


def test_in_a_host_they_are_the_hosts(monkeypatch, caplog):
    said = []
    host = SimpleNamespace(warn=said.append, info=said.append, debug=said.append)
    monkeypatch.setattr(log, "_host", host)
    for tell in (log.warn, log.info, log.debug):
        tell(tell.__name__)
    assert said == ["warn", "info", "debug"]
    assert not [r for r in caplog.records if r.name == "lods"]


def test_the_door_gives_them_to_threestudio():
    assert log._host is threestudio


# --- importing ------------------------------------------------------------------------------------

HEAVY = {"torch", "numpy", "diffusers", "transformers", "threestudio", "omegaconf", "jaxtyping"}


def test_importing_it_imports_nothing_heavy():
    folder = str(registry.__file__).rpartition("/lods/")[0]
    code = f"import sys; sys.path.insert(0, {folder!r}); import lods; dir(lods); lods.load"
    code += f"; print({HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
