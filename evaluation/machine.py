"""What a number was measured on: machine, memory, versions, commit."""

import fnmatch
import os
import re
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from threestudio.run import snapshot
from threestudio.run.git import NoGit, blob_hash, changed_files, head, staged, untracked_files

ROOT = Path(__file__).resolve().parent.parent
# tables and what is temporary: in the checkout, or with an installed copy below the current folder
_CHECKOUT = (ROOT / "evaluate.py").is_file()
TABLES = ROOT / "docs" / "evaluation" if _CHECKOUT else Path.cwd() / "outputs" / "comparison"
OBJECTS = TABLES.with_name("objects")  # of the comparison on real objects
BUILD = ROOT / "build" if _CHECKOUT else Path.cwd() / "outputs" / "build"
# what a result depends on; tables and grids may change while a grid runs
CODE = (
    *("benchmarks/*.py", "configs/*", "custom/*", "evaluate.py", "evaluation/*.py", "launch.py"),
    *("pocket/*.py", "pocket/*.safetensors", "pocket/truth/*", "pocket/ideal/*", "threestudio/*"),
)
# of the copy of this project that Ray takes to other machines; of what is hidden, nothing
NOT_NEEDED = (".?*", "build", "outputs", "docs")


def _is_code(name: str) -> bool:
    """Whether a result depends on this file, named relative to ROOT."""
    path = PurePosixPath(name)
    settings = path.suffix == ".yaml" and str(path.parent) == "evaluation"  # not the grids below it
    return settings or any(fnmatch.fnmatchcase(name, pattern) for pattern in CODE)


def peak_mib() -> int:
    """The most memory that this process has held so far; it only rises."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def code() -> tuple[tuple[str, str, str], ...]:
    """What the code is, whatever else was committed: of each of its files the name, the hash of
    what git has, and of what is there. Empty without git."""
    try:
        known = staged(ROOT)
        names = [name for name in (*known, *untracked_files(ROOT)) if _is_code(name)]
    except NoGit:
        return ()
    like = next(iter(known.values()), "")
    return tuple((name, known.get(name, ""), blob_hash(ROOT / name, like)) for name in names)


def commit() -> str:
    """The commit of the code that runs, with ``-dirty`` if a file of it was changed since; empty
    without git."""
    try:
        name, changed = head(ROOT), changed_files(ROOT)
    except NoGit:
        return ""
    dirty = any(there != known for _, known, there in code()) or any(map(_is_code, changed))
    return name + ("-dirty" if dirty else "")


def not_for_others() -> list[str]:
    """What is not copied to other machines, as patterns of a .gitignore: what a run does not need,
    and what may be secret. Of files that git does not track, that is all but code."""
    try:
        new = untracked_files(ROOT)
    except NoGit:
        new = []
    links = []
    for folder, inner, names in os.walk(ROOT):
        paths = [Path(folder, name).relative_to(ROOT) for name in [*inner, *names]]
        links += [str(path) for path in paths if (ROOT / path).is_symlink()]
        inner[:] = [name for name in inner if not name.startswith(".") and name not in NOT_NEEDED]
    code = {*snapshot.CODE, ".yaml", ".yml"}
    secret = [name for name in new if Path(name).suffix not in code] + links
    return [*NOT_NEEDED, *("/" + re.sub(r"([\\\[*?!# ])", r"\\\1", name) for name in secret)]


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package; empty for one that is not there."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
