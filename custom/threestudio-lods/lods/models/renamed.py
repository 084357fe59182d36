"""Does the name of a model of this package still mean what it meant when something was trained?

Up to version 0.2 ``pocket`` was the model that is called ``pocket-shapes`` now. What was trained
with it, a run or a learned part, names it as it was called then, and must not go on with another
model without a word.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lods.models import cards

# of a card: what tells two models apart that have had the same name
SHAPE = ("latent_channels", "image_size", "text_width", "text_tokens")


def former(name: str) -> str:
    """The card that ``name`` (a card's, or the path of its folder) was of up to version 0.2; for
    any other name what :func:`lods.models.cards.canonical` says."""
    name = cards.shipped_name(name) or cards.canonical(name)
    return cards.FORMER.get(name, name)


def notes(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """What a checkpoint keeps of those of its models that are part of this package: by the name
    that the config gives it, the shapes on its card."""
    found = {name: cards.all_cards().get(cards.canonical(name)) for name in names}
    return {name: _shape(card) for name, card in found.items() if card and card.folder}


def refuse_another(named: Mapping[str, str], noted: Any) -> None:
    """Raise ``ValueError``, one line, for a name that stands for another model than in the run
    whose checkpoint holds ``noted``, the :func:`notes` of then; None for a checkpoint of version
    0.2 or before, which has none. ``named``: the names by the keys that say them in the config."""
    for name, now in notes(named.values()).items():
        if noted is None:
            then = cards.all_cards().get(former(name))
            before = _shape(then) if then else now
        else:
            before = noted.get(name, now) if isinstance(noted, Mapping) else now
        if before != now:
            keys = [key for key, value in named.items() if value == name]
            raise ValueError(_another(name, before, keys))


def _another(name: str, before: Any, keys: list[str]) -> str:
    known = [card.name for card in cards.all_cards().values() if _shape(card) == before]
    said = f"the run was trained with another model than {name!r} is now"
    if not known:
        return f"{said}, and it is no longer part of this package: install the version of then"
    wanted = " ".join(f"{key}={known[0]}" for key in keys)
    return f"{said}: it is called {known[0]!r} today; to go on with it, add {wanted}"


def _shape(card: cards.Card) -> dict[str, int]:
    return {key: getattr(card, key) for key in SHAPE}
