"""Your own renderer: a picture of a few dozen triangles, made from a prompt.

The library takes images of any renderer that torch can differentiate. This one has forty lines: it
draws soft-edged triangles over one another on white. The result is vector graphics: it is drawn
large, and written as SVG.
"""

# %% The renderer: corners (N, 3, 2) in -1..1, colours (N, 3) and opacities (N,) in 0..1
import math
from pathlib import Path

import lods
import torch
from tqdm import trange


class Triangles(torch.nn.Module):
    def __init__(self, count: int):
        super().__init__()
        angle = 2 * math.pi * (torch.rand(count, 1) + torch.arange(3) / 3)
        around = torch.stack([angle.cos(), angle.sin()], dim=-1)
        centre = torch.randn(count, 1, 2) * 0.35
        self.corners = torch.nn.Parameter(centre + 0.3 * around)
        self.colors = torch.nn.Parameter(0.5 * torch.randn(count, 3))
        self.opacities = torch.nn.Parameter(torch.full((count,), -0.5))

    def forward(self, size: int, sharpness: float = 25.0) -> torch.Tensor:
        """The picture, (1, 3, size, size) in 0..1; ``sharpness`` of the edges, one over their
        width."""
        line = (torch.arange(size, device=self.corners.device) + 0.5) * 2 / size - 1
        pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(-1, 1, 2)
        start = self.corners
        edge = start.roll(-1, dims=1) - start
        turn = torch.linalg.det(edge[:, :2].detach()).sign()  # which way round the corners go
        inside = []
        for k in range(3):  # the distance from each edge, positive inside of the triangle
            away = pixels - start[:, k]
            cross = edge[:, k, 0] * away[..., 1] - edge[:, k, 1] * away[..., 0]
            inside.append(turn * cross / edge[:, k].norm(dim=-1).clamp_min(1e-3))
        distance = torch.stack(inside).amin(dim=0)  # (pixels, N)
        alpha = torch.sigmoid(sharpness * distance) * self.opacities.sigmoid()
        through = torch.cumprod(1 - alpha, dim=1)  # the first triangle is in front
        weight = alpha * torch.cat([torch.ones_like(alpha[:, :1]), through[:, :-1]], dim=1)
        picture = weight @ self.colors.sigmoid() + through[:, -1:]
        return picture.T.view(1, 3, size, size)

    def svg(self) -> str:
        shapes = []
        for corners, color, opacity in zip(self.corners, self.colors, self.opacities):
            points = " ".join(f"{x:.3f},{y:.3f}" for x, y in corners.tolist())
            rgb = ",".join(f"{255 * c:.0f}" for c in color.sigmoid().tolist())
            style = f'fill="rgb({rgb})" fill-opacity="{opacity.sigmoid():.3f}"'
            shapes.append(f'<polygon points="{points}" {style}/>\n')
        head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 2 2" width="512">\n'
        return head + "".join(reversed(shapes)) + "</svg>\n"


# %% Any method, any model: the renderer's picture goes in, and the gradient comes back
def main(
    prompt: str = "a DSLR image of a hamburger",
    steps: int = 250,
    out: str = "triangles.png",
    count: int = 80,
) -> torch.Tensor:
    """Returns the picture, (1, 3, 512, 512) in 0..1, which is also written as SVG."""
    torch.manual_seed(0)
    fall = [0.98, 0.5, steps]  # of the largest timestep: first the layout, then the details
    method = lods.load("sds", prompt=prompt, guidance_scale=10, max_step_percent=fall)
    triangles = Triangles(count).to(method.model.device)
    optimizer = torch.optim.Adam(
        [
            {"params": [triangles.corners], "lr": 0.01},
            {"params": [triangles.colors, triangles.opacities], "lr": 0.05},
        ]
    )
    for step in trange(steps):
        method.step(step)
        losses = method(triangles(method.model.image_size))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()

    # Drawn large, with sharp edges
    with torch.no_grad():
        picture = triangles(512, sharpness=600.0)
    lods.save_images(out, picture)
    Path(out).with_suffix(".svg").write_text(triangles.svg())
    print("saved", out, "and the same as .svg")
    return picture


# %%
if __name__ == "__main__":
    main()
