"""The queue of the studio: runs in their turn, stopped, gone on with, and found again."""

import errno
import json
import os
import signal
from dataclasses import replace

import pytest
from lods import host
from lods.studio import processes
from lods.studio.queue import Refused
from lods.studio.records import plain_file

from tests.studio.toy import (
    FORM,
    QUICK,
    REQUEST,
    ask,
    let_end,
    queue_of,
    server_process,
    state,
    stop_all,
    until,
)


@pytest.fixture
def queue(tmp_path):
    yield queue_of(tmp_path)
    stop_all(tmp_path)


def is_in(queue, name, wanted):
    return lambda: state(queue, name) == wanted


def test_one_run_at_a_time_in_the_order_in_which_they_were_asked_for(queue):
    first, second, third = (queue.add(REQUEST, "good") for _ in range(3))
    until(is_in(queue, first, "running"))
    assert [state(queue, name) for name in (second, third)] == ["queued", "queued"]
    assert queue.waiting() == [second, third]
    let_end(queue, first)
    until(is_in(queue, second, "running"))
    assert state(queue, first) == "done" and state(queue, third) == "queued"


def test_a_run_that_fails_is_failed_with_its_reason_and_can_be_tried_again(queue):
    name = queue.add(REQUEST, "good")
    let_end(queue, name, 3)
    until(is_in(queue, name, "failed"))
    assert "status 3" in queue.shelf.find(name).error
    let_end(queue, name, 0)
    queue.resume(name)
    until(is_in(queue, name, "done"))


def test_a_cancelled_run_stops_as_a_training_does_and_goes_on_when_asked(queue):
    name = queue.add(REQUEST, "good")
    until(is_in(queue, name, "running"))
    queue.cancel(name)
    until(is_in(queue, name, "stopped"))
    queue.resume(name)
    until(is_in(queue, name, "running"))
    assert queue.shelf.find(name).process["attempt"] == 2


def test_a_run_that_does_not_heed_is_killed_after_a_while(queue):
    queue.patience = 0.2
    name = queue.add(REQUEST, "good")
    until(is_in(queue, name, "running"))
    os.kill(queue.shelf.find(name).process["pid"], signal.SIGSTOP)  # it hears nothing
    queue.cancel(name)
    until(is_in(queue, name, "stopped"))


def test_a_run_that_is_stopping_is_not_asked_twice_by_the_next_server(queue, tmp_path, monkeypatch):
    """Asked twice, a training would end without saving."""
    name = queue.add(REQUEST, "good")
    until(is_in(queue, name, "running"))
    process = queue.shelf.find(name).process
    os.kill(process["pid"], signal.SIGSTOP)  # it is slow to save
    queue.cancel(name)
    asked = []
    monkeypatch.setattr(processes, "ask", lambda *words: asked.append(words))
    another = queue_of(tmp_path)
    another.recover()
    assert state(another, name) == "stopping" and asked == []
    another.patience = 0.0  # much later
    another.tick()
    assert asked == [(process["pid"], process["who"], signal.SIGTERM)]
    os.kill(process["pid"], signal.SIGCONT)
    until(is_in(queue, name, "stopped"))


def test_what_is_taken_out_of_the_queue_is_never_begun(queue):
    first, second = (queue.add(REQUEST, "good") for _ in range(2))
    queue.cancel(second)
    let_end(queue, first)
    until(is_in(queue, first, "done"))
    assert state(queue, second) == "stopped"
    assert not (queue.shelf.root / second / "process.json").exists()


def test_a_killed_run_is_interrupted_and_the_next_server_goes_on_with_it(queue, tmp_path):
    name = queue.add(REQUEST, "good")
    until(is_in(queue, name, "running"))
    os.kill(queue.shelf.find(name).process["pid"], signal.SIGKILL)
    until(is_in(queue, name, "interrupted"))
    another = queue_of(tmp_path)
    another.recover()
    until(is_in(another, name, "running"))


def test_what_cannot_begin_is_told_and_not_tried_for_ever(tmp_path):
    queue = queue_of(tmp_path)
    queue._program = ("python3", "-c", "import sys; sys.exit('error: no such thing')")
    name = queue.add(REQUEST, "good")
    until(is_in(queue, name, "failed"))
    assert queue.shelf.find(name).error == "no such thing"


def test_a_pid_that_another_process_has_now_is_neither_alive_nor_ended(queue):
    name = queue.add(QUICK, "good")
    until(is_in(queue, name, "done"))
    mine = processes.identity(os.getpid())
    assert processes.is_alive(os.getpid(), mine)
    earlier = f"{os.getpid()} 12345 {mine.split()[2]}"
    assert not processes.is_alive(os.getpid(), earlier)
    processes.ask(os.getpid(), earlier, signal.SIGKILL)  # or this test would not go on


def test_a_run_outlives_its_server_and_is_found_again(tmp_path):
    """After kill -9 of the server."""
    with server_process(tmp_path) as (port, process):
        names = [json.loads(ask(port, "POST", "/api/runs", FORM)[2])["name"] for _ in range(2)]
        until((tmp_path / names[0] / "process.json").exists)
        process.kill()
        process.wait()
    begun = json.loads((tmp_path / names[0] / "process.json").read_text())
    assert processes.is_alive(begun["pid"], begun["who"])
    queue = queue_of(tmp_path)
    try:
        queue.recover()
        assert [state(queue, name) for name in names] == ["running", "queued"]
        let_end(queue, names[0])
        until(is_in(queue, names[1], "running"))
        assert state(queue, names[0]) == "done"
        assert json.loads((tmp_path / names[0] / "process.json").read_text()) == begun
    finally:
        stop_all(tmp_path)


def test_of_two_servers_only_one_run_comes_in_a_folder(queue, tmp_path):
    """A server that was killed before the run said who it is: the next one starts a second."""
    name = queue.add(REQUEST, "good")
    another = queue_of(tmp_path)
    another.tick()
    children = [q._children[name] for q in (queue, another)]
    until(lambda: any(child.poll() is not None for child in children))
    until(is_in(queue, name, "running"))
    lost = next(child for child in children if child.poll() is not None)
    assert lost.returncode == 0 and queue.shelf.find(name).process["pid"] != lost.pid
    assert state(another, name) == "running"


def test_only_what_is_over_is_removed_and_only_what_the_studio_has_made(queue, tmp_path):
    name = queue.add(REQUEST, "good")
    until(is_in(queue, name, "running"))
    with pytest.raises(Refused, match="cancel it first"):
        queue.remove(name)
    wish = tmp_path / name / "studio.json"
    before = wish.read_text()
    wish.write_text("{")
    with pytest.raises(Refused, match="cancel it first"):
        queue.remove(name)  # nor a run whose folder is damaged
    wish.write_text(before)
    let_end(queue, name)
    until(is_in(queue, name, "done"))
    queue.remove(name)
    assert queue.shelf.find(name) is None and not list(tmp_path.glob("*car*"))
    other = tmp_path / "by-hand"
    other.mkdir()
    (other / "request.json").write_text(json.dumps(REQUEST.plain()))
    with pytest.raises(Refused, match="not made by the studio"):
        queue.remove("by-hand")
    assert (other / "request.json").exists()


def test_progress_is_what_the_files_of_the_run_say(queue):
    from lods.studio.progress import progress

    name = queue.add(REQUEST, "good")
    run = queue.shelf.root / name / "run" / REQUEST.key
    until((run / "ckpts" / "last.ckpt").exists)
    entry = queue.shelf.find(name)
    assert progress(entry) == {"stage": "training", "step": 20, "of": 40}
    frames = run / "save" / "it40-test"
    frames.mkdir(parents=True)
    (frames / "0.png").touch()
    assert progress(entry) == {"stage": "rendering", "step": 1, "of": 4}
    (run / "save" / "it40-test.mp4").touch()
    assert progress(entry)["stage"] == "exporting"


def test_a_run_for_which_there_is_no_process_now_waits_and_is_tried_again(queue, monkeypatch):
    """Out of files, processes or disk for a moment, a queue must not fail from end to end."""

    def refuse(*words, **options):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", refuse)
        name = queue.add(QUICK, "good")
        with pytest.raises(OSError):
            queue.tick()
        assert queue.shelf.find(name).state == "queued"
    until(is_in(queue, name, "done"))


# --- folders of somebody else ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_log_that_is_no_file_is_not_written(queue, tmp_path, kind):
    """A link would lead the output of a run into any file of the user; a pipe would block."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    name = queue.shelf.create(QUICK, "")
    for log in ("log.txt", "export.log"):
        path = queue.shelf.root / name / log
        path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    assert state(queue, name) == "failed" and "started" in queue.shelf.find(name).error
    for log in ("log.txt", "export.log"):
        with pytest.raises(OSError):
            plain_file(queue.shelf.root / name / log).close()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": ("--extensions", "theirs")},
        {"overrides": ("trainer.callbacks=[os.system]",)},
        {"model": "/tmp/theirs"},
        {"method": "lods-sds resume=/x"},
        {"on": "mesh"},
        {"quality": "../x"},
        {"gpu": "0"},
        {"seed": -1},
        {"prompt": "${oc.env:HOME}"},
    ],
)
def test_a_request_that_no_form_makes_is_not_started(queue, change):
    """Runs start by themselves: a folder from elsewhere could bring any command line."""
    name = queue.shelf.create(replace(QUICK, **change), "")
    assert state(queue, name) == "failed" and not queue._children
    assert "no form" in queue.shelf.find(name).error


def test_a_run_that_another_program_is_at_work_in_is_not_removed(queue):
    name = queue.add(QUICK, "good")
    until(is_in(queue, name, "done"))
    lock = queue.shelf.root / name / "run" / QUICK.key / ".lock"
    held = host.module("evaluation.batch").Lock.take(lock)
    with pytest.raises(Refused, match="another program"):
        queue.remove(name)
    held.release()
    queue.remove(name)
    assert queue.shelf.find(name) is None
