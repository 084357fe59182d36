"""Loading of extensions: folders (or single files) in ``custom/`` that register their classes."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

loaded: dict = {}  # extension name -> where :func:`load_custom_modules` found it
left_out: list = []  # the names of those in the current folder, which nobody asked for
failed: dict = {}  # extension name -> the exception it failed to load with
_to_report: dict = {}  # those of them that the user was not told of yet

_PARTIAL = "__entered_without_init__"


def last_line(error: BaseException, length: int = 200) -> str:
    """``ValueError: the last line of the message``, which of a long one says what went wrong, in at
    most `length` characters."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {' '.join(lines[-1].split())}"
    return text if len(text) <= length else text[:length] + "..."


def what_failed() -> str:
    """The extensions that failed to load, or were not asked for, in brackets, for the end of a
    message about a name that they may have brought; "" if there are none."""
    errors = list(failed.items())
    text = "".join(
        f" (extension {name!r} failed to load: {last_line(error, 80)})"
        for name, error in errors[:2]
    )
    text += f" (so did {len(errors) - 2} others)" * (len(errors) > 2)
    if left_out:
        text += f" (not loaded: {', '.join(left_out)[:80]}; --extensions custom loads them)"
    return text


def report_failures() -> None:
    """Warn, one line each, of the extensions that failed to load since the last report."""
    import threestudio

    for name, error in _to_report.items():
        threestudio.warn(f"extension {name!r} failed to load: {last_line(error)}")
    _to_report.clear()


def _forget(name: str) -> None:
    """Undo what a failed import left behind, so that a later load starts afresh."""
    import threestudio

    for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        del sys.modules[module]
    for key, cls in list(threestudio.__modules__.items()):
        if cls.__module__ == name or cls.__module__.startswith(name + "."):
            del threestudio.__modules__[key]


def load_extension(path, submodule: str | None = None) -> ModuleType:
    """Import the folder (or ``.py`` file) at `path` as a package named after it.

    The name may hold dashes (``threestudio-lods``); the package imports its own modules
    relatively. Loading twice returns the same module. With ``submodule="playground"`` the package
    is entered in ``sys.modules`` without running its ``__init__``, and only
    ``threestudio-lods.playground`` is imported and returned.

    Raises ``ImportError`` if there is nothing to import or if another extension of that name is
    loaded, and whatever the extension raises itself; names it had registered are taken back.
    """
    path = Path(path).resolve()
    name = path.stem if path.suffix == ".py" else path.name
    file = path if path.suffix == ".py" else path / "__init__.py"
    if not file.is_file():
        raise ImportError(f"no extension at {path}: {file.name} is missing")
    module = sys.modules.get(name)
    if module is not None and Path(getattr(module, "__file__", None) or "/") != file:
        raise ImportError(f"{name!r} is already loaded from {getattr(module, '__file__', '?')}")
    new = module is None
    try:
        if new:
            locations = [str(path)] if path.is_dir() else None
            spec = importlib.util.spec_from_file_location(
                name, file, submodule_search_locations=locations
            )
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # first, so that its relative imports find it
            setattr(module, _PARTIAL, True)
        if submodule is not None:
            return importlib.import_module(f"{name}.{submodule}")
        if getattr(module, _PARTIAL, False):
            new = True
            delattr(module, _PARTIAL)
            module.__spec__.loader.exec_module(module)
        return module
    except BaseException:
        if new:
            _forget(name)
        raise


def find_extensions(root="custom") -> Iterator[tuple[str, Path]]:
    """``(name, path)`` of every extension in the folder `root`, in sorted order.

    ``__pycache__``, hidden entries, names ending in ``_disabled`` and files that are not ``.py``
    are skipped; a missing folder means no extensions.
    """
    root = Path(root)
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        name = path.stem if path.suffix == ".py" else path.name
        wanted = path.is_dir() or path.suffix == ".py"
        if wanted and not name.startswith((".", "__")) and not name.endswith("_disabled"):
            yield name, path


def load_custom_modules(root="custom") -> dict:
    """Load every extension of :func:`find_extensions`.

    An extension may import another (``importlib.import_module("threestudio-lods.guidance.csd")``):
    one that lacks another of the folder is loaded again after it. A failure does not stop the
    others: it is kept in :data:`failed`, for :func:`threestudio.find` to mention, and for
    :func:`report_failures`.

    Returns ``{name: None, or the exception it failed with}``.
    """
    result: dict = {}
    every: dict = {}
    for name, path in find_extensions(root):
        first = every.setdefault(name, path)
        if first is not path:
            error = ImportError(
                f"{path.name} is not loaded: {first.name} beside it has the same name"
            )
            _to_report[f"{name} ({path.name})"] = error
    waiting = every
    while waiting:
        later = {}
        for name, path in waiting.items():
            try:
                load_extension(path)
                loaded[name] = path
                for errors in (failed, _to_report):
                    errors.pop(name, None)
                result[name] = None
            except Exception as error:
                failed[name] = _to_report[name] = result[name] = error
                if _lacks(error) in every:
                    later[name] = path
        # once more, as long as that brings something
        waiting = later if len(later) < len(waiting) else {}
    return result


def _lacks(error: Exception) -> str | None:
    """The package that an import did not find."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.split(".")[0]
    return None
