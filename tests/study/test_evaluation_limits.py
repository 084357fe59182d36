"""The evaluation harness at its limits: grids without end, texts of any kind, and full disks."""

import json
import os
from types import SimpleNamespace

import pytest

import evaluate
from evaluation import command, csvfile, processes, run
from evaluation.grid import MAX_RUNS, load_grid, slug
from evaluation.table import CURVES, Table, begun, sheet_path
from threestudio.utils.errors import UserError

GRID = """
methods: {sds: {guidance_type: lods-sds-guidance}}
representations: {2d: {configs: [evaluation/playground.yaml], steps: 25}}
prompts: [a red car]
seeds: [0]
judge: false
"""
ALL = "[" + ", ".join(map(str, range(20))) + "]"


@pytest.fixture
def grid(tmp_path):
    """``grid(old, new, ...)``: the path of GRID with these texts replaced."""

    def write(*changes):
        text = GRID
        for old, new in zip(changes[::2], changes[1::2]):
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "try.yaml").write_text(text)
        return tmp_path / "try.yaml"

    return write


# --- grids --------------------------------------------------------------------------------------


def product(prompts: int, seeds: int) -> str:
    return f"prompts: {[f'a car {i}' for i in range(prompts)]}\nseeds: {[*range(seeds)]}"


TUNED = "lods-sds-guidance, tune: {" + ", ".join(f"data.x{i}: {ALL}" for i in range(9)) + "}}"
SETS = ", ".join(f"{{x: {i}}}" for i in range(101))
SETS = f"lods-sds-guidance, tune: {{y: {[*range(200)]}}}, settings: [{SETS}]}}"


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("lods-sds-guidance}", TUNED, "tune: 512,000,000,000 runs are more than"),
        ("lods-sds-guidance}", SETS, "on 2d: 20,200 runs are more than 20,000"),
        (
            "prompts: [a red car]\nseeds: [0]",
            product(101, 200),
            "try.yaml: 20,200 runs are more than",
        ),
        ("steps: 25", "steps: 1000000000000", "at most 10,000,000 steps"),
        ("steps: 25", "steps: 25, views: 100000", "and 1,000 views"),
        ("judge: false", "judge: false\ngpus: -1", "gpus must be from 0 to 64, not -1"),
        ("judge: false", "judge: false\ngpus: .nan", "gpus must be from 0 to 64, not nan"),
        ("seeds: [0]", "seeds: [-1]", "a seed is a number from 0 to 4294967295, not -1"),
        ("seeds: [0]", "seeds: [4294967296]", "not 4294967296"),
        ("seeds: [0]", "seeds: [0, 1, 0]", "seeds has '0' twice"),
        ("a red car]", "a red car, a red car]", "prompts has 'a red car' twice"),
        ("steps: 25", "steps: 25, seeds: [0, 0]", "representation 2d: seeds has '0' twice"),
        ("a red car]", "a " + "x" * 131_073 + "]", "a prompt has 131,075 characters, more than"),
        ("a red car]", r'"a red\r car"]', r"'a red\r car' has a line break or another control"),
        ("a red car]", r'"a red\n car"]', "has a line break"),
        ("a red car]", r'"a\0car"]', "control character"),
        ("a red car]", r'"a red\u2028car"]', "has a line break"),
    ],
)
def test_a_grid_that_could_not_be_carried_out_is_refused(grid, old, new, text, monkeypatch):
    monkeypatch.setattr("threestudio.utils.safe_yaml.MAX_BYTES", 10**7)
    with pytest.raises(UserError) as error:
        load_grid(grid(old, new))
    message = str(error.value)
    assert text in message and "\n" not in message and len(message) < 300


def test_a_grid_of_as_many_runs_as_are_allowed_is_read(grid):
    path = grid("prompts: [a red car]\nseeds: [0]", product(100, 200))
    assert len(load_grid(path).runs) == MAX_RUNS == 20_000


def test_prompts_of_all_scripts_are_read(grid):
    prompts = ["café", "红色的车", "a 👩\u200d🚀", "a\u00a0car", "x" * 10_000]
    runs = load_grid(grid("[a red car]", json.dumps(prompts, ensure_ascii=False))).runs
    assert [r.prompt for r in runs] == prompts


# --- tables -------------------------------------------------------------------------------------

TEXTS = [
    "\r",
    "a\rb",
    "\r\n",
    "\n",
    '"',
    "a,b",
    "",
    " ",
    "\0",
    "é",
    "\u2028",
    "\ud800",
    "x" * 200_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:5]))
def test_a_table_holds_any_text(tmp_path, text):
    rows = [{"a": text, "b": "1"}, {"a": "2", "b": text}]
    csvfile.write_rows(tmp_path / "t.csv", ("a", "b"), rows)
    assert csvfile.read_rows(tmp_path / "t.csv") == (["a", "b"], rows)
    csvfile.write_rows(tmp_path / "t.csv", ("a", "b"), rows)
    assert (tmp_path / "t.csv").read_bytes().startswith(b"a,b\n")


def test_plain_tables_are_written_as_before(tmp_path):
    csvfile.write_rows(
        tmp_path / "t.csv", ("a", "b"), [{"a": 1, "b": "x y"}, {"a": '"', "b": "\n"}]
    )
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n1,x y\n"""","\n"\n'


@pytest.mark.parametrize(
    "content", [b"a,b\n1\n", b"a,b\n1,2,3\n", b'a,b\n"1,2\n', b"a,b\n\xff,1\n"]
)
def test_what_is_no_table_is_one_line(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        csvfile.read_rows(tmp_path / "t.csv")
    assert str(tmp_path / "t.csv") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["prompt", "method", "representation", "settings"])
def test_a_run_is_found_again_whatever_it_is_called(grid, tmp_path, field):
    """Else it would be repeated for ever."""
    (one,) = load_grid(grid()).runs
    for text in ("a\rb", "x" * 131_073):
        odd = type(one)(**{**one.__dict__, field: text})
        table = Table(tmp_path / "out")
        row = begun(odd, 1, "") | {"status": "ok"}
        table.record(row, [dict.fromkeys(CURVES, "")], b"")
        assert Table(tmp_path / "out").find(odd) == row


def test_sheets_of_different_prompts_have_different_names(tmp_path):
    prompts = ["红色的车", "蓝色的车", "a" * 61, "a" * 62, "é", "a/../b é", "a red car", ""]
    paths = [sheet_path(tmp_path, "g", "2d", "sds", prompt, 0) for prompt in prompts]
    assert len(set(paths)) == len(prompts)
    assert all(p.parent == tmp_path / "sheets" / "g" and len(p.name) < 255 for p in paths)
    assert slug("2d", "sds", "a DSLR image, red", 0) == "2d-sds-a-dslr-image-red-0"
    assert len(slug(*["é" * 1000] * 4)) < 250


# --- full disks ---------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(28, "No space left on device", "/full/file")


def test_a_full_disk_is_no_failure_of_a_run(grid, tmp_path, monkeypatch):
    """It raises, where other errors become the row's status."""
    (one,) = load_grid(grid()).runs
    monkeypatch.setattr(run, "load_run", full)
    with pytest.raises(OSError, match="No space left"):
        run.carry_out(one, 1, "", tmp_path)

    def behind(*_):
        try:
            full()
        except OSError as error:
            raise RuntimeError("PytorchStreamWriter failed") from error

    monkeypatch.setattr(run, "load_run", behind)
    with pytest.raises(OSError, match="No space left"):
        run.carry_out(one, 1, "", tmp_path)


@pytest.mark.parametrize("where", ["submit", "wait", "claim"])
def test_a_full_disk_ends_the_session_with_one_line(grid, tmp_path, monkeypatch, capsys, where):
    backend = SimpleNamespace(slots=1, submit=lambda job: 1, wait=lambda: [], close=lambda: None)
    monkeypatch.setattr(command, "Local", lambda *_: backend)
    if where == "claim":
        monkeypatch.setattr(Table, "claim", full)
    else:
        setattr(backend, where, full)
    path = grid()
    assert evaluate.main([str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: /full/file cannot be written (No space left")
    assert line.endswith("make room; the same command goes on with what is left")
    table = Table(tmp_path / "out")
    assert table.rows() == []
    monkeypatch.undo()
    assert table.claim(load_grid(path).runs[0]) is not None  # it was let go


def test_a_failure_has_a_reason():
    assert processes.ended_with(1, "").endswith("status 1: it said nothing")
    assert processes.ended_with(-11, "x").endswith("signal 11: x")
    try:
        raise MemoryError
    except MemoryError as error:
        said = run.reason(error)
    assert said.startswith("MemoryError: at test_evaluation_limits.py:")


# --- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, workers, threads",
    [("3", 2, 3), ("3,2", 1, 3), (" 2 ", None, 2), ("", 2, 4), ("x", 2, 4), ("0", 2, 4)]
    + [("99999999999", 2, 4), ("", None, 1), ("", 100, 1)],
)
def test_threads_are_those_of_the_environment(monkeypatch, value, workers, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert command.default_threads(workers) == threads


@pytest.mark.parametrize("option", ["--threads", "--workers"])
def test_numbers_without_bounds_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse_args(["g.yaml", option, "1000000000"])
    assert stop.value.code == 2 and "number from 1 to 1024" in capsys.readouterr().err
