"""The textured models that the pocket world is rendered from: Debian's sweethome3d-furniture.

They stay out of the repository. ``find`` gives the folder of the ``.sh3f`` files, which are zips of
OBJ models with a catalogue; ``unpack`` takes one model out.
"""

import re
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

PACKAGE = "sweethome3d-furniture"
INSTALLED = Path("/usr/share/sweethome3d/furniture")  # where the package puts its files
CATALOGUE = "PluginFurnitureCatalog.properties"
VERSION = "1.8"  # of the libraries: in another one, a number may be another model's
LARGEST = 200 << 20  # bytes of one model, unpacked: more than any of the package has
LARGEST_CATALOGUE = 16 << 20

# what zipfile raises of a file that is damaged, encrypted or no zip
BROKEN = (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


def find(folder: Path | None, work: Path) -> Path:
    """The folder that holds the ``.sh3f`` files.

    ``folder`` may be that folder, one that holds the package's ``.deb``, or None: then the
    installed package is taken, or it is fetched with apt-get to ``work``.

    Raises ``ValueError`` with the way out where there is none.
    """
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"--assets {folder} is not a folder")
        if any(folder.glob("*.sh3f")):
            return folder
        if debs := sorted(folder.glob(f"{PACKAGE}_*.deb")):
            return _unpack_deb(debs[-1], work)
        raise ValueError(f"--assets {folder} has neither .sh3f files nor {PACKAGE}_*.deb")
    if any(INSTALLED.glob("*.sh3f")):
        return INSTALLED
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        fetched = work / "assets"
        if any(_inner(work).glob("*.sh3f")):
            return _inner(work)
        if not (debs := sorted(fetched.glob(f"{PACKAGE}_*.deb"))):
            fetched.mkdir(parents=True, exist_ok=True)
            command = ["apt-get", "download", PACKAGE]
            done = subprocess.run(command, cwd=fetched, capture_output=True, text=True)
            debs = sorted(fetched.glob(f"{PACKAGE}_*.deb"))
            if done.returncode or not debs:
                for rest in debs:
                    rest.unlink()
                said = (done.stderr.strip().splitlines() or ["no file came"])[-1]
                raise ValueError(f"apt-get download {PACKAGE} failed ({said}): give --assets DIR")
        return _unpack_deb(debs[-1], work)
    raise ValueError(
        f"The models come from Debian's package {PACKAGE}, and there is no apt-get here: "
        "unpack the package and give the folder of its .sh3f files as --assets DIR"
    )


def _inner(work: Path) -> Path:
    """Where the package's files are after it was unpacked."""
    return work / "assets" / "unpacked" / INSTALLED.relative_to("/")


def _unpack_deb(deb: Path, work: Path) -> Path:
    if not shutil.which("dpkg-deb"):
        raise ValueError(f"{deb} needs dpkg-deb to be unpacked: give the folder of .sh3f files")
    inner, target = _inner(work), work / "assets" / "unpacked"
    if not any(inner.glob("*.sh3f")):
        # Under another name until it is whole: what an interruption leaves is not taken for it.
        partial = work / "assets" / "unpacking"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        done = subprocess.run(["dpkg-deb", "-x", str(deb), str(partial)], capture_output=True)
        if done.returncode or not any((partial / INSTALLED.relative_to("/")).glob("*.sh3f")):
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"{deb} is not Debian's package {PACKAGE}, or damaged: remove it")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return inner


def catalogue(archive: Path) -> dict[int, dict[str, str]]:
    """The entries of a ``.sh3f`` file: number -> key -> value (name, model, creator,
    modelRotation...). Raises ``ValueError`` for a file that is none, or of another version."""
    try:
        with zipfile.ZipFile(archive) as opened:
            info = opened.getinfo(CATALOGUE)
            if info.file_size > LARGEST_CATALOGUE:
                raise KeyError(CATALOGUE)
            text = opened.read(info).decode("latin-1")
    except BROKEN as error:
        raise ValueError(f"{archive} is not a furniture library of Sweet Home 3D") from error
    version = re.search(r"^version=(.*)$", text, re.MULTILINE)
    if version is None or version[1].strip() != VERSION:
        said = version[1].strip()[:40] if version else "none"
        raise ValueError(f"{archive} is of version {said}: the world is made of version {VERSION}")
    entries: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        if found := re.match(r"(\w+)#(\d+)=(.*)", line.strip()):
            entries.setdefault(int(found[2]), {})[found[1]] = found[3]
    return entries


def unpack(archive: Path, entry: dict[str, str], target: Path) -> Path:
    """Write the model of a catalogue's entry, with its materials and textures, to ``target`` and
    return the path of its OBJ file.

    Only files of the model's own folder in the zip are written, flat or in subfolders of it.
    Raises ``ValueError`` for a model that is not there, larger than any of the package, damaged, or
    with a file whose name leads out of its folder.
    """
    model = PurePosixPath(entry.get("model", "").lstrip("/"))
    named = f"{archive}: the model of {entry.get('name')!r}"
    try:
        with zipfile.ZipFile(archive) as opened:
            if str(model) not in opened.namelist():
                raise ValueError(f"{named} is not there")
            inside = [
                (info, path)
                for info in opened.infolist()
                if not info.is_dir()
                and (path := PurePosixPath(info.filename)).is_relative_to(model.parent)
            ]
            if any(".." in path.parts for _, path in inside):
                raise ValueError(f"{named} has a file whose name leads out of its folder")
            if sum(info.file_size for info, _ in inside) > LARGEST:
                raise ValueError(f"{named} is too large")
            contents = [(path, opened.read(info)) for info, path in inside]
    except BROKEN as error:
        raise ValueError(f"{named} is damaged ({error})") from error
    for path, content in contents:
        file = target.joinpath(*path.relative_to(model.parent).parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return target / model.name


def find_entry(archive: Path, number: int) -> dict[str, str]:
    """One entry of a ``.sh3f`` file. Raises ``ValueError`` where there is none of this number."""
    entries = catalogue(archive)
    if number not in entries:
        raise ValueError(f"{archive} has no model number {number}")
    return entries[number]


def rotation(entry: dict[str, str]) -> np.ndarray:
    """The 3 x 3 matrix that an entry wants its model to be turned by."""
    text = entry.get("modelRotation", "1 0 0 0 1 0 0 0 1")
    try:
        return np.array([float(number) for number in text.split()]).reshape(3, 3)
    except ValueError:
        raise ValueError(f"The model {entry.get('name')!r} has a rotation of {text!r}") from None
