"""``python -m pocket.make``: what stages are made with, what refuses them, how long they took."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch

from pocket import (
    assets,
    autoencoder,
    colours,
    data,
    latents,
    make,
    recipes,
    render,
    training,
    world,
)
from tests.study.world_renders import COUNT, plain_renders

RENDERS = {
    "render",
    "truth",
    "vae",
    "vae-on",
    "latents",
    "unet",
    "decoder",
    "save",
    "judge",
    "report",
    "flow",
}
RENDERS |= {"save-flow", "views", "save-views"}
# of captions
READERS = {"unet", "save", "report", "flow", "save-flow", "views", "save-views"}


def begin(work, stage):
    """A file such as the stage leaves in its work folder."""
    file = work / recipes.FILES[stage].replace("*", "car")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


@pytest.fixture
def work(tmp_path):
    """A folder in which every stage has begun, made with today's world."""
    now = recipes.recipes(0)
    for stage in recipes.FILES:
        begin(tmp_path, stage)
    (tmp_path / "made_with.json").write_text(json.dumps(now))
    return tmp_path


def refusals(work, seed=0):
    """What each stage is refused for."""
    now, said = recipes.recipes(seed), {}
    for stage in make.STAGES:
        try:
            recipes.check(work, [stage], now)
        except ValueError as error:
            said[stage] = str(error)
    return said


def test_nothing_is_refused_where_nothing_changed(work):
    assert refusals(work) == {}


def _other_car(**changes):
    return tuple(dataclasses.replace(o, **changes) if o.name == "car" else o for o in world.OBJECTS)


@pytest.mark.parametrize(
    "module, name, value, refused, reason",
    [
        (world, "OBJECTS", _other_car(turn=90.0), RENDERS, "other objects (car)"),
        (world, "OBJECTS", _other_car(paint=(0, 20)), RENDERS, "other colours (car)"),
        (world, "OBJECTS", world.OBJECTS[1:], RENDERS, "other objects (hamburger)"),
        (colours, "PAINTS", colours.PAINTS | {"red": (1, 0, 0)}, RENDERS, "other colours (red)"),
        (render, "LIGHTS", render.LIGHTS[:2], RENDERS, "other lights (directions)"),
        (render, "AMBIENT", 0.5, RENDERS, "other lights (ambient)"),
        (render, "SEED", 3, RENDERS, "other cameras"),
        (world, "SIZE", 64, RENDERS, "pixels 128, not 64"),
        (world, "HALF_SIDE", 0.5, RENDERS, "half side 0.87, not 0.5"),
        (data, "COLOURED", 0.5, RENDERS - {"render", "truth", "judge"}, "other backgrounds"),
        (world, "TEMPLATES", ("{}",), READERS, "other captions (templates)"),
        (latents, "EMPTY", 0.3, READERS, "other captions (left out)"),
        (world, "view_of", lambda *_: 1, READERS | {"judge"}, "views"),
        (world, "caption", lambda *_: "it", READERS, "other captions (names)"),
    ],
)  # fmt: skip
def test_a_changed_world_refuses_what_depends_on_it(
    work, monkeypatch, module, name, value, refused, reason
):
    monkeypatch.setattr(module, name, value)
    said = refusals(work)
    assert set(said) == refused
    for text in said.values():
        assert reason in text and "\n" not in text and text.endswith("give another --work")


def test_another_seed_is_refused_by_its_number(work):
    said = refusals(work, seed=1)
    assert said["vae"] == f"{work}: the stage vae was made with seed 0, not 1: give another --work"
    assert "render" not in said and "latents" in said


def test_a_stage_that_left_nothing_may_begin_under_another_recipe(work, monkeypatch):
    monkeypatch.setattr(world, "TEMPLATES", ("{}",))
    for stage in ("unet", "flow", "views"):
        for file in work.glob(recipes.FILES[stage]):
            file.unlink()
    assert refusals(work) == {}
    recipes.note(work, "unet", recipes.recipes(0))
    assert recipes.read(work)["unet"]["captions"]["templates"] == ["{}"]


def test_what_an_older_folder_does_not_say_is_noted_and_kept_to(tmp_path, monkeypatch, capsys):
    now = recipes.recipes(0)
    older = {k: {key: now[k][key] for key in ("seed", "channels")} for k in ("vae", "unet")}
    (tmp_path / "made_with.json").write_text(json.dumps(older))
    for stage in ("render", "vae", "latents", "unet"):
        begin(tmp_path, stage)
    assert refusals(tmp_path) == {}
    recipes.note(tmp_path, "unet", now)
    noted = recipes.read(tmp_path)
    assert noted == {k: now[k] for k in ("render", "vae", "latents", "unet")}
    assert "unet does not say its captions: taken to be as now" in capsys.readouterr().out
    recipes.note(tmp_path, "unet", now)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(render, "AMBIENT", 0.5)
    assert {"render", "vae", "latents", "unet"} <= set(refusals(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{", '{"vae": 3}'])
def test_damaged_notes_are_one_line(tmp_path, capsys, text):
    (tmp_path / "made_with.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        make.main(["--work", str(tmp_path), "--stages", "save"])
    assert stop.value.code == 2
    assert "made_with.json is damaged: give another --work" in capsys.readouterr().err


def test_stages_run_in_their_order_and_add_to_their_times(tmp_path, monkeypatch, capsys):
    ran = []

    def stage(name, seconds):
        def run(args):
            ran.append(name)
            time.sleep(seconds)

        return run

    monkeypatch.setattr(make, "RUN", {n: stage(n, 0.02) for n in make.STAGES})
    (tmp_path / "times.json").write_text(json.dumps({"vae": 3600.0, "unet": 1.0}))
    make.main(["--work", str(tmp_path), "--stages", "save,vae,render"])
    assert ran == ["render", "vae", "save"]
    times = json.loads((tmp_path / "times.json").read_text())
    assert list(times) == ["vae", "unet", "render", "save"]
    assert 3600 <= times["vae"] < 3605 and times["unet"] == 1.0 and times["save"] < 5
    assert "vae: 0.0 s, 1 h 0 min in all" in capsys.readouterr().out
    ran.clear()
    make.main(["--work", str(tmp_path)])
    assert tuple(ran) == make.STAGES


def test_the_time_of_a_stage_that_is_stopped_counts(tmp_path, monkeypatch):
    def stopped(args):
        time.sleep(0.2)
        raise KeyboardInterrupt("saved at step 3 of 9")

    monkeypatch.setitem(make.RUN, "vae", stopped)
    with pytest.raises(SystemExit) as stop:
        make.main(["--work", str(tmp_path), "--stages", "vae"])
    assert stop.value.code == 130
    assert json.loads((tmp_path / "times.json").read_text())["vae"] >= 0.2


@pytest.mark.parametrize(
    "seconds, said", [(0.04, "0.0 s"), (59.9, "59.9 s"), (245, "4 min 5 s"), (11220, "3 h 7 min")]
)
def test_durations_are_said_in_units_of_their_size(seconds, said):
    assert make.duration(seconds) == said


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without the package and without Debian's tools."""
    monkeypatch.setattr(assets, "INSTALLED", tmp_path / "usr")
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)


@pytest.mark.parametrize("stage", ["render", "truth"])
def test_without_the_models_one_line_says_where_they_come_from(bare, tmp_path, capsys, stage):
    with pytest.raises(SystemExit) as stop:
        make.main(["--work", str(tmp_path), "--package", str(tmp_path), "--stages", stage])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no apt-get here" in error and "--assets DIR" in error
    assert not list(tmp_path.glob("truth/*"))


def test_views_that_are_there_need_no_models(bare, tmp_path):
    plain_renders(tmp_path / "renders")
    few = ["--work", str(tmp_path), "--stages", "render", "--views", str(COUNT)]
    make.main([*few, "--painted", "25"])
    assert render.lacking(tmp_path, COUNT, 25) == []
    assert {o.name for o in render.lacking(tmp_path, COUNT, 26)} == {
        o.name for o in world.OBJECTS if o.colours
    }
    with pytest.raises(SystemExit):
        make.main([*few, "--painted", "26"])


@pytest.mark.parametrize(
    "stage", [pytest.param("vae", marks=pytest.mark.slow), "vae_on", "decoder"]
)
def test_the_autoencoder_that_is_kept_has_the_averaged_weights(tmp_path, monkeypatch, stage):
    """Those of ``_fit``; the whitening that follows is left out."""
    plain_renders(tmp_path / "renders", ("car", "dog"))
    build = autoencoder.build
    monkeypatch.setattr(autoencoder, "build", lambda: build((8, 8), 4, 16))
    monkeypatch.setattr(autoencoder, "whiten", lambda *_: None)
    if stage != "vae":
        training.save_state(tmp_path / "vae.pt", model=autoencoder.build().state_dict())
    if stage == "decoder":
        autoencoder.train_decoder(tmp_path, 4, batch=2)
    elif stage == "vae_on":
        autoencoder.train_on(tmp_path, 4, batch=2)
    else:
        autoencoder.train(tmp_path, 4, batch=2)
    state = training.load_state(tmp_path / f"{stage}_state.pt")
    kept = training.load_state(tmp_path / f"{stage}.pt")["model"]
    average = dict(zip(state["parameters"], state["average"]["shadow_params"], strict=True))
    assert average.keys() == kept.keys()
    for name, value in average.items():
        assert torch.equal(kept[name], value), name
    assert any(not torch.equal(value, state["model"][name]) for name, value in average.items())


def test_the_autoencoder_that_was_trained_on_is_the_one_that_is_used(tmp_path):
    first, second = (autoencoder.build().state_dict() for _ in range(2))
    training.save_state(tmp_path / "vae.pt", model=first)
    digest = autoencoder.encoder_digest(autoencoder.load_vae(tmp_path))
    training.save_state(tmp_path / "vae_on.pt", model=second)
    used = autoencoder.load_vae(tmp_path)
    for name, value in second.items():
        assert torch.equal(used.state_dict()[name], value), name
    assert autoencoder.encoder_digest(used) != digest  # so that latents are made anew


@pytest.mark.parametrize("stage", ["decoder", "vae-on"])
def test_a_decoder_without_its_autoencoder_is_one_line(tmp_path, capsys, stage):
    plain_renders(tmp_path / "renders", ("car",))
    with pytest.raises(SystemExit):
        make.main(["--work", str(tmp_path), "--stages", stage])
    assert "no autoencoder yet: run the stage vae first" in capsys.readouterr().err


@pytest.mark.slow
def test_renders_become_latents_and_nothing_is_made_twice(tmp_path):
    plain_renders(tmp_path / "renders")
    options = ["--work", str(tmp_path), "--stages", "render,vae,latents", "--views", str(COUNT)]
    options += ["--painted", "25", "--vae-steps", "2", "--threads", "1"]
    make.main(options)
    files = [tmp_path / "vae.pt", *sorted((tmp_path / "latents").glob("*.npy"))]
    assert len(files) == 1 + sum(1 + len(o.colours) for o in world.OBJECTS)
    assert np.load(tmp_path / "latents" / "hamburger.npy").shape == (
        COUNT,
        2,
        autoencoder.LATENT_CHANNELS,
        2,
        2,
    )
    before = [file.stat().st_mtime_ns for file in files]
    make.main(options)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert set(json.loads((tmp_path / "times.json").read_text())) == {"render", "vae", "latents"}
