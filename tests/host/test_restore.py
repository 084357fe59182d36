"""Checkpoints of another layout than the run's are refused in one line that names the file."""

import copy
import importlib
import random

import pytest
import pytorch_lightning as pl
import torch

import threestudio
from tests.runs import QUIET, ROOT
from threestudio.run.checkpoint import AtomicCheckpointIO
from threestudio.run.resume import (
    Misfit,
    RestoreCheck,
    check_optimizer,
    check_random_states,
    check_structure,
    conform,
)
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.misc import capture_rng_state

OPTIMIZER = {"name": "Adam", "params": {"body.0": {"lr": 0.01}, "body.1": {"lr": 0.02}}}
SYSTEM = {
    "optimizer": OPTIMIZER,
    "scheduler": {"name": "ExponentialLR", "interval": "step", "args": {"gamma": 0.9}},
}
AUTOMATIC = "epoch_loop.automatic_optimization.optim_progress"
VALUES = (
    *(None, -1, 0, True, 10**30, float("nan"), "x", "0.1.0", [], [1, 2], {}, {"step": 1}),
    *(torch.zeros(2, 7), torch.full((1,), float("nan"))),
)


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """``go(mode, content=None)``: a run of the toy, restored from ``content`` as launch.py does."""
    load_extension(ROOT / "tests" / "toy_extension.py")
    folder = tmp_path_factory.mktemp("restore")

    def run(mode, content=None, system=SYSTEM):
        path = folder / "h.ckpt"
        system = threestudio.find("toy-system")(copy.deepcopy(system), resumed=content is not None)
        system.checkpoint_name = f"checkpoint {path}"
        system.set_save_dir(str(folder))
        saver = pl.callbacks.ModelCheckpoint(folder / "ckpts", every_n_train_steps=2, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=4 if content is None else 6,
            **QUIET,
            callbacks=[saver, RestoreCheck(path)],
            plugins=[AtomicCheckpointIO()],
        )
        if content is not None:
            torch.save(content, path)
            check_structure(content, path, mode)
        task = {"train": trainer.fit, "test": trainer.test, "export": trainer.predict}[mode]
        data = threestudio.find("toy-data")(None)
        task(system, datamodule=data, ckpt_path=None if content is None else path)
        trainer.save_checkpoint(folder / "now.ckpt")
        return torch.load(folder / "now.ckpt", weights_only=True)

    return run


@pytest.fixture(scope="module")
def content(go):
    return go("train")


def changed(content, path, value="delete"):
    """A copy with another value at ``path``, or without it."""
    whole = copy.deepcopy(content)
    parent = whole
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(value, str) and value == "delete":
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return whole


FIT, STATES = ("loops", "fit_loop"), ("optimizer_states", 0)
GROUP = (*STATES, "param_groups", 0)
CASES = {
    "no loops": (("loops",), "delete", "it has no loops"),
    "loops of another kind": (("loops",), [], "loops is no dict"),
    "no loop of this mode": (FIT, "delete", "loops has no fit_loop"),
    "progress that is none": ((*FIT, AUTOMATIC), 3, "fit_loop is at step None"),
    "a count that is none": (
        (*FIT, "epoch_loop.batch_progress", "current", "ready"),
        "x",
        "batch_progress.current.ready is no count: x",
    ),
    "a method in its place": (
        (*FIT, "epoch_loop.batch_progress", "current", "reset"),
        5,
        "has reset, which no loop has",
    ),
    "another step": (("global_step",), 3, "fit_loop is at step 4, and global_step is 3"),
    "another epoch": (("epoch",), 7, "fit_loop is in epoch 1, and epoch 7"),
    "a step beyond all": (("global_step",), 10**30, "global_step 10000"),
    "no version": (("pytorch-lightning_version",), "delete", "it has no pytorch-lightning_version"),
    "no version at all": (("pytorch-lightning_version",), "new", "'new' is no version"),
    "an old version": (("pytorch-lightning_version",), "1.9.5", "is of Lightning 1.9.5"),
    "callbacks of another kind": (("callbacks",), [1], "callbacks is no dict"),
    "a callback of another kind": (
        ("callbacks", "NonFiniteGuard"),
        3,
        "callbacks.NonFiniteGuard is",
    ),
    "a callback that lacks a count": (
        ("callbacks", "NonFiniteGuard"),
        {"a": 1},
        "callbacks.NonFiniteGuard has no skipped",
    ),
    "batch steps": (("batch_steps",), ["x"], "batch_steps is no list of counts"),
    "random states": (("rng_state", "torch"), torch.zeros(3), "random states cannot be restored"),
    "no optimizer states": (("optimizer_states",), "delete", "it has no optimizer_states"),
    "another count of optimizers": (
        ("optimizer_states",),
        [],
        "optimizer_states are 0, and the run",
    ),
    "an optimizer of another kind": (
        STATES,
        {"state": {}},
        "optimizer_states[0] has no param_groups",
    ),
    "another count of groups": (
        (*STATES, "param_groups"),
        [],
        "has 0 groups of parameters, and the run has 2",
    ),
    "another count of parameters": ((*GROUP, "params"), [0], "has 1 parameters, and the run has 2"),
    "groups of other names": ((*GROUP, "name"), "body.1", "is body.1, and the run's is body.0"),
    "no betas": ((*GROUP, "betas"), "delete", "has no betas"),
    "betas of another kind": ((*GROUP, "betas"), (0.9, 2), "betas are not between 0 and 1"),
    "a rate of nan": ((*GROUP, "lr"), float("nan"), "lr is no finite number: nan"),
    "a negative rate": ((*GROUP, "lr"), -1.0, "lr is negative"),
    "a state of another shape": (
        (*STATES, "state", 0, "exp_avg"),
        torch.zeros(9, 4),
        "state of body.0: exp_avg has the shape (9, 4), and the parameter (3, 4)",
    ),
    "a state that lacks an entry": ((*STATES, "state", 2, "exp_avg_sq"), "delete", "no exp_avg_sq"),
    "a state of no parameter": ((*STATES, "state", 9), {}, "is of a parameter 9 that no group has"),
    "a step that is none": ((*STATES, "state", 0, "step"), "x", "step is no number from 0"),
    "another count of schedulers": (
        ("lr_schedulers",),
        [],
        "lr_schedulers are 0, and the run has 1",
    ),
    "a scheduler of another kind": (
        ("lr_schedulers", 0, "last_epoch"),
        [],
        "last_epoch is no finite",
    ),
    "a scheduler's method": (("lr_schedulers", 0, "step"), 5, "has step, which is no state"),
    "a tensor that is none": (("state_dict", "body.0.bias"), 3, "body.0.bias is no tensor"),
    "parameters of another shape": (
        ("state_dict", "body.0.bias"),
        torch.zeros(9),
        "does not fit ToySystem: size mismatch for body.0.bias",
    ),
    "parameters of another system": (
        ("state_dict",),
        {"geometry.means": torch.zeros(3, 3)},
        "does not fit ToySystem: Missing key(s)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_checkpoint_is_refused_in_one_line_that_names_it(go, content, case):
    path, value, expected = CASES[case]
    with pytest.raises(UserError) as caught:
        go("train", changed(content, path, value))
    line = str(caught.value)
    assert expected in line and "h.ckpt" in line and "\n" not in line


@pytest.mark.parametrize(
    ("mode", "loop"),
    [("test", "test_loop"), ("export", "predict_loop"), ("validate", "validate_loop")],
)
def test_every_mode_looks_at_what_it_restores(content, mode, loop):
    check_structure(content, "h.ckpt", mode)
    weights = {k: content[k] for k in ("state_dict", "epoch", "global_step")}
    weights["pytorch-lightning_version"] = "2.0.0"
    check_structure(weights, "h.ckpt", mode)  # weights only are enough to look at them
    with pytest.raises(UserError, match=r"h\.ckpt cannot be restored: it has no callbacks: take"):
        check_structure(weights, "h.ckpt", "train")
    for broken in (
        changed(content, ("loops", loop)),
        changed(content, ("loops", loop), 3),
        changed(content, ("callbacks",), 3),
        changed(content, ("global_step",), True),
    ):
        with pytest.raises(UserError, match=r"^checkpoint h\.ckpt cannot be restored: "):
            check_structure(broken, "h.ckpt", mode)


@pytest.mark.parametrize("mode", ["test", "export"])
def test_progress_is_looked_at_in_every_mode(go, content, mode):
    loop = {"test": "test_loop", "export": "predict_loop"}[mode]
    broken = changed(content, ("loops", loop, "batch_progress", "total"), [])
    with pytest.raises(UserError, match=r"batch_progress\.total is no dict"):
        go(mode, broken)
    go(mode, content)


def test_a_good_one_is_continued_bit_for_bit(go, content):
    first, second = (go("train", copy.deepcopy(content)) for _ in range(2))
    assert first["global_step"] == 6
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name])
        assert not torch.equal(value, content["state_dict"][name])


def _paths(content, above=()):
    if isinstance(content, dict):
        items = content.items()
    else:
        items = enumerate(content) if isinstance(content, list) and len(content) < 50 else ()
    for key, value in items:
        yield (*above, key)
        yield from _paths(value, (*above, key))


def mutated(content, rng):
    """(path, value, a copy of ``content`` with that value there, or without it)."""
    path, value = rng.choice(list(_paths(content))), rng.choice((*VALUES, "delete"))
    return path, value, changed(content, path, value)


def _tried(go, content, n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        path, value, broken = mutated(content, rng)
        mode = rng.choice(("train", "train", "test", "export"))
        if {"state_dict", "epoch", "global_step"} & {path[0]} and len(path) == 1:
            continue  # read_checkpoint refuses those
        try:
            go(mode, broken)
        except UserError as error:
            assert "h.ckpt" in str(error) and len(str(error)) < 400, (path, value)


def test_what_is_changed_at_random_is_refused_or_does_no_harm(go, content):
    _tried(go, content, 25, seed=0)


@pytest.mark.slow
def test_so_is_much_more_of_it(go, content):
    _tried(go, content, 500, seed=1)


# --- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam"])
def test_every_optimizer_takes_its_own_state_and_no_other(name):
    def make(shape):
        parameter = torch.nn.Parameter(torch.ones(shape))
        options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
        optimizer = getattr(torch.optim, name)([parameter], lr=0.1, **options)
        parameter.grad = torch.ones(shape)
        optimizer.step()
        return optimizer

    live, other = make((4, 2)), make((3, 2))
    check_optimizer(live.state_dict(), live, "o")
    with pytest.raises(Misfit, match=r"has the shape \(3, 2\), and the parameter \(4, 2\)"):
        check_optimizer(other.state_dict(), live, "o")


def test_an_optimizer_of_others_is_looked_at_as_far_as_it_can_be():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            raise RuntimeError("only within my trainer")

    live = Own([torch.nn.Parameter(torch.ones(2))])
    state = live.state_dict()
    state["state"][0] = {"anything": 3}
    check_optimizer(state, live, "o")
    state["state"][1] = {}
    with pytest.raises(Misfit, match="that no group has"):
        check_optimizer(state, live, "o")


def test_random_states_are_tried_and_put_back():
    before = capture_rng_state()
    other = copy.deepcopy(before)
    torch.rand(3)
    now = capture_rng_state()
    check_random_states(other, "h.ckpt")
    for state in (other | {"numpy": ["x"]}, {}, 3, []):
        with pytest.raises(UserError, match=r"^h\.ckpt: the checkpoint's random states"):
            check_random_states(state, "h.ckpt")
    check_random_states(None, "h.ckpt")
    assert torch.equal(capture_rng_state()["torch"], now["torch"])


@pytest.mark.parametrize(
    ("value", "live", "fits"),
    [
        ({"a": 1, "b": 2}, {"a": 3}, True),
        ({}, {"a": 3}, False),
        (3.5, 1, True),
        (True, 1, False),
        (float("inf"), 1, False),
        (None, "x", True),
        (3, "x", False),
        ([1, 2], (1.0, 2.0), True),
        ([1], (1.0, 2.0), False),
        (1, True, False),
        ("anything", None, True),
    ],
)
def test_a_layout_is_compared(value, live, fits):
    if fits:
        conform(value, live, "x")
    else:
        with pytest.raises(Misfit):
            conform(value, live, "x")


def test_states_of_densification_are_of_the_gaussians_in_the_checkpoint(lods):
    densify = importlib.import_module("lods.gaussians.densify")

    def state(**values):
        return {"name": "default", "state": values}

    for value in (torch.zeros(3), None):
        densifier = densify.Densifier("default", {})
        densifier.load_state_dict(state(grad2d=value), "cpu", 3)
    for value in (torch.zeros(4), torch.zeros(3, 1), 7, "x"):
        with pytest.raises(ValueError, match=r"densification state is damaged \(grad2d is not"):
            densify.Densifier("default", {}).load_state_dict(state(grad2d=value), "cpu", 3)
