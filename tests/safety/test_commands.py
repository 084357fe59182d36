"""Odd files and folders given to the commands cost one line, before anything is computed."""

import json
import os

import pytest
from lods.cli import main
from lods.commands import make, runs
from lods.commands.parser import made_folder


@pytest.mark.parametrize("target", ["file", "link"])
def test_an_out_that_is_no_folder_is_refused_with_one_line(tmp_path, target):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^--out \S+ cannot be made a folder: [^\n]*$"):
        made_folder("--out", tmp_path / target)


def test_an_export_to_a_file_is_refused_before_it_begins(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "parsed.yaml").touch()
    (tmp_path / "file").touch()
    monkeypatch.setattr(runs, "start", lambda words: pytest.fail("it began"))
    words = [str(tmp_path), "--format", "glb", "--out", str(tmp_path / "file")]
    with pytest.raises(ValueError, match="--out"):
        runs.main(words, "lods export")


def test_a_pipe_in_place_of_a_request_is_passed_over(tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / make.REQUEST)
    (tmp_path / "b").mkdir()
    request = make.Request("a red car", "gaussians", "lods-lora", "pocket-shapes", small=True)
    (tmp_path / "b" / make.REQUEST).write_text(json.dumps(request.plain()))
    assert [job.folder for job in make.noted(tmp_path)] == [tmp_path / "b"]


def test_a_list_of_prompts_with_a_nul_is_no_text(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(b"a red\0car\n")
    with pytest.raises(ValueError, match="NUL"):
        make.read_prompts(file)


def test_a_name_from_elsewhere_commands_no_terminal(tmp_path, capsys):
    for name in ("a\x1b]0;title\x07\nb", "c"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs" / "parsed.yaml").touch()
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told[:-1].isprintable() and "holds 2 runs" in told
