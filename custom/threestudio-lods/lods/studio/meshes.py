"""The meshes that users of the studio have sent, to be painted."""

import hashlib
import re
import secrets
import time
from pathlib import Path

from lods.commands.job import OF_FILE, Request

FOLDER = ".meshes"  # below that of the runs, which shows no name with a dot
MAX_BYTES = 64 << 20  # of a mesh
MAX_ALL = 1 << 30  # of all of them
AGE = 86400.0  # seconds, after which one that no run has is deleted
ENDINGS = (".glb", ".obj", ".ply", ".stl", ".off")  # of files that need no other beside them
NAME = re.compile(r"([0-9a-f]{16})-([A-Za-z0-9_-]{1,40})\.(glb|obj|ply|stl|off)")


class Refused(ValueError):
    """A mesh that is not taken; its text is one line."""


class Meshes:
    """Files with names of our own in a folder below ``root``. What a request names is looked up by
    the form of those names, and never made a path as it is."""

    def __init__(self, root: Path):
        self.folder = root / FOLDER

    def keep(self, title: str, content: bytes, used: set[str]) -> str:
        """Store a mesh that is called ``title``; returns its name here. Meshes that are not among
        the ``used`` ones are deleted when they have lain here for a day. Raises :class:`Refused`
        for what is none."""
        ending = Path(title).suffix.lower()
        if ending not in ENDINGS:
            raise Refused(f"a mesh is a file of {', '.join(e[1:] for e in ENDINGS)}")
        if not content or len(content) > MAX_BYTES:
            raise Refused(f"a mesh has at most {MAX_BYTES >> 20} MB, and at least a byte")
        self.folder.mkdir(exist_ok=True)
        self.sweep(used)
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(title).stem)[:40].strip("-") or "mesh"
        name = f"{hashlib.sha256(content).hexdigest()[:16]}-{stem}{ending}"
        if self.path(name) is not None:
            return name
        if sum(path.stat().st_size for path in self.folder.iterdir()) + len(content) > MAX_ALL:
            raise Refused(f"the meshes here have {MAX_ALL >> 30} GB: delete runs that have them")
        partial = self.folder / f".{secrets.token_hex(8)}{ending}"
        try:
            partial.write_bytes(content)
            self._look(partial)
            partial.rename(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
        return name

    def _look(self, path: Path) -> None:
        from lods.meshes.initialize import MeshFileInit

        try:
            MeshFileInit(str(path)).load()
        except (ValueError, MemoryError) as error:
            why = str(error).replace(f"'{path}'", "the file") or "it is too large"
            raise Refused(f"this is no mesh to be painted: {why}") from None

    def path(self, name: str) -> Path | None:
        """The file of this name; None where there is none, and for any other text."""
        if NAME.fullmatch(name) is None:
            return None
        path = self.folder / name
        return path if path.is_file() and not path.is_symlink() else None

    def sweep(self, used: set[str]) -> None:
        """Delete what no run has, and nobody has sent for a day."""
        for path in self.folder.iterdir():
            try:
                if path.name not in used and time.time() - path.lstat().st_mtime > AGE:
                    path.unlink()
            except OSError:
                continue

    # --- requests ---------------------------------------------------------------------------------

    def fields(self, name: str) -> dict[str, str]:
        """What a request for a mesh of this name has. Raises :class:`Refused` for one that is not
        here."""
        path = self.path(name)
        if path is None:
            raise Refused("choose the file of a mesh: there is none of this name here")
        return {"source": str(path), "source_hash": name[:16]}

    def name_of(self, request: Request) -> str:
        """The mesh here that a request has; "" for any other request."""
        path = Path(request.source) if request.source else None
        if path is None or path.parent != self.folder or request.on != OF_FILE:
            return ""
        return path.name if self.path(path.name) and request.source_hash == path.name[:16] else ""


def title(name: str) -> str:
    """What a mesh was called, of its name here; "" for another text."""
    found = NAME.fullmatch(name)
    return f"{found[2]}.{found[3]}" if found else ""
