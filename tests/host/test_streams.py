"""A prompt with an accent on a terminal that has ASCII only."""

import contextlib
import importlib
import io
import sys
from types import SimpleNamespace

import pytest

import evaluate
from tests.host.test_launch import cli, train  # noqa: F401 (a fixture)
from threestudio.run.streams import print_anything


@contextlib.contextmanager
def ascii_only():
    """Standard output and error in ASCII; gives a function that returns what they were given."""
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield lambda: [stream.buffer.getvalue().decode("ascii") for stream in streams]


def test_what_ascii_lacks_is_escaped():
    with ascii_only() as written:
        print_anything()
        print("caf\u00e9 \U0001f697")
        print("caf\u00e9", file=sys.stderr)
    assert written() == ["caf\\xe9 \\U0001f697\n", "caf\\xe9\n"]


def test_streams_of_another_kind_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_anything()
    print("caf\u00e9")
    assert sys.stdout.getvalue() == "caf\u00e9\n"


def test_a_run_prints_its_folder(cli):  # noqa: F811
    with ascii_only() as written:
        status, _, _ = train(cli, "trainer.max_steps=1", prompt="a caf\u00e9 \U0001f697")
    assert status == 0
    assert "results in outputs/toy/a_caf\\xe9_\\U0001f697\n" in written()[0]


@pytest.mark.parametrize("command", ["evaluate", "playground"])
def test_so_do_the_other_commands(lods, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    playground = importlib.import_module("lods.playground")
    with ascii_only() as written:
        if command == "evaluate":
            assert evaluate.main(["caf\u00e9.yaml", "--dry-run"]) == 2
        else:
            assert playground.main("lora", ["--model", "./caf\u00e9"]) == 2
    assert "caf\\xe9" in "".join(written())


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_a_stream_that_cannot_be_written_is_no_end(error, monkeypatch):
    def reconfigure(**options):
        raise error

    monkeypatch.setattr("sys.stdout", SimpleNamespace(reconfigure=reconfigure))
    monkeypatch.setattr("sys.stderr", None)
    print_anything()
