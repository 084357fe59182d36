"""Jobs that cost nothing: in processes of this machine, stopped, killed, resumed, and on Ray."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import psutil
import pytest

from evaluation import batch, on_ray, processes
from evaluation.batch import BatchError, Folders, Job, Lock, Outcome, carry_out, run, table
from tests.runs import ROOT
from tests.study.jobs import double, fill


def say(*words, then=0):
    code = f"import sys; print(*{words!r}); sys.exit({then})"
    return [sys.executable, "-c", code]


def test_functions_and_commands_are_done_once(tmp_path):
    jobs = [
        Job("seven", double, tmp_path / "7", argument=7),
        Job("words", say("a", "b"), tmp_path / "words"),
    ]
    said = []
    assert run(jobs, workers=2, tell=said.append)
    book = Folders(jobs)
    assert [book.state(job)["state"] for job in jobs] == ["done", "done"]
    assert book.state(jobs[0])["value"] == 14
    assert (tmp_path / "words/log.txt").read_text() == "a b\n"
    assert [line[:6] for line in said] == ["[1/2] ", "[2/2] "]
    assert {line[6:].split(": done in")[0] for line in said} == {"seven", "words"}
    assert run(jobs, tell=said.append) and len(said) == 2
    assert (tmp_path / "7/calls").read_text() == "x"
    # other work under the same name is not what was done
    again = Job("seven", double, tmp_path / "7", argument=8, key="8")
    assert run([again], tell=said.append) and Folders([again]).state(again)["value"] == 16


def test_a_failure_is_kept_with_its_reason_and_repeated_when_asked(tmp_path):
    jobs = [
        Job("unlucky", double, tmp_path / "a", argument=13),
        Job("broken", say("it is", "broken", then=3), tmp_path / "b"),
        Job("nothing", ["/no/such/program"], tmp_path / "c"),
    ]
    said = []
    assert not run(jobs, workers=3, tell=said.append)
    errors = [Folders(jobs).state(job)["error"] for job in jobs]
    assert errors[0] == "13 brings no luck"
    assert errors[1] == "the process ended with status 3: it is broken"
    assert "/no/such/program cannot be started (No such file" in errors[2]
    assert not run(jobs, tell=said.append) and len(said) == 3
    assert not run(jobs[:1], retry=True, tell=said.append) and len(said) == 4
    assert (tmp_path / "a/calls").read_text() == "xx"


def test_the_table_says_how_each_job_stands(tmp_path):
    jobs = [Job(name, say(name), tmp_path / name) for name in ("done", "held", "cut", "new", "odd")]
    assert run(jobs[:1], tell=lambda line: None)
    book = Folders(jobs)
    _, claim = book.start(jobs[1])
    book.start(jobs[2])[1].release()  # as if it had been killed
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/job.json").write_text('{"state": "done"}')  # of others
    rows = [line.split()[:2] for line in table(jobs).splitlines()]
    assert rows == [
        ["job", "state"],
        ["done", "done"],
        ["held", "running"],
        ["cut", "stopped"],
        ["new", "waiting"],
        ["odd", "waiting"],
    ]
    said = []
    assert not run(jobs, tell=said.append)  # one is somebody else's
    assert "held: left to another process" in " ".join(said)
    claim.release()
    assert run(jobs, tell=said.append)


def test_a_full_disk_ends_the_batch_with_one_line(tmp_path):
    jobs = [
        Job("full", fill, tmp_path / "full"),
        Job("next", double, tmp_path / "next", argument=1),
    ]
    with pytest.raises(BatchError, match=r"cannot be written \(No space left.*make room; the same"):
        run(jobs, tell=lambda line: None)
    assert [line.split()[1] for line in table(jobs).splitlines()[1:]] == ["stopped", "waiting"]


def test_jobs_that_cannot_be_done_are_refused(tmp_path):
    with pytest.raises(BatchError, match="must be a function at the top of a module"):
        Job("local", lambda argument, folder: None, tmp_path).task()
    twice = [Job(name, say(name), tmp_path) for name in "ab"]
    with pytest.raises(BatchError, match=r"2 jobs have the folder .*: give each one of its own"):
        run(twice)
    with pytest.raises(BatchError, match="a: this job needs a folder of its own"):
        run([Job("a", say("a"))])


def test_a_temporary_folder_leaves_nothing(tmp_path):
    where = processes.Local(1, scratch=tmp_path / "scratch")
    where.submit(Job("five", double, argument=5))
    [(_, outcome)] = where.wait()
    assert outcome.value == 10 and outcome.error == "" and outcome.log == "doubling 5\n"
    assert outcome.seconds > 0 and list((tmp_path / "scratch").iterdir()) == []


def test_threads_and_devices_are_those_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(n, [sys.executable, "-c", code], tmp_path / n, threads=2) for n in "ab"]
    assert run(jobs, workers=2, tell=lambda line: None)
    assert {(tmp_path / n / "log.txt").read_text() for n in "ab"} == {"2 3\n", "2 5\n"}


class Once:
    """A backend that interrupts at the second job."""

    slots = 1

    def __init__(self):
        self.did = []

    def submit(self, job):
        return job

    def wait(self):
        if self.did:
            raise KeyboardInterrupt
        self.did.append(1)
        return [(self.job, Outcome("value"))]


def test_a_command_that_is_stopped_may_save_what_it_has(tmp_path):
    code = (
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    open('saved', 'w').write('x')\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(600)\n"
    )
    job = Job("long", [sys.executable, "-c", code], tmp_path / "long")
    (tmp_path / "long").mkdir()
    where = processes.Local(1)
    process = where.submit(job)
    while not (tmp_path / "long/ready").exists():
        assert process.status() is None
        time.sleep(0.01)
    where.close()
    assert (tmp_path / "long/saved").read_text() == "x" and process.status() is not None


@pytest.mark.parametrize("preload", [[], ["tests.study.jobs"]], ids=["Process", "Forked"])
def test_a_killed_batch_leaves_no_process_and_goes_on(tmp_path, preload):
    code = (
        "import sys; from pathlib import Path; from evaluation.batch import Job, run\n"
        "from tests.study.jobs import wait_for_ever\n"
        f"jobs = [Job('w', wait_for_ever, Path({str(tmp_path / 'w')!r}))]\n"
        f"run(jobs, preload={preload})\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    job = Job("w", double, tmp_path / "w", argument=2)
    try:
        while not (tmp_path / "w/pid").exists():
            assert driver.poll() is None
            time.sleep(0.02)
        assert table([job]).splitlines()[1].split() == ["w", "running"]
        child = psutil.Process(int((tmp_path / "w/pid").read_text()))
    finally:
        driver.kill()
        driver.wait()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    assert table([job]).splitlines()[1].split() == ["w", "stopped"]
    assert run([job], tell=lambda line: None)


def test_a_signal_is_an_interrupt_and_then_what_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), batch.stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_lock_is_held_once(tmp_path):
    lock = Lock.take(tmp_path / "x")
    assert lock is not None and Lock.take(tmp_path / "x") is None
    lock.release()
    assert Lock.take(tmp_path / "x") is not None


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path):
    """The folder may be somebody else's, and what the lock says would replace the file."""
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        Lock.take(tmp_path / "x")
    assert (tmp_path / "precious").read_text() == "kept"


# --- on Ray, without Ray --------------------------------------------------------------------------


def test_files_go_to_another_machine_and_back(tmp_path):
    job = Job("far", double, tmp_path / "here", argument=4)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/calls").write_text("xx")  # of a time before
    task = job.task() | {"folder": str(tmp_path / "not of this machine")}
    found = on_ray.run_elsewhere(task, on_ray.pack(job.folder), "token")
    assert found["value"] == 8 and not (tmp_path / "not of this machine").exists()
    on_ray.unpack(found["files"], job.folder)
    assert (tmp_path / "here/calls").read_text() == "xxx"
    assert (tmp_path / "here/log.txt").read_text() == "doubling 4\n"


def test_a_folder_that_is_shared_is_used_where_it_is(tmp_path):
    job = Job("near", double, tmp_path, argument=4)
    (tmp_path / ".claim").write_text("token")
    found = on_ray.run_elsewhere(job.task(), b"", "token")
    assert found["value"] == 8 and found["files"] == b""
    assert (tmp_path / "calls").read_text() == "x"


def test_files_from_elsewhere_stay_in_their_folder(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    (tmp_path / "in").mkdir()
    with pytest.raises(tarfile.TarError):
        on_ray.unpack(file.getvalue(), tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_a_stopped_backend_keeps_what_is_recorded(tmp_path):
    jobs = [Job(name, say(name), tmp_path / name) for name in "abc"]
    where = Once()
    where.submit = lambda job: setattr(where, "job", job) or job
    with pytest.raises(KeyboardInterrupt):
        carry_out(jobs, where, Folders(jobs), lambda *_: None)
    rows = [line.split()[1] for line in table(jobs).splitlines()[1:]]
    assert rows == ["done", "stopped", "waiting"]
    assert json.loads((tmp_path / "a/job.json").read_text())["value"] == "value"
