"""Where the host is: the programs that train a run and compare methods, which ``lods`` does not
import but starts.

In a checkout they are in its root. An installed copy has them in the folder ``lods_host``, which
only the processes of the command ``lods`` put on ``sys.path``, so that nobody else's
``import threestudio`` finds ours.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent
# beside an installed lods; the root of a checkout, in whose custom/threestudio-lods this one is
_PLACES = (_PACKAGE.parent / "lods_host", _PACKAGE.parents[2])


def home() -> Path:
    """The folder with ``threestudio``, ``evaluation``, ``configs`` and ``custom``. Raises
    ``ValueError`` where only the package ``lods`` was copied."""
    for place in _PLACES:
        if (place / "threestudio" / "run" / "cli.py").is_file() and (place / "configs").is_dir():
            return place
    raise ValueError(
        f"{_PACKAGE} has no host beside it, which trains and renders: pip install threestudio-lods "
        "(or pip install . in its repository) has one"
    )


def module(name: str) -> ModuleType:
    """A module of the host, which comes before any other of its name from now on.

    Raises ``ValueError`` where there is no host, and in a process that has imported another
    threestudio already.
    """
    place = str(home())
    if place not in sys.path:
        sys.path.insert(0, place)
    found = importlib.import_module(name)
    file = Path(getattr(found, "__file__", None) or "/").resolve()
    if not file.is_relative_to(place):
        raise ValueError(
            f"this process has imported {name} from {file}: the command lods needs one of its own"
        )
    return found
