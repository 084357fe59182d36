"""What visitors save: pictures of what they see, and the object."""

import os
from pathlib import Path
from typing import Any

from PIL import Image

from threestudio.run.folder import RESULTS, Lock
from threestudio.run.viewer.frames import Painter, undisturbed
from threestudio.run.viewer.visitors import Visitors
from threestudio.utils.files import whole_file

TALLEST, MOST_PIXELS = 2160, 1e7  # of a snapshot
MAX_DOWNLOAD = 64 << 20  # bytes
DOWNLOADS = (".ply", ".glb", ".obj")


class Saver:
    """Writes into the run's folder, as the run itself does, and offers what it has written to the
    visitor who has asked for it. Between two steps, in the training's thread."""

    def __init__(
        self, system: Any, trainer: Any, folder: Path, painter: Painter, visitors: Visitors
    ) -> None:
        self.system, self.trainer, self.folder = system, trainer, folder
        self.painter, self.visitors = painter, visitors
        self._snapshots = 0

    def snapshot(self, client_id: int | None) -> None:
        """A PNG of what this visitor sees, in ``save/``; nothing for one who has gone."""
        visitor = self.visitors.get(client_id)
        if visitor is None or visitor.view is None:
            return
        view = visitor.view
        width, height = view.size(MOST_PIXELS, TALLEST)
        with undisturbed(self.system, self.trainer):
            image = self.painter(view, width, height)
        folder = Path(self.system.get_save_dir())
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._snapshots += 1
            path = folder / f"it{self._step}-view{self._snapshots}.png"
            if not os.path.lexists(path):
                break
        with whole_file(path, keep_suffix=True) as tmp:
            Image.fromarray(image).save(tmp)
        visitor.client.send_file_download(path.name, path.read_bytes())
        self.visitors.tell(client_id, "Snapshot", str(path))

    def export(self, client_id: int | None) -> None:
        """The object's files, in ``save/``, unless another process writes results of this run."""
        lock = Lock(self.folder / RESULTS)
        if not lock.acquire():
            why = f"{lock.holder()} is writing results of this run"
            self.visitors.tell(client_id, "No export", why)
            return
        try:
            files = self._write()
        finally:
            lock.release()
        visitor = self.visitors.get(client_id)
        for path in files:
            small = path.stat().st_size <= MAX_DOWNLOAD
            if visitor is not None and path.suffix in DOWNLOADS and small:
                visitor.client.send_file_download(path.name, path.read_bytes())
        where = files[0].parent if files else Path(self.system.get_save_dir())
        names = ", ".join(path.name for path in files) or "nothing"
        self.visitors.tell(client_id, "Exported", f"{names} in {where}")

    def _write(self) -> list[Path]:
        system = self.system
        missing = object()
        before = getattr(system, "exporter", missing)
        with undisturbed(system, self.trainer):
            try:
                system.on_predict_start()
                system.exporter.cfg.save_video = False
                system.on_predict_epoch_end()
            finally:
                if before is missing:
                    system.__dict__.pop("exporter", None)
                else:
                    system.exporter = before
        folder = Path(system.get_save_dir(), f"it{self._step}-export")
        return sorted(path for path in folder.glob("*") if path.is_file())

    @property
    def _step(self) -> int:
        return int(self.system.true_global_step)
