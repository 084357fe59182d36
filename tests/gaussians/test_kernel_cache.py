"""Where compiled kernels are kept: what may be wrong with it, and what is then done."""

import importlib.util
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT
from threestudio.utils import kernel_cache

SOURCE = """
from threestudio.utils.kernel_cache import kernel
from .{helper} import FACTOR

@kernel()
def times(x):
    return FACTOR * x
"""
COPIES = [ROOT / "threestudio/utils", ROOT / "custom/threestudio-lods/lods/gaussians"]
# the lines in which the two differ: who tells of what goes wrong
TELLING = ("from lods import log", "import threestudio")
TELLING += ("log.warn(_why(error))", "threestudio.warn(_why(error))")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one kernel: ``package(helper="factor")`` imports it afresh. Its cache is in
    tmp_path/cache."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache, "_told", False)
    folder = tmp_path / "kernels_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "other.py").write_text("FACTOR = 2")
    (folder / "factor.py").write_text("from .other import FACTOR")
    monkeypatch.syspath_prepend(tmp_path)

    def load():
        (folder / "kernels.py").write_text(SOURCE.format(helper="factor"))
        for name in [n for n in sys.modules if n.startswith(folder.name)]:
            del sys.modules[name]
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        kernel_cache._digest.cache_clear()
        importlib.invalidate_caches()
        return importlib.import_module(f"{folder.name}.kernels").times

    return load


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "threestudio-lods" / "kernels"


def outcome(function) -> str:
    """Call the kernel, check its result, and say where the machine code was from."""
    assert function(21.0) == 42.0
    hits, misses = (sum(getattr(function.stats, f"cache_{kind}").values()) for kind in KINDS)
    assert hits + misses == 1
    return "cache" if hits else "compiler"


KINDS = ("hits", "misses")


def entry(folder: Path) -> Path:
    (found,) = folder.glob("*.kernel")
    return found


def test_that_a_kernel_is_kept_is_known_before_it_is_loaded(package, tmp_path):
    assert not kernel_cache.are_kept([package()])
    outcome(package())
    kept = package()
    assert kernel_cache.are_kept([kept, kept])
    assert outcome(kept) == "cache"
    (tmp_path / "kernels_of_a_test" / "other.py").write_text("FACTOR = 2  # another source")
    assert not kernel_cache.are_kept([kept, package()])


def warnings_of(monkeypatch) -> list:
    told = []
    monkeypatch.setattr("threestudio.warn", lambda text: told.append(text))
    return told


def test_the_second_start_takes_what_the_first_has_compiled(package, folder):
    assert outcome(package()) == "compiler"
    assert outcome(package()) == "cache"
    names = {path.name for path in folder.iterdir()}
    assert names == {"key", entry(folder).name}


def test_the_folders_are_for_the_user_alone(package, folder):
    before = os.umask(0)
    try:
        outcome(package())
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (folder.parent, folder)] == [0o700, 0o700]
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}


def test_nothing_is_written_beside_the_code(package, tmp_path):
    outcome(package())
    beside = (tmp_path / "kernels_of_a_test").rglob("*")
    assert not [path for path in beside if path.suffix in (".nbi", ".nbc")]


class Poison:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "truncated in its checksum": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a bit flipped in the checksum": lambda path: flip(path, 3),
    "a bit flipped in the code": lambda path: flip(path, -1),
    "a link": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").write_text("")),
}


@pytest.mark.parametrize("name", ["a.kernel", "key"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_as_good_as_none(package, folder, damage, name):
    kernel_cache._store("a.kernel", b"x" * 40)
    damage(folder / name)
    assert kernel_cache._fetch("a.kernel") is None
    kernel_cache._store("a.kernel", b"y" * 40)
    assert kernel_cache._fetch("a.kernel") == b"y" * 40


@pytest.mark.parametrize("name", ["*.kernel", "key"])
def test_a_kernel_with_a_damaged_file_is_compiled_anew(package, folder, name, monkeypatch):
    told = warnings_of(monkeypatch)
    outcome(package())
    (path,) = folder.glob(name)
    flip(path, 20)
    assert outcome(package()) == "compiler"
    assert outcome(package()) == "cache"
    assert not told


def test_code_from_elsewhere_is_not_run(package, folder, tmp_path):
    outcome(package())
    path, made = entry(folder), tmp_path / "poisoned"
    poison = pickle.dumps(Poison(made))
    own_key = bytes(32)
    for content in (poison, kernel_cache._mac(own_key, path.name, poison) + poison):
        path.write_bytes(content)
        assert outcome(package()) == "compiler" and not made.exists()
    pickle.loads(poison)
    assert made.exists()  # it would have


def test_one_kernel_is_not_taken_for_another(package, folder):
    """A file under another's name has a checksum that does not fit."""
    outcome(package())
    first = entry(folder)
    content = first.read_bytes()
    first.unlink()
    assert package()(1) == 2  # of an integer: another file
    entry(folder).write_bytes(content)
    fresh = package()
    assert fresh(1) == 2 and sum(fresh.stats.cache_misses.values()) == 1


def test_a_changed_helper_recompiles(package, tmp_path):
    """Also one that is imported by way of another."""
    outcome(package())
    (tmp_path / "kernels_of_a_test" / "other.py").write_text("FACTOR = 3")
    changed = package()
    assert changed(21.0) == 63.0


def make_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def make_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


REFUSED = {
    "a link": (make_link, "a link or a file"),
    "a file": (make_file, "a link or a file"),
    "writable by the group": (lambda folder: folder.chmod(0o770), "others can write"),
    "writable by all": (lambda folder: folder.chmod(0o707), "others can write"),
}


@pytest.mark.parametrize("level", ["kernels", "threestudio-lods"])
@pytest.mark.parametrize("change, reason", REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_not_private_is_refused(package, folder, level, change, reason):
    kernel_cache._store("a.kernel", b"x")
    change(folder if level == "kernels" else folder.parent)
    for use in (lambda: kernel_cache._fetch("a.kernel"), lambda: kernel_cache._store("b", b"x")):
        with pytest.raises(OSError, match=reason) as error:
            use()
        assert Path(error.value.filename).name == level


def test_beside_a_refused_folder_kernels_are_compiled(package, folder, monkeypatch):
    told = warnings_of(monkeypatch)
    outcome(package())
    folder.chmod(0o777)
    assert outcome(package()) == outcome(package()) == "compiler"
    assert len(told) == 1 and "\n" not in told[0]
    assert f"({folder}: others can write to it" in told[0]


def test_a_folder_of_somebody_else_is_refused(package, monkeypatch):
    kernel_cache._store("a.kernel", b"x")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(OSError, match="another user"):
        kernel_cache._fetch("a.kernel")


def test_a_full_disk_costs_the_cache_and_one_line(package, folder, monkeypatch):
    told = warnings_of(monkeypatch)
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    plain = os.open

    def full(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            plain(path, flags, *args, **kwargs)
            return plain("/dev/full", os.O_WRONLY)
        return plain(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    assert outcome(package()) == outcome(package()) == "compiler"
    assert len(told) == 1 and "No space left" in told[0]
    assert list(folder.iterdir()) == []  # not even a part


def test_without_a_place_to_write_kernels_are_compiled(package, tmp_path, monkeypatch):
    told = warnings_of(monkeypatch)
    (tmp_path / "cache").write_text("a file")
    assert outcome(package()) == "compiler"
    assert len(told) == 1 and "kernels are not kept" in told[0]


def test_without_a_home_kernels_are_compiled(package, monkeypatch):
    told = warnings_of(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which is to be ignored
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert outcome(package()) == "compiler"
    assert len(told) == 1 and "home" in told[0]


def test_the_folder_that_numba_was_given_is_used(package, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "chosen"))
    outcome(package())
    assert entry(tmp_path / "chosen" / "threestudio-lods" / "kernels")
    assert not folder.exists()


def test_numba_can_be_switched_off(package, monkeypatch):
    monkeypatch.setattr("numba.core.config.DISABLE_JIT", True)
    assert package()(21.0) == 42.0


def test_what_was_not_used_for_long_is_removed(package, folder):
    kernel_cache._store("a.kernel", b"x")
    old, left, strange = folder / "old.kernel", folder / ".left-behind", folder / "a note"
    for path in (old, left, strange):
        path.write_text("")
        os.utime(path, (0, 0))
    os.utime(folder / "key", (0, 0))
    kernel_cache._store("b.kernel", b"x")
    assert not old.exists() and not left.exists()
    assert strange.exists() and (folder / "key").exists()


def test_what_is_in_use_is_not_old(package, folder):
    kernel_cache._store("a.kernel", b"x")
    os.utime(folder / "a.kernel", (0, 0))
    kernel_cache._fetch("a.kernel")
    kernel_cache._store("b.kernel", b"x")
    assert kernel_cache._fetch("a.kernel") == b"x"


def test_the_library_has_the_same_file():
    """It imports nothing of threestudio, and threestudio knows no library by name."""

    def lines(folder):
        text = (folder / "kernel_cache.py").read_text().splitlines()
        return [line for line in text if line.strip() and line.strip() not in TELLING]

    first, second = (lines(folder) for folder in COPIES)
    assert len(first) > 200 and first == second


def test_no_kernel_uses_the_cache_of_numba():
    """Which unpickles what lies beside the code."""
    shipped = ["benchmarks", "custom", "evaluation", "pocket", "threestudio"]
    files = [path for name in shipped for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 100
    assert not [path for path in files if "cache=True" in path.read_text().replace(" ", "")]
    assert not [path for path in files if '"cache": True' in path.read_text()]
