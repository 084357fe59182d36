"""The judge: a small classifier that says which object, colour and view a picture shows.

It shares nothing with the models: a residual network on pixels, trained on the same renders but for
those held out, before other backgrounds, moved, blurred, noised and made translucent, so that it is
not thrown by soft pictures. It is never used in training a model or in distillation, only to
measure them.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn

from pocket.data import Renders, coloured, white
from pocket.fast import autocast, fast
from pocket.tools import say, whole_file
from pocket.training import Training
from pocket.world import COLOURS, NAMES, OBJECTS, VIEWS, view_of

WEIGHTS = Path(__file__).with_name("judge.safetensors")
STATE = "judge_state.pt"
REFRESH = 100  # steps between two looks for new renders
SIZE = 64  # pixels of a side, to which pictures are reduced
OWN = "own"  # an object's own colours
PALETTE = (OWN, *COLOURS)
FRONTS = np.array([thing.front for thing in OBJECTS])
SLUGS = tuple(thing.slug for thing in OBJECTS)


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return F.relu(x + self.body(x))


class Judge(nn.Module):
    """Pictures (N, 3, H, W) in 0..1, H = W, are averaged to 64 pixels a side. Returns logits
    ``object`` (N, 40), ``colour`` (N, 5: own colours, then COLOURS), ``view`` (N, 4), ``turn``
    (N, 2), which points to (sin, cos) of the azimuth, and the ``features`` (N, 128) before them."""

    def __init__(self, widths=(64, 96, 128)):
        super().__init__()
        layers, last = [], 3
        for width in widths:
            # straight to 16 x 16: more than half of the time would go into the first block else
            first = nn.Conv2d(3, width, 7, 4, 3, bias=False)
            halve = nn.Conv2d(last, width, 3, 2, 1, bias=False)
            layers += [first if last == 3 else halve, nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(Block(width))
            last = width
        self.body = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Linear(last * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict(
            {
                "object": nn.Linear(128, len(NAMES)),
                "colour": nn.Linear(128, len(PALETTE)),
                "view": nn.Linear(128, len(VIEWS)),
                "turn": nn.Linear(128, 2),
            }
        )

    def forward(self, images):
        if images.shape[-1] != SIZE:
            images = F.interpolate(images, (SIZE, SIZE), mode="area")
        features = self.mix(self.body(2 * images - 1).flatten(1))
        return {"features": features, **{k: head(features) for k, head in self.heads.items()}}


def load(file: Path = WEIGHTS) -> Judge:
    """The trained judge, ready to use on the CPU. Raises ``ValueError`` for weights of another
    world's."""
    from safetensors import SafetensorError, safe_open

    judge = Judge().eval().requires_grad_(False)
    try:
        with safe_open(file, "pt") as stored:
            objects = (stored.metadata() or {}).get("objects", "")
            state = {k: stored.get_tensor(k).float() for k in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}): train the judge first") from None
    if objects.split("|") != list(NAMES):
        raise ValueError(f"{file} judges other objects than this world's: train the judge again")
    missing, unexpected = judge.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # not of use here
    if missing or unexpected:
        raise ValueError(f"{file} is not of this judge: see {(missing + unexpected)[0]!r}")
    return judge


def save(judge: Judge, file: Path = WEIGHTS) -> None:
    """Write the weights in half precision, with the objects that the answers stand for."""
    from safetensors.torch import save_file

    weights = {k: v for k, v in judge.state_dict().items() if v.is_floating_point()}
    with whole_file(file) as tmp:
        save_file(
            {k: v.half().contiguous() for k, v in weights.items()},
            tmp,
            metadata={"objects": "|".join(NAMES)},
        )


@torch.no_grad()
def verdict(
    judge: Judge, images: Float[torch.Tensor, "N 3 H W"], batch: int = 200
) -> dict[str, np.ndarray]:
    """Best ``object`` (index into OBJECTS), ``colour`` (into PALETTE) and ``view`` (into VIEWS) of
    each picture, its ``azimuth`` in degrees (-180..180), and the ``features``."""
    parts = [judge(images[i : i + batch]) for i in range(0, len(images), batch)]
    joined = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    sine, cosine = joined.pop("turn").T
    said = {k: (v if k == "features" else v.argmax(1)).numpy() for k, v in joined.items()}
    return {**said, "azimuth": torch.rad2deg(torch.atan2(sine, cosine)).numpy()}


def labels_of(renders: Renders, rows) -> dict[str, np.ndarray]:
    """What ``rows`` (series, view) of the renders show: ``object``, ``colour``, ``view`` as
    indices, ``azimuth`` in degrees.

    An object whose own colours are those of a colour word has that word's index in both.
    """
    things = [SLUGS.index(renders.series[i].slug) for i, _ in rows]
    cameras = renders.cameras(rows)
    words = [
        renders.series[i].colour or OBJECTS[thing].like or OWN
        for (i, _), thing in zip(rows, things, strict=True)
    ]
    return {
        "object": np.array(things),
        "colour": np.array([PALETTE.index(word) for word in words]),
        "view": np.array([view_of(e, a) for e, a in cameras[:, :2]]),
        "azimuth": cameras[:, 1],
    }


def accuracies(said: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, float]:
    """Shares of right answers of a ``verdict``, and over how many pictures.

    ``colour`` is asked of objects that come in colours; ``view`` and ``azimuth`` (within 45
    degrees) of those whose front and back can be told apart.
    """
    thing = labels["object"]
    painted = np.array([bool(t.colours) for t in OBJECTS])[thing]
    fronted = FRONTS[thing]
    off = np.abs((said["azimuth"] - labels["azimuth"] + 180) % 360 - 180)
    right = {
        "object": said["object"] == thing,
        "colour": (said["colour"] == labels["colour"])[painted],
        "view": (said["view"] == labels["view"])[fronted],
        "azimuth": (off < 45)[fronted],
    }
    shares = {name: float(r.mean()) if len(r) else np.nan for name, r in right.items()}
    counts = {"n": len(thing), "n_colour": int(painted.sum()), "n_view": int(fronted.sum())}
    return {**shares, **counts}


def pictures(rgba: np.ndarray, ground: float | np.ndarray = 1.0) -> Float[torch.Tensor, "N 3 H W"]:
    """Renders before a grey background, or a colour (3, 1, 1), in 0..1."""
    x = torch.from_numpy(rgba).permute(0, 3, 1, 2).float().div_(255)
    return x[:, :3] + (1 - x[:, 3:]) * torch.as_tensor(ground)


def augment(
    x: Float[torch.Tensor, "N 4 H W"], rng: np.random.Generator
) -> Float[torch.Tensor, "N 3 H W"]:
    """Pictures for training from premultiplied renders in 0..1: moved and scaled, translucent,
    before a background, softened, noised and tinted, each with some probability."""
    n, size = len(x), x.shape[-1]
    moved = (rng.uniform(size=n) < 0.7)[:, None]
    shift = np.where(moved, rng.uniform(-0.1, 0.1, (n, 2)), 0.0)
    scale = np.where(moved, np.exp(rng.uniform(-0.12, 0.15, (n, 1))), 1.0)
    turn = np.zeros((n, 2, 3), np.float32)
    turn[:, 0, 0] = turn[:, 1, 1] = scale[:, 0]
    turn[:, :, 2] = shift
    grid = F.affine_grid(torch.from_numpy(turn), [n, 4, size, size], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    opacity = np.where(rng.uniform(size=n) < 0.15, rng.uniform(0.5, 1, n), 1.0)
    x = x * torch.from_numpy(opacity).float()[:, None, None, None]
    grounds = [white(rng) if rng.uniform() < 0.6 else coloured(rng) for _ in range(n)]
    behind = torch.from_numpy(np.array(grounds)).float()[:, :, None, None]
    x = x[:, :3] + (1 - x[:, 3:]) * behind
    # The first half is softened, by two strengths: the order of a batch is random anyway.
    for part in (slice(0, n // 4), slice(n // 4, n // 2)):
        small = int(rng.integers(size // 4, size))
        soft = F.interpolate(x[part], (small, small), mode=str(rng.choice(("area", "bilinear"))))
        x[part] = F.interpolate(soft, (size, size), mode="bilinear")
    sigma = torch.from_numpy(rng.choice((0.0, 0.02, 0.05), (n, 1, 1, 1))).float()
    x = x + sigma * torch.from_numpy(rng.standard_normal(x.shape, np.float32))
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (n, 3, 1, 1))).float()
    return (x * gain).clamp(0, 1).contiguous(memory_format=torch.channels_last)


def held_out(judge: Judge, renders: Renders, count: int = 1000) -> dict[str, float]:
    """What the judge says of renders that no training saw, before white: ``accuracies``."""
    rows = renders.held_out[:count]
    said = verdict(judge, pictures(renders.rgba(rows)))
    return accuracies(said, labels_of(renders, rows))


def train(
    work: Path, steps: int, seed: int = 0, batch: int = 48, peak: float = 3e-3, file: Path = WEIGHTS
) -> None:
    """Train on ``work/renders`` and write the weights to ``file``; resumable through
    ``work/judge_state.pt``. Loss: cross entropies of object, colour and view (0.05 of each label
    goes to the others) and 1 - cos of the error of the azimuth, view and azimuth for objects with a
    front only."""
    renders = Renders(work / "renders")
    unknown = {series.slug for series in renders.series} - set(SLUGS)
    if unknown:
        raise ValueError(f"{work}/renders: {sorted(unknown)[0]} is no object of the world")
    torch.manual_seed(seed)
    judge = Judge()
    fronts = torch.from_numpy(FRONTS)

    def loss(step: int) -> torch.Tensor:
        if step % REFRESH == 0:
            renders.refresh()
        rng = np.random.default_rng((seed, 2, step))
        rows = renders.draw(rng, batch)
        labels = {k: torch.from_numpy(v) for k, v in labels_of(renders, rows).items()}
        x = torch.from_numpy(renders.rgba(rows)).permute(0, 3, 1, 2).float().div_(255)
        x = augment(F.avg_pool2d(x, x.shape[-1] // SIZE), rng)
        with autocast():
            out = {k: v.float() for k, v in judge(x).items()}
        front = fronts[labels["object"]]
        # An object without a front has no side, front or back, but it does have a top.
        view = torch.where(front | (labels["view"] == VIEWS.index("overhead")), labels["view"], -1)
        total = F.cross_entropy(out["object"], labels["object"], label_smoothing=0.05)
        for name, target in (("colour", labels["colour"]), ("view", view)):
            total = total + F.cross_entropy(
                out[name], target, ignore_index=-1, label_smoothing=0.05
            )
        angle = torch.deg2rad(labels["azimuth"])
        towards = torch.stack([angle.sin(), angle.cos()], dim=1)
        off = 1 - F.cosine_similarity(out["turn"], towards, eps=1e-3)
        return total + (off * front).mean()

    def watch(step: int) -> None:
        found = held_out(judge, renders)
        say(f"judge at {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))

    with fast(judge):
        training = Training(
            work / STATE, judge, loss, steps, peak=peak, warm=100, decay=0.99, weight_decay=5e-2,
            name="judge",
        )  # fmt: skip
        training.run(watch, watch_s=600)
    # The rate has fallen to 0: the last weights, whose batch statistics are exactly theirs.
    save(judge.eval(), file)
