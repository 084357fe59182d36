"""How the commands of the study end."""

from pathlib import Path

import pytest

from evaluation.tool import parser_of, write_files
from threestudio.utils.errors import UserError


def test_a_command_says_which_files_it_wrote(capsys):
    assert write_files(lambda: [Path("a.csv"), Path("a.webp")]) == 0
    assert capsys.readouterr() == ("wrote a.csv and a.webp\n", "")


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("there is nothing to show"), "there is nothing to show"),
        (OSError(28, "No space left on device", "out/a.csv"), "out/a.csv: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the disk is gone"), "the disk is gone"),
    ],
)
def test_what_stops_a_command_is_one_line(capsys, error, line):
    def make():
        raise error

    assert write_files(make) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_a_mistake_in_the_code_is_no_message():
    def make():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_files(make)


def test_a_command_is_described_by_the_end_of_its_docstring():
    parser = parser_of("sweep", "Title.\n\nWhat it does.\n")
    assert parser.prog == "python -m evaluation.sweep"
    assert parser.description.strip() == "What it does."
