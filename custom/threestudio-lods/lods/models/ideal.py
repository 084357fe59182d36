"""The ideal denoiser of renders that are known: a posterior mean in closed form, and no network.

Its pictures are the renders of a folder (:mod:`lods.models.renders`), each over any background, and
its latents are the pixels themselves: z = 2 x - 1. With a prior pi_i over the renders, which the
text and the camera choose, and p(b) over backgrounds, what it sees in x_t is

    x_0(x_t) = E[z | x_t] = sum_i int w_i(b) z_i(b) db,
    w_i(b) ~ pi_i p(b) exp(-|x_t / alpha - z_i(b)|^2 alpha^2 / (2 sigma^2)),
    z_i(b) = 2 (c_i + (1 - a_i) b) - 1,

for a render of colour c_i (premultiplied) and opacity a_i; it predicts (x_t - alpha x_0) / sigma.
p is 1/2 for white, and 1/2 for the 256^3 colours of a picture of 8 bits, all alike. The exponent is
quadratic in b and separable by channels, so that all of them cost no more than 256 numbers a
channel and render: nothing is approximated. Sums are float64.

Differentiable with respect to x_t and to the texts, but for the choice of the nearest cameras.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lods import scores
from lods.cameras import Cameras, no_cameras
from lods.models.base import AddsNoise, Context, Model, Schedule, TextEncoder
from lods.models.cards import resolve
from lods.models.memory import ModelSettings
from lods.models.renders import Object, Renders
from lods.models.text_layout import TextLayout
from torch import Tensor, nn

VIEWS = ("side", "front", "back", "overhead")
WHITE = 0.5  # share of white backgrounds; the others are any colour
LEVELS = 256
NEIGHBOURS = 4  # renders of an object that a camera allows, unless set
CHUNK = 64  # renders that are in float64 at a time
NO_NETWORK = (
    "the ideal denoiser has no network, so that a LoRA has no place in it: take a method that "
    "learns nothing or an embedding, such as lods-sds"
)


def sd_schedule() -> Schedule:
    """The noise of Stable Diffusion: 1,000 steps, sqrt(beta) even from sqrt(0.00085) to
    sqrt(0.012) ("scaled_linear")."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Schedule((1 - betas).cumprod(0))


class NamedObjects:
    """The text encoder: which objects and views a text allows.

    An embedding is one row of numbers, one for each object and colour of the renders and then one
    for each of VIEWS, 1 for what is allowed and 0 for what is not. A text allows the objects that
    it names (of names within each other the longest: "hot dog"), in the colours that it names, or
    their own; and the view of which it says "front view". Without any of either all are allowed: so
    it is with the empty text. The prior of a render is the product of its object's and its view's
    numbers, which may be any of 0 and above.
    """

    def __init__(self, objects: Sequence[Object], device: Any = "cpu"):
        self.sorts = tuple((each.name.lower(), each.colour) for each in objects)
        self.shape: tuple[int, int] = (1, len(self.sorts) + len(VIEWS))
        self.device = torch.device(device)

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "N 1 D"]:
        """See :class:`lods.models.base.TextEncoder`."""
        rows = [[*self._allowed(text.lower()), *_views(text.lower())] for text in texts]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)[:, None]

    def _allowed(self, text: str) -> list[bool]:
        named, rest = set(), text
        for name in sorted({name for name, _ in self.sorts}, key=len, reverse=True):
            rest, times = re.subn(rf"\b{re.escape(name)}\b", " ", rest)
            named |= {name} if times else set()
        colours = {c for _, c in self.sorts if c and re.search(rf"\b{re.escape(c)}\b", rest)}
        found = [
            (name in named or not named) and (colour in colours or (not colours and not colour))
            for name, colour in self.sorts
        ]
        # a colour in which the object does not come
        return found if any(found) else [name in named for name, _ in self.sorts]


def _views(text: str) -> list[bool]:
    found = [re.search(rf"\b{view} view\b", text) is not None for view in VIEWS]
    return found if any(found) else [True] * len(VIEWS)


class IdealModel(AddsNoise):
    """See the module. It follows :class:`lods.models.base.Model`.

    ``cameras="words"``: the renders that the text allows. ``"tokens"`` and ``"both"``: of each
    object that the text allows (with the words for the view, if it has any) the
    ``ideal_neighbours`` renders with the nearest cameras, by

        d^2 = angle^2 + (ln s - ln s')^2,  s = 1 / (distance tan(fovy / 2)),

    with the angle between the directions in radians and s the size on the screen: both are how far
    a point of the unit ball moves in the picture. Equally near are taken in the folder's order.
    """

    grad_scale, no_null, views = 1.0, "", 1

    def __init__(
        self,
        renders: Renders,
        device: Any = "cpu",
        settings: ModelSettings | None = None,
        name: str = "",
        schedule: Schedule | None = None,
    ):
        self.renders, self.device = renders, torch.device(device)
        self.name, self.settings = name or str(renders.folder), settings or ModelSettings()
        self.schedule = (schedule or sd_schedule()).to(self.device)
        self.cameras: str = self.settings.cameras
        self.image_size = renders.size
        self.latent_shape: tuple[int, int, int] = (3, renders.size, renders.size)
        self.text: TextEncoder = NamedObjects(renders.objects, self.device)
        self.text_shape = self.text.shape
        self.text_width = self.text_shape[1]
        self.text_layout = TextLayout(*self.text_shape)
        cameras = np.concatenate([each.cameras for each in renders.objects])
        self._numbers = torch.from_numpy(cameras).double().to(self.device)
        counts = [len(each.cameras) for each in renders.objects]
        self._starts = [0, *itertools.accumulate(counts)]
        self._sort = torch.arange(len(counts), device=self.device).repeat_interleave(
            torch.tensor(counts, device=self.device)
        )
        self._view = _view_index(self._numbers)

    @classmethod
    def from_folder(cls, name: str, device: torch.device, settings: ModelSettings) -> "IdealModel":
        """Of a folder of renders, by any name that the cards know."""
        return cls(Renders.read(resolve(name).path), device, settings, name)

    @functools.cached_property
    def _pictures(self) -> dict[int, Any]:
        return {}

    def _of(self, sort: int) -> tuple[Tensor, Tensor]:
        """All renders of an object, read when it is first asked for: uint8 (V, 4, S S), and float64
        (V, 7) of each: |c|^2, sum of c (1 - a) by channels, sum of (1 - a)^2, of its pixels."""
        if sort not in self._pictures:
            views = self.renders.views(self.renders.objects[sort])
            planes = torch.from_numpy(views).permute(0, 3, 1, 2).flatten(2).contiguous()
            planes = planes.to(self.device)
            sums = []
            for part in planes.split(CHUNK):
                part = part.double() / 255
                c, through = part[:, :3], 1 - part[:, 3:]
                sums.append(
                    torch.cat(
                        [
                            (c**2).sum((1, 2))[:, None],
                            (c * through).sum(2),
                            (through**2).sum(2),
                        ],
                        dim=1,
                    )
                )
            self._pictures[sort] = planes, torch.cat(sums)
        return self._pictures[sort]

    def _take(self, rows: Int[Tensor, " K"]) -> tuple[Tensor, Tensor]:
        """(uint8 (K, 4, S S), float64 (K, 5)) of renders by their place in the folder, in order."""
        parts = []
        for sort in self._sort[rows].unique().tolist():
            planes, sums = self._of(sort)
            mine = rows[self._sort[rows] == sort] - self._starts[sort]
            parts.append((planes[mine], sums[mine]))
        planes, sums = zip(*parts)
        return torch.cat(planes), torch.cat(sums)

    # -- of every model ------------------------------------------------------------------------

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """2 x - 1. Differentiable."""
        return 2 * images - 1

    def decode(self, latents: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """(z + 1) / 2, within 0..1."""
        return (latents / 2 + 0.5).clamp(0, 1)

    def predict(
        self,
        x_t: Float[Tensor, "B 3 H W"],
        t: Int[Tensor, " B"],
        texts: Float[Tensor, "B 1 D"],
        cameras: Cameras | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """The noise of the posterior mean. Raises ``ValueError``, one line, where cameras are
        wanted and are not there, and for a text that allows no render."""
        return self.noise_of(x_t, self.mean(x_t, t, texts, cameras), t)

    def mean(
        self,
        x_t: Float[Tensor, "B 3 H W"],
        t: Int[Tensor, " B"],
        texts: Float[Tensor, "B 1 D"],
        cameras: Cameras | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """x_0(x_t) of the module, as latents; the arguments of :meth:`predict`."""
        numbers = None
        if self.cameras != "words":
            if cameras is None:
                raise ValueError(no_cameras(self.cameras))
            numbers = cameras.numbers().to(self._numbers)
        alpha, sigma = (each.double() for each in self.schedule.alpha_sigma(t))
        # of the picture x_t / alpha as values in 0..1, where distances are half of the latents'
        seen = (x_t.double() / scores.rows(alpha, x_t) + 1) / 2
        sharpness = 4 * alpha**2 / (2 * sigma**2)
        rows = [
            self._mean(
                seen[i].flatten(1),
                sharpness[i],
                *self._allowed(texts[i, 0].double(), None if numbers is None else numbers[i]),
            )
            for i in range(len(x_t))
        ]
        return (2 * torch.stack(rows) - 1).view_as(x_t).to(x_t.dtype)

    def _allowed(
        self, text: Float[Tensor, " D"], camera: Float[Tensor, " 4"] | None
    ) -> tuple[Int[Tensor, " K"], Float[Tensor, " K"]]:
        """(places of the renders that are looked at, their pi)."""
        sorts = len(self.renders.objects)
        prior = text[:sorts].clamp(min=0)[self._sort] * text[sorts:].clamp(min=0)[self._view]
        rows = prior.detach().nonzero()[:, 0]
        if not len(rows):
            raise ValueError("the text's embedding allows none of the ideal denoiser's renders")
        if camera is not None:
            far = camera_distances(camera, self._numbers[rows])
            k, near = self.settings.ideal_neighbours or NEIGHBOURS, []
            for sort in self._sort[rows].unique().tolist():
                mine = (self._sort[rows] == sort).nonzero()[:, 0]
                near.append(mine[far[mine].sort(stable=True).indices[:k]].sort().values)
            rows = rows[torch.cat(near)]
        return rows, prior[rows]

    def _mean(
        self,
        seen: Float[Tensor, "3 P"],
        sharpness: Float[Tensor, ""],
        rows: Int[Tensor, " K"],
        prior: Float[Tensor, " K"],
    ) -> Float[Tensor, "3 P"]:
        """E[c_i + (1 - a_i) b | seen] under these renders."""
        parts, total = [], seen.new_zeros(())
        levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64, device=seen.device)
        chunks = rows.split(CHUNK)
        for chunk in chunks:
            planes, sums = self._take(chunk)
            planes = planes.double() / 255
            c, through = planes[:, :3], 1 - planes[:, 3]
            apart = (seen**2).sum() - 2 * torch.einsum("kcp,cp->k", c, seen) + sums[:, 0]
            # |seen - c - (1 - a) b|^2 = apart - 2 sum_c s_c b_c + area sum_c b_c^2
            s = through @ seen.T - sums[:, 1:4]
            area = sums[:, 4:]
            white = -sharpness * (apart - 2 * s.sum(1) + 3 * area[:, 0])
            by_level = -sharpness * (area[..., None] * levels**2 - 2 * s[..., None] * levels)
            any_colour = -sharpness * apart + (by_level.logsumexp(2) - np.log(LEVELS)).sum(1)
            expected = by_level.softmax(2) @ levels  # (K, 3)
            parts.append((white + np.log(WHITE), any_colour + np.log(1 - WHITE), expected))
        white, any_colour, expected = (torch.cat(each) for each in zip(*parts))
        both = torch.stack([white, any_colour])
        weights = prior * (both - both.detach().max()).exp()
        weights = weights / weights.sum()
        background = weights[0][:, None] + weights[1][:, None] * expected
        weight, total = weights.sum(0), torch.zeros_like(seen)
        for part in (weight.detach() > 0).nonzero()[:, 0].split(CHUNK):
            planes = self._take(rows[part])[0].double() / 255
            total = total + torch.einsum("k,kcp->cp", weight[part], planes[:, :3])
            total = total + background[part].T @ (1 - planes[:, 3])
        return total

    def lora_network(self) -> nn.Module:
        """Raises ``ValueError``: there is none."""
        raise ValueError(NO_NETWORK)

    def time_embedding(self) -> nn.Module:
        """Raises ``ValueError``: there is none."""
        raise ValueError(NO_NETWORK)

    def sibling(self, name: str) -> Model:
        """See :class:`lods.models.base.Model`."""
        from lods.models.families import load_family

        return load_family(name, self.device, self.settings)

    def prepare(self, context: Context | None = None) -> None:
        """Nothing: there are no weights."""


def camera_distances(
    camera: Float[Tensor, " 4"], others: Float[Tensor, "V 4"]
) -> Float[Tensor, " V"]:
    """d of :class:`IdealModel` between a camera and others, each (elevation, azimuth, distance,
    fovy), angles in degrees."""
    angle = torch.atan2(
        torch.linalg.cross(_direction(camera).expand(len(others), 3), _direction(others)).norm(
            dim=-1
        ),
        _direction(others) @ _direction(camera),
    )
    return (angle**2 + (_log_size(others) - _log_size(camera)) ** 2).sqrt()


def _direction(cameras: Float[Tensor, "*V 4"]) -> Float[Tensor, "*V 3"]:
    e, a = torch.deg2rad(cameras[..., 0]), torch.deg2rad(cameras[..., 1])
    return torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=-1)


def _log_size(cameras: Float[Tensor, "*V 4"]) -> Float[Tensor, "*V"]:
    return -(cameras[..., 2].log() + torch.deg2rad(cameras[..., 3] / 2).tan().log())


def _view_index(cameras: Float[Tensor, "V 4"]) -> Int[Tensor, " V"]:
    from lods.prompts import TextSettings, view_index

    return view_index(Cameras(cameras[:, 0], cameras[:, 1], cameras[:, 2]), TextSettings())
