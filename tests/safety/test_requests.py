"""What others leave in the folder of ``lods make`` neither hangs it nor steers the terminal."""

import json
import os

from lods.commands.job import Request
from lods.commands.make import noted


def test_pipes_and_prompts_with_control_characters_are_no_requests(tmp_path):
    good = Request("a red mushroom", "gaussians", "lods-embedding", "pocket-shapes", True).plain()
    for name, prompt in (("good", good["prompt"]), ("bad", "\x1b[2J"), ("pipe", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "request.json").write_text(json.dumps({**good, "prompt": prompt}))
    (tmp_path / "pipe" / "request.json").unlink()
    os.mkfifo(tmp_path / "pipe" / "request.json")
    assert [job.folder.name for job in noted(tmp_path)] == ["good"]
