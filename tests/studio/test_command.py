"""The command line ``lods studio``."""

import socket
import stat
import subprocess
import sys
import textwrap

import pytest
from lods.cli import main
from lods.commands import studio


def refused(capsys, *words):
    try:
        status = main(["studio", *words])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "words", [("--port", "x"), ("--port", "70000"), ("--at-once", "0"), ("--host", " "), ("word",)]
)
def test_a_mistake_in_the_command_costs_one_line(capsys, words):
    assert words[0] in refused(capsys, *words)


def test_a_port_that_is_taken_costs_one_line(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refused(capsys, "--port", port, "--runs", str(tmp_path))


def test_a_folder_that_is_a_file_costs_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "--runs" in refused(capsys, "--runs", str(tmp_path / "file"))


def test_a_folder_that_another_studio_looks_after_is_refused(capsys, tmp_path):
    from lods import host

    lock = host.module("evaluation.batch").Lock.take(tmp_path / studio.LOCK)
    lock.write("http://127.0.0.1:7000/")
    assert "at http://127.0.0.1:7000/" in refused(capsys, "--runs", str(tmp_path))
    lock.release()


def test_without_aiohttp_one_line_says_how_to_get_it(tmp_path):
    program = """
        import sys
        sys.modules["aiohttp"] = None
        from lods.cli import main
        status = main(["studio", "--runs", sys.argv[1]])
        assert "torch" not in sys.modules
        sys.exit(status)
    """
    words = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "runs")]
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install aiohttp" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_token_stays_the_same_and_only_its_owner_can_read_it(tmp_path):
    first = studio._token(tmp_path)
    assert len(first) == 43 and studio._token(tmp_path) == first
    assert stat.S_IMODE((tmp_path / studio.TOKEN).stat().st_mode) == 0o600
    (tmp_path / studio.TOKEN).write_text("short")
    assert studio._token(tmp_path) not in (first, "short")


def test_importing_the_command_imports_no_server():
    program = "import sys, lods.commands.studio, lods.cli; sys.exit('aiohttp' in sys.modules)"
    env = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=env).returncode == 0


@pytest.mark.parametrize(
    ("address", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("a.example", "a.example")],
)
def test_the_printed_address_is_one_that_can_be_opened(address, shown):
    assert studio._shown(address) == shown
