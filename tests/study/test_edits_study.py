"""The comparison of edits with true renders: its measures, and its table that goes on."""

import numpy as np
import pytest

from evaluation import edits


def test_both_sides_of_an_edit_are_seen_from_one_camera_and_white_outside():
    seen = edits.sides("a red armchair", "a blue armchair")
    assert seen.before.shape == seen.after.shape == (128, 128, 3)
    for picture in (seen.before, seen.after):
        assert (picture[seen.outside] == 255).all()
    red, blue = (picture[~seen.outside].mean(0) for picture in (seen.before, seen.after))
    assert red.argmax() == 0 and blue.argmax() == 2
    assert 0.2 < seen.outside.mean() < 0.9


@pytest.mark.parametrize("prompts", edits.EDITS, ids=" to ".join)
def test_every_edit_has_its_true_renders(prompts):
    assert edits.sides(*prompts).outside.any()


def test_the_judge_sees_the_target_in_its_true_render_and_not_in_the_source():
    seen = edits.sides("a red armchair", "a blue armchair")
    assert edits.verdict(seen.after, "a blue armchair") == {"object": 1.0, "colour": 1.0}
    assert edits.verdict(seen.before, "a blue armchair") == {"object": 1.0, "colour": 0.0}
    seen = edits.sides("a cat", "a dog")
    found = edits.verdict(seen.before, "a dog")
    assert found["object"] == 0.0 and np.isnan(found["colour"])


def test_psnr_is_of_the_mean_square():
    one = np.zeros((4, 4, 3), np.uint8)
    assert edits.psnr(one, one + 255) == pytest.approx(0)
    assert edits.psnr(one, one + 51) == pytest.approx(20 * np.log10(5))
    assert edits.psnr(one, one) > 100


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """Nothing is loaded where nothing is left to do; a row follows each method at once."""
    done = []

    def carry_out(source, target, method, model, folder):
        done.append(method)
        picture = np.full((128, 128, 3), len(done), np.uint8)
        for name in (method, edits.PLAIN):
            edits.save(folder / f"{edits.name_of(source, target, name)}.png", picture)
        if method == "ssd" and len(done) == 3:
            raise KeyboardInterrupt
        return dict.fromkeys(edits.COLUMNS, "0") | {
            "source": source,
            "target": target,
            "method": method,
        }

    monkeypatch.setattr(edits, "carry_out", carry_out)
    monkeypatch.setattr("lods.models.load", lambda *args, **kwargs: object())
    arguments = ["--out", str(tmp_path), "--only", "0"]
    with pytest.raises(KeyboardInterrupt):
        edits.main(arguments)
    assert edits.main(arguments) == 0
    assert done == ["dds", "pds", "ssd", "ssd", "edit"]
    monkeypatch.setattr("lods.models.load", lambda *args, **kwargs: pytest.fail("loaded"))
    assert edits.main(arguments) == 0
    assert len(edits.read_rows(tmp_path / edits.TABLE)[1]) == 4
    assert (tmp_path / edits.SHEET).is_file()


def test_a_sheet_of_nothing_is_one_line(tmp_path, capsys):
    assert edits.main(["--out", str(tmp_path), "--only", "99"]) == 2
    assert capsys.readouterr().err == "error: no edit is complete yet\n"
