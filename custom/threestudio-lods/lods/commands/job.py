"""One object of ``lods make``: trained, rendered, exported, and put where it is easy to find."""

import dataclasses
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lods import host
from lods.commands.runs import PARSED, copy, exported, start
from lods.models import cards, renamed

# representations -> their configs at full size; for methods that learn a LoRA of the model, what is
# learned has another rate
BASE = {
    "gaussians": ("lods-gs-embedding",),
    "nerf": ("lods-ngp-embedding",),
    "mesh": ("lods-mesh-embedding",),
}
BASE_LORA = {
    "gaussians": ("lods-gs-lora",),
    "nerf": ("lods-ngp-lora",),
    "mesh": ("lods-mesh-embedding", "mesh-lora"),
}
LORA = ("lods-lora", "lods-vsd")
OVERLAY_ENDS = {"gaussians": "", "nerf": "-ngp", "mesh": "-mesh"}
FORMATS = {"gaussians": "[ply,glb]", "nerf": "glb", "mesh": "glb"}
OF_FILE = "mesh"  # the representation that a file is the start of
QUALITIES = ("draft", "good", "best")  # good is the overlay itself
RESULTS = ("picture.png", "video.mp4")  # and the exported files
RECORD = "run.json"  # of the host: when it was trained, and for how long
PAGE = "report.html"  # of the run, unless its config says report: false
LAST = Path("ckpts", "last.ckpt")


def has_config(name: str) -> bool:
    """Whether a config of this name ships."""
    return (host.home() / "configs" / f"{name}.yaml").is_file()


@dataclass(frozen=True)
class Request:
    """What is to be made, in plain values."""

    prompt: str
    on: str
    method: str
    model: str
    small: bool  # sizes for a CPU and a model of this package
    seed: int = 0
    steps: int | None = None
    overrides: tuple[str, ...] = ()
    gpu: str | None = None
    # channels of the latents, of a model whose name was another's up to version 0.2; else 0
    latents: int = 0
    quality: str = "good"
    source: str = ""  # the file of the mesh that is painted, and the SHA-256 of what it holds
    source_hash: str = ""

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Request":
        values = {**values, "overrides": tuple(values["overrides"])}
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def key(self) -> str:
        """A short name of all that the result depends on."""
        told = {name: value for name, value in self.plain().items() if name != "gpu"}
        if not self.latents:  # as in requests of version 0.2
            del told["latents"]
        if self.quality == "good":  # likewise
            del told["quality"]
        if not self.source:
            del told["source"]
        if not self.source_hash:
            del told["source_hash"]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]

    def words(self, folder: Path) -> list[str]:
        """The command line of the training, as ``lods train`` takes it."""
        prompt = "system.prompt_processor"
        # a model that understands cameras is told them; no other can be
        told = "tokens" if cards.has_camera_encoder(self.model) else "words"
        settings = {
            "exp_root_dir": folder,
            "name": "run",
            "tag": self.key,
            "use_timestamp": "false",
            "seed": self.seed,
            f"{prompt}.prompt": as_typed(self.prompt),
            f"{prompt}.pretrained_model_name_or_path": self.model,
            "system.guidance_type": f"{self.method}-guidance",
            "system.guidance.cameras": told,
            # the last checkpoint alone, often enough that a killed run goes on near its end
            "checkpoint.save_top_k": 0,
            "checkpoint.every_n_train_steps": 50 if self.small else 500,
        }
        if self.source:
            settings["system.geometry.init_type"] = "file"
            settings["system.geometry.file.path"] = as_typed(self.source)
        if self.steps is not None:
            settings["trainer.max_steps"] = self.steps
        words = [f"{key}={value}" for key, value in settings.items()]
        return ["--config", *self.configs(), "--train", *words, *self.overrides, *self._gpu()]

    @property
    def command(self) -> str:
        """The command ``lods make`` that asks for this."""
        options = {"--on": self.on, "--method": self.method.removeprefix("lods-")}
        options |= {"--model": self.model, "--quality": self.quality, "--seed": str(self.seed)}
        options |= {} if self.steps is None else {"--steps": str(self.steps)}
        options |= {"--from": self.source} if self.source else {}
        usual = {"--on": "gaussians", "--quality": "good", "--seed": "0"}
        told = [pair for pair in options.items() if pair not in usual.items()]
        words = [word for pair in told for word in pair]
        return shlex.join(["lods", "make", self.prompt, *words, *self.overrides, *self._gpu()])

    def configs(self) -> list[str]:
        """The names of its configs, of which each goes over the ones before it."""
        base = (BASE_LORA if self.method in LORA else BASE)[self.on]
        return [*base, *(self.overlays() if self.small else [])]

    def again(self, run: Path) -> list[str]:
        """The first words of a command line that goes on with the run."""
        return ["--config", str(run / PARSED), f"resume={run / LAST}", *self._gpu()]

    def overlays(self) -> list[str]:
        """The configs that go after the full one: the overlay of the model, or of the embedded
        one; then, where there are such, the ones for the method and the quality. Raises
        ``ValueError`` for a quality that there is no overlay for."""
        known = cards.all_cards()
        card = known.get(cards.canonical(self.model))
        if card is None or card.overlay is None:
            card = known[cards.EMBEDDED]
        overlay = f"{card.overlay}{OVERLAY_ENDS[self.on]}"
        found = [overlay]
        if self.method in LORA and has_config(f"{card.overlay}-lora"):
            found.append(f"{card.overlay}-lora")
        if self.quality == "good":
            return found
        if not has_config(f"{overlay}-{self.quality}"):
            raise ValueError(
                f"--quality {self.quality}: there is no overlay {overlay}-{self.quality}; "
                "--steps sets the training steps of any model"
            )
        return [*found, f"{overlay}-{self.quality}"]

    def _gpu(self) -> list[str]:
        return [] if self.gpu is None else ["--gpu", self.gpu]


def fields_of_model(model: str, has_gpu: Callable[[], bool]) -> dict[str, Any]:
    """What a request for this model has besides its name. ``has_gpu`` is asked where it matters."""
    card = cards.all_cards().get(cards.canonical(model))
    fields: dict[str, Any] = {"small": bool(card and card.overlay) or not has_gpu()}
    if card and renamed.former(model) != card.name:
        fields["latents"] = card.latent_channels
    return fields


def as_typed(text: str) -> str:
    """What is written after ``KEY=`` so that a config has ``text`` there. The quotes of one that is
    quoted as a whole would be taken for those of a shell."""
    return json.dumps(text, ensure_ascii=False) if text.lstrip()[:1] in ("'", '"') else text


def make(
    request: Request, folder: Path, options: Sequence[str] = (), asked: str | None = None
) -> int:
    """Do what is left of the request in ``folder``; returns the exit status of a run. ``options``
    of the launcher go to the training only. ``asked``: the command that was typed; None for the one
    that asks for the same."""
    run = run_of(request, folder)
    words = request.words(folder) if run is None else [*request.again(run), "--train"]
    status = start([*words, *options], request.command if asked is None else asked)
    run = run_of(request, folder)
    if status or run is None:
        return status or 1
    return export(request, run, folder)


def finish(request: Request, folder: Path) -> int:
    """Render and export what there is of a request that was stopped; returns the exit status of a
    run. Raises ``ValueError`` where there is no checkpoint."""
    run = run_of(request, folder)
    if run is None:
        raise ValueError(f"there is no checkpoint in {folder}: go on with the training first")
    return start([*request.again(run), "--test"]) or export(request, run, folder)


def export(request: Request, run: Path, folder: Path) -> int:
    """Write the object of a run, and put the results into ``folder``; returns the exit status."""
    fmt = f"system.exporter.fmt={FORMATS[request.on]}"
    status = start([*request.again(run), "--export", fmt])
    if not status:
        publish(run, folder)
    return status


def paused_in(request: Request, folder: Path, since: float) -> float:
    """The seconds for which the training of a request was paused that has begun after ``since``,
    in seconds since 1970; 0 where none was."""
    run = run_of(request, folder)
    if run is None:
        return 0.0
    with suppress(OSError, IndexError, KeyError, TypeError, ValueError):
        last = json.loads((run / RECORD).read_bytes())["trainings"][-1]
        if datetime.fromisoformat(last["started"]).timestamp() >= since - 1:  # whole seconds
            return max(0.0, float(last["paused"]))
    return 0.0


def run_of(request: Request, folder: Path) -> Path | None:
    """The run of the request that has a checkpoint."""
    found = [p.parent.parent for p in (folder / "run").glob(f"{request.key}*/{LAST}")]
    return max(found, key=lambda p: (p / LAST).stat().st_mtime, default=None)


def publish(run: Path, folder: Path) -> None:
    """Copy the newest results of a run to ``folder``, under names without the step."""
    sheets, videos = (run.glob(f"save/it*-test{end}") for end in ("-sheet.png", ".mp4"))
    for name, files in zip(RESULTS, (sheets, videos)):
        if newest := max(files, key=_step, default=None):
            copy(newest, folder / name)
    last = max(map(_step, exported(run)), default=0)
    for file in exported(run):
        if _step(file) == last:
            copy(file, folder / file.name)
    if (run / PAGE).is_file():  # written anew: its links are relative
        host.module("threestudio.run.page").try_page(run, folder / PAGE)


def _step(path: Path) -> int:
    """The step in ``save/it300-test.mp4`` and ``save/it300-export/gaussians.ply``."""
    found = re.search(r"it(\d+)-", str(Path(*path.parts[path.parts.index("save") :])))
    return int(found[1]) if found else -1


def main() -> int:
    """The process of a job of a batch: its folder is the current one."""
    return make(Request.of(json.loads(sys.argv[1])), Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
