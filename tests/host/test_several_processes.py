"""Frames, videos and files of several processes: each view once, and what all have made is written
by the first one, when all are there."""

import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.core.hooks import ModelHooks

from tests.runs import ROOT, launch, small_run
from tests.two_processes import OPTIONS, run_both
from threestudio.systems.several_processes import HOOKS, TogetherAtTheEnds
from threestudio.utils import saving
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.saving import SaverMixin

# --- two processes as two threads -----------------------------------------------------------------


class Strategy:
    """What the callback takes of Lightning's, for two threads."""

    meeting = None

    def barrier(self, name=None):
        self.meeting.wait()

    def reduce_boolean_decision(self, decision, all=True):
        self.said.append(decision)
        self.meeting.wait()
        return min(self.said[-2:])


class System(ModelHooks, SaverMixin):
    def __init__(self, rank, folder):
        self.rank, self.calls = rank, []
        self.set_save_dir(str(folder))
        self._trainer = SimpleNamespace(
            global_rank=rank,
            is_global_zero=rank == 0,
            world_size=2,
            training=False,
            strategy=Strategy(),
            state=SimpleNamespace(fn="test"),
        )

    def frame(self, index):
        self.save_rgb_image(f"frames/{index}.png", torch.full((8, 8, 3), index / 9))

    def video(self):
        return self.save_img_sequence("turn", "frames", r"(\d+)\.png", save_format="gif")

    def on_test_epoch_end(self):
        self.calls.append("on_test_epoch_end")
        self.action(self)


@pytest.fixture
def both(tmp_path, monkeypatch):
    """``both(action, steps) -> (systems, errors)``: each process does its ``steps`` of a test, the
    second one late, and ``action(system)`` at the end."""
    store = torch.distributed.HashStore()
    c10d = torch.distributed.distributed_c10d
    monkeypatch.setattr(c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(Strategy, "meeting", threading.Barrier(2, timeout=20))
    monkeypatch.setattr(Strategy, "said", [], raising=False)
    errors = [None, None]

    def process(system, action, steps):
        callback, trainer = TogetherAtTheEnds(), system._trainer
        callback.setup(trainer, system, "test")
        try:
            time.sleep(0.3 * system.rank)
            steps(system)
            system.action = action
            system.on_test_epoch_end()
        except Exception as error:
            errors[system.rank] = error
        finally:
            callback.teardown(trainer, system, "test")

    def run(action, steps=lambda system: None):
        systems = [System(rank, tmp_path / "save") for rank in range(2)]
        threads = [threading.Thread(target=process, args=(s, action, steps)) for s in systems]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads)
        assert not any(name in vars(system) for system in systems for name in HOOKS)
        return systems, errors

    return run


def every_second(system):
    for index in range(system.rank, 6, 2):
        system.frame(index)


@pytest.fixture
def written(monkeypatch):
    """The numbers of frames of the videos that are written, slowly."""
    found, write = [], saving._write_video

    def slow(path, frames, *args):
        found.append(len(frames))
        time.sleep(0.2)
        write(path, frames, *args)

    monkeypatch.setattr(saving, "_write_video", slow)
    return found


def test_a_video_has_the_frames_of_all_processes_and_is_written_once(both, written):
    paths = {}
    systems, errors = both(lambda s: paths.update({s.rank: s.video()}), every_second)
    assert errors == [None, None] and written == [6]
    assert paths[0] == paths[1] and Path(paths[0]).name == "turn.gif"
    assert [system.calls for system in systems] == [["on_test_epoch_end"]] * 2


def test_frames_that_a_hook_removes_after_the_video_are_in_it(both, written):
    """As upstream's zero123 does, on each process."""

    def action(system):
        system.video()
        shutil.rmtree(Path(system.get_save_dir(), "frames"), ignore_errors=True)

    systems, errors = both(action, every_second)
    assert errors == [None, None] and written == [6]
    assert Path(systems[0].get_save_dir(), "turn.gif").exists()


def test_what_one_process_writes_alone_keeps_nobody_waiting(both, written):
    """Neither what only the first one asks for, nor what only the others do."""

    def action(system):
        if system.rank == 0:
            system.video()
            system.save_json("first.json", {})
        else:
            system.save_json("other.json", {})

    systems, errors = both(action, every_second)
    assert errors == [None, None] and written == [6]
    folder = Path(systems[0].get_save_dir())
    assert (folder / "first.json").exists() and not (folder / "other.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all(both, rank):
    def action(system):
        if system.rank == rank:
            raise OSError("no space")
        system.save_json("end.json", {})

    _, errors = both(action)
    assert str(errors[rank]) == "no space"
    assert isinstance(errors[1 - rank], UserError)
    assert "on_test_epoch_end has failed in another process" in str(errors[1 - rank])


def test_a_file_that_cannot_be_written_keeps_nobody_waiting(both):
    _, errors = both(System.video)  # there are no frames
    assert "no frames for 'turn.gif'" in str(errors[0]) and "another process" in str(errors[1])


def test_pictures_of_the_training_are_the_first_process_s(both):
    def train(system):
        system._trainer.training = True
        assert system.save_json("train.json", {"rank": system.rank}).endswith("train.json")
        system._trainer.training = False

    systems, errors = both(lambda system: None, train)
    assert errors == [None, None]
    assert Path(systems[0].get_save_dir(), "train.json").read_text() == '{"rank": 0}'


def test_one_process_is_left_as_it_is(tmp_path):
    system = System(0, tmp_path)
    system._trainer.world_size = 1
    TogetherAtTheEnds().setup(system._trainer, system, "test")
    assert not any(name in vars(system) for name in HOOKS)


def test_processes_build_the_same_system_and_draw_other_numbers(tmp_path, monkeypatch):
    """Initial points that are drawn at random have to be as many on all."""
    load_extension(ROOT / "tests" / "toy_extension.py")
    toy = sys.modules["toy_extension"]

    built, drawn = [], []

    def look(system):
        built.append(system.body[0].weight.detach().clone())
        drawn.append((torch.initial_seed(), torch.rand(1).item()))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(toy.ToySystem, "on_fit_start", look)
    monkeypatch.setattr("threestudio.find", {"toy-data": toy.ToyData, "toy": toy.ToySystem}.get)
    config = {"data_type": "toy-data", "system_type": "toy", "tag": "t", "use_timestamp": False}
    config["system"] = {"optimizer": {"name": "SGD", "args": {"lr": 0.1}}}
    config["trainer"] = {"max_steps": 1, "limit_val_batches": 0, "enable_progress_bar": False}
    OmegaConf.save(OmegaConf.create({**config, "name": "x", "seed": 5}), "toy.yaml")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert launch(["toy.yaml"], []) == 0
    assert torch.equal(*built) and drawn[0] != drawn[1]
    assert [seed for seed, _ in drawn] == [5, 6]


# --- two processes ------------------------------------------------------------------------------

SYSTEMS = {
    "gs": (
        ["lods-gs-embedding.yaml", "pocket-shapes.yaml"],
        ["system.geometry.init_type=ball", "system.geometry.ball={n_points: 120, radius: 0.6}"],
        ["gaussians.ply", "prior.safetensors"],
    ),
    "ngp": (
        ["lods-ngp-lora.yaml", "pocket-shapes-ngp.yaml"],
        ["data.resolution_milestones=[]", "system.geometry.isosurface_resolution=16"],
        ["prior.safetensors"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_of_which_one_is_slow_lose_nothing(system, tiny_sd, tmp_path, monkeypatch):
    """Training, validation and test, with a number of views that two do not divide; the files are
    those that one process makes of the same checkpoint."""
    monkeypatch.chdir(tmp_path)
    names, more, files = SYSTEMS[system]
    configs = [str(ROOT / "configs" / name) for name in names]
    words = [*small_run(tiny_sd()), *more, "data.n_val_views=3", "trainer.log_every_n_steps=1"]
    statuses, outputs = run_both(["--config", *configs, "--train", *words, *OPTIONS], tmp_path)
    assert statuses == [0, 0], outputs
    save = next(tmp_path.glob("outputs/*/t/save"))
    assert sorted(p.name for p in save.glob("it2-test/*")) == [f"{i}.png" for i in range(5)]
    assert sorted(p.name for p in save.glob("it2-?.png")) == [f"it2-{i}.png" for i in range(3)]
    wrote = Counter(line for out in outputs for line in out.splitlines() if "wrote " in line)
    shared = ["it2-test.mp4", "it2-test-sheet.png", *files]
    assert {name: wrote[f"wrote {name}"] for name in shared} == dict.fromkeys(shared, 1)
    assert [line for out in outputs for line in out.splitlines() if "frames " in line] == [
        "frames 5"
    ]
    assert not any("wrote it2-test.mp4" in line for line in outputs[1].splitlines())
    assert imageio_ffmpeg.count_frames_and_secs(str(save / "it2-test.mp4"))[0] == 5

    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    parsed, resume = str(save.parent / "configs/parsed.yaml"), save.parent / "ckpts/last.ckpt"
    one = ["trainer.devices=1", "trainer.strategy=auto", f"resume={resume}"]
    assert launch([parsed], one, "--test") == 0
    for path, content in before.items():
        if "it2-test" in str(path):
            assert path.read_bytes() == content, path
    # an export that renders, in two processes again
    (save / "it2-test.mp4").unlink()
    export = ["--config", parsed, "--export", f"resume={resume}", *OPTIONS]
    statuses, outputs = run_both([*export, "system.exporter.save_video=true"], tmp_path)
    assert statuses == [0, 0], outputs
    assert (save / "it2-test.mp4").read_bytes() == before[save / "it2-test.mp4"]
    assert "wrote it2-test.mp4" in outputs[0] and "wrote it2-test.mp4" not in outputs[1]


@pytest.mark.slow
def test_a_system_that_knows_nothing_of_processes_loses_nothing(tiny_sd, tmp_path):
    """Of an extension: its hooks make the video, and are those of one process."""
    config = str(ROOT / "tests/extensions/threestudio-noise-score/configs/score.yaml")
    words = ["trainer.max_steps=1", "trainer.val_check_interval=1", "data.n_test_views=5", "tag=t"]
    words += ["use_timestamp=false", "trainer.precision=32", *OPTIONS]
    words.append(f"system.prompt_processor.pretrained_model_name_or_path={tiny_sd()}")
    words.append("system.prompt_processor.prompt=a red car")
    statuses, outputs = run_both(["--config", config, "--train", *words], tmp_path)
    assert statuses == [0, 0], outputs
    lines = [line for out in outputs for line in out.splitlines()]
    assert [line for line in lines if "frames " in line] == ["frames 5"]
    assert lines.count("wrote it1-test.mp4") == 1
