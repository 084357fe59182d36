"""The first picture of a training, drawn when the object is built and before the model is loaded.

Importing the libraries of a model, loading it and embedding the prompt take longer than all that
comes before. A system that has a method ``draw_first_picture(make_loader) -> paths`` is asked for
its picture where :meth:`threestudio.systems.base.BaseLift3DSystem.configure` has built geometry,
material, background and renderer; ``make_loader()`` gives the loader of the views of a validation.
The method writes ``it0-<view>.png`` into the folder ``save`` and leaves all random states, and all
that it has not made, as they were.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from threestudio.utils.compiling import uncompiled

_waiting: ContextVar[Callable[[Any], None] | None] = ContextVar("first_picture", default=None)


def object_is_built(system: Any) -> None:
    """Draw the first picture of `system`, if one is wanted: within :func:`drawn_early`, once."""
    draw = _waiting.get()
    if draw is not None:
        _waiting.set(None)
        draw(system)


def is_wanted(cfg: Any, save_dir: str) -> bool:
    """Whether a training has a first picture: it begins anew, has validations, and writes into a
    folder without files, none of which would be lost if it came to nothing."""
    if cfg.resume is not None or not cfg.trainer.get("limit_val_batches", 1.0):
        return False
    folder = Path(save_dir)
    return not (folder.is_dir() and any(folder.iterdir()))


@contextlib.contextmanager
def drawn_early(cfg: Any, save_dir: str, tell: Callable[[str], None]) -> Iterator[None]:
    """A system of the config `cfg` that is built within this draws its first picture on the way,
    into the folder `save_dir`; ``tell(path)`` is called for the first of its files. They are
    removed if the system cannot be built. What fails in drawing is left to the first step of the
    training, which tells it."""

    def draw(system: Any) -> None:
        method = getattr(system, "draw_first_picture", None)
        if method is None:
            return
        system.set_save_dir(save_dir)
        paths: list[str] = []
        with contextlib.suppress(Exception), uncompiled():
            paths = method(lambda: _loader(cfg))
        if paths:
            tell(paths[0])

    token = _waiting.set(draw)
    try:
        yield
    except BaseException:
        for path in Path(save_dir).glob("it0-*.png"):  # nothing was there, see is_wanted
            path.unlink(missing_ok=True)
        raise
    finally:
        _waiting.reset(token)


def _loader(cfg: Any) -> Any:
    """Of the views of a validation, by a data module of its own: that of the run sees nothing."""
    import threestudio

    data = threestudio.find(cfg.data_type)(cfg.data)
    data.setup("validate")
    return data.val_dataloader()
