"""Runs on Ray, of which there is a stand-in here: where it listens, and what it is given."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import evaluate
from evaluation import command, machine, on_ray
from evaluation.batch import BatchError
from evaluation.grid import Run
from evaluation.on_ray import OnRay
from evaluation.table import Table, begun

GRID = """
methods: {sds: {guidance_type: lods-sds-guidance}}
representations: {2d: {configs: [evaluation/playground.yaml], steps: 25}}
prompts: [a red car]
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
true_renders: false
"""


@pytest.fixture
def ray(monkeypatch):
    """A stand-in that does each task when it is waited for, and keeps what it was told."""
    told = {"cancelled": [], "got": []}

    def remote(**options):
        told["options"] = options

        def wrap(function):
            return SimpleNamespace(remote=lambda *args: _Ref(function, args))

        return wrap

    class _Ref:
        def __init__(self, function, args):
            self.function, self.args = function, args

    def get(ref):
        told["got"].append(ref)
        return ref.function(*ref.args)

    stand_in = SimpleNamespace(
        __version__="2.52.0",
        exceptions=SimpleNamespace(RayError=type("RayError", (Exception,), {})),
        util=SimpleNamespace(get_node_ip_address=lambda: told.get("ip", "127.0.0.1")),
        init=lambda **options: told.update(init=options),
        remote=remote,
        wait=lambda refs, num_returns: (refs[:num_returns], refs[num_returns:]),
        get=get,
        cancel=lambda ref, force: told["cancelled"].append(ref),
        cluster_resources=lambda: {"CPU": 8.0, "GPU": 1.0},
        shutdown=lambda: told.update(shutdown=True),
    )
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return told


def test_runs_are_tasks_of_ray(ray, tmp_path, monkeypatch):
    def task(task, packed, token):
        argument = task["argument"]
        if argument["run"]["seed"] == 2:
            raise RuntimeError("the machine\nis lost")
        row = begun(Run.of(argument["run"]), argument["threads"], "") | {"status": "ok"}
        return {"value": {"row": row, "curves": [], "sheet": None}, "files": b""}

    monkeypatch.setattr(on_ray, "run_elsewhere", task)
    monkeypatch.setattr(command, "WORK", tmp_path / "work")
    (tmp_path / "try.yaml").write_text(GRID)
    arguments = ["--ray", "auto", "--threads", "3", "--out", str(tmp_path / "out")]
    status = evaluate.main([str(tmp_path / "try.yaml"), *arguments])
    assert status == 1 and ray["shutdown"] and len(ray["got"]) == 8
    assert ray["options"] == {"num_cpus": 3, "num_gpus": 0.0, "max_retries": 1}
    assert ray["init"]["address"] == "auto"
    assert ray["init"]["runtime_env"]["working_dir"] == str(machine.ROOT)
    rows = {int(r["seed"]): r for r in Table(tmp_path / "out").rows()}
    assert len(rows) == 8 and rows[2]["status"] == "Ray: the machine is lost"
    assert {r["status"] for seed, r in rows.items() if seed != 2} == {"ok"}
    assert {r["threads"] for r in rows.values()} == {"3"}


@pytest.mark.parametrize(
    "threads, gpus, workers, slots",
    [(2, 0, None, 4), (2, 0.5, None, 2), (16, 0, None, 1), (2, 0, 9, 9)],
)
def test_ray_is_given_what_it_has_room_for(ray, threads, gpus, workers, slots):
    assert OnRay("", threads, gpus, workers).slots == slots


def test_an_unreachable_cluster_is_one_line(ray, monkeypatch):
    def refuse(**options):
        raise ConnectionError("no such\naddress")

    monkeypatch.setattr(sys.modules["ray"], "init", refuse)
    with pytest.raises(BatchError) as error:
        OnRay("a:1", 1, 0, 1)
    assert str(error.value) == "Ray at a:1: no such address"


def test_a_cluster_that_is_started_is_of_this_machine_and_asks_for_a_token(ray):
    OnRay("", 1, 0, 1)
    assert ray["init"]["address"] == "local"  # none that runs here already
    assert ray["init"]["include_dashboard"] is False
    environment = on_ray.os.environ
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"  # which is: loopback
    assert environment["RAY_AUTH_MODE"] == "token"
    first = environment["RAY_AUTH_TOKEN"]
    OnRay("", 1, 0, 1)
    assert len(first) == 64 and environment["RAY_AUTH_TOKEN"] != first


def test_machines_find_the_modules_of_jobs(ray, tmp_path):
    OnRay("", 1, 0, 1)
    path = ray["init"]["runtime_env"]["env_vars"]["PYTHONPATH"]
    assert str(machine.ROOT) in path.split(on_ray.os.pathsep)
    OnRay("a:1", 1, 0, 1, ship=[tmp_path])
    assert ray["init"]["runtime_env"] == {"py_modules": [str(tmp_path)]}


def test_errors_of_ray_are_one_plain_line():
    assert on_ray._line(RuntimeError("\x1b[36mray::task()\x1b[39m\nbroke")) == "ray::task() broke"


def test_a_cluster_that_would_listen_elsewhere_is_refused(ray):
    ray["ip"] = "192.0.2.2"
    with pytest.raises(BatchError, match=r"would listen on 192\.0\.2\.2"):
        OnRay("", 1, 0, 1)
    assert ray["shutdown"]
    OnRay("192.0.2.2:6379", 1, 0, 1)  # that was asked for


def test_the_token_of_another_cluster_is_its_own(ray, monkeypatch, capsys):
    OnRay("a:1", 1, 0, 1)
    assert "RAY_AUTH_TOKEN" not in on_ray.os.environ
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and "a:1 is used without a token" in line
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    OnRay("a:1", 1, 0, 1)
    assert capsys.readouterr().out == ""


def test_authentication_that_was_switched_off_stays_so(ray, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    OnRay("", 1, 0, 1)
    assert "RAY_AUTH_TOKEN" not in on_ray.os.environ


@pytest.mark.parametrize("address", ["", "a:1"])
def test_a_ray_without_tokens_is_refused(ray, monkeypatch, address):
    monkeypatch.setattr(sys.modules["ray"], "__version__", "2.51.2")
    with pytest.raises(BatchError, match=r"Ray 2\.51\.2 has no token .* 'ray>=2\.52\.0'"):
        OnRay(address, 1, 0, 1)
    assert "init" not in ray


def test_a_missing_token_is_one_line(ray, monkeypatch):
    def refuse(**options):
        raise sys.modules["ray"].exceptions.RayError("there is no\ntoken")

    monkeypatch.setattr(sys.modules["ray"], "init", refuse)
    with pytest.raises(BatchError, match="Ray at a:1: there is no token"):
        OnRay("a:1", 1, 0, 1)


def test_secrets_do_not_go_to_other_machines(tmp_path, monkeypatch):
    """Untracked files are left out, except code; so is what is hidden, or a link."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    kept = ["launch.py", "configs/new.yaml", "custom/new.py", "pocket/shapes/judge.safetensors"]
    left = [".env", "custom/.env", "a key[1]!.pem", "configs/token.json", "docs/a.md", "#1"]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "linked.py").symlink_to("launch.py")
    tracked = ["launch.py", "pocket/shapes/judge.safetensors"]
    subprocess.run(["git", "add", *tracked], cwd=tmp_path, check=True)
    (tmp_path / ".git/info/exclude").write_text("\n".join(machine.not_for_others()))
    names = "\0".join([*kept, *left, "linked.py"])
    ask = dict(cwd=tmp_path, input=names, capture_output=True, text=True)
    found = subprocess.run(["git", "check-ignore", "--no-index", "--stdin", "-z"], **ask).stdout
    assert found.split("\0")[:-1] == [*left, "linked.py"]
