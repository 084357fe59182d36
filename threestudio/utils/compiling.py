"""Whether kernels may be compiled now: a few pictures are not worth the time that it takes."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

_compiles: ContextVar[bool] = ContextVar("compiles", default=True)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within this, what has a twin without kernels uses that, unless the kernels are kept from an
    earlier process: the same results within rounding."""
    token = _compiles.set(False)
    try:
        yield
    finally:
        _compiles.reset(token)


def is_avoided() -> bool:
    """Whether kernels are not to be compiled."""
    return not _compiles.get()


def would_compile(kernels: Iterable[Any]) -> bool:
    """Whether one of these kernels is kept from no earlier process."""
    from threestudio.utils.kernel_cache import are_kept  # imports numba

    return not are_kept(kernels)
