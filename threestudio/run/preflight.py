"""What can be refused before torch and the other large packages are imported.

An extension takes part with a file ``preflight.py`` in its folder, which is executed alone (not
its package) and defines ``preflight(cfg, mode)``. `cfg` is the resolved config, a copy; `mode` is
"train", "validate", "test", "export" or "view". A ``ValueError`` of that function, one line, ends
the run.
It must be quick and import little, and in doubt let the run go on, which finds out by itself.

An option that no class has is refused here too, as far as the source shows it (see
:mod:`threestudio.run.declared`). Of classes that its source does not show, an extension can tell
the options itself: ``preflight.py`` may define ``settings_of(name)``, which gives the names of the
settings of what it registers as `name`, or None, and ``SOURCES``, folders outside of its own that
hold further classes of it.
"""

import contextlib
import copy
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from threestudio.run.declared import Declared, Sources, sections
from threestudio.run.overlays import REQUIRED, refuse_order, refuse_overlay
from threestudio.utils.config import load_config, unknown_field
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import find_extensions, last_line

HOOK = "preflight.py"


def read_config(
    files: Iterable[str], overrides: Iterable[str], mode: str, n_gpus: int = 1
) -> DictConfig:
    """The config of a command line, checked as far as it can be before anything is built.

    Raises :class:`UserError`, as :func:`load_config`, and if there is nothing to run.
    """
    files = list(files)
    cfg = load_config(*files, cli_args=overrides, n_gpus=n_gpus)
    for key in REQUIRED:
        if not cfg[key]:
            refuse_overlay(files, key)
    refuse_order(files)
    if mode != "train" and cfg.resume is None:
        raise UserError(f"--{mode} needs a trained model: add resume=path/to/last.ckpt")
    return cfg


def preflight(
    files: Sequence[str],
    overrides: Iterable[str],
    mode: str,
    roots: Iterable[Path],
    verbose: bool = False,
) -> None:
    """Raise :class:`UserError` if the config cannot be run, or if an extension in one of the
    folders `roots` refuses it. Anything else that fails in an extension's file costs a line, and
    the run goes on (`verbose` shows where)."""
    if any(Path(file).exists() and not Path(file).is_file() for file in files):
        return  # a pipe can be read once: by the run
    try:
        cfg = read_config(files, overrides, mode)
    except UserError as error:
        if isinstance(error.__context__, OmegaConfBaseException):
            return  # the run says it, unless an extension brings a resolver that mends it
        raise
    roots = list(roots)
    ask_extensions(cfg, mode, roots, verbose)
    refuse_unknown_settings(cfg, roots)


def refuse_unknown_settings(cfg: DictConfig, roots: Iterable[Path]) -> None:
    """Raise :class:`UserError` for a key of `data`, `system` or a part of it that its class, of the
    host or of an extension in one of the folders `roots`, certainly does not have."""
    folders, asked = [], []
    for root in roots:
        folders += [path for _, path in find_extensions(root)]
    for file in _hooks(roots):
        with contextlib.suppress(Exception), _hook(file) as module:  # of which others tell
            folders += getattr(module, "SOURCES", ())
            asked += [module.settings_of] if hasattr(module, "settings_of") else []
    sources = Sources(folders)

    def declared(name: str) -> Declared | None:
        for ask in asked:
            with contextlib.suppress(Exception):
                if (names := ask(name)) is not None:
                    return Declared("Config", frozenset(names), {})
        return sources.declared(name)

    for where, section, known in sections(cfg, declared):
        for key in section:
            if key not in known.names:
                raise unknown_field(known.where, key, f"{where}.{key}", known.names)


def ask_extensions(
    cfg: DictConfig, mode: str, roots: Iterable[Path], verbose: bool = False
) -> None:
    """Raise the :class:`UserError` of an extension that refuses this config. ``cfg.n_gpus`` is the
    number of GPUs where that is known, 1 before torch has counted them: with several an extension
    is asked a second time, before any model is loaded."""
    for file in _hooks(roots):
        try:
            _run(file, copy.deepcopy(cfg), mode)
        except UserError:
            raise
        except Exception as error:
            if verbose:
                traceback.print_exc()
            print(f"{file} was left out: {last_line(error)}", file=sys.stderr)


def _hooks(roots: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for root in roots:
        for name, path in find_extensions(root):
            if name not in seen and (path / HOOK).is_file():
                yield path / HOOK
            seen.add(name)  # a second one of that name is not loaded either


def _run(file: Path, cfg: DictConfig, mode: str) -> None:
    with _hook(file) as module:
        _refusal_as_user_error(module.preflight, cfg, mode)


@contextlib.contextmanager
def _hook(file: Path) -> Iterator[Any]:
    name = f"_preflight_of_{file.parent.name}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.modules.pop(name, None)


def _refusal_as_user_error(check: Callable, cfg: DictConfig, mode: str) -> None:
    try:
        check(cfg, mode)
    except OmegaConfBaseException:  # some are ValueErrors: a mistake in reading the config
        raise
    except ValueError as error:
        text = " ".join(str(error).split())
        raise UserError(text or type(error).__name__) from error
