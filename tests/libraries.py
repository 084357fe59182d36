"""What every library in ``lods`` keeps to: what importing it loads, and where its names are."""

import subprocess
import sys

import pytest

from tests.runs import ROOT

LODS = ROOT / "custom" / "threestudio-lods" / "lods"


def loads(name, at_once, at_all):
    """Which of the modules ``at_once`` importing the library ``lods.<name>`` loads, and which of
    those ``at_all`` all of its names do: sorted lists, as printed by a process of its own."""
    code = (
        f"import sys, lods.{name} as library; "
        f"print(sorted({set(at_once)!r} & set(sys.modules))); "
        "[getattr(library, name) for name in library.__all__]; "
        f"print(sorted({set(at_all)!r} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=LODS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_names(library):
    """Each public name is where the library says that it is, and has a text."""
    found = {name for names in library._MODULES.values() for name in names}
    assert set(library.__all__) == found and library.__all__ == sorted(library.__all__)
    for name in library.__all__:
        assert getattr(library, name).__name__ == name and getattr(library, name).__doc__
    assert set(library.__all__) <= set(dir(library))
    with pytest.raises(AttributeError, match="no attribute 'rasterisation'"):
        library.rasterisation  # noqa: B018


def check_no_host(name):
    """No module of the library names the host."""
    for path in (LODS / name).rglob("*.py"):
        text = path.read_text()
        for words in ("import threestudio", "from threestudio", "lods.threestudio", "import *"):
            assert words not in text, path
