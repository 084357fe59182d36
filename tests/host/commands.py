"""Command lines of ``lods``, for the tests beside this file."""

import pytest
from lods import cli, host


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """The tests run in an empty folder that is not the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *argv):
    """The one line with which a command line is refused."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    [line] = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def called(monkeypatch):
    """What the host is asked to do instead of doing it: ``(module, arguments)`` of each call."""
    calls, real = [], host.module

    def module(name):
        if name == "threestudio.run.viewer.options":
            return real(name)

        def main(*args, **kwargs):
            calls.append((name, args, kwargs))
            return 0

        return type("Module", (), {"main": staticmethod(main)})

    monkeypatch.setattr(host, "module", module)
    monkeypatch.setattr(cli, "_steady_streams", cli.contextlib.nullcontext)
    return calls
