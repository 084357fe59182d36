"""``lods doctor``: what works on this machine, and the one line that would make the rest work.

Each optional part says itself why it is missing. The network is not touched.
"""

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from lods import __version__, host
from lods.commands.parser import Parser

READY = "ready"
# what a run needs, and whose versions explain most differences between machines
PACKAGES = (
    *("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "safetensors"),
    *("pytorch-lightning", "omegaconf", "jaxtyping", "numba", "gsplat", "scipy", "trimesh"),
)


@dataclass(frozen=True)
class Finding:
    """A part of this machine or of this library: how it is, or what would make it ready."""

    group: str
    name: str
    state: str

    @property
    def ready(self) -> bool | None:
        """None for what only tells something of the machine."""
        if self.group == "machine":
            return None
        return not self.state.startswith("missing") if self.group == "packages" else self._says_so

    @property
    def _says_so(self) -> bool:
        return self.state.split(" (")[0] == READY


def main(argv: list[str], command: str) -> int:
    parser = Parser(command, "What works on this machine, and what would make the rest work.")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
    found = examine()
    if args.json:
        print(json.dumps([asdict(f) | {"ready": f.ready} for f in found], indent=2))
    else:
        print("\n".join(_lines(found)))
    return 0


def examine() -> list[Finding]:
    """Everything that is looked at, in the order in which it is shown."""
    groups: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
        "machine": _machine,
        "packages": _packages,
        "Gaussians": _rasterisers,
        "meshes": _meshes,
        "radiance fields": _radiance,
        "tools": _tools,
        "models": _models,
    }
    return [Finding(group, *pair) for group, look in groups.items() for pair in _looked(look)]


def _looked(look: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """A part that cannot even be imported is a finding, and hides no other."""
    try:
        yield from look()
    except Exception as error:
        yield "error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _lines(found: list[Finding]) -> Iterator[str]:
    width = max(len(f.name) for f in found)
    group = ""
    for f in found:
        if f.group != group:
            group = f.group
            yield ("" if f is found[0] else "\n") + group
        yield f"  {f.name:<{width}}  {f.state}"


def _state(missing: str) -> str:
    """What a part says of itself, in one line."""
    return " ".join(missing.split()) or READY


# --- what there is --------------------------------------------------------------------------------


def _machine() -> Iterator[tuple[str, str]]:
    import psutil
    import torch

    yield "lods", f"{__version__}, {host.__file__.removesuffix('/host.py')}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / 2**30:.1f} GB free of {memory.total / 2**30:.1f} GB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "threads", f"torch takes {torch.get_num_threads()} of {cores} cores"
    for index in range(torch.cuda.device_count()):
        gigabytes = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {gigabytes:.1f} GB"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch sees none" if built else "this build of torch is for the CPU"
        yield "GPU", f"none ({why}); everything runs on the CPU, with the embedded model"


def _packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, f"missing: pip install {name}"


def _rasterisers() -> Iterator[tuple[str, str]]:
    from lods.gaussians import backends, neighbours

    for name in backends.backend_names():
        if name not in ("auto", "torch"):  # the choice, and an old name of the reference
            try:
                missing = getattr(backends.get(name), "missing", str)()
            except ValueError as error:  # an installed package whose backend does not load
                missing = str(error)
            yield f"rasteriser {name}", _state(missing)
    for name in neighbours.KNN_BACKENDS:
        if name != "auto":
            missing = neighbours.missing(name) if name in neighbours.CUDA_BACKENDS else ""
            yield f"neighbours {name}", _state(missing)


def _meshes() -> Iterator[tuple[str, str]]:
    from lods.meshes import backends

    for name in backends.BACKENDS:
        if name != "auto":
            missing = getattr(backends.get(name), "missing", str)()
            yield f"triangle rasteriser {name}", _state(missing)
    unwraps = importlib.util.find_spec("xatlas")
    yield "texture coordinates xatlas", _state("" if unwraps else "pip install xatlas")


def _radiance() -> Iterator[tuple[str, str]]:
    import torch

    yield (
        "hash grid tinycudann",
        _state(host.module("threestudio.models.hashgrid.native").missing()),
    )
    nerfacc = host.module("threestudio.models.raymarch.march_nerfacc")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "ray marching nerfacc", _state(nerfacc.missing(device, torch.float32))
    yield "both on a CPU", _state("" if importlib.util.find_spec("numba") else "pip install numba")


def _tools() -> Iterator[tuple[str, str]]:
    from lods.gaussians import kernel_cache

    yield "compiled kernels", _state(kernel_cache.missing())
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    found = next(filter(None, map(shutil.which, compilers)), "")
    remedy = "not found, and only needed to build CUDA packages: apt-get install build-essential"
    yield "C compiler", f"{READY} ({found})" if found else remedy
    try:
        import imageio_ffmpeg

        yield "ffmpeg", f"{READY} ({imageio_ffmpeg.get_ffmpeg_version()})"
    except (ImportError, RuntimeError):
        yield "ffmpeg", "not found, so that no video is written: pip install imageio-ffmpeg"
    on_ray = host.module("evaluation.on_ray")
    if importlib.util.find_spec("ray") is None:
        yield "ray", f"not installed: pip install 'ray>={on_ray.LEAST_RAY}'"
    else:
        from packaging.version import Version

        old = Version(version("ray")) < Version(on_ray.LEAST_RAY)
        yield "ray", f"too old: pip install 'ray>={on_ray.LEAST_RAY}'" if old else READY


def _models() -> Iterator[tuple[str, str]]:
    import torch
    from lods.models import cards

    gigabytes = 0.0
    if torch.cuda.is_available():
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 2**30
    for name, card in cards.all_cards().items():
        if not cards.is_here(name):
            login = ", after its licence is accepted there and hf auth login" * card.gated
            ask = f"{card.download}{login}" if card.ids else ""
            least = f"; for GPUs of {card.memory_gb:g} GB and more"
            guess = "" if card.memory_measured else " (estimated)"
            download = f"not downloaded: {ask}{least}{guess}" if ask else ""
            yield name, download or "its folder is not there: install threestudio-lods again"
            continue
        notes = [card.memory_note(gigabytes)] if gigabytes else []
        notes += ["understands cameras"] * cards.has_camera_encoder(name)
        notes += [f"guidance-distilled, take {card.instead}"] * bool(card.instead)
        said = "; ".join(filter(None, notes))
        yield name, READY + f" ({said})" * bool(said)
    from lods.models.autoencoders import TAESD

    for family, (repo, _) in TAESD.items():
        here = cards.is_here(repo)
        yield f"model_vae=taesd, {family}", READY if here else f"not downloaded: hf download {repo}"
    from lods.models import quantized

    yield (
        "quantized_weights",
        _state(quantized.missing(torch.device("cuda" if torch.cuda.is_available() else "cpu"))),
    )
    from lods.gaussians.initialize import ShapEInit

    shap_e = ShapEInit().pretrained_model_name_or_path
    here = cards.is_here(shap_e)
    yield "shap-e (first Gaussians)", READY if here else f"not downloaded: hf download {shap_e}"
