"""``trainer.callbacks`` of a config: callbacks by a registered name or an import path."""

import shlex
import sys
from pathlib import Path

import pytest

from tests.host.test_launch import cli, last, train  # noqa: F401 (a fixture)
from tests.runs import ROOT
from threestudio.run.named_callbacks import said_again
from threestudio.run.preflight import read_config
from threestudio.utils.config import parse_overrides
from threestudio.utils.errors import UserError

RECORDER = "trainer.callbacks=[{name: toy-recorder, path: seen.txt}]"
THEIRS = """
from pathlib import Path
from pytorch_lightning.callbacks import Callback
Path("imported.txt").touch()
class Counter(Callback):
    def __init__(self, every: int = 1):
        self.every = every
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.every == 0:
            with open("counted.txt", "a") as file:
                file.write(f"{trainer.global_step} ")
class NoCallback: pass
"""


@pytest.fixture(autouse=True)
def extension(cli):  # noqa: F811
    file = Path("custom", "toy_callbacks.py")
    file.symlink_to(ROOT / "tests" / "toy_callbacks.py")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module ``their_callbacks`` that Python finds, and one whose import fails."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "their_callbacks.py").write_text(THEIRS)
    (tmp_path / "site" / "broken_callbacks.py").write_text("raise RuntimeError('half\\nbaked')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("their_callbacks", None)


def refusal(result):
    """The one line that a run was refused with, before it made anything."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert not Path("outputs").exists()
    return lines[0].removeprefix("error: ")


# --- they run -----------------------------------------------------------------------------------


def test_a_registered_callback_runs_in_every_mode(cli):  # noqa: F811
    assert train(cli, RECORDER)[0] == 0
    for mode in ("--validate", "--test", "--export"):
        again = ("--config", "toy.yaml", mode, "system.prompt=p", f"resume={last()}")
        assert cli(*again, RECORDER)[0] == 0
    stages = [line.split()[0] for line in Path("seen.txt").read_text().splitlines()]
    assert stages == ["fit", "test", "validate", "test", "predict"]


def test_it_comes_after_those_of_every_run(cli):  # noqa: F811
    assert train(cli, RECORDER)[0] == 0
    before = set(Path("seen.txt").read_text().splitlines()[0].split())
    ours = {"RestoreCheck", "CustomProgressBar", "CodeSnapshotCallback", "LearningRateMonitor"}
    assert ours <= before


def test_a_class_is_found_by_its_import_path_and_gets_its_arguments(cli, package):  # noqa: F811
    Path("more.yaml").write_text(
        "trainer: {callbacks: [{name: their_callbacks.Counter, every: 2}, toy-system-is-none]}"
    )
    Path("last.yaml").write_text(
        "trainer: {callbacks: [{name: their_callbacks.Counter, every: 2}]}"
    )
    status = cli("--config", "toy.yaml", "more.yaml", "last.yaml", "--train", "system.prompt=p")[0]
    assert status == 0 and Path("counted.txt").read_text() == "2 4 "


def test_a_progress_bar_takes_the_place_of_ours(cli):  # noqa: F811
    name = "pytorch_lightning.callbacks.TQDMProgressBar"
    callbacks = f"trainer.callbacks=[{name}, {{name: toy-recorder, path: seen.txt}}]"
    assert train(cli, callbacks)[0] == 0
    before = Path("seen.txt").read_text().split()
    assert "TQDMProgressBar" in before and "CustomProgressBar" not in before


def test_an_empty_list_and_null_are_none(cli):  # noqa: F811
    assert train(cli, "trainer.callbacks=[]")[0] == 0
    assert train(cli, "trainer.callbacks=null", prompt="q")[0] == 0


# --- they are refused before anything is built --------------------------------------------------


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("toy-recorder", "trainer.callbacks takes a list, ['toy-recorder'], not a single value"),
        ("[3]", "trainer.callbacks[0] takes a name, or a mapping of name and arguments, not 3"),
        ("[a, {path: x}]", "trainer.callbacks[1] takes a name, or a mapping of name and arguments"),
        ("[{name: a, 3: b}]", "trainer.callbacks[0] takes arguments by their names"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_config(cli, value, line):  # noqa: F811
    words = ["system.prompt=p", f"trainer.callbacks={value}"]
    with pytest.raises(UserError) as caught:
        read_config(["toy.yaml"], words, "train")
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("toy-recoder", "did you mean 'toy-recorder'?"),
        ("EarlyStopping", "did you mean 'pytorch_lightning.callbacks.EarlyStopping'?"),
        ("pytorch_lightning.callbacks.EarlyStoping", "did you mean 'EarlyStopping'?"),
        ("their_callbacks.Conter", "the module their_callbacks has no 'Conter': did you mean 'Cou"),
        ("their_calbacks.Counter", "is neither a registered callback nor the path of one"),
        ("..Counter", "is neither a registered callback nor the path of one"),
        ("toy-system", "toy-system is no callback"),
        ("their_callbacks.NoCallback", "their_callbacks.NoCallback is no callback"),
        ("broken_callbacks.Any", "broken_callbacks cannot be imported: RuntimeError: baked"),
        ("pytorch_lightning.callbacks.ModelCheckpoint", "writes files wherever its arguments say"),
        ("pytorch_lightning.callbacks.OnExceptionCheckpoint", "writes files wherever"),
        ("pytorch_lightning.callbacks.spike.SpikeDetection", "writes files wherever"),
    ],
)
def test_a_name_that_means_no_callback(cli, package, entry, line):  # noqa: F811
    said = refusal(train(cli, f"trainer.callbacks=[{{name: toy-recorder, path: x}}, {entry}]"))
    assert said.startswith("trainer.callbacks[1]: ") and line in said


def test_no_module_of_the_standard_library_is_imported(cli):  # noqa: F811
    said = refusal(train(cli, "trainer.callbacks=[antigravity.Callback]"))
    assert "Python's own library" in said and "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "path: x, evry: 2",
            "trainer.callbacks[0].evry: toy-recorder has no argument 'evry': did you mean 'every'?",
        ),
        (
            "every: 2",
            "trainer.callbacks[0].path is missing: {name: toy-recorder, path: ...}",
        ),
        ("path: x, every: often", "trainer.callbacks[0].every takes int, not 'often'"),
        ("path: x, every: true", "trainer.callbacks[0].every takes int, not true"),
        ("path: x, share: a", "trainer.callbacks[0].share takes float or int or null, not 'a'"),
    ],
)
def test_arguments_that_the_class_does_not_take(cli, arguments, line):  # noqa: F811
    assert refusal(train(cli, f"trainer.callbacks=[{{name: toy-recorder, {arguments}}}]")) == line


def test_an_argument_that_only_the_class_can_judge(cli):  # noqa: F811
    said = refusal(train(cli, "trainer.callbacks=[{name: toy-recorder, path: x, every: 0}]"))
    assert said == "trainer.callbacks[0] (toy-recorder): every must be above 0, not 0"


# --- saved configs ------------------------------------------------------------------------------

COUNTER = "trainer.callbacks=[{name: their_callbacks.Counter, every: 2}]"
PARSED = "outputs/toy/p/configs/parsed.yaml"


def test_a_saved_config_imports_nothing_by_itself(cli, package):  # noqa: F811
    assert train(cli, COUNTER)[0] == 0
    sys.modules.pop("their_callbacks")
    Path("imported.txt").unlink()
    resume = ("--config", PARSED, "--train", f"resume={last()}", "trainer.max_steps=6")
    status, _, err = cli(*resume)
    assert status == 2 and not Path("imported.txt").exists()
    assert f"the saved config {PARSED} names" in err and "trainer.callbacks=[]" in err
    assert cli(*resume, "trainer.callbacks=[]")[0] == 0
    assert not Path("imported.txt").exists()


def test_a_saved_config_names_registered_callbacks(cli):  # noqa: F811
    assert train(cli, RECORDER)[0] == 0
    assert cli("--config", PARSED, "--test", f"resume={last()}")[0] == 0
    assert Path("seen.txt").read_text().split()[0] == "fit"
    assert len(Path("seen.txt").read_text().splitlines()) == 3


def test_the_command_that_resumes_says_the_import_paths_again(cli, package):  # noqa: F811
    status, out, _ = train(cli, COUNTER, "system.signal_at=1")
    assert status == 130
    command = shlex.split(out.splitlines()[-1].split("resume with: python launch.py ")[1])
    assert cli(*command, "system.signal_at=-1")[0] == 0
    assert Path("counted.txt").read_text() == "2 4 "


def test_what_is_said_again_is_read_as_it_was():
    callbacks = [{"name": "a.B", "texts": ["x: y", '"', "#1"], "n": None, "share": 0.5}, "toy-one"]
    cfg = parse_overrides([])
    cfg["trainer"] = {"callbacks": callbacks}
    (word,) = said_again(cfg)
    assert parse_overrides([word]).trainer.callbacks == callbacks
