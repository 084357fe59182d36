"""The host that trains, renders and exports for the command ``lods``: a folder more than a package.

In an installed copy this folder holds ``threestudio`` (the compact implementation of threestudio's
API), ``evaluation`` and ``pocket`` (the comparison of methods), ``configs``, and
``custom/threestudio-lods`` (the door through which a host finds the package ``lods``). They keep
these names, but they lie one folder deeper than other packages, so that no program finds them by
accident: where upstream's threestudio is installed, ``import threestudio`` stays upstream's. The
command ``lods`` puts this folder first on ``sys.path`` of its own processes (see ``lods.host``).

In a checkout these parts lie in the root of the repository, beside this folder.
"""

from pathlib import Path

_OWN = Path(__file__).resolve().parent
HOME = _OWN if (_OWN / "threestudio").is_dir() else _OWN.parent

__all__ = ["HOME"]
