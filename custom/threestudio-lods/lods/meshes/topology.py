"""Which triangles and vertices of a mesh are side by side."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def neighbours(faces: Int[Tensor, "F 3"]) -> Int[Tensor, "F 3"]:
    """The triangle across the edge opposite to each corner: -1 at the border of the mesh, and where
    more than two triangles share an edge, as where two corners of a triangle are one vertex."""
    count = len(faces)
    ends = torch.stack([faces.roll(-1, 1), faces.roll(-2, 1)], dim=-1).view(-1, 2)
    ends = ends.sort(dim=1).values
    _, edge, uses = torch.unique(ends, dim=0, return_inverse=True, return_counts=True)
    order = edge.argsort(stable=True)
    found = torch.full((3 * count,), -1, dtype=torch.int64, device=faces.device)
    shared = (uses[edge[order]] == 2).nonzero()[:, 0]
    one, two = order[shared[0::2]], order[shared[1::2]]
    apart = one // 3 != two // 3
    one, two = one[apart], two[apart]
    found[one], found[two] = two // 3, one // 3
    return found.view(count, 3)


def edges(faces: Int[Tensor, "F 3"]) -> Int[Tensor, "E 2"]:
    """Each edge once, the smaller index first."""
    ends = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return torch.unique(ends.sort(dim=1).values, dim=0)


def weld(vertices: Float[Tensor, "V 3"]) -> tuple[Float[Tensor, "U 3"], Int[Tensor, " V"]]:
    """``(places, index)`` with ``vertices == places[index]``: vertices at the same place, which
    texture coordinates tell apart at seams, become one. Places are in the order of their first
    vertices."""
    _, index = torch.unique(vertices, dim=0, return_inverse=True)
    first = torch.full((int(index.max()) + 1 if len(index) else 0,), len(index))
    first = first.to(index.device).scatter_reduce(
        0, index, torch.arange(len(index), device=index.device), "amin"
    )
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return vertices[first[order]], rank[index]
