"""What shortens the imports before a run.

Lightning takes two classes from torchmetrics, whose package imports SciPy's signal processing,
Matplotlib and transformers: a quarter of the time until a run begins. :func:`defer_torchmetrics`
puts the package into ``sys.modules`` without running it. Whatever is asked of it beyond those
classes runs it then, so that who uses torchmetrics sees no difference.
"""

import contextlib
import gc
import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE, PLOTS = "torchmetrics", "torchmetrics.utilities.plot"
# the modules of the package that have what Lightning takes from it
_WHERE = {
    "Metric": "torchmetrics.metric",
    "MetricCollection": "torchmetrics.collections",
    "__version__": "torchmetrics.__about__",
}
_lock = threading.RLock()


class _Deferred(ModuleType):
    """A module that is run when something is asked of it that :meth:`_light` does not have."""

    def _light(self, name: str) -> Any:
        """Raises ``KeyError`` for what it does not have."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return self._light(name)
        except KeyError:
            # of the rest with such names Python itself asks for many; for the path it asks before
            # it imports a module of the package, which expects that the package has run
            if name.startswith("__") and name != "__path__":
                raise AttributeError(f"module {self.__name__!r} has no {name!r}") from None
        return getattr(run(self), name)

    def __dir__(self) -> list[str]:
        return dir(run(self))


class _Package(_Deferred):
    def _light(self, name: str) -> Any:
        if name == "_logger":  # the same object when the package has run
            return logging.getLogger(PACKAGE)
        return getattr(import_module(_WHERE[name]), name)


class _Plots(_Deferred):
    """Every metric calls one function, and has two types of Matplotlib in annotations."""

    def _light(self, name: str) -> Any:
        return {"_AX_TYPE": object, "_PLOT_OUT_TYPE": object, _plot.__name__: _plot}[name]


def plot_single_or_multi_val(*args, **kwargs) -> Any:
    return run(sys.modules[PLOTS]).plot_single_or_multi_val(*args, **kwargs)


_plot = plot_single_or_multi_val


def run(module: ModuleType) -> ModuleType:
    """`module`, which is run first if nothing has done so."""
    with _lock:
        if isinstance(module, _Deferred):
            module.__class__ = ModuleType
            if module.__spec__.submodule_search_locations is not None:
                module.__path__ = module.__spec__.submodule_search_locations
            module.__spec__.loader.exec_module(module)
    return module


def defer_torchmetrics() -> None:
    """Let ``import pytorch_lightning`` leave out most of torchmetrics. Nothing happens where that
    is imported already, is not installed, or has its classes elsewhere."""
    spec = None if PACKAGE in sys.modules else importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return
    file = Path(spec.origin).parent / "utilities" / "plot.py"
    spec_of_plots = importlib.util.spec_from_file_location(PLOTS, file)
    if spec_of_plots is None or not file.is_file():
        return
    before = set(sys.modules)
    for each, kind in ((spec, _Package), (spec_of_plots, _Plots)):
        module = kind(each.name)
        module.__spec__, module.__file__, module.__loader__ = each, each.origin, each.loader
        module.__package__ = each.parent
        if each.submodule_search_locations is not None:
            module.__path__ = each.submodule_search_locations
        sys.modules[each.name] = module
    try:
        # first, or torchmetrics.metric is imported in a circle; and an import does not enter into
        # the package what it has found in sys.modules
        import_module("torchmetrics.utilities").plot = sys.modules[PLOTS]
        for name in _WHERE.values():
            import_module(name)
        del sys.modules[PACKAGE].__path__
    except (ImportError, AttributeError):
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == PACKAGE:
                del sys.modules[name]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within this, Python does not look for garbage in reference cycles. What imports make stays,
    and to look through it again and again takes a tenth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
