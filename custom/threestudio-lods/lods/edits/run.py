"""An edit of a picture: the loop over the latents of its source, and the folder of its results."""

import contextlib
import csv
import functools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from lods.edits import region as regions
from lods.edits.details import with_details
from lods.edits.picture import Picture
from lods.edits.settings import EditSettings
from lods.edits.state import read_state, write_state
from lods.files import whole_file
from lods.methods import Method
from lods.playground import STOPPING, camera_at

RESULT, SHEET, SOURCE, REGION, METRICS = (
    "picture.png",
    "sheet.png",
    "source.png",
    "region.png",
    "metrics.csv",
)


class PictureEdit:
    """z, which starts as the latents of the source, goes down the method's gradient by SGD, the
    mean over ``draws`` draws of (t, noise); a learned part goes with AdamW. What is outside of the
    ``region`` stays: the gradient is 0 there, so that its latents do not change, and in the picture
    the source's own pixels are put back, for a decoder looks beyond the edge. What the autoencoder
    lost of the source comes back where its structure stayed (:mod:`lods.edits.details`).
    """

    def __init__(
        self,
        settings: EditSettings,
        picture: Picture,
        region: Bool[np.ndarray, "S S"],
        method: Method,
    ):
        self.settings, self.picture, self.method = settings, picture, method
        model = method.model
        camera = camera_at(model, settings.elevation, settings.azimuth)
        self.cameras = camera.repeat(settings.draws)
        pixels = torch.from_numpy(picture.pixels.copy()).to(model.device)
        self._seen = pixels.permute(2, 0, 1).float() / 255
        with torch.no_grad():
            self.source = method.latents_of(self._seen[None])
        self.latents = self.source.clone().requires_grad_()
        self.restrict(region)
        self.descent = torch.optim.SGD([self.latents], lr=settings.lr)
        learned = [p for p in method.parameters() if p.requires_grad]
        self.learning: torch.optim.Optimizer | None = None
        if learned:
            self.learning = torch.optim.AdamW(learned, settings.learned_lr, weight_decay=0.0)
        self.step = 0

    def restrict(self, region: Bool[np.ndarray, "S S"]) -> None:
        """Only this may change, from now on."""
        model = self.method.model
        self.region = region
        self.inside = regions.latent_mask(region, model.latent_shape, model.device)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Go on to the last step; the numbers of each."""
        method, rows = self.method, self.settings.draws
        while self.step < self.settings.steps:
            method.step(self.step)
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            losses = method(
                latents=self.latents.expand(rows, -1, -1, -1),
                cameras=self.cameras,
                source_latents=self.source.expand(rows, -1, -1, -1),
            )
            losses.total.backward()
            assert self.latents.grad is not None
            self.latents.grad *= self.inside
            for optimizer in self._optimizers:
                optimizer.step()
            self.step += 1
            moved = (self.latents.detach() - self.source).square().mean().sqrt()
            yield {
                "step": self.step,
                **{name: float(value.detach()) for name, value in losses.terms.items()},
                "moved": float(moved),
            }

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.descent] if self.learning is None else [self.descent, self.learning]

    @torch.no_grad()
    def pixels(self) -> UInt8[np.ndarray, "S S 3"]:
        """The square as it is now."""
        decoded = self.method.model.decode(self.latents)[0].float().clamp(0, 1)
        if self.settings.details > 0:
            decoded = with_details(self._seen, self._plain, decoded, self.settings.details)
        edited = (decoded.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        return regions.blended(edited, self.picture.pixels, self.region)

    @functools.cached_property
    def _plain(self) -> torch.Tensor:
        """What the autoencoder alone makes of the source."""
        with torch.no_grad():
            return self.method.model.decode(self.source)[0].float().clamp(0, 1)

    # -- files -----------------------------------------------------------------------------------

    def begin(self, folder: Path) -> None:
        """Write what does not change."""
        _save(folder / SOURCE, self.picture.cut(self.picture.pixels))
        _save(folder / REGION, self.region.astype(np.uint8) * 255)

    def save(self, folder: Path, metrics: list[dict[str, Any]]) -> None:
        """Write the picture, the sheet, the numbers, the learned part and the state, the state
        last."""
        now = self.pixels()
        before, after = (self.picture.cut(each) for each in (self.picture.pixels, now))
        _save(folder / RESULT, after)
        _save(folder / SHEET, sheet(before, after, self.picture.cut(self.region)))
        if metrics:
            with whole_file(folder / METRICS) as partial, open(partial, "w", newline="") as file:
                table = csv.DictWriter(file, metrics[0])
                table.writeheader()
                table.writerows(metrics)
        self.method.save(folder / "embedding.safetensors")
        write_state(folder, self.step, self.latents, self.source, self.method, self.learning)

    def resume(self, folder: Path) -> list[dict[str, Any]]:
        """Go on from a folder; returns its numbers up to there."""
        self.step = read_state(folder, self.latents, self.source, self.method, self.learning)
        try:
            with open(folder / METRICS, newline="") as file:
                rows = list(csv.DictReader(file))
            return [row for row in rows if int(row["step"]) <= self.step]
        except (OSError, ValueError, KeyError, TypeError, csv.Error):
            return []


def carry_on(edit: PictureEdit, folder: Path, metrics: list[dict[str, Any]]) -> None:
    """Go on to the last step, with the results in ``folder``. Raises ``KeyboardInterrupt`` after
    a signal, when the step is done and everything saved; at once after a second one."""
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines in a log file
    settings, start = edit.settings, time.monotonic()
    bar = tqdm(
        edit.steps(),
        initial=edit.step,
        total=settings.steps,
        desc=settings.method,
        unit="step",
        mininterval=pause,
    )
    with _after_the_step() as asked:
        for numbers in bar:
            metrics.append({**numbers, "seconds": round(time.monotonic() - start, 3)})
            if asked:
                bar.close()
                print(f"Interrupted after step {edit.step}: saving what there is.", flush=True)
                break
            if edit.step % settings.every == 0 and edit.step < settings.steps:
                _save(folder / f"{edit.step:05d}.png", edit.picture.cut(edit.pixels()))
                edit.save(folder, metrics)
        edit.save(folder, metrics)
    if asked:
        interrupt: Any = KeyboardInterrupt()
        interrupt.signum = asked[0]
        raise interrupt


@contextlib.contextmanager
def _after_the_step() -> Iterator[list[int]]:
    """The signals that ask the process to stop, as they come; a second one is obeyed at once. In
    the middle of a step there would be nothing to go on from."""
    asked: list[int] = []
    handlers: dict[int, Any] = {}

    def hear(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            handler = handlers[number]
            if callable(handler):
                handler(number, frame)
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", *STOPPING):
            number = getattr(signal, name, None)
            if number is not None and callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, hear)
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def sheet(
    before: UInt8[np.ndarray, "h w 3"],
    after: UInt8[np.ndarray, "h w 3"],
    region: Bool[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h W 3"]:
    """Before, after, and what changed: half of the difference on grey, 0.75 of the light where
    nothing may change."""
    change = 127.5 + (after.astype(np.float32) - before) / 2
    change = np.where(region[..., None], change, 0.75 * change).round().astype(np.uint8)
    gap = np.full((len(before), max(2, before.shape[1] // 32), 3), 255, np.uint8)
    return np.concatenate([before, gap, after, gap, change], axis=1)


def _save(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    with whole_file(path) as partial:
        Image.fromarray(pixels).save(partial)
