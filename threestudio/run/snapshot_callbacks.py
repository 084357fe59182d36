"""Callbacks that keep the config and the code of a run."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_only

import threestudio
from threestudio.run.git import NoGit, tracked_files
from threestudio.run.snapshot import (
    MAX_BYTES,
    PlainFiles,
    copy_files,
    extension_files,
    is_linked,
    make_plain_folder,
)
from threestudio.utils import extensions
from threestudio.utils.config import dump_config
from threestudio.utils.files import disk_error, whole_file


class VersionedCallback(Callback):
    """Writes into `save_root`, or with `use_version` into a new folder ``version_N`` in it, which
    is made when its number is first asked for."""

    def __init__(self, save_root, version: int | None = None, use_version: bool = True) -> None:
        self.save_root = str(save_root)
        self.use_version = use_version
        self._version = version

    @property
    def version(self) -> int:
        """The number of the folder: the one given, else the first that is free."""
        while self._version is None:
            os.makedirs(self.save_root, exist_ok=True)
            names = os.listdir(self.save_root)
            numbers = [int(n[8:]) for n in names if n.startswith("version_") and n[8:].isdigit()]
            number = max(numbers, default=-1) + 1
            with contextlib.suppress(FileExistsError):  # another run was quicker
                os.mkdir(os.path.join(self.save_root, f"version_{number}"))
                self._version = number
        return self._version

    @property
    def savedir(self) -> str:
        """The folder to write into."""
        if not self.use_version:
            return self.save_root
        return os.path.join(self.save_root, f"version_{self.version}")


class ConfigSnapshotCallback(VersionedCallback):
    """Saves ``parsed.yaml`` (the config with everything merged and resolved, enough to relaunch)
    and ``raw.yaml`` (a copy of `config_path`; of several, ``raw.yaml``, ``raw_1.yaml``, ...)."""

    def __init__(
        self,
        config_path: str | list[str],
        cfg: DictConfig,
        save_root,
        version: int | None = None,
        use_version: bool = True,
    ) -> None:
        super().__init__(save_root, version, use_version)
        self.config_paths = [config_path] if isinstance(config_path, str) else list(config_path)
        # read now: a file may change before the fit starts, and raw.yaml may be its own source
        self.raw = [Path(path).read_bytes() for path in self.config_paths]
        self.cfg = cfg

    @rank_zero_only
    def save_config_snapshot(self) -> None:
        """Write the files. Raises ``OSError`` where their folder is a link."""
        make_plain_folder(self.savedir, self.savedir)
        with whole_file(os.path.join(self.savedir, "parsed.yaml")) as tmp:
            dump_config(tmp, self.cfg)
        for i, raw in enumerate(self.raw):
            with whole_file(Path(self.savedir, f"raw_{i}.yaml" if i else "raw.yaml")) as tmp:
                tmp.write_bytes(raw)

    def on_fit_start(self, trainer, pl_module) -> None:
        self.save_config_snapshot()


class CodeSnapshotCallback(VersionedCallback):
    """Copies the code: of the current folder the files that git tracks, and the extensions that are
    loaded. Left out are ``load``, ``outputs`` and the folders in `exclude` (of runs: their copies
    of the code would be copied), links, and files over 1 MB (weights, pictures). What prevents a
    snapshot is one warning. See :mod:`threestudio.run.snapshot`.
    """

    def __init__(
        self,
        save_root,
        version: int | None = None,
        use_version: bool = True,
        exclude: Iterable[str] = (),
    ) -> None:
        super().__init__(save_root, version, use_version)
        self.exclude = list(exclude)

    def get_file_list(self) -> list[str]:
        """Paths of the tracked files, relative to the current folder. Raises ``NoGit``."""
        outside = {Path(folder).resolve() for folder in (self.save_root, *self.exclude)}
        here = Path.cwd().resolve()
        outside -= {here, *here.parents}  # results in the repository's own folder, or around it
        inside = [folder.relative_to(here) for folder in outside if folder.is_relative_to(here)]
        left_out = tuple(f"{folder.as_posix()}/" for folder in inside)
        plain = PlainFiles(here)
        return [
            name
            for name in tracked_files(here)
            if name.split("/")[0] not in ("load", "outputs")
            and not name.startswith(left_out)
            and name in plain
            and os.path.getsize(name) <= MAX_BYTES
        ]

    @rank_zero_only
    def save_code_snapshot(self) -> None:
        """Copy the files. Raises ``OSError``, and ``NoGit`` when only the extensions could be."""
        here = Path.cwd()
        for name, path in extensions.loaded.items():
            inside = here in path.absolute().parents
            folder = path.absolute().parent.relative_to(here) if inside else Path("custom")
            source, part = (path.parent, "") if path.is_file() else (path, name)
            copy_files(source, extension_files(path), self.savedir, Path(folder, part))
        copy_files(here, self.get_file_list(), self.savedir)

    def on_fit_start(self, trainer, pl_module) -> None:
        try:
            self.save_code_snapshot()
            linked = [name for name, path in extensions.loaded.items() if is_linked(path)]
            if linked:
                names = ", ".join(linked)
                threestudio.info(f"the snapshot of the code is without what is a link: {names}")
        except NoGit as error:
            only = " but of the extensions" if extensions.loaded else ""
            if "not a git repository" in str(error):  # as of a program that is installed
                here = f"{Path.cwd()} is no git repository"
                threestudio.info(f"no snapshot of the code{only}: {here}")
            else:
                threestudio.warn(f"no snapshot of the code{only}: {error}")
        except OSError as error:
            if disk_error(error):
                raise
            threestudio.warn(f"no snapshot of the code: {error.filename}: {error.strerror}")
