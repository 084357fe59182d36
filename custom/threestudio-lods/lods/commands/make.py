"""``lods make``: from prompts to pictures, videos and 3D files, one at a time or many."""

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lods import host
from lods.commands.job import (
    BASE,
    OF_FILE,
    PAGE,
    QUALITIES,
    RESULTS,
    Request,
    fields_of_model,
    make,
    paused_in,
)
from lods.commands.parser import (
    Parser,
    add_viewer,
    count,
    made_folder,
    viewer_words,
    with_port,
)
from lods.commands.runs import exported_object, find_run
from lods.declared import method_names
from lods.files import whole_file
from lods.models.cards import EMBEDDED
from lods.models.vocabulary import OPTION
from lods.preflight import EDITING
from lods.settings import nearest

ABOUT = """\
Make 3D objects from prompts: trained, rendered from all sides, exported.

    lods make "a blue backpack"
    lods make --prompts list.txt --on nerf --workers 2
    lods make "a red armchair" --on mesh --from chair.glb

Each object has a folder below --out. The same command goes on where it was stopped or killed, and
tries again what has failed. A config's settings are changed by KEY=VALUE, as of lods train.
"""
REQUEST = "request.json"
SURFACES = ("mesh.glb", "model.glb", "gaussians.glb")  # that runs export
MAX_REQUEST = 1 << 20  # bytes of one that are read
MAX_PROMPTS = 10_000
MAX_PROMPT = 5000  # characters: one word of a command line holds no more than 128 KiB
DEFAULT_METHOD = "lods-embedding"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")  # a prompt that begins so is none


def parse_args(argv: list[str], command: str) -> argparse.Namespace:
    """The command line; ``prompts`` holds those of the file as well, each once."""
    parser = Parser(command, ABOUT)
    add = parser.add_argument
    add("words", nargs="*", metavar="PROMPT | KEY=VALUE")
    add("--prompts", type=Path, dest="file", metavar="FILE", help="a text file, a prompt a line")
    add("--on", choices=list(BASE), default="gaussians", help="the representation (gaussians)")
    add(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help=f"with --on {OF_FILE}: the mesh whose texture is made (glb, gltf, obj, ply, stl, off)"
        ", or a RUN whose surface is",
    )
    add("--method", default=DEFAULT_METHOD, help=f"lods-lora, sds, csd, ... ({DEFAULT_METHOD})")
    add(
        "--model",
        default="auto",
        help=f"a card such as {EMBEDDED} or sd15, a hub id or a diffusers folder (auto: Stable "
        f"Diffusion where there is a GPU and the model can be had, else {EMBEDDED})",
    )
    add("--out", type=Path, default=Path("outputs", "make"), help="folder (outputs/make)")
    add(
        "--quality",
        choices=QUALITIES,
        default="good",
        help="how much time an object gets, with a model of this package (good)",
    )
    add("--steps", type=count, help="training steps; dates in schedules stay as they are")
    add("--seed", type=int, default=0, help="random seed (0)")
    add("--gpu", help="GPU to use, such as 0")
    add("--workers", type=count, help="objects at a time (1; on Ray: what fits)")
    ray = "carry them out on Ray: one that is started here, or the cluster at ADDRESS"
    add("--ray", nargs="?", const="", metavar="ADDRESS", help=ray)
    add(OPTION, action="store_true", help="take a prompt without any word that the model knows")
    add_viewer(parser)
    add("--status", action="store_true", help="only show how the objects below --out stand")
    args = parser.parse_intermixed_args(with_port(argv))
    args.overrides = [word for word in args.words if _OVERRIDE.match(word)]
    prompts = [word for word in args.words if not _OVERRIDE.match(word)]
    if args.status:
        return args
    if args.file is not None:
        prompts += read_prompts(args.file)
    args.prompts = list(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts))
    if not args.prompts or "" in args.prompts:
        parser.error("a prompt is empty" if args.prompts else "give a prompt, or --prompts FILE")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is not a number from 0 to {2**32 - 1}")
    if args.ray and " " in args.ray:
        parser.error("--ray takes the word after it for an address: put --ray at the end")
    for prompt in args.prompts:
        if wrong := unfit(prompt):
            parser.error(f"a prompt {wrong}")
    return args


def unfit(text: str, in_config: bool = True) -> str:
    """What is wrong with a text for a model, which is written into a config or not; "" if nothing
    is."""
    if len(text) > MAX_PROMPT:
        return f"has {len(text)} characters: {MAX_PROMPT} are the most"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "is not a text in UTF-8"
    if in_config and "${" in text:
        return f"holds '${{', which configs take for a reference: {text[:60]!r}"
    if in_config and text == "???":
        return "is '???', which is how configs write a missing value"
    return ""


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file, but for empty ones and those that begin with ``#``. Raises
    ``ValueError`` for what is no such file."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_REQUEST + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {file} is not a text in UTF-8") from None
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if "\0" in text:
        raise ValueError(f"--prompts {file} is not a text: it holds a NUL")
    if len(data) > MAX_REQUEST or len(prompts) > MAX_PROMPTS:
        raise ValueError(f"--prompts {file} holds more than {MAX_PROMPTS} prompts, or a megabyte")
    return prompts


def find_method(name: str) -> str:
    """The full name of a method of this library. Raises ``ValueError`` that names the nearest."""
    known = method_names()  # read from the source: importing the methods imports torch
    for full in (name, f"lods-{name}"):
        if full in known:
            return full
    hint = nearest(name, [*known, *(k.removeprefix("lods-") for k in known)])
    raise ValueError(f"there is no method {name!r}{hint}: {', '.join(known)}")


def requests(args: argparse.Namespace) -> list[Request]:
    """What is to be made, checked as far as it can be before anything is loaded."""
    from lods.models import cards, choose

    source = source_of(args.on, args.source)
    method = find_method(args.method)
    if f"{method}-guidance" in EDITING:
        raise ValueError(f"{method} changes what is there: lods edit FILE --from TEXT --to TEXT")
    if args.model == "auto":
        model, why = choose()
        print(f"model: {model} ({why})", flush=True)
    else:
        model = args.model
        cards.refuse_early(model)
    if not args.allow_unknown_words:
        refuse_unknown_words(args.prompts, model)
    force = ["system.prompt_processor.allow_unknown_words=true"] * args.allow_unknown_words
    overrides = (*force, *args.overrides)
    common = {"model": model, "seed": args.seed, "steps": args.steps}
    common |= fields_of_model(model, has_gpu)
    if args.quality != "good":
        if not common["small"]:
            raise ValueError(
                f"--quality {args.quality} is for the models of this package and for CPUs; "
                "at full size --steps sets the training steps"
            )
        common["quality"] = args.quality
    common |= {"on": args.on, "method": method, "overrides": overrides, "gpu": args.gpu} | source
    wanted = [Request(prompt=prompt, **common) for prompt in args.prompts]
    wanted[0].overlays()
    return wanted


def source_of(on: str, file: Path | None) -> dict[str, str]:
    """The fields of a request that tell of the mesh to begin with. Raises ``ValueError``, one line,
    where there is none that can be had, or where none is of use."""
    if on != OF_FILE:
        if file is None:
            return {}
        more = (
            ": Gaussians begin with a file by system.geometry.init_type=file "
            "system.geometry.file.path=FILE"
            if on == "gaussians"
            else ""
        )
        raise ValueError(f"--from is of --on {OF_FILE}, and this is --on {on}{more}")
    if file is None:
        raise ValueError(
            f"--on {OF_FILE} makes the texture of a mesh that is there: name it by --from FILE "
            "(glb, gltf, obj, ply, stl or off), or --from RUN for the surface of a run"
        )
    from lods.gaussians.mesh_file import FORMATS  # which imports torch

    if not file.is_file() and file.suffix.lower().removeprefix(".") not in FORMATS:
        run = find_run(str(file))
        found = exported_object(run, SURFACES, ["system.exporter.fmt=glb"])
        if found is None:
            raise ValueError(f"--from: {run.folder} has no surface to be had as a glb")
        file = found
    path = mesh_in(file, f"--from {file}")
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"source": str(path), "source_hash": content[:16]}


def mesh_in(file: Path, named: str) -> Path:
    """The whole path of a file that holds a mesh, which is read to see that it does. Raises
    ``ValueError``, one line that begins with what it is ``named``, where it does not."""
    path = file.expanduser().resolve()
    if "${" in str(path):
        raise ValueError(f"{named}: the path holds '${{', which configs take for a reference")
    from lods.meshes.initialize import MeshFileInit

    try:
        MeshFileInit(str(path)).load()
    except OSError as error:
        raise ValueError(f"{named} cannot be read: {error.strerror}") from None
    except ValueError as error:
        why = str(error).removeprefix(f"'{path}': ")
        raise ValueError(f"{named}: {why}") from None
    return path


def refuse_unknown_words(
    prompts: list[str], model: str, force: str = OPTION, listed: bool = True
) -> None:
    """Raise ``ValueError``, one line, for prompts that name nothing that the model knows. ``force``
    is what the user sets to have them all the same; ``listed``: whether the line names what the
    model knows."""
    from lods.models.cards import local_folder
    from lods.models.vocabulary import Vocabulary

    folder = local_folder(model)
    vocabulary = Vocabulary.read(folder) if folder else None
    if vocabulary is None:
        return
    refused = {p: text for p in prompts if (text := vocabulary.refusal(p, force, listed))}
    if refused:
        first, *others = refused
        names = ", ".join(repr(prompt) for prompt in others[:5]) + ", ..." * (len(others) > 5)
        more = f" (nor do {names})" if others else ""
        raise ValueError(refused[first] + more)


def has_gpu() -> bool:
    """Whether torch can use one."""
    import torch

    return torch.cuda.is_available()


# --- folders --------------------------------------------------------------------------------------


def folder_of(request: Request, out: Path) -> Path:
    """One for each prompt, representation with the file it begins with, method and seed."""
    safe_name = host.module("threestudio.utils.config").safe_name
    seed = f"-seed{request.seed}" if request.seed else ""
    quality = f"-{request.quality}" if request.quality != "good" else ""
    on = f"{request.on}-{Path(request.source).stem}" if request.source else request.on
    name = f"{request.prompt.replace(' ', '_')}-{on}-{request.method}{quality}{seed}"
    return out / safe_name(name)


def make_job(request: Request, folder: Path, threads: int = 1) -> Any:
    """The job of :mod:`evaluation.batch` that does the request."""
    plain = json.dumps(request.plain())
    work = [sys.executable, "-P", "-m", "lods.commands.job", plain]
    job = host.module("evaluation.batch").Job
    return job(request.prompt, work, folder, threads=threads, key=request.key)


def note(request: Request, folder: Path) -> None:
    """Leave the request in its folder, for ``--status``."""
    with whole_file(folder / REQUEST) as partial:
        partial.write_text(json.dumps(request.plain()))


def noted(out: Path) -> list[Any]:
    """The jobs that were ever asked for below ``out``; what is no request is left out."""
    jobs = []
    files = (file for file in out.glob(f"*/{REQUEST}") if file.is_file())  # a pipe would block
    for file in sorted(files):
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            with file.open("rb") as opened:
                request = Request.of(json.loads(opened.read(MAX_REQUEST)))
            # nor may the table hold what steers a terminal
            if isinstance(request.prompt, str) and request.prompt.isprintable():
                jobs.append(make_job(request, file.parent))
    return jobs


def show_results(folder: Path) -> None:
    """Print where the picture, the video, the page and the 3D files are."""
    names = [name for name in (*RESULTS, PAGE) if (folder / name).is_file()]
    ends = (".glb", ".ply", ".obj", ".safetensors")
    names += sorted(path.name for path in folder.glob("*.*") if path.suffix in ends)
    for name in names:
        print(f"  {folder / name}")


# --- the command ----------------------------------------------------------------------------------


def main(argv: list[str], command: str) -> int:
    args = parse_args(argv, command)
    viewer = [] if args.status else viewer_words(args)
    if viewer and (len(args.prompts) > 1 or args.workers is not None or args.ray is not None):
        raise ValueError("--viewer shows one object: give one prompt, without --workers and --ray")
    batch = host.module("evaluation.batch")
    if args.status:
        jobs = noted(args.out)
        if not jobs:
            raise ValueError(f"nothing was made in {args.out}: --out names the folder")
        print(batch.table(jobs))
        return 0
    wanted = {folder_of(request, args.out): request for request in requests(args)}
    if len(wanted) < len(args.prompts):
        raise ValueError("two prompts differ in nothing that the name of a folder can hold")
    made_folder("--out", args.out)
    for folder, request in wanted.items():
        note(request, folder)
    if len(wanted) == 1 and args.workers is None and args.ray is None:
        ((folder, request),) = wanted.items()
        asked = shlex.join([*command.split(), *argv])
        status = _here(batch, request, folder, viewer, asked)
    else:
        status = _batch(batch, wanted, args)
    if status >= 128:
        print(f"the same command goes on: {shlex.join([*command.split(), *argv])}", flush=True)
    return status


def _here(batch: Any, request: Request, folder: Path, viewer: list[str], asked: str) -> int:
    """One object in this process, where its progress is seen."""
    job = make_job(request, folder)
    book = batch.Folders([job], retry=True)
    if book.due(job):
        started = book.start(job)
        if started is None:
            raise ValueError(f"another process is at work in {folder}: wait until it has ended")
        begun, status = time.time(), 1
        try:
            status = make(request, folder, viewer, asked)
        finally:
            error = "" if status == 0 else f"the run ended with status {status}"
            if status < 128:  # what was stopped is neither done nor failed
                seconds = time.time() - begun - paused_in(request, folder, begun)
                book.record(job, batch.Outcome(error=error, seconds=max(0.0, seconds)))
            started[1].release()
        if status:
            return status
    print(f"\n{request.prompt}:")
    show_results(folder)
    return 0


def _batch(batch: Any, wanted: dict[Path, Request], args: argparse.Namespace) -> int:
    """Many objects, each in a process of its own."""
    workers = args.workers or (None if args.ray is not None else 1)
    threads = threads_of(workers)
    jobs = [make_job(request, folder, threads) for folder, request in wanted.items()]
    gpus = 1.0 if has_gpu() else 0.0
    try:
        done = batch.run(jobs, workers=workers, ray=args.ray, gpus=gpus, retry=True, tell=_tell)
    except KeyboardInterrupt:
        print(batch.table(jobs))
        return 130
    print(f"\n{batch.table(jobs)}")
    for folder, request in wanted.items():
        if batch.Folders([]).state(make_job(request, folder))["state"] == "done":
            print(f"{request.prompt}:")
            show_results(folder)
        else:
            print(f"{request.prompt}: see {folder / 'log.txt'}")
    return 0 if done else 1


def _tell(line: str) -> None:
    print(line, flush=True)


def threads_of(workers: int | None) -> int:
    """Of one object: OMP_NUM_THREADS, else the cores shared out; on Ray, where they are not known,
    1."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // workers) if workers else 1
