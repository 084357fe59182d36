"""The two playground commands, with a tiny model in place of a real one."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from lods.methods import Losses
from lods.models import cards
from PIL import Image

from tests.runs import ROOT

KINDS = ["lora", "embedding"]


@pytest.fixture(scope="module")
def playground(lods):
    return importlib.import_module("lods.playground")


@pytest.fixture
def play(playground, tiny_sd, tmp_path, monkeypatch):
    """``play(kind, *flags)`` in an empty folder: the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")

    def run(kind, *flags):
        model = [] if "--model" in flags else ["--model", tiny_sd(sample_size=4)]
        return playground.main(kind, [*model, *map(str, flags)])

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("particles", [1, 5])
def test_everything_is_written(play, playground, tmp_path, kind, particles, capsys):
    flags = ["--steps", 3, "--every", 2, "--particles", particles, "--guidance-scale", "inf"]
    assert play(kind, *flags, "--output", tmp_path / "out") == 0
    out = tmp_path / "out"
    names = {"config.json", "metrics.csv", "00002.png", "final.png", "latents.safetensors"}
    pictures = {f"particle_{i:02d}.png" for i in range(particles)}
    assert {p.name for p in out.iterdir()} == names | pictures | {f"{kind}.safetensors"}
    with open(out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["1", "2", "3"]
    assert all(float(r[f"loss_{kind}"]) > 0 and float(r["loss_sds"]) > 0 for r in rows)
    config = json.loads((out / "config.json").read_text())
    assert (config["steps"], config["guidance_scale"]) == (3, "inf")
    columns = {1: 1, 5: 3}[particles]  # the tiny model's images are 8 x 8
    assert Image.open(out / "final.png").size == (8 * columns, 8 * (1 if particles == 1 else 2))
    said = capsys.readouterr().out
    assert "as asked" in said and str(out / "final.png") in said


def test_the_pictures_are_the_particles(play, tmp_path):
    play("lora", "--steps", 1, "--particles", 3, "--output", tmp_path)
    sheet = Image.open(tmp_path / "final.png")
    for i in range(3):
        alone = Image.open(tmp_path / f"particle_{i:02d}.png")
        y, x = 8 * (i // 2), 8 * (i % 2)
        assert sheet.crop((x, y, x + 8, y + 8)).tobytes() == alone.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_result(play, tmp_path, kind):
    from safetensors.torch import load_file

    results = []
    for i, seed in enumerate([1, 1, 2]):
        flags = ["--steps", 2, "--particles", 2, "--seed", seed]
        assert play(kind, *flags, "--output", tmp_path / str(i)) == 0
        results.append(load_file(tmp_path / str(i) / "latents.safetensors")["latents"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_pictures_show_the_side_that_is_asked_for(play, tiny_sd, tmp_path):
    """By words in four directions, by tokens in any; the same side, the same pictures."""
    from safetensors.torch import load_file

    model, results = tiny_sd(sample_size=4, camera_tokens=2), {}
    for cameras in ("words", "tokens"):
        for azimuth in (90, 100, -90):
            out = tmp_path / f"{cameras}{azimuth}"
            flags = ["--model", model, "--cameras", cameras, "--azimuth", azimuth, "--steps", 2]
            assert play("lora", *flags, "--particles", 1, "--output", out) == 0
            results[cameras, azimuth] = load_file(out / "latents.safetensors")["latents"]
    assert torch.equal(results["words", 90], results["words", -90])  # both are a side view
    assert torch.equal(results["words", 90], results["words", 100])
    tokens = [results["tokens", azimuth] for azimuth in (90, 100, -90)]
    assert not any(torch.equal(tokens[0], other) for other in tokens[1:])


def test_the_camera_is_in_the_middle_of_those_of_the_training(playground, lods, tiny_sd):
    told = lods.models.load(tiny_sd(sample_size=4, camera_tokens=2), "cpu", cameras="tokens")
    camera = playground.camera_at(told, -5.0, 30.0)
    torch.testing.assert_close(camera.numbers(), torch.tensor([[-5.0, 30.0, 3.6, 40.0]]))
    assert len(camera.repeat(3)) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cameras", "tokens"], "has no folder camera_encoder: set cameras=words"),
        (["--azimuth", "400"], "argument --azimuth: invalid number from -360 to 360"),
        (["--elevation", "nan"], "argument --elevation: invalid number from -90 to 90"),
        (["--cameras", "token"], "argument --cameras: invalid choice: 'token'"),
    ],
)
def test_a_side_that_cannot_be_had_is_one_line(play, capsys, flags, said):
    try:
        status = play("lora", "--steps", 1, *flags)
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2 and said in capsys.readouterr().err


def test_a_split_batch_has_the_same_gradients(playground, monkeypatch):
    """6 particles in chunks of 4 get the gradient of a mean over all 6."""

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def step(self, step):
            pass

        def forward(self, latents):
            assert latents.shape[1] == 4
            loss = (self.scale * latents).square().sum() / len(latents)
            return Losses({"loss_sds": loss}, {"grad_norm": 0.0})

    ends = []
    for batch in (6, 4):
        torch.manual_seed(0)
        method, particles = Square(), torch.randn(6, 4, 2, 2).requires_grad_()
        steps = list(playground.optimise(method, particles, 5, 0.1, 0.2, batch))
        ends.append([particles.detach(), method.scale.detach()])
        assert steps[-1]["step"] == 5 and steps[-1]["loss_sds"] < steps[0]["loss_sds"]
    torch.testing.assert_close(ends[0], ends[1])
    assert ends[0][1] < 0.5  # what the method learns is optimised too, at its own rate


@pytest.mark.parametrize("start, deviation", [(1, 3**-0.5), (4, 12**-0.5)])
def test_latents_start_as_published_with_stable_diffusion(playground, start, deviation):
    """The original draws 512 x 512 numbers in -1..1 and resizes them to 64 x 64."""
    torch.manual_seed(0)
    latents = playground.initial_particles((40, 4, 32, 32), start, torch.device("cpu"))
    assert latents.shape == (40, 4, 32, 32)
    assert latents.std().item() == pytest.approx(deviation, rel=0.01)
    assert latents.abs().max() <= 1 and abs(latents.mean().item()) < 0.01
    if start == 4:
        large = torch.rand(20, 4, 256, 256) * 2 - 1
        resized = torch.nn.functional.interpolate(large, 32, mode="bilinear")
        assert latents.std().item() == pytest.approx(resized.std().item(), rel=0.01)
        # and of the same form: the fourth moments of uniform and normal numbers are 1.8 and 3
        fourth = [(x / x.std()).pow(4).mean().item() for x in (latents, resized)]
        assert fourth[0] == pytest.approx(fourth[1], rel=0.02)
    for kind in KINDS:
        assert playground.SETTINGS["stable-diffusion", kind]["start"] == 4
        assert playground.SETTINGS["stable-diffusion", kind]["drawn"]


def test_published_batches_are_drawn_with_replacement(playground):
    """Each step has two batches of three of six particles; those that are not drawn have no
    gradient, and one drawn twice has twice as much."""

    class Sum(torch.nn.Module):
        def step(self, step):
            pass

        def forward(self, latents):
            sizes.append(len(latents))
            return Losses({"loss_sds": latents.sum() / len(latents)})

    sizes, counts = [], []
    particles = torch.zeros(6, 4, 2, 2).requires_grad_()
    torch.manual_seed(0)
    for _ in playground.optimise(Sum(), particles, 50, 0.1, 0.1, 3, drawn=True):
        counts.append((particles.grad[:, 0, 0, 0] * 6).round().int().tolist())
        torch.testing.assert_close(particles.grad.sum(), torch.tensor(16.0))
    assert set(sizes) == {3} and len(sizes) == 100
    assert all(sum(step) == 6 for step in counts)
    often = [n for step in counts for n in step]
    # binomial: six draws, each with a chance of one in six
    assert often.count(0) / len(often) == pytest.approx((5 / 6) ** 6, abs=0.08)
    assert max(often) >= 3


@pytest.mark.parametrize("prompt", ["../../x/y", "a/b: c?*", "..", "x" * 500])
def test_prompts_make_harmless_folders(play, tmp_path, prompt):
    assert play("embedding", "--steps", 1, "--particles", 1, "--prompt", prompt) == 0
    (folder,) = (tmp_path / "outputs" / "2d_lods_embedding").iterdir()
    assert (folder / "final.png").is_file() and len(folder.name) < 110
    assert {p.name for p in tmp_path.iterdir()} <= {"outputs", ".threestudio_cache"}
    assert json.loads((folder / "config.json").read_text())["prompt"] == prompt


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--model", "/nowhere/at/all"], "there is no model folder and no card '/nowhere/at/all'"),
        (["--model", "nobody/no-such-model"], "the model 'nobody/no-such-model' cannot be had"),
        (["--prompt", " "], "the prompt is empty"),
    ],
)
def test_bad_input_is_one_line(play, tmp_path, capsys, flags, text):
    assert play("lora", *flags, "--output", tmp_path / "out") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and text in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--steps", "--guidance-scale", "--particles", "--lr", "--every"])
@pytest.mark.parametrize("value", ["0", "-3", "many", "nan"])
def test_bad_numbers_are_refused(play, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        play("lora", flag, value)
    assert stop.value.code == 2
    assert f"argument {flag}: invalid" in capsys.readouterr().err


def test_a_folder_is_one_runs(playground, tmp_path):
    made = [playground.new_folder(tmp_path / "a" / "run", str(i)) for i in range(3)]
    assert [path.name for path in made] == ["run", "run-002", "run-003"]
    assert [(path / "config.json").read_text() for path in made] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "kind, signum",
    [("lora", signal.SIGINT), ("embedding", signal.SIGTERM), ("embedding", signal.SIGHUP)],
)
def test_interrupted_run_keeps_what_it_has(play, playground, tmp_path, monkeypatch, kind, signum):
    optimise, before = playground.optimise, signal.getsignal(signum)

    def interrupted(*args):
        for numbers in optimise(*args):
            yield numbers
            if numbers["step"] == 2:
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(playground, "optimise", interrupted)
    assert play(kind, "--steps", 50, "--output", tmp_path) == 128 + signum
    assert signal.getsignal(signum) is before
    assert (tmp_path / "final.png").is_file() and (tmp_path / f"{kind}.safetensors").is_file()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_choice_of_the_model(playground, monkeypatch):
    def missing(*args):
        raise ValueError("it is not on the hub")

    choose, small = playground.choose_model, cards.EMBEDDED
    folder = str(cards.CARDS.parent / small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, family, why = choose(None)
    assert (model, family) == (folder, small) and "no CUDA GPU" in why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("lods.models.cards.resolve", lambda name: cards.Location(name))
    monkeypatch.setattr("lods.models.files.load_model_config", lambda *args: {})
    assert choose(None)[:2] == (cards.DEFAULT_MODEL, "stable-diffusion")
    monkeypatch.setattr("lods.models.files.load_model_config", missing)
    assert choose(None) == (folder, small, "it is not on the hub")
    assert choose("a/b") == ("a/b", "stable-diffusion", "as asked")
    assert choose(small)[:2] == (folder, small)
    assert choose(folder)[1] == small


@pytest.mark.slow
def test_commands_import_no_3d_code(tiny_sd, tmp_path):
    """Both scripts in a process of their own, and what that process has imported at its end."""
    flags = ["--model", tiny_sd(sample_size=4), "--steps", "1", "--particles", "1", "--gpu", "-1"]
    code = f"import json, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    for kind in KINDS:
        script = str(ROOT / f"2dplayground_{kind}.py")
        code += (
            f"sys.argv = {[script, *flags]!r}\n"
            f"try: runpy.run_path({script!r}, run_name='__main__')\n"
            "except SystemExit as stop: print('STATUS', stop.code)\n"
        )
    code += "print('MODULES', json.dumps(sorted(sys.modules)))\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count("STATUS 0") == 2, done.stdout + done.stderr
    for kind in KINDS:
        (folder,) = (tmp_path / "outputs" / f"2d_lods_{kind}").iterdir()
        assert (folder / f"{kind}.safetensors").is_file()
    modules = json.loads(done.stdout.split("MODULES ")[1])
    assert "lods.methods.lods_lora" in modules
    roots = {m.split(".")[0] for m in modules}
    assert not roots & {"numba", "gsplat", "trimesh", "plyfile", "nerfacc"}
    three_d = ("lods.gaussians", "lods.threestudio", "threestudio.models", "threestudio.systems")
    assert not [m for m in modules if m.startswith(three_d)]


def test_what_stops_a_run_stops_the_playground(playground):
    from threestudio.run.signals import stop_signals

    before = playground._stop_like_ctrl_c()
    try:
        assert {*before, signal.SIGINT} == set(stop_signals())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
