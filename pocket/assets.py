"""The textured models that the pocket world is rendered from: Debian's sweethome3d-furniture.

They stay out of the repository. ``find`` gives the folder of the ``.sh3f`` files, which are zips of
OBJ models with a catalogue; ``unpack`` takes one model out.
"""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = "sweethome3d-furniture"
INSTALLED = Path("/usr/share/sweethome3d/furniture")  # where the package puts its files
CATALOGUE = "PluginFurnitureCatalog.properties"
LARGEST = 200 << 20  # bytes of one model, unpacked: more than any of the package has


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
        if not (debs := sorted(fetched.glob(f"{PACKAGE}_*.deb"))):
            fetched.mkdir(parents=True, exist_ok=True)
            command = ["apt-get", "download", PACKAGE]
            done = subprocess.run(command, cwd=fetched, capture_output=True, text=True)
            debs = sorted(fetched.glob(f"{PACKAGE}_*.deb"))
            if done.returncode or not debs:
                shutil.rmtree(fetched, ignore_errors=True)
                said = (done.stderr.strip().splitlines() or ["no file came"])[-1]
                raise ValueError(f"apt-get download {PACKAGE} failed ({said}): give --assets DIR")
        return _unpack_deb(debs[-1], work)
    raise ValueError(
        f"The models come from Debian's package {PACKAGE}, and there is no apt-get here: "
        "unpack the package and give the folder of its .sh3f files as --assets DIR"
    )


def _unpack_deb(deb: Path, work: Path) -> Path:
    target = work / "assets" / "unpacked"
    inner = target / INSTALLED.relative_to("/")
    if not any(inner.glob("*.sh3f")):
        target.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], capture_output=True)
        if done.returncode or not any(inner.glob("*.sh3f")):
            shutil.rmtree(target, ignore_errors=True)
            raise ValueError(f"{deb} cannot be unpacked as Debian's package {PACKAGE}")
    return inner


def catalogue(archive: Path) -> dict[int, dict[str, str]]:
    """The entries of a ``.sh3f`` file: number -> key -> value (name, model, creator,
    modelRotation...). Raises ``ValueError`` for a file that is none."""
    try:
        with zipfile.ZipFile(archive) as opened:
            text = opened.read(CATALOGUE).decode("latin-1")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} is not a furniture library of Sweet Home 3D") from error
    entries: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        if found := re.match(r"(\w+)#(\d+)=(.*)", line.strip()):
            entries.setdefault(int(found[2]), {})[found[1]] = found[3]
    return entries


def unpack(archive: Path, entry: dict[str, str], target: Path) -> Path:
    """Write the model of a catalogue's entry, with its materials and textures, to ``target`` and
    return the path of its OBJ file.

    Only files of the model's own folder in the zip are written, flat or in subfolders of it.
    Raises ``ValueError`` for a model that is not there or larger than any of the package.
    """
    model = PurePosixPath(entry.get("model", "").lstrip("/"))
    with zipfile.ZipFile(archive) as opened:
        if str(model) not in opened.namelist():
            raise ValueError(f"{archive} has no model of {entry.get('name')!r}")
        inside = [
            (info, path)
            for info in opened.infolist()
            if not info.is_dir()
            and (path := PurePosixPath(info.filename)).is_relative_to(model.parent)
            and ".." not in path.parts
        ]
        if sum(info.file_size for info, _ in inside) > LARGEST:
            raise ValueError(f"{archive}: the model of {entry.get('name')!r} is too large")
        for info, path in inside:
            file = target.joinpath(*path.relative_to(model.parent).parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(opened.read(info))
    return target / model.name
