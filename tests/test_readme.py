"""What the README and the pages of docs/ tell a reader to type works: their Python blocks run, and
their commands parse."""

import argparse
import ast
import contextlib
import importlib
import re
import shlex
import textwrap

import lods
import pytest

from tests.runs import ROOT
from threestudio.run.arguments import Program, find_config
from threestudio.utils.config import load_config

README = "\n\n".join(
    file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)((?:(?: {4}[^\n]*)?\n)+)")
PROGRAM = re.compile(r"(?:.*/)?(launch\.py|evaluate\.py|2dplayground_\w+\.py|merge\.py|lods)")


def blocks(*languages):
    """The code blocks in these languages; an indented one has none, or is Python by its start."""
    found = FENCED.findall(README)
    for code in map(textwrap.dedent, INDENTED.findall(FENCED.sub("", README))):
        found.append(("python" if code.startswith(("import ", "from ")) else "", code))
    return [code for language, code in found if language in languages and code.strip()]


def commands():
    """The words of each command line of the shell blocks, from its program on."""
    found = []
    for block in blocks("bash", "sh", "console", "shell", ""):
        for line in block.replace("\\\n", " ").splitlines():
            with contextlib.suppress(ValueError):  # what is no shell, as a table of files
                lexer = shlex.shlex(line.lstrip("$ "), posix=True, punctuation_chars="&;|")
                lexer.whitespace_split = True
                found += split(list(lexer))
    return found


def split(words):
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set("&;|"):
            starts = [i for i, w in enumerate(command[:4]) if PROGRAM.fullmatch(w)]
            if starts:
                yield command[starts[0] :]
            command = []
        else:
            command.append(word)


class Parsed(BaseException):
    """The command line has been understood; nothing of it is done."""


@pytest.fixture
def only_parsed(monkeypatch):
    """argparse ends a program where its arguments are right."""
    depth = [0]

    def ending(original):
        def parse(self, *args, **kwargs):
            depth[0] += 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                depth[0] -= 1
            if depth[0] == 0:
                raise Parsed
            return result

        return parse

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(original))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def call(program, words):
    if program.startswith("2dplayground_"):
        kind = program.removeprefix("2dplayground_").removesuffix(".py")
        return importlib.import_module("lods.playground").main(kind, words)
    module = {"launch.py": "launch", "evaluate.py": "evaluate", "merge.py": "lods.merge"}
    main = importlib.import_module(module.get(program, "lods.cli")).main
    return main(words)


def configs_of(words):
    """What stands after ``--config``, which takes several."""
    found, taking = [], False
    for word in words:
        if word.startswith("-"):
            taking = word in ("--config", "--grid")
            _, _, value = word.partition("=")
            if word.startswith(("--config=", "--grid=")):
                found.append(value)
        elif taking and "=" not in word:
            found.append(word)
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_understood_and_names_what_is_there(only_parsed, words):
    program, rest = PROGRAM.fullmatch(words[0])[1], words[1:]
    # <run> is the reader's own, and what -o names is written by a command before
    made = re.findall(r"-o (\S+)", README)
    files = [file for file in configs_of(rest) if "<" not in file and file not in made]
    with pytest.raises(Parsed):
        call(program, rest)
    for file in files:
        names = [ROOT / file, ROOT / "configs" / f"{file}.yaml"]
        assert any(name.is_file() for name in names), file
    if program == "launch.py" and files:
        found = [find_config(file, Program(home=ROOT)) for file in files]
        load_config(*found, cli_args=[w for w in rest if "=" in w and not w.startswith("-")])


@pytest.mark.parametrize(
    "target", re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash", "sh", "")), re.M)
)
def test_a_target_of_make_is_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


class FewSteps(ast.NodeTransformer):
    """Loops of hundreds of steps become loops of two."""

    def visit_Call(self, node):
        self.generic_visit(node)
        count = node.args[-1] if node.args else None
        if getattr(node.func, "id", "") == "range" and isinstance(count, ast.Constant):
            count.value = min(count.value, 2)
        return node


@pytest.fixture(scope="module")
def small():
    return lods.models.load("pocket", "cpu")


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_a_block_of_python_runs_as_it_stands(registered, small, tmp_path, monkeypatch, code):
    """With a small model, whatever it names, and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lods.models, "load", lambda *args, **settings: small)
    tree = ast.fix_missing_locations(FewSteps().visit(ast.parse(code)))
    exec(compile(tree, "README.md", "exec"), {"__name__": "__main__"})


def test_there_are_commands():
    assert commands()
