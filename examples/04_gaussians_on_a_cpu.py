"""Gaussians on a CPU, without a host and without a diffusion model.

A coloured knot is photographed from 24 sides, and a ball of random Gaussians is fitted to the
photographs: they grow and are pruned on the way. What comes out is a picture (photograph above,
Gaussians below, from three sides that were not photographed), a ply for viewers of Gaussians, and a
mesh. Nothing here needs a GPU; on one, give ``device="cuda"`` to the two lines that make Gaussians.
"""

# %% The object: points on a trefoil knot, coloured by where on it they are
import math
from pathlib import Path

import lods.gaussians as gs
import torch
from PIL import Image


def knot(n: int) -> gs.Gaussians:
    t = torch.arange(n) * (2 * math.pi / n)
    tube = 0.9 * torch.arange(n)  # around the thread, while t goes along it
    around = 2 + torch.cos(3 * t) + 0.5 * torch.cos(tube)
    x, y = around * torch.cos(2 * t), around * torch.sin(2 * t)
    xyz = 0.25 * torch.stack([x, y, torch.sin(3 * t) + 0.5 * torch.sin(tube)], dim=-1)
    rgb = 0.5 + 0.45 * torch.cos(t[:, None] + torch.tensor([0.0, 2.1, 4.2]))
    return gs.Gaussians.points(xyz, rgb, opacity=0.95, scale=0.7)


# %% Fit Gaussians that begin as a ball
def main(steps: int = 250, folder: str | Path = "gaussians-on-a-cpu") -> float:
    """Returns the mean absolute error of the colours (0..1) on views that were not fitted."""
    cameras = torch.cat([gs.orbit(12, 2.5, elevation=e, azimuth=e) for e in (10.0, 45.0)])
    with torch.no_grad():
        photographs, masks, _ = knot(3000).render(cameras, 80, 80)

    gaussians = gs.Gaussians.ball(1500, radius=0.8)
    rates = {"means": 2e-3, "scales": 0.01, "sh0": 0.03}
    optimizer = torch.optim.Adam(gaussians.groups(**rates), eps=1e-15)
    schedule = {"refine_start_iter": 50, "refine_every": 50, "refine_stop_iter": steps * 3 // 4}
    densifier = gs.Densifier("default", schedule)
    for step in range(steps):
        i = torch.randint(len(cameras), (2,))
        images, alphas, info = gaussians.render(cameras[i], 80, 80)
        densifier.before_backward(info)
        loss = (images - photographs[i]).abs().mean() + (alphas - masks[i]).abs().mean()
        loss.backward()
        optimizer.step()
        densifier.after_step(gaussians, optimizer, step, info)
        optimizer.zero_grad()

    # What has come out
    with torch.no_grad():
        views = gs.orbit(3, 2.5, elevation=30.0, azimuth=7.0)
        shown = [part.render(views, 192, 192)[0] for part in (knot(3000), gaussians)]
        error = (shown[0] - shown[1]).abs().mean().item()
    rows = torch.cat([torch.cat(list(images), dim=1) for images in shown])
    folder = Path(folder)
    gaussians.write_ply(folder / "knot.ply", axes="y-down")
    gaussians.mesh(resolution=48).write(folder / "knot.glb")
    Image.fromarray((rows.clamp(0, 1) * 255).byte().numpy()).save(folder / "knot.png")
    print(f"{gaussians.count} Gaussians, mean error {error:.3f}: {folder}/knot.png, .ply, .glb")
    return error


# %%
if __name__ == "__main__":
    main()
