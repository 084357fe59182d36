"""What the report gives as reasons, from small tables."""

import subprocess

import pytest

from evaluation import machine
from evaluation.overview import method
from evaluation.reasons import reasons
from evaluation.report import full_marks, standing
from evaluation.results import sections
from tests.test_report import PROMPTS, make_rows

RIVALS = make_rows(("sds", "csd", "vsd"), seeds="0")


def told(rows, tuning=None) -> list[str]:
    return [item for block in reasons(sections(rows), tuning)[1:] for item in block.items]


def study(distances, prompts=PROMPTS, settings=None):
    """Contestants of a grid of its own that end with a loss of 0.1, 0.2, ..."""
    rows = []
    for k, (name, distance) in enumerate(distances.items(), 1):
        for row in make_rows((name,), prompts=prompts, seeds="0"):
            row |= {"grid": "study", "settings": (settings or {}).get(name, f"rate={k}")}
            rows.append(row | {"prior_loss_last": f"0.{k}", "frechet": str(distance)})
    return rows


def test_scales_are_compared_each_at_its_best():
    tuning = []
    for prior, scale, distance in (
        *(("sds", 5, 40), ("sds", 100, 60), ("sds", 5, 90)),
        *(("lods-lora", 5, 50), ("lods-lora", 100, 44), ("nfsd", 5, 1), ("nfsd", 100, 1)),
    ):
        setting = f"scene_lr={distance} system.guidance.guidance_scale={scale}"
        rows = make_rows((prior,), prompts=["a tree", "a donut"], seeds="0")
        tuning += [{**r, "settings": setting, "frechet": str(distance)} for r in rows]
    (text,) = told(RIVALS, tuning)
    assert "sds is best at 5 (40.0) and has 1.50 times that at 100" in text
    assert "lods-lora is best at 100 (44.0)." in text and "nfsd" not in text
    assert text.endswith("at which SDS saturates.")
    # SDS has to be worse by more than a little
    near = [r | {"frechet": "44"} if r["frechet"] == "60" else r for r in tuning]
    assert "1.10 times that at 100" in told(RIVALS, near)[0]
    assert "saturates" not in told(RIVALS, near)[0]
    # and at a high scale
    lower = [r | {"settings": r["settings"].replace("=100", "=10")} for r in tuning]
    assert "1.50 times that at 10" in told(RIVALS, lower)[0]
    assert "saturates" not in told(RIVALS, lower)[0]
    # two scales that came to a second round
    later = [r | {"prompt": "a lamp", "frechet": "70"} for r in tuning if r["frechet"] in "40 60"]
    (text,) = told(RIVALS, [*tuning, *later])
    assert "(in the second round, over 3 prompts, 50.0 at 5 and 63.3 at 100); lods-lora is" in text
    (text,) = told(RIVALS, [r for r in tuning if r["frechet"] != "40"])
    assert "sds is best at 100 (60.0)" in text and "saturates" not in text
    assert told(RIVALS) == []


@pytest.mark.parametrize(
    "distances, said",
    [
        ((10, 20, 30, 40, 50), "is the better in Frechet distance (rank correlation +1.00)"),
        ((50, 40, 30, 20, 10), "is the worse in Frechet distance (rank correlation -1.00)"),
        ((30, 10, 50, 20, 40), "is neither clearly better nor worse"),
    ],
)
def test_learning_is_compared_with_quality(distances, said):
    rows = study({f"lods-{k}": d for k, d in enumerate(distances)})
    (text,) = told([*RIVALS, *rows])
    assert said in text and "of 5 ways to learn" in text and "(grid study)" in text
    # none of these counts: another scale, another schedule, not all prompts, no LODS
    others = {"lods-a": 1, "lods-b": 2, "lods-c": 3, "vsd": 4}
    settings = {
        "lods-a": "system.guidance.guidance_scale=5.0",
        "lods-b": "system.guidance.timestep_schedule=monotone",
    }
    more = study(others, settings=settings)
    more = [r for r in more if r["prior"] != "lods-c" or r["prompt"] != PROMPTS[0]]
    assert told([*RIVALS, *rows, *more])[-1] == text
    # nor are four enough, or five prompts, or a grid with all the rivals, which is no study
    assert told([*RIVALS, *[r for r in rows if r["prior"] != "lods-4"]]) == []
    assert told([*RIVALS, *[r for r in rows if r["prompt"] in PROMPTS[:5]]]) == []
    assert told([*RIVALS, *[{**r, "grid": "pocket"} for r in rows]]) == []


def test_priors_are_compared_at_one_scale():
    distances = {"sds": 50, "vsd-100": 40, "nfsd": 1, "lods-a": 30, "lods-b": 45, "lods-c": 2}
    scale = "system.guidance.guidance_scale=5.0"
    weight = "system.loss.lambda_sds=${div:1,${system.guidance.guidance_scale}}"  # sets no scale
    rows = study(distances, settings={"nfsd": scale, "lods-c": scale, "sds": weight})
    (text,) = told([*RIVALS, *rows])
    assert text == (
        "gaussians (grid study), Frechet distance at one guidance scale for all, 2 LODS "
        "priors: the lowest mean has lods-a (30.0); measurably better "
        "than sds (50.0) and vsd-100 (40.0): lods-a (30.0)."
    )
    # a prior that lacks a prompt is not compared, and a LODS prior that wins by its mean alone
    few = [r for r in rows if r["prior"] != "vsd-100" or r["prompt"] != PROMPTS[0]]
    assert told([*RIVALS, *few])[0].endswith("than sds (50.0): lods-a (30.0) and lods-b (45.0).")
    lucky = [
        r | {"frechet": "400" if r["prompt"] == PROMPTS[0] else "60"} if r["prior"] == "sds" else r
        for r in study({"sds": 0, "lods-a": 55}, settings=None)
    ]
    hard = [
        r | {"frechet": "90" if r["prompt"] in PROMPTS[:2] else "55"}
        if r["prior"] == "lods-a"
        else r
        for r in lucky
    ]
    assert "none is measurably better than all of sds" in told([*RIVALS, *hard])[0]
    assert told([*RIVALS, *[r for r in rows if r["prompt"] in PROMPTS[:5]]]) == []
    assert told([*RIVALS, *[r for r in rows if not r["prior"].startswith("lods-")]]) == []


@pytest.mark.parametrize("third, contest", [("vsd", 1), ("vsd-fast", 1), ("nfsd", 0)])
def test_a_fast_rival_stands_for_its_kind(third, contest):
    (section,) = sections(make_rows(("sds", "csd", third, "lods-lora"), seeds="0"))
    assert section.contest == contest
    # without a judge there is nothing to say
    unjudged = [r | {"object_accuracy": "", "frechet": ""} for r in section.all_runs]
    assert not sections(unjudged)[0].contest


def test_on_how_many_prompts_the_best_is_better_than_sds():
    rows = make_rows(("sds", "lods-lora"), seeds="01")
    for r in rows:
        worse = r["prompt"] in PROMPTS[:3] and r["prior"] == "lods-lora"
        r["frechet"] = {"sds": "50", "lods-lora": "60" if worse else "10"}[r["prior"]]
    (text,) = standing(sections(rows)[0])
    assert text.startswith("lods-lora has the lowest mean") and "than sds on 5 of 8 prompts" in text


def test_names_and_priors_are_explained():
    priors = ("sds", "vsd-100", "lods-lora", "lods-lora-4", "csd-x")
    (_, bullets) = method(sections(make_rows(priors, seeds="0")), None)
    text = bullets.items[0] + bullets.items[1]
    assert "-4 four updates a step of what is learnt and -100 a guidance scale." in text
    assert "sds, the guided eps minus the noise" in text and "lods-lora, the same" in text
    assert "csd, eps" not in text and "-fast" not in text


def test_what_the_code_is_does_not_hang_on_other_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)

    def git(*args):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *args]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for name in ("configs/a.yaml", "docs/table.csv", "evaluation/grids/g.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", "."), git("commit", "-qm", "1")
    before, first = machine.code(), machine.commit()
    (tmp_path / "docs/table.csv").write_text("2")
    (tmp_path / "evaluation/grids/g.yaml").write_text("2")
    git("commit", "-qam", "2")
    assert machine.code() == before and machine.commit() != first
    (tmp_path / "configs/b.yaml").write_text("1")
    new = machine.code()
    (tmp_path / "configs/b.yaml").unlink()
    (tmp_path / "configs/a.yaml").write_text("2")
    edited = machine.code()
    git("commit", "-qam", "3")
    assert len({before, new, edited, machine.code()}) == 4


def test_who_is_best_is_told_over_the_runs_that_all_have():
    rows = [r | {"frechet": "10" if r["prompt"] in PROMPTS[:6] else "90"} for r in RIVALS]
    change = {"csd": 1, "vsd": 2}
    rows = [r | {"frechet": str(float(r["frechet"]) + change.get(r["prior"], 0))} for r in rows]
    # csd lacks the two hard prompts: the mean over its own runs would be the lowest
    rows = [r for r in rows if r["prior"] != "csd" or r["prompt"] in PROMPTS[:6]]
    # and one with few prompts is not compared at all
    few = [r | {"prior": "nfsd", "frechet": "1", "object_accuracy": "1"} for r in rows[:1]]
    (section,) = sections([*rows, *few])
    (text,) = standing(section)
    assert text.startswith("sds has the lowest mean Frechet distance, 10.0 over the 6 runs that")
    assert text.endswith("worse (left out, with fewer than 6 prompts: nfsd).")
    vsd = [r | {"object_accuracy": "1"} for r in rows if r["prior"] == "vsd"]
    rest = [r for r in rows if r["prior"] != "vsd"]
    assert full_marks(sections([*rest, *vsd])[0])[0].startswith("vsd has an object accuracy of 100")
    assert full_marks(sections([*rest, *vsd[:5]])[0]) == []
