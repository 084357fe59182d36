"""A camera as rows of the text embedding, for models that were trained with them."""

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods import settings
from lods.files import whole_file
from lods.learned.files import read_safetensors, write_safetensors
from lods.models.cards import CAMERA_ENCODER as PART
from lods.models.files import read_config
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_FREQUENCIES, MAX_FREQUENCY = 64, 1024


@dataclass
class Config:
    """What an encoder of cameras is made of: the ``config.json`` of its folder."""

    width: Annotated[int, "[1, 65536]"]  # of a row, as wide as those of the text embedding
    tokens: Annotated[int, "[1, 64]"] = 2  # rows that a camera becomes
    hidden: Annotated[int, "[1, 65536]"] = 256  # width of the layer between
    # whole numbers, so that one turn later all is the same
    azimuth_frequencies: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    elevation_frequencies: list[int] = field(default_factory=lambda: [1, 2, 4])
    # what is subtracted, and what the difference is divided by
    distance: list[float] = field(default_factory=lambda: [3.6, 0.4])  # world units
    fovy: list[float] = field(default_factory=lambda: [40.0, 4.0])  # degrees

    def contradictions(self):
        """Fields that cannot be meant: (field, what is wrong)."""
        for name in ("azimuth_frequencies", "elevation_frequencies"):
            values = getattr(self, name)
            whole = all(type(value) is int and 1 <= value <= MAX_FREQUENCY for value in values)
            if not whole or not 1 <= len(values) <= MAX_FREQUENCIES:
                yield (
                    name,
                    f"must be 1 to {MAX_FREQUENCIES} whole numbers from 1 to {MAX_FREQUENCY}, "
                    f"not {settings.shown(values)}",
                )
        for name in ("distance", "fovy"):
            values = getattr(self, name)
            if len(values) != 2 or not all(map(_finite, values)) or not values[1] > 0:
                yield (
                    name,
                    f"must be a number and a spread above 0, not {settings.shown(values)}",
                )

    @property
    def features(self) -> int:
        """How many numbers describe a camera."""
        return 2 * (len(self.azimuth_frequencies) + len(self.elevation_frequencies)) + 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the weights, by name."""
        rows = self.tokens * self.width
        return {
            "linear_1.weight": (self.hidden, self.features),
            "linear_1.bias": (self.hidden,),
            "linear_2.weight": (rows, self.hidden),
            "linear_2.bias": (rows,),
        }


class CameraTokens(nn.Module):
    """A camera as ``tokens`` rows to be appended to a text embedding (T, width):

    rows = W_2 silu(W_1 f + b_1) + b_2,

    with f the sine and cosine of k times the azimuth for each k of ``azimuth_frequencies``, those
    of the elevation likewise, (distance - 3.6) / 0.4 and (fovy - 40) / 4, where the four numbers
    are the config's ``distance`` and ``fovy``. All in float32, and differentiable.

    ``CameraTokens(width=96)`` is a new one with random weights; other fields of :class:`Config` may
    be given. Raises ``ValueError``, one line, for one that is out of its range.
    """

    def __init__(self, config: Config | None = None, **values: Any):
        super().__init__()
        self.config = settings.make(Config, values) if config is None else config
        self.linear_1 = nn.Linear(self.config.features, self.config.hidden)
        self.linear_2 = nn.Linear(self.config.hidden, self.config.tokens * self.config.width)

    def features(self, cameras: Float[Tensor, "B 4"]) -> Float[Tensor, "B F"]:
        """f of each camera: elevation and azimuth in degrees, the distance in world units, and the
        vertical field of view in degrees. For k = 1, 2, ...: sin, cos, sin, cos, ... of the
        azimuth; then of the elevation; then distance and field of view."""
        elevation, azimuth, distance, fovy = cameras.float().unbind(-1)
        parts = [
            *_waves(azimuth, self.config.azimuth_frequencies),
            *_waves(elevation, self.config.elevation_frequencies),
            _normalized(distance, self.config.distance),
            _normalized(fovy, self.config.fovy),
        ]
        return torch.stack(parts, dim=-1)

    def forward(self, cameras: Float[Tensor, "B 4"]) -> Float[Tensor, "B tokens width"]:
        """The rows of each camera, given as in :meth:`features`."""
        # a trainer's autocast would round the features of a camera to three digits
        with torch.autocast(cameras.device.type, enabled=False):
            hidden = F.silu(self.linear_1(self.features(cameras)))
            rows = self.linear_2(hidden)
        return rows.unflatten(-1, (self.config.tokens, self.config.width))

    def unseen(self, cameras: Float[Tensor, "B 4"]) -> list[str]:
        """What to say of distances and of fields of view that are far from those of the training:
        more than twice the spread away from the middle. One line for either, none if all is well.
        """
        lines = []
        for place, name in ((2, "distance"), (3, "fovy")):
            middle, spread = getattr(self.config, name)
            values = cameras[:, place]
            far = values[~((values - middle).abs() <= 2 * spread)]
            if len(far):
                lines.append(
                    f"a camera's {name} is {float(far[0]):.3g}, and the model was trained with "
                    f"{middle - spread:g} to {middle + spread:g}"
                    + (" (degrees)" if name == "fovy" else "")
                )
        return lines

    def save(self, folder: str | Path) -> Path:
        """Write it into the folder of a model, as ``camera_encoder/config.json`` and
        ``camera_encoder/model.safetensors`` (float32); returns the folder of the two."""
        part = Path(folder) / PART
        with whole_file(part / CONFIG) as partial:
            partial.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        write_safetensors(part / WEIGHTS, dict(self.state_dict()), {"format": "pt"})
        return part

    @classmethod
    def load(cls, folder: str | Path) -> "CameraTokens":
        """The encoder in the folder of a model. Raises ``ValueError``, one line, where there is
        none, and for one that is damaged, or of another kind."""
        part = Path(folder) / PART
        if not part.is_dir():
            raise ValueError(f"the model folder {str(folder)!r} has no {PART}")
        config = _checked(read_config(os.fspath(part / CONFIG)), part / CONFIG)
        tensors, _ = read_safetensors(part / WEIGHTS)
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        wanted = config.shapes()
        for name in [*wanted, *found]:
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{part / WEIGHTS} does not fit its {CONFIG}: {name} is "
                    f"{_or_none(found.get(name))} and should be {_or_none(wanted.get(name))}; "
                    "download the model again"
                )
        with torch.device("meta"):  # no random numbers are drawn, which would change a run's
            encoder = cls(config)
        values = {name: value.float() for name, value in tensors.items()}
        encoder.load_state_dict(values, assign=True)
        return encoder


def _waves(degrees: Float[Tensor, " B"], frequencies: list[int]) -> list[Float[Tensor, " B"]]:
    # within one turn first: a later turn is then the same to the last bit
    turn = torch.remainder(degrees, 360.0)
    angles = [torch.deg2rad(k * turn) for k in frequencies]
    return [wave for angle in angles for wave in (angle.sin(), angle.cos())]


def _normalized(value: Float[Tensor, " B"], scale: list[float]) -> Float[Tensor, " B"]:
    return (value - scale[0]) / scale[1]


def _finite(value: Any) -> bool:
    with contextlib.suppress(OverflowError):  # an int of more digits than a float has
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return False


def _checked(values: dict[str, Any], path: Path) -> Config:
    lost = [each.name for each in fields(Config) if each.name not in values]
    try:
        if lost:
            raise ValueError(f"it has no {lost[0]}")
        return settings.make(Config, values)
    except ValueError as error:
        raise ValueError(
            f"{path} does not describe an encoder of cameras: {error}; download the model again"
        ) from None


def _or_none(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(shape)
