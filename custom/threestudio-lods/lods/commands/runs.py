"""``lods resume``, ``test`` and ``export``: what is done with a run that is there."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lods import host
from lods.commands.parser import Parser, add_viewer, made_folder, viewer_words, with_port
from lods.files import told, whole_file
from lods.settings import nearest

ABOUT = {
    "resume": "Go on with the training of a run, from its last checkpoint.",
    "test": "Render the views and the video of a run again.",
    "export": "Write the object of a run: Gaussians as ply (the layout of 3DGS), compressed-ply, "
    "splat, spz, points or glb, a radiance field as glb, obj, obj-mtl or ply, a mesh as glb, obj. "
    "A glb has a texture (system.exporter.glb_colors=vertices: colours at its vertices). Or its "
    "views, without background: webp and webm, animations, or frames, PNG files.",
}
MODES = {"resume": "--train", "test": "--test", "export": "--export"}
# formats of the views, see lods.threestudio.systems.turntable
PICTURES = ("webp", "webm", "frames")
FRAMES = "frames"  # their folder
PARSED = Path("configs", "parsed.yaml")  # the settings that a run keeps
# how deep below a folder runs are looked for: outputs/<name>/<tag> of a run of its own, and
# outputs/make/<prompt>/run/<settings> of lods make
DEPTHS = range(1, 5)
LISTED = 5


@dataclass(frozen=True)
class Run:
    """A run that is on the disk: its folder, and which of its checkpoints is meant."""

    folder: Path
    checkpoint: Path  # the folder, if it is the last

    @property
    def words(self) -> list[str]:
        """The first words of a command line that does something with it."""
        return ["--config", str(self.folder / PARSED), f"resume={self.checkpoint}"]


def find_run(word: str, root: Path = Path("outputs")) -> Run:
    """The run that ``word`` means: its folder, or one that it alone is in, a checkpoint of it, or a
    piece of the name of its folder below ``root``. Raises ``ValueError`` for anything else."""
    if not word.strip():
        raise ValueError("the run is empty: give its folder, or a piece of its name")
    path = Path(word)
    if path.is_file():
        folder = path.resolve().parent.parent
        if path.suffix != ".ckpt" or not (folder / PARSED).is_file():
            raise ValueError(f"{word} is not a checkpoint in the folder ckpts of a run")
        return Run(Path(_shown(folder)), path)
    if path.is_dir():
        found = [path] if (path / PARSED).is_file() else runs_below(path)
        where = f"{word} holds"
    else:
        every = runs_below(root)
        pieces = word, "_".join(word.split())  # a prompt has underscores in the name of a folder
        found = [
            run for run in every if any(piece in str(run.relative_to(root)) for piece in pieces)
        ]
        if not found:
            names = {run.name: run for run in every}
            hint = nearest(word, names) or ": give its folder, or a piece of its name"
            raise ValueError(f"there is no run {word!r}, here or below {root}{hint}")
        where = f"{word!r} is a piece of the names of"
    if len(found) != 1:
        names = [str(run) for run in found[-LISTED:]]
        more = ", ..." if len(found) > LISTED else ""
        raise ValueError(
            f"{where} {len(found)} runs, name one: {', '.join(names)}{more}"
            if found
            else f"{word} is not the folder of a run: there is no {PARSED} in it"
        )
    return Run(found[0], found[0])


def runs_below(root: Path) -> list[Path]:
    """The folders of the runs below ``root``, the oldest first."""
    files = [file for n in DEPTHS for file in root.glob("/".join(["*"] * n + [str(PARSED)]))]
    folders = {file.parent.parent: file.stat().st_mtime for file in files}
    return sorted(folders, key=lambda folder: folders[folder])


def _shown(folder: Path) -> str:
    here = Path.cwd().resolve()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def main(argv: list[str], command: str) -> int:
    verb = command.rpartition(" ")[2]
    parser = Parser(command, ABOUT[verb])
    parser.add_argument(
        "run", metavar="RUN", help="its folder, a checkpoint of it, or a piece of its name"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, as of lods train"
    )
    parser.add_argument("--gpu", help="GPUs to use, such as 0 or 0,1")
    if verb == "export":
        parser.add_argument(
            "--format", required=True, help="glb, ply, splat, webp, ..., or several: glb,webp"
        )
        parser.add_argument("--out", type=Path, help="folder that also gets the files")
    if verb == "resume":
        add_viewer(parser)
        argv = with_port(argv)
    args = parser.parse_intermixed_args(argv)
    for word in args.overrides:
        if "=" not in word:
            parser.error(f"{word!r} is not written KEY=VALUE")
    run = find_run(args.run)
    words = [*run.words, MODES[verb], *args.overrides]
    words += [] if args.gpu is None else ["--gpu", args.gpu]
    words += viewer_words(args) if verb == "resume" else []
    if verb != "export":
        return start(words)
    if args.out is not None:
        made_folder("--out", args.out)
    formats = formats_of(args.format)
    before = exported(run.folder)
    status = start([*words, *formats])
    if status == 0 and args.out is not None:
        changed = [file for file, time in exported(run.folder).items() if before.get(file) != time]
        try:
            hand_over(changed, args.out)
        except OSError as error:
            raise ValueError(
                f"--out {args.out}: not all could be copied there ({told(error)}); the files are "
                f"in {changed[0].parent}"
            ) from None
    return status


def hand_over(files: list[Path], out: Path) -> None:
    """Copy exported files to the folder ``out``, frames to one in it, and tell so."""
    for file in files:
        inner = file.parent.name if file.parent.name == FRAMES else ""
        copy(file, out / inner / file.name)
        if not inner:
            print(f"  copied to: {out / file.name}")
    if any(file.parent.name == FRAMES for file in files):
        print(f"  copied to: {out / FRAMES}")


def formats_of(word: str) -> list[str]:
    """The settings of a ``--format``: one, or several with commas, in brackets or without."""
    several = word.strip()
    if several.startswith("[") and several.endswith("]"):
        several = several[1:-1]
    named = list(dict.fromkeys(each.strip() for each in several.split(",") if each.strip()))
    if not named:
        raise ValueError("--format is empty: name a format, such as glb")
    pictures = [each for each in named if each in PICTURES]
    objects = [each for each in named if each not in PICTURES]
    words = [f"system.turntable={_listed(pictures)}"] if pictures else []
    if not objects:
        return [*words, "system.export_object=false"]
    return [*words, f"system.exporter.fmt={_listed(objects)}"]


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"[{','.join(words)}]"


def start(words: list[str], asked: str = "") -> int:
    """Run these words of ``lods train``, which messages about going on then name; the page of the
    run shows the command that was ``asked`` for, too."""
    main = host.module("threestudio.run.cli").main
    return main(words, prog="lods train", home=host.home(), asked=asked)


def exported(folder: Path) -> dict[Path, int]:
    """The files that the exports of a run have written, and when."""
    kinds = ("save/it*-export/*", f"save/it*-export/{FRAMES}/*.png")
    files = (path for kind in kinds for path in folder.glob(kind) if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files}


def exported_object(run: Run, names: Sequence[str], settings: Sequence[str] = ()) -> Path | None:
    """The newest file that a run has exported by the first of these names that it has; without any
    it is exported first, with these settings. None where nothing comes of it. Raises ``ValueError``
    for a run that cannot be exported."""
    for attempt in range(2):
        found = [file for file in exported(run.folder) if file.name in names]
        if found:
            order = {name: number for number, name in enumerate(names)}
            return min(found, key=lambda file: (order[file.name], -file.stat().st_mtime))
        if not attempt and start([*run.words, "--export", *settings]):
            raise ValueError(f"the object of {run.folder} cannot be exported: see above")
    return None


def copy(file: Path, target: Path) -> None:
    with whole_file(target) as partial:
        shutil.copyfile(file, partial)
