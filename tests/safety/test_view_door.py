"""Who may connect to the live view, and what of their messages is heard."""

import asyncio
import http.client
import json
import os
import random
import socket
import stat
import time
from types import SimpleNamespace

import msgspec
import pytest

viser = pytest.importorskip("viser", reason="viser is not installed (the extra 'viewer')")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from tests.view_client import VIEW, Client  # noqa: E402
from threestudio.run.viewer import door  # noqa: E402
from threestudio.run.viewer import server as servers  # noqa: E402
from threestudio.run.viewer.door import Door  # noqa: E402
from threestudio.run.viewer.options import ViewerOptions  # noqa: E402
from threestudio.utils.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def local():
    options = ViewerOptions(0)
    server = servers.Server(options, servers.listen(options), "test")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def public():
    options = ViewerOptions(0, "0.0.0.0")
    server = servers.Server(options, servers.listen(options), "test")
    yield server
    server.stop()


def get(port, path="/", **headers):
    """``(status, headers, the first bytes)`` of a request; Host is given or left to http.client."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    found = response.status, response.headers, response.read(200)
    connection.close()
    return found


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def refused(port, path="/", **headers):
    """The status that a websocket with these headers gets; None for one that is let in."""
    try:
        Client(port, path, origin=headers.pop("Origin", None), additional_headers=headers).close()
    except InvalidStatus as error:
        return error.response.status_code
    return None


# --- origin and host ---


def test_this_machine_may_open_the_page_and_connect(local):
    for host in ("127.0.0.1", "localhost", "[::1]", "LOCALHOST"):
        assert get(local.port, Host=f"{host}:{local.port}")[0] == 200
    assert refused(local.port) is None
    assert refused(local.port, Origin=f"http://127.0.0.1:{local.port}") is None


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://127.0.0.1", "http://127.0.0.1:1", "null", "http://localhost"],
)
def test_a_page_of_another_origin_cannot_connect(local, origin):
    assert refused(local.port, Origin=origin) == 403
    assert get(local.port, Origin=origin)[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_a_name_that_leads_here_is_not_this_machine(local, host):
    """DNS rebinding: the page's own origin is the name that it connects to."""
    name = f"{host}:{local.port}"
    assert get(local.port, Host=name, Origin=f"http://{name}")[0] == 403


def test_two_hosts_or_two_origins_are_refused():
    class Headers(dict):
        def get_all(self, name):
            return self.get(name, [])

    good = {"Host": ["localhost:1"], "Origin": ["http://localhost:1"]}
    door = Door(None)
    assert door.refusal("/", Headers(good)) is None
    assert door.refusal("/", Headers(good, Host=["localhost:1", "evil.example"]))
    assert door.refusal("/", Headers(good, Origin=["http://localhost:1", "http://evil.example"]))
    assert door.refusal("/", Headers(Origin=["http://localhost:1"]))


def test_the_page_cannot_be_framed_by_another(local):
    headers = get(local.port)[1]
    assert headers["X-Frame-Options"] == "SAMEORIGIN"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'self'"
    assert headers["Referrer-Policy"] == "no-referrer"  # a URL may hold the token


# --- token ---


def test_a_public_address_needs_the_token_for_pages_and_websockets(public):
    assert public.token and f"?token={public.token}" in public.url
    for path in ("/", "/?token=", "/?token=wrong", f"/?token={public.token}x", "/?token=%ff"):
        assert get(public.port, path)[0] == 403 and refused(public.port, path) == 403
    right = f"/?token={public.token}"
    assert get(public.port, right)[0] == 200 and refused(public.port, right) is None


def test_the_page_passes_the_token_on_in_a_cookie_of_its_own(public):
    """viser's client connects to the address of its page without its query."""
    cookie = get(public.port, f"/?token={public.token}")[1]["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    own = cookie.partition(";")[0]
    assert refused(public.port, Cookie=f"other=1; {own}") is None
    assert refused(public.port, Cookie=own + "x") == 403
    assert refused(public.port, Cookie=f"other={public.token}") == 403
    assert "Set-Cookie" not in get(public.port, Cookie=own)[1]
    origin = "http://evil.example"
    assert refused(public.port, Cookie=own, Origin=origin) == 403


def test_the_token_is_the_machines_own_each_time():
    tokens = set()
    for _ in range(3):
        options = ViewerOptions(0, "0.0.0.0")
        server = servers.Server(options, servers.listen(options), "test")
        tokens.add(server.token)
        server.stop()
    assert len(tokens) == 3 and all(len(token) >= 32 for token in tokens)


# --- messages ---


def test_only_cameras_and_new_values_of_controls_are_heard():
    encode = msgspec.msgpack.encode
    value = {"type": "GuiUpdateMessage", "uuid": "u", "updates": {"value": 1.5}}
    for good in (VIEW, value, {**value, "updates": {"value": "text"}}):
        assert Door.hears(encode(good))
    for bad in (
        {"type": "ShareUrlRequest"},
        {"type": "FileTransferStartUpload"},
        {**value, "updates": {"update_cb": []}},
        {**value, "updates": {"value": 1, "removed": True}},
        {**value, "updates": {"value": [1]}},
        {**value, "updates": {"value": "x" * 3000}},
        {**value, "updates": {"value": float("nan")}},
        {**value, "extra": 1},
        {**value, "uuid": "u" * 70_000},
        {**VIEW, "position": [1, 2]},
        {**VIEW, "position": [1, 2, float("inf")]},
        {**VIEW, "wxyz": [0, 0, 0, 0]},
        {**VIEW, "image_width": 10**6},
        {**VIEW, "fov": 4.0},
        {k: v for k, v in VIEW.items() if k != "fov"},
        ["GuiUpdateMessage"],
        None,
    ):
        assert not Door.hears(encode(bad)), bad
    assert not Door.hears("text") and not Door.hears(b"") and not Door.hears(b"\xc1")


def test_a_visitor_who_sends_too_much_is_read_more_slowly(monkeypatch):
    now, frame = [0.0], msgspec.msgpack.encode(VIEW)

    async def receive():
        return frame

    async def sleep(seconds):
        now[0] += seconds

    async def hear(count):
        heard = Door(None)._receive_of(receive)
        for _ in range(count):
            await heard()

    monkeypatch.setattr(door, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(door, "asyncio", SimpleNamespace(sleep=sleep))
    asyncio.run(hear(int(door.BURST)))
    assert now[0] == 0
    asyncio.run(hear(int(door.BURST + 3 * door.RATE)))
    assert now[0] == pytest.approx(3)


def test_no_visitor_can_open_a_public_tunnel_to_the_run(local, monkeypatch):
    asked = []
    monkeypatch.setattr(type(local.viser), "request_share_url", lambda *a, **k: asked.append(1))
    client, before = Client(local.port), local.door.dropped
    client.send({"type": "ShareUrlRequest"})
    end = time.monotonic() + 5
    while local.door.dropped == before and time.monotonic() < end:
        time.sleep(0.01)
    client.close()
    assert local.door.dropped == before + 1 and not asked


def mutated(draw):
    """A frame that is random, or a good one with something else in it."""
    encode = msgspec.msgpack.encode
    kinds = [*viser._messages.Message.get_subclasses()]
    strange = [None, True, -1, 2**63, 1e308, "", "../../x", "\0", [], {}, [[]], b"\xff" * 9]
    choice = draw.randrange(5)
    if choice == 0:
        return draw.randbytes(draw.randrange(200))
    if choice == 1:
        frame = bytearray(encode(VIEW))
        for _ in range(draw.randrange(1, 6)):
            frame[draw.randrange(len(frame))] = draw.randrange(256)
        return bytes(frame)
    if choice == 2:
        return encode({**VIEW, draw.choice(list(VIEW)): draw.choice(strange)})
    if choice == 3:
        kind = draw.choice(kinds)
        names = [*getattr(kind, "__dataclass_fields__", {})]
        return encode({"type": kind.__name__, **{n: draw.choice(strange) for n in names}})
    prop = draw.choice(["value", "label", "visible", "update_cb", "removed", "uuid"])
    update = {"uuid": draw.choice(["", "x", None]), "updates": {prop: draw.choice(strange)}}
    return encode({"type": "GuiUpdateMessage", **update})


def test_a_thousand_senseless_frames_leave_the_server_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ViewerOptions(0)
    server = servers.Server(options, servers.listen(options), "test")
    heard = []
    text = server.viser.gui.add_text("Prompt", "a cat")
    text.on_update(lambda event: heard.append(event))
    draw, client = random.Random(0), Client(server.port)
    before = sorted(os.listdir(tmp_path))
    try:
        client.wait("GuiTextMessage")
        uuid = client.control("Prompt")
        for _ in range(1000):
            client.send(mutated(draw))
        client.socket.send("text instead of bytes")
        update = {"uuid": uuid, "updates": {"value": "a dog"}}
        client.look()  # from here on viser counts it as connected
        client.send({"type": "GuiUpdateMessage", **update})
        end = time.monotonic() + 20
        while text.value != "a dog" and time.monotonic() < end:
            time.sleep(0.01)
        assert text.value == "a dog"  # the connection has outlived it all
        assert text.label == "Prompt" and text.visible
        assert server.door.dropped > 500
        assert sorted(os.listdir(tmp_path)) == before
    finally:
        client.close()
        server.stop()


def test_strangers_cannot_take_the_files_that_the_run_needs(local, monkeypatch):
    """Each open connection is one, and a run without any left cannot save."""
    monkeypatch.setattr("threestudio.run.viewer.door.MAX_CONNECTIONS", 3)
    until(lambda: local.door.connections == 0)
    strangers = [socket.create_connection(("127.0.0.1", local.port)) for _ in range(3)]
    until(lambda: local.door.connections == 3)
    with pytest.raises(OSError):
        get(local.port)
    for stranger in strangers:
        stranger.close()
    until(lambda: local.door.connections == 0)
    assert get(local.port)[0] == 200


def test_more_visitors_than_sixteen_are_turned_away(local):
    clients = [Client(local.port) for _ in range(16)]
    try:
        late = Client(local.port)
        with pytest.raises(ConnectionClosed):
            late.socket.send(b"x")
            time.sleep(0.2)
            late.socket.send(b"x")
        late.close()
    finally:
        for client in clients:
            client.close()


# --- ports ---


def test_a_port_that_is_taken_is_told_and_the_default_is_the_next_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}.*choose another port"):
            servers.listen(ViewerOptions(port))
    ours = [servers.listen(ViewerOptions()) for _ in range(2)]
    numbers = [each.getsockname()[1] for each in ours]
    for each in ours:
        each.close()
    assert len(set(numbers)) == 2 and all(8080 <= number < 8180 for number in numbers)


def test_an_address_of_nobody_is_told():
    with pytest.raises(UserError, match="--viewer-host"):
        servers.listen(ViewerOptions(0, "not a host"))
    with pytest.raises(UserError, match="see --viewer-host"):
        servers.listen(ViewerOptions(0, "192.0.2.1"))


# --- viewer.json ---


def test_the_file_that_says_where_the_view_is_is_for_its_owner_only(public, tmp_path):
    path = servers.announce(tmp_path, public)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert servers.read(tmp_path) == {
        "url": public.url,
        "host": "0.0.0.0",
        "port": public.port,
        "token": public.token,
        "pid": os.getpid(),
        "paused": False,
    }
    assert servers.running(tmp_path) == servers.read(tmp_path)
    servers.withdraw(path)
    assert not path.exists()


def test_the_file_of_another_process_is_left_where_it_is(public, tmp_path):
    """Such as that of a run in the same folder that has begun meanwhile."""
    path = servers.announce(tmp_path, public)
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"pid": os.getpid() + 1}))
    servers.withdraw(path)
    assert path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 50000,
        b'{"url": "file:///etc/passwd", "host": "a", "port": 1, "token": null, "pid": 1}',
        b'{"url": "http://a", "host": "a", "port": "1", "token": null, "pid": 1}',
        b'{"url": "http://a\\u001b[2J", "host": "a", "port": 1, "token": null, "pid": 1}',
        b'{"url": "http://evil.example", "host": "127.0.0.1", "port": 8, "token": null, "pid": 1}',
        b'{"url": "http://a:8/?token=&", "host": "a", "port": 8, "token": "&", "pid": 1}',
        b'{"url": "http://a/b:8", "host": "a/b", "port": 8, "token": null, "pid": 1}',
    ],
)
def test_a_file_of_somebody_else_is_no_view(tmp_path, content):
    (tmp_path / servers.FILE).write_bytes(content)
    assert servers.read(tmp_path) is None and servers.running(tmp_path) is None


def test_a_file_that_leads_to_another_machine_is_no_running_view(tmp_path, monkeypatch):
    """The folder may be somebody else's: what it names is neither asked nor opened."""
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda *words, **_: asked.append(words))
    told = {"url": "http://192.0.2.1:80", "host": "192.0.2.1", "port": 80, "token": None, "pid": 1}
    (tmp_path / servers.FILE).write_text(json.dumps(told))
    assert servers.read(tmp_path) == told
    assert servers.running(tmp_path) is None and not asked


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / servers.FILE)
    assert servers.read(tmp_path) is None


def test_the_file_of_a_killed_run_is_no_running_view(tmp_path, local):
    servers.announce(tmp_path, local)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        text = (tmp_path / servers.FILE).read_text()
        gone = text.replace(str(local.port), str(closed.getsockname()[1]))
        (tmp_path / servers.FILE).write_text(gone)
        assert servers.read(tmp_path) is not None and servers.running(tmp_path) is None
