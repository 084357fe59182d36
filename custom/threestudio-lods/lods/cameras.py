"""From where each image is seen, and what of it a model is told."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# What a model is told of a camera: words for the view in the prompt ("side view"), rows of its own
# beside the rows of the text, or both
TOLD = ("words", "tokens", "both")


@dataclass(frozen=True)
class Cameras:
    """One camera per row, in threestudio's conventions.

    ``elevation`` and ``azimuth`` are in degrees (azimuth 0 sees the front, 180 the back),
    ``distance`` in world units. ``c2w`` is camera to world with OpenGL axes (x right, y up, z
    backward), ``mvp`` the product of projection and world to camera; VSD reads both, and a
    multi-view model the first. ``fovy``, the vertical field of view in degrees, is read by models
    with an encoder of cameras.
    """

    elevation: Float[Tensor, " B"]
    azimuth: Float[Tensor, " B"]
    distance: Float[Tensor, " B"]
    c2w: Float[Tensor, "B 4 4"] | None = None
    mvp: Float[Tensor, "B 4 4"] | None = None
    fovy: Float[Tensor, " B"] | None = None

    def repeat(self, times: int) -> "Cameras":
        """All rows, so many times one after the other: rows 0..B-1, 0..B-1, ..."""
        if times == 1:
            return self
        parts = {name: value for name, value in vars(self).items() if value is not None}
        return Cameras(**{name: torch.cat([value] * times) for name, value in parts.items()})

    def __len__(self) -> int:
        return len(self.elevation)

    @property
    def views(
        self,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
        """(elevation, azimuth, distance)."""
        return self.elevation, self.azimuth, self.distance

    def numbers(self) -> Float[Tensor, "B 4"]:
        """(elevation, azimuth, distance, fovy) of each row, as an encoder of cameras takes them.
        Raises ``ValueError``, one line, without a field of view."""
        if self.fovy is None:
            raise ValueError(
                "the model is told the camera, with its field of view: give lods.Cameras(elevation,"
                " azimuth, distance, fovy=...), one a row, in degrees"
            )
        return torch.stack([*self.views, self.fovy], dim=-1)

    def poses(self) -> Float[Tensor, "B 16"]:
        """``c2w`` of each row, flattened, with the place moved to the unit sphere, p / |p|:
        the rotation and the direction, as multi-view models are told them (MVDream,
        arXiv:2308.16512). Without ``c2w`` the camera is at its angles and looks at the origin."""
        c2w = self.c2w
        if c2w is None:
            from lods.gaussians.cameras import orbit

            places = zip(*(values.tolist() for values in self.views))
            found = [orbit(1, distance, up, turn) for up, turn, distance in places]
            c2w = torch.cat(found).to(self.elevation.device)
        c2w = c2w.detach().float().clone()
        c2w[:, :3, 3] = torch.nn.functional.normalize(c2w[:, :3, 3], dim=-1)
        return c2w.flatten(1)


def no_cameras(told: str) -> str:
    """One line for a call without cameras of a model that is told them."""
    return (
        f"with cameras={told} the model is told the camera of each picture: give cameras="
        "lods.Cameras(elevation, azimuth, distance, fovy=...)"
    )


def no_views(views: int) -> str:
    """One line for a call without cameras."""
    return (
        f"the model sees {views} views at once and is told their cameras: give cameras="
        "lods.Cameras(elevation, azimuth, distance), one a picture"
    )


def refuse_rows(rows: int, views: int) -> None:
    """Raise ``ValueError``, one line, for pictures that are not ``views`` of each object."""
    if rows % views:
        raise ValueError(
            f"the model sees {views} views of an object at once, and {rows} pictures are no "
            f"multiple of {views}: set the batch size to one (system of a run: "
            "data_type=lods-multiview-camera-datamodule)"
        )


def fovy_of(mvp: Float[Tensor, "B 4 4"], c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, " B"]:
    """The vertical field of view in degrees, from world to clip space and camera to world:

    P = mvp c2w is the projection, whose second row is (0, +-1 / tan(fovy / 2), 0, 0), with the
    minus where image rows go down.
    """
    focal = (mvp.float() @ c2w.float())[:, 1, 1].abs()
    return torch.rad2deg(2 * torch.atan(1 / focal))


def contradictions(told: str, view_words: bool | None) -> Iterator[tuple[str, str]]:
    """What is wrong with a setting ``cameras``, one of TOLD, beside ``view_dependent_prompting``
    (None: as ``cameras`` wants it): (field, text)."""
    if told == "tokens" and view_words:
        yield (
            "cameras",
            "=tokens goes with prompts that have no words for the view: leave "
            "view_dependent_prompting out, or set cameras=both",
        )
    if told == "both" and view_words is False:
        yield (
            "cameras",
            "=both goes with prompts that have words for the view: leave view_dependent_prompting "
            "out, or set cameras=tokens",
        )


def refuse_contradictions(told: str, asked: bool | None, where: str = "") -> None:
    """Raise ``ValueError`` with the first of :func:`contradictions`. ``where`` stands before the
    settings ("system.guidance.")."""
    for field, text in contradictions(told, asked):
        raise ValueError(f"{where}{field}{text}")


def view_words(told: str, asked: bool | None) -> bool:
    """Whether prompts get words for the view; ``asked``: ``view_dependent_prompting``, None where
    it is left to ``cameras``."""
    return told != "tokens" if asked is None else asked
