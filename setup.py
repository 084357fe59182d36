"""Which folders of this repository an installed copy has, and under which names.

The rest is in pyproject.toml. The library is ``lods``; the host lies in ``lods_host``, one folder
deeper than packages that are imported: lods_host/__init__.py says why.
"""

import atexit
import shutil
import tempfile

from setuptools import find_packages, setup

LIBRARY, HOST = "custom/threestudio-lods/lods", "lods_host"
PARTS = ("threestudio", "evaluation", "pocket")  # packages of the host
DOOR = "custom/threestudio-lods"


def packages() -> dict[str, str]:
    """The folder of each package. Data and the door, which a host loads by its path, count as some:
    a folder's files are copied, those of folders below it are not."""
    found = {"lods": LIBRARY, HOST: HOST}
    found |= {f"lods.{name}": f"{LIBRARY}/{name.replace('.', '/')}" for name in find(LIBRARY)}
    for part in PARTS:
        below = {f"{part}.{name}": f"{part}/{name.replace('.', '/')}" for name in find(part)}
        found |= {f"{HOST}.{name}": path for name, path in ({part: part} | below).items()}
    return found | {f"{HOST}.configs": "configs", f"{HOST}.{DOOR.replace('/', '.')}": DOOR}


def find(folder: str) -> list[str]:
    return find_packages(folder)


build = tempfile.mkdtemp(prefix="lods-build-")  # one that is left over would bring deleted modules
atexit.register(shutil.rmtree, build, ignore_errors=True)
folders = packages()
setup(
    packages=[*folders],
    package_dir=folders,
    package_data={
        "lods": [
            "models/*.yaml",
            "models/clip_merges.*",
            "models/pocket*/*",
            "models/pocket*/*/*",
            "studio/*.yaml",
            "studio/assets/*",
        ],
        f"{HOST}.threestudio.run.drawing": ["*.js"],
        f"{HOST}.threestudio.run.page": ["*.css", "*.js"],
        f"{HOST}.evaluation": ["*.yaml", "grids/*.yaml"],
        # without pocket/ideal and pocket/truth: they are for the study of this repository
        f"{HOST}.pocket": ["*.safetensors", "*.md", "*.sh"],
        f"{HOST}.pocket.shapes": ["*.safetensors"],
        f"{HOST}.configs": ["*.yaml"],
    },
    options={"build": {"build_base": build}},
)
