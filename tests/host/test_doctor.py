"""``lods doctor``: what works on this machine."""

import json
import socket

import pytest
from lods import cli
from lods.commands import doctor
from lods.models import cards

from tests.host.commands import away

__all__ = ["away"]  # a fixture


@pytest.fixture
def offline(monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)


def test_doctor_names_every_rasteriser_and_every_card_without_the_network(offline, capsys):
    from lods.gaussians.backends import backend_names

    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not [f for f in found if f["name"] == "error"]
    states = {f["name"]: f["state"] for f in found}
    assert all("\n" not in state and state for state in states.values())
    assert {f"rasteriser {n}" for n in backend_names()} - set(states) <= {
        "rasteriser auto",
        "rasteriser torch",
    }
    assert set(cards.all_cards()) <= set(states)
    assert states["rasteriser cpu"] == "ready" == states["pocket-shapes"].split(" (")[0]


def test_doctor_tells_how_a_card_is_downloaded(offline, monkeypatch):
    monkeypatch.setattr(cards, "is_here", lambda name: False)
    states = dict(doctor._models())
    [first, *_] = cards.find_card("sd15").ids
    assert states["sd15"].startswith(f"not downloaded: hf download {first}; for GPUs of 8 GB")


def test_a_part_that_fails_hides_no_other(monkeypatch):
    def broken():
        raise RuntimeError("no\ndriver")
        yield

    monkeypatch.setattr(doctor, "_machine", broken)
    found = doctor.examine()
    assert found[0].state == "RuntimeError: no driver" and found[-1].group == "models"


def test_a_reason_of_a_backend_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr("lods.gaussians.backends.gsplat.missing", lambda: "no\n  kernels; do this")
    assert dict(doctor._rasterisers())["rasteriser gsplat"] == "no kernels; do this"
