"""The rasterisers, by name.

``cpu`` (numba, any machine) and ``reference`` (torch, dense: slow, any device and float dtype; its
older name ``torch`` stays valid), and on CUDA ``gsplat``, ``gswarp`` and
``diff-gaussian-rasterization``. ``cpu``, ``reference`` and ``gsplat`` give the same images,
gradients and ``info``; the other two differ as :mod:`.inria` says.

One more is a module or an object as :mod:`.base` describes it. Either the program registers it,

    lods.gaussians.register_backend("mine", my_module)

or an installed package does, by an entry point, which is loaded when its name is first asked for:

    [project.entry-points."lods.rasterizers"]
    mine = "my_package.my_module"
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

import torch
from lods import log
from lods.settings import nearest

ENTRY_POINTS = "lods.rasterizers"
# In the order that ``auto`` tries those of CUDA: gsplat draws all cameras and channels in one go,
# gswarp takes a call a camera, diff-gaussian-rasterization one a camera and three channels.
BUILT_IN = {
    "cpu": "cpu",
    "reference": "reference",
    "torch": "reference",
    "gsplat": "gsplat",
    "gswarp": "gswarp",
    "diff-gaussian-rasterization": "diff_gaussian",
}
CUDA = ("gsplat", "gswarp", "diff-gaussian-rasterization")
_registered: dict[str, Any] = {}
_compiles: ContextVar[bool] = ContextVar("compiles", default=True)


def register_backend(name: str, backend: Any) -> None:
    """Make ``backend``, a module or an object (see :class:`lods.gaussians.backends.base.Backend`),
    a rasteriser of this name, here and in YAML (``system.renderer.backend: mine``). A name that
    was registered before gets the new one.

    Raises ``ValueError`` for a name of this library's, ``TypeError`` for what has no function
    ``rasterization``.
    """
    if name == "auto" or name in BUILT_IN:
        raise ValueError(f"the rasteriser backend {name!r} is this library's: take another name")
    _registered[name] = _checked(name, backend)


def _checked(name: str, backend: Any) -> Any:
    if not callable(getattr(backend, "rasterization", None)):
        raise TypeError(f"the rasteriser backend {name!r} has no function 'rasterization'")
    return backend


def _announced() -> dict[str, Any]:
    """The entry points of installed packages, by name; none of them replaces one of ours."""
    found = entry_points(group=ENTRY_POINTS)
    return {e.name: e for e in found if e.name != "auto" and e.name not in BUILT_IN}


def backend_names() -> tuple[str, ...]:
    """Every name that ``backend=`` takes: ``auto``, ours, those that were registered, and those
    that installed packages announce."""
    others = dict.fromkeys([*_registered, *_announced()])
    return ("auto", *BUILT_IN, *others)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within this, ``cpu`` compiles nothing: if its kernels are not kept from an earlier process,
    it draws without them (:mod:`.tiles`), the same pictures within rounding. A few pictures are not
    worth the compilation."""
    token = _compiles.set(False)
    try:
        yield
    finally:
        _compiles.reset(token)


def may_compile() -> bool:
    """Whether kernels may be compiled now: not within :func:`uncompiled`."""
    return _compiles.get()


def is_known(name: Any) -> bool:
    """Whether there is a backend of this name (``auto`` included). Loads nothing."""
    if not isinstance(name, str):
        return False
    return name == "auto" or name in BUILT_IN or name in _registered or name in _announced()


def unknown(name: Any) -> str:
    """What is wrong with a name that is not known, after the name of its setting."""
    names = backend_names()
    return f"must be one of {', '.join(names)}, not {name!r}{nearest(name, names)}"


def get(name: str) -> Any:
    """The backend of a name other than ``auto``. Raises ``ValueError``, one line, for an unknown
    name, and for an entry point that cannot be loaded."""
    if name in BUILT_IN:
        module = importlib.import_module(f"{__name__}.{BUILT_IN[name]}")
        if name == "cpu" and not may_compile() and not module.is_compiled():
            return importlib.import_module(f"{__name__}.tiles")
        return module
    if name not in _registered:
        entry = _announced().get(name)
        if entry is None:
            raise ValueError(f"the rasteriser backend {unknown(name)}")
        try:
            _registered[name] = _checked(name, entry.load())
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(
                f"the rasteriser backend {name!r} ({entry.value}) cannot be loaded ({reason})"
            ) from error
    return _registered[name]


@lru_cache
def announce(backend: str, reason: str, fallback: bool = False) -> None:
    """One log line, once; a warning where it is much slower than it could be."""
    tell = log.warn if fallback else log.info
    tell(f"Gaussian rasteriser: {backend}{reason}")


def _unusable(name: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str:
    """Why a backend cannot be used; empty where it can."""
    backend = get(name)
    why = getattr(backend, "missing", str)()
    if not why and name in CUDA and device.type != "cuda":
        why = f"the Gaussians are on {device.type}, not on a CUDA device"
    if why or arguments is None or not hasattr(backend, "refuses"):
        return why
    return backend.refuses(**arguments)


def resolve_backend(
    backend: str, device: torch.device, arguments: Mapping[str, Any] | None = None
) -> str:
    """The backend to use for tensors on ``device``; ``auto`` is, on CUDA devices, the first of
    ``CUDA`` that works, else cpu. A backend of others is used where it is named.

    ``arguments``: those of ``rasterization``, if the backend is also to be asked whether it can
    draw that. Raises ``ValueError`` for an unknown or an unusable backend.
    """
    reasons = []
    if backend != "auto":
        why = _unusable(backend, device, arguments)
    else:
        for backend in (*(CUDA if device.type == "cuda" else ()), "cpu"):
            why = _unusable(backend, device, arguments)
            if not why:
                break
            reasons.append(f"{backend}: {why}")
    if why:
        raise ValueError(f"the rasteriser backend {backend!r} is not usable: {why}")
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    if reasons and backend == "cpu":
        remedy = "'pip install gswarp' brings a rasteriser for the GPU that needs no compiler"
        announce(backend, f"{reason}, which is far slower than the GPU: {remedy}", fallback=True)
    else:
        announce(backend, reason)
    return backend
