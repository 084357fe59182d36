"""LODS for threestudio: importing this folder registers its guidances, Gaussians and systems.

It is the door of a threestudio host. All code is in the package ``lods`` beside this file, which
has that one name always: where it is not installed, this folder goes to the end of ``sys.path``.
"""

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_spec = importlib.util.find_spec("lods")
if _spec is None:
    sys.path.append(str(_HERE))

import lods.threestudio  # noqa: E402

__version__ = lods.__version__

if (_HERE / "lods").is_dir() and Path(lods.__file__).resolve().parent != _HERE / "lods":
    lods.threestudio.warn(
        f"lods {lods.__version__} is the package installed in {Path(lods.__file__).parent}, not "
        f"the one in {_HERE}: uninstall threestudio-lods to use that"
    )


def find_model(model: str) -> str:
    """The folder of a model of ``lods`` that a config names; "" for anything else. The host of this
    repository asks it for its own prompt processors and guidances."""
    from lods.models.cards import find_folder

    return find_folder(model)


__all__ = ["__version__", "find_model", "lods"]
