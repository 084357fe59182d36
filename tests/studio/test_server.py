"""What the server answers, to whom, and what it does not do."""

import base64
import gzip
import json
import os
import random
import shutil
import string
import zlib
from pathlib import Path
from urllib.parse import quote

import pytest

import threestudio
from tests.run_folders import gaussians, write_gaussians
from tests.studio.toy import FORM, QUICK, REQUEST, ask, let_end, raw, server, until

pytest.importorskip("aiohttp")
TOKEN = "the-token"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """``(port, queue)`` of a server with one finished run, ``done``."""
    folder = tmp_path_factory.mktemp("studio") / "runs"
    with server(folder) as (port, queue):
        name = queue.add(QUICK, "good")
        until(lambda: queue.shelf.find(name).state == "done")
        (folder / name).rename(folder / "done")
        (folder.parent / "secret.txt").write_text("secret")
        yield port, queue


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The port of a server that needs a token, and can be reached from elsewhere."""
    with server(tmp_path_factory.mktemp("guarded"), TOKEN, "0.0.0.0") as (port, _):
        yield port


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- pages, data, files ---------------------------------------------------------------------------


def test_from_a_form_to_a_file_of_the_result(studio):
    port, queue = studio
    status, _, body = ask(port, "POST", "/api/runs", FORM)
    assert status == 200
    name = json.loads(body)["name"]
    let_end(queue, name)

    def run():
        found = json.loads(ask(port, "GET", f"/api/runs/{name}")[2])
        return found if found["state"] == "done" else None

    found = until(run)
    assert (found["prompt"], found["quality"], found["formats"]["ply"]) == (
        "a red car",
        "good",
        "ready",
    )
    assert "the toy has begun" in found["log"]
    status, headers, body = ask(port, "GET", f"/files/{name}/ply?download")
    assert (status, body) == (200, b"ply")
    assert headers["Content-Disposition"] == 'attachment; filename="a-red-car.ply"'


def test_every_file_of_the_page_is_served_and_refers_to_nothing_elsewhere(studio):
    from lods.studio.server import ASSETS

    for path in ASSETS.iterdir():
        status, _headers, body = ask(studio[0], "GET", f"/assets/{path.name}")
        assert status == 200 and body == path.read_bytes()
        text = body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text
        assert " style=" not in text and "innerHTML" not in text


def test_the_viewer_is_that_of_the_pages_of_runs(studio):
    viewer = Path(threestudio.__file__).parent / "run" / "drawing" / "viewer.js"
    status, headers, body = ask(studio[0], "GET", "/assets/viewer.js")
    assert status == 200 and headers["Content-Type"].startswith("text/javascript")
    assert body == viewer.read_bytes()
    assert b"http" not in body and b"innerHTML" not in body


def test_an_object_is_packed_for_the_viewer(studio, monkeypatch):
    port, queue = studio
    rows = gaussians(30)
    file = queue.shelf.root / "done" / "gaussians.ply"
    before = file.read_bytes()
    try:
        write_gaussians(file, rows)
        status, headers, body = ask(port, "GET", "/drawn/done/ply?123")
        found = json.loads(body)
        monkeypatch.setattr("threestudio.run.drawing.BUDGET", 10)
        fewer = json.loads(ask(port, "GET", "/drawn/done/ply")[2])
    finally:
        file.write_bytes(before)
    assert status == 200 and "max-age" in headers["Cache-Control"]
    assert found["about"]["kind"] == "splats" and found["about"]["count"] == 30
    assert len(zlib.decompress(base64.b64decode(found["data"]))) == 17 * 30
    assert found["left_out"] == []
    assert fewer["about"]["count"] == 10
    assert fewer["left_out"] == ["Drawn here with 10 Gaussians of 30 Gaussians."]


@pytest.mark.parametrize("content", [b"ply", b"ply\nelement vertex\nend_header\n", b"", b"\0" * 99])
def test_an_object_that_cannot_be_drawn_is_told_in_one_line(studio, content):
    port, queue = studio
    file = queue.shelf.root / "done" / "gaussians.ply"
    before = file.read_bytes()
    try:
        file.write_bytes(content)
        status, _, body = ask(port, "GET", "/drawn/done/ply")
    finally:
        file.write_bytes(before)
    error = json.loads(body)["error"]
    assert status == 422 and error.startswith("gaussians.ply ") and "\n" not in error


@pytest.mark.parametrize("path", ["done/log", "done/video", "done/glb", "none/ply", "../done/ply"])
def test_only_objects_are_drawn(studio, path):
    assert ask(studio[0], "GET", f"/drawn/{path}")[0] == 404


def test_every_answer_carries_the_policy(studio):
    for path in ("/", "/assets/studio.js", "/api/runs", "/nothing", "/files/done/ply"):
        headers = ask(studio[0], "GET", path)[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_refused_form_is_answered_in_one_line(studio):
    for change in ({"prompt": "a tiger"}, {"prompt": "a\ncar"}, {"seed": "x"}):
        status, _, body = ask(studio[0], "POST", "/api/runs", FORM | change)
        assert status == 400 and "\n" not in json.loads(body)["error"]


def test_what_makes_no_sense_for_a_run_is_refused(studio):
    for verb in ("cancel", "resume"):
        status, _, body = ask(studio[0], "POST", f"/api/runs/done/{verb}", {})
        assert status == 409 and "done" in json.loads(body)["error"]
    assert ask(studio[0], "POST", "/api/runs/nothing/cancel", {})[0] == 409
    assert ask(studio[0], "POST", "/api/runs/done/export", {"format": "exe"})[0] == 409
    assert ask(studio[0], "POST", "/api/runs/done/chmod", {})[0] == 404


def test_a_run_that_cannot_be_told_hides_no_other(studio, monkeypatch):
    from lods.studio.server import Studio

    port, queue = studio
    bad = queue.shelf.root / "trained" / "configs"
    bad.mkdir(parents=True)
    (bad / "parsed.yaml").write_text("{}")
    tell = Studio._about

    def fail(self, entry):
        if entry.name == "trained":
            raise ZeroDivisionError
        return tell(self, entry)

    monkeypatch.setattr(Studio, "_about", fail)
    status, _, body = ask(port, "GET", "/api/runs")
    states = {run["name"]: run["state"] for run in json.loads(body)["runs"]}
    assert status == 200 and states["trained"] == "damaged" and states["done"] == "done"
    shutil.rmtree(bad.parent)


# --- who may ask ----------------------------------------------------------------------------------

STRANGERS = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": None},
    {"Origin": "http://127.0.0.1:1"},
    {"Host": "evil.example", "Origin": "http://evil.example"},  # DNS rebinding
    {"Host": None},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "[::1"},
    {"Host": "evil.example@127.0.0.1", "Origin": "http://evil.example@127.0.0.1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", STRANGERS)
def test_a_page_of_another_origin_cannot_command(studio, headers):
    port, queue = studio
    before = tree(queue.shelf.root)
    for path, body in (("/api/runs", FORM), ("/api/runs/done/remove", {})):
        assert ask(port, "POST", path, body, headers)[0] in (400, 403)
    assert tree(queue.shelf.root) == before


@pytest.mark.parametrize("headers", STRANGERS)
def test_a_page_of_another_origin_cannot_open_a_websocket(studio, headers):
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert ask(studio[0], "GET", "/live/done", None, upgrade | headers)[0] in (400, 403)


def test_a_rebound_name_sees_nothing(studio):
    for path in ("/", "/api/runs", "/files/done/ply"):
        headers = {"Host": "evil.example", "Origin": None}
        assert ask(studio[0], "GET", path, None, headers)[0] == 403


def test_what_a_form_of_another_page_can_send_is_no_command(studio):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        assert ask(studio[0], "POST", "/api/runs", FORM, {"Content-Type": kind})[0] == 415


def test_without_the_token_nothing_is_seen(guarded):
    for path in ("/", "/?token=", "/?token=wrong", "/api/runs", f"/api/runs?token={TOKEN}"):
        assert ask(guarded, "GET", path)[0] == 401
    assert ask(guarded, "POST", "/api/runs", FORM)[0] == 401
    assert ask(guarded, "GET", "/", None, {"Cookie": "lods-studio-0=wrong"})[0] == 401


def test_the_token_in_the_address_becomes_a_cookie_that_pages_cannot_read(guarded):
    status, headers, _ = ask(guarded, "GET", f"/?token={TOKEN}")
    assert status == 200
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    word = {"Cookie": cookie.partition(";")[0]}
    assert ask(guarded, "GET", "/api/runs", None, word)[0] == 200
    # a page of another origin has the cookie of the browser, but not our origin
    stranger = word | {"Origin": "http://evil.example"}
    assert ask(guarded, "POST", "/api/runs", FORM, stranger)[0] == 403


# --- what is sent to break it ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../server.py",
        "/assets/..%2fserver.py",
        "/files/../secret.txt",
        "/files/..%2f..%2fsecret/log",
        "/files/%2e%2e/log",
        "/files/done/..%2f..%2fsecret.txt",
        "/files/done/request.json",
        "/files/done%00/log",
        "/files//log",
        "/api/runs/..",
        "/api/runs/%2e%2e%2f%2e%2e",
        "/live/../../api/choices",
        "/live/done/",
    ],
)
def test_no_path_leads_out_of_the_runs(studio, path):
    status, _, body = ask(studio[0], "GET", path)
    assert status in (400, 404) and b"secret" not in body


def test_an_address_that_is_too_long_is_refused(studio):
    from lods.studio.guard import MAX_URL

    status, _, body = ask(studio[0], "GET", f"/?{'a' * MAX_URL}")
    assert status == 403 and b"too long" in body


def test_a_body_that_is_too_large_is_refused(studio):
    assert ask(studio[0], "POST", "/api/runs", b"[" * (1 << 20))[0] == 413
    assert ask(studio[0], "GET", "/" + "x" * 6000)[0] == 403


def test_a_thousand_senseless_requests_neither_crash_it_nor_write_anything(studio):
    port, queue = studio
    rng, outside = random.Random(0), queue.shelf.root.parent
    until(lambda: not queue.waiting() and not queue._children)
    before = tree(outside)
    runs = ["done", "..", "a/../b", "\0", "%", "nothing", "x" * 300, "香", ".studio.lock"]
    verbs = ["cancel", "resume", "export", "delete", ""]  # none that would change "done"
    values = [None, True, -1, 1e308, 2**80, "", "x" * 400, "${a}", "\ud800", [], {}, "a car\n", "/"]

    def text():
        return "".join(rng.choice(string.printable) for _ in range(rng.randrange(30)))

    def one():
        kind = rng.randrange(5)
        if kind == 0:  # a form with wrong values
            fields = rng.sample([*FORM, "seed", "quality", "any_words", text()], 3)
            # "a car" alone could be carried out: at least one value is never right
            form = FORM | {field: rng.choice(values) for field in fields} | {"seed": "no number"}
            return ask(port, "POST", "/api/runs", json.dumps(form).encode())[0]
        if kind == 1:
            path = f"/api/runs/{quote(rng.choice(runs), safe='%')}/{rng.choice(verbs)}"
            return ask(port, "POST", path, {"format": rng.choice(values)})[0]
        if kind == 2:
            path = "/" + "/".join(quote(rng.choice([*runs, text()]), safe="%.") for _ in range(3))
            return ask(port, rng.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS"]), path)[0]
        if kind == 3:
            return ask(port, "POST", "/api/runs", rng.randbytes(rng.randrange(300)))[0]
        data = rng.randbytes(rng.randrange(1, 200))
        if rng.random() < 0.5:
            data = b"POST /api/runs HTTP/1.1\r\n" + data + b"\r\n\r\n"
        answer = raw(port, data)
        return int(answer[9:12]) if answer.startswith(b"HTTP/1.") else 400

    seen = {one() for _ in range(1000)}
    assert seen <= {200, 400, 403, 404, 405, 409, 413, 415}
    assert 400 in seen and 404 in seen and 409 in seen
    assert tree(outside) == before
    assert ask(port, "GET", "/api/runs")[0] == 200


# --- the live view --------------------------------------------------------------------------------


def test_the_live_view_of_a_run_is_passed_on_under_the_address_of_the_studio(tmp_path):
    import asyncio

    import aiohttp
    from aiohttp import web

    asked = []

    async def view(request):
        asked.append((request.query.get("token"), request.headers.get("Origin")))
        if "Upgrade" not in request.headers:
            packed = gzip.compress(b"the client")  # as viser sends its own
            headers = {"Content-Type": "text/html", "Content-Encoding": "gzip"}
            return web.Response(body=packed, headers=headers)
        socket = web.WebSocketResponse(protocols=("viser-v1",))
        await socket.prepare(request)
        async for message in socket:
            await socket.send_bytes(b"echo " + message.data)
        return socket

    async def visit():
        app = web.Application()
        app.router.add_get("/{tail:.*}", view)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        there = runner.addresses[0][1]
        with server(tmp_path) as (port, queue):

            def prepare():
                name = queue.add(REQUEST, "good")
                until(lambda: queue.shelf.find(name).state == "running")
                run = tmp_path / name / "run" / REQUEST.key
                until((run / "ckpts" / "last.ckpt").exists)
                (run / "viewer.json").write_text(
                    json.dumps({"port": there, "token": "t", "pid": 1})
                )
                return name

            name = await asyncio.to_thread(prepare)
            base, origin = f"http://127.0.0.1:{port}/live/{name}", f"http://127.0.0.1:{port}"
            async with aiohttp.ClientSession() as session:
                async with session.get(base) as page:
                    assert str(page.url) == f"{base}/" and await page.text() == "the client"
                    assert "frame-ancestors 'self'" in page.headers["Content-Security-Policy"]
                async with session.ws_connect(
                    base, origin=origin, protocols=("viser-v1",)
                ) as socket:
                    assert socket.protocol == "viser-v1"
                    await socket.send_bytes(b"camera")
                    assert await socket.receive_bytes() == b"echo camera"
                let_end(queue, name)
                ended = asyncio.to_thread(until, lambda: queue.shelf.find(name).state == "done")
                await ended
                async with session.get(f"{base}/") as page:
                    assert page.status == 404
        await runner.cleanup()

    asyncio.run(visit())
    assert asked[-1][0] == "t" and asked[-1][1].startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "content", ['{"port": 22}', '{"port": "80"}', "[]", '{"port": 9999, "token": 3}', "{"]
)
def test_a_note_of_a_view_that_leads_elsewhere_is_not_followed(studio, content, tmp_path):
    from dataclasses import replace

    from lods.studio.live import view_of

    entry = replace(studio[1].shelf.find("done"), state="running")
    note = entry.run / "viewer.json"
    note.write_text('{"port": 9999, "token": "t", "pid": 1}')
    assert view_of(entry) == (9999, "t")
    note.write_text(content)
    assert view_of(entry) is None
    note.unlink()


def test_a_note_that_is_a_link_or_old_or_of_a_run_that_is_over_is_not_followed(studio):
    from dataclasses import replace

    from lods.studio.live import view_of

    done = studio[1].shelf.find("done")
    entry = replace(done, state="running")
    note, real = entry.run / "viewer.json", entry.run / "real.json"
    text = '{"port": 9999, "token": null, "pid": 1}'
    try:
        note.write_text(text)
        assert view_of(entry) == (9999, "") and view_of(done) is None
        before = entry.process["began"] - 60
        os.utime(note, (before, before))  # of an earlier attempt
        assert view_of(entry) is None
        real.write_text(text)
        note.unlink()
        note.symlink_to(real)
        assert view_of(entry) is None
    finally:
        note.unlink(missing_ok=True)
        real.unlink(missing_ok=True)


def test_the_page_of_a_run_is_downloaded_and_never_shown_at_the_studios_address(studio):
    port, queue = studio
    page = queue.shelf.root / "done" / "report.html"
    page.write_text("<script>1</script>")
    try:
        assert "report" in json.loads(ask(port, "GET", "/api/runs/done")[2])["files"]
        for address in ("/files/done/report", "/files/done/report?download"):
            status, headers, body = ask(port, "GET", address)
            assert (status, body) == (200, b"<script>1</script>")
            assert headers["Content-Disposition"] == 'attachment; filename="done.html"'
    finally:
        page.unlink()


def test_a_run_that_is_paused_is_told_to_be_without_a_time_left(studio):
    from dataclasses import replace

    from lods.studio.server import Studio

    entry = studio[1].shelf.find("done")
    entry = replace(entry, state="running", process={"began": 0.0})
    note = entry.run / "viewer.json"
    handlers, told = Studio(studio[1]), []
    try:
        for paused in ("true", "false", '"yes"'):
            note.write_text(f'{{"port": 9999, "token": null, "pid": 1, "paused": {paused}}}')
            told.append(handlers._progress(entry)["paused"])
        assert told == [True, False, False]
    finally:
        note.unlink()


def test_the_prompt_that_a_run_was_steered_to_is_told(studio):
    from lods.studio.progress import steered_to
    from lods.studio.server import Studio

    queue = studio[1]
    log = queue.shelf.find("done").run / "interventions.jsonl"
    line = '{"step": %d, "what": "%s", "old": "x", "new": %s}\n'
    try:
        for text, wanted in (
            (
                line % (1, "prompt", '"a snowman"') + line % (2, "guidance_scale", "9.0"),
                "a snowman",
            ),
            (line % (1, "prompt", '"a snowman"') + "{\n[]\n7\n", "a snowman"),
            (line % (1, "prompt", '"a snowman"') + line % (2, "x", '"a house"'), "a snowman"),
            (line % (1, "prompt", f'"{QUICK.prompt}"'), ""),
            (line % (1, "prompt", "7"), ""),
        ):
            log.write_text(text)
            assert steered_to(queue.shelf.find("done")) == wanted
            assert Studio(queue)._about(queue.shelf.find("done"))["steered"] == wanted
    finally:
        log.unlink()
