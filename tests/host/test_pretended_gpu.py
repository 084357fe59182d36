"""Whole runs on a pretended CUDA device (tests/fakecuda): operations on tensors of two devices and
numpy of a CUDA tensor fail there as on a GPU, and what makes the CPU wait for it is counted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fakecuda import device
from tests.runs import ROOT, launch, read, small_run

# of a step that logs nothing: two of the guard against NaN (gradients, parameters), one of the
# scaler's step, two of densification (are its gradients finite, how are they scaled), one of the
# guidance (was the last gradient finite), and one of Lightning (the loss, for progress bars)
WAITS = 7
STRATEGY = (
    "system.strategy={name: default, scene_scale: 9.0, default: {refine_start_iter: 0, "
    "refine_every: 2, refine_stop_iter: 9, grow_grad2d: 1.e-9, refine_scale2d_stop_iter: 0}}"
)


# --- the device -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    # a run of an earlier test has chosen the CPU for this process
    monkeypatch.setattr("threestudio.utils.misc._device_type", None)
    with device.pretended_gpu():
        yield torch.device("cuda")


def test_the_device_is_there_only_while_it_is_pretended():
    before = torch.cuda.is_available(), torch.is_autocast_enabled, torch.cuda.device_count
    with device.pretended_gpu():
        assert torch.cuda.is_available() and torch.ones(2, device="cuda").is_cuda
    assert (torch.cuda.is_available(), torch.is_autocast_enabled, torch.cuda.device_count) == before


def test_devices_follow_through_operations_and_gradients(gpu):
    x = torch.ones(3, requires_grad=True)
    y = (x.to(gpu) * 2).sum()
    assert y.device.type == "cuda" and x.device.type == "cpu"
    y.backward()
    assert x.grad.device.type == "cpu" and x.grad.tolist() == [2, 2, 2]
    assert y.detach()[None].new_zeros(2).is_cuda and torch.zeros_like(y).is_cuda
    assert torch.zeros(2).to(y).is_cuda and not y.cpu().is_cuda
    assert y.to(torch.float64).device.type == "cuda"


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.where(a > 0, b, a),
        lambda a, b: a.index_put_((torch.zeros(3, dtype=torch.long, device="cuda"),), b),
        lambda a, b: b[a.long()],
    ],
)
def test_tensors_of_both_devices_do_not_meet(gpu, mixed):
    with pytest.raises(device.DeviceMixError, match="same device"):
        mixed(torch.ones(3, device=gpu), torch.ones(3))


def test_what_cuda_allows_of_the_cpu_is_allowed(gpu):
    a = torch.ones(3, device=gpu)
    assert (a * torch.tensor(2.0)).is_cuda  # a number without dimensions
    a.copy_(torch.zeros(3))
    assert a.is_cuda and a[torch.tensor([0])].is_cuda


def test_numpy_and_generators_of_the_other_device_are_refused(gpu):
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(1, device=gpu).numpy()
    with pytest.raises(RuntimeError, match="for generator"):
        torch.randn(1, device=gpu, generator=torch.Generator())


def test_waits_are_counted(gpu):
    a, mask = torch.ones(3, device=gpu), torch.zeros(3, dtype=torch.bool, device=gpu)
    with device.counting() as waits:
        a.add(1).mean()
        torch.where(mask, a, 2 * a)
        assert not waits
        a.sum().item(), bool(mask.any()), mask.nonzero(), a[mask], a.tolist(), a.cpu()
        a[mask] = 2
    assert sum(waits.values()) == 7


# --- the parts of a step --------------------------------------------------------------------------


def test_the_words_for_a_view_are_chosen_without_a_wait(gpu, tiny_sd, tmp_path, monkeypatch):
    import threestudio

    monkeypatch.chdir(tmp_path)
    processor = threestudio.find("lods-prompt-processor")(
        {"prompt": "a red car", "pretrained_model_name_or_path": tiny_sd()}
    )
    prompt = processor()
    elevation = torch.tensor([0.0, 0, 0, 80, 80], device=gpu)
    azimuth = torch.tensor([0.0, 90, 180, 0, 190], device=gpu)
    with device.counting() as waits:
        index = prompt.direction_indices(elevation, azimuth, torch.ones_like(azimuth))
        prompt.get_text_embeddings(elevation, azimuth, torch.ones_like(azimuth))
        prompt.get_text_embeddings_perp_neg(elevation, azimuth, torch.ones_like(azimuth))
    assert not waits, waits
    names = [prompt.directions[i].name for i in index.tolist()]
    assert names == ["front", "side", "back", "overhead", "overhead"]


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, tiny_sd):
    """``run(configs, *words) -> (exit status, output)``."""

    def start(configs, *words):
        files = [str(ROOT / "configs" / name) for name in configs]
        command = [sys.executable, "-m", "tests.fakecuda", "--config", *files, "--train"]
        done = subprocess.run(
            [*command, *small_run(tiny_sd()), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    return start


GAUSSIANS = ["lods-gs-embedding.yaml"]
SMALL = ["system.geometry.init_type=ball", "system.geometry.ball={n_points: 120, radius: 0.6}"]


def waits_in(output):
    found = re.findall(r"^waits (\d+) (.*)$", output, re.MULTILINE)
    return {line: int(times) for times, line in found}


@pytest.mark.slow
def test_gaussians_train_in_16_bits_and_go_on_without_a_gpu(run, tmp_path, monkeypatch):
    """With densification and gsplat's own Python half; then one step and an export on the CPU."""
    words = ["trainer.max_steps=8", "trainer.precision=16-mixed", "system.loss.lambda_sds=0.01"]
    words.append("trainer.val_check_interval=100")
    status, output = run(GAUSSIANS, "--count", "5", *SMALL, STRATEGY, *words)  # refines at 2, 4, 6
    assert status == 0 and "Gaussian rasteriser: gsplat" in output, output[-3000:]
    waits = waits_in(output)
    own = {line: n for line, n in waits.items() if "strategy/" not in line}  # gsplat's own code
    assert 0 < sum(own.values()) <= WAITS, waits
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/lods-gs-embedding/t")
    state = read(folder / "ckpts/last.ckpt")
    count = len(state["state_dict"]["geometry.means"])
    assert state["global_step"] == 8 and count != 120, "Gaussians were grown or pruned"
    parsed, resume = [str(folder / "configs/parsed.yaml")], f"resume={folder}/ckpts/last.ckpt"
    assert launch(parsed, [resume, "trainer.max_steps=9", "trainer.precision=32"]) == 0
    resume = [resume, "trainer.precision=32"]
    assert launch(parsed, resume, "--export") == 0
    assert (folder / "save/it9-export/gaussians.ply").exists()


@pytest.mark.slow
def test_a_radiance_field_trains_by_the_torch_references(run, tmp_path, monkeypatch):
    words = ["data.resolution_milestones=[]", "trainer.max_steps=3"]
    words.append("system.geometry.isosurface_resolution=16")
    status, output = run(["lods-ngp-embedding.yaml", "pocket-shapes-ngp.yaml"], *words)
    assert status == 0, output[-3000:]
    for line in ("hash grid: torch (tinycudann", "Ray marching: torch (nerfacc"):
        assert line in output
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/lods-ngp-embedding/t")
    resume = f"resume={folder}/ckpts/last.ckpt"
    assert launch([str(folder / "configs/parsed.yaml")], [resume], "--export") == 0


@pytest.mark.slow
def test_a_tensor_left_on_the_cpu_is_found(run):
    """Else the runs above would tell nothing."""
    status, output = run(GAUSSIANS, "--fault", *SMALL, "system.strategy.name=none")
    assert status != 0 and output.rstrip().endswith("must be a CUDA tensor"), output[-3000:]
