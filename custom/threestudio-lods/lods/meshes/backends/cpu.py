"""The CPU rasteriser: the compiled kernels behind autograd functions.

Its functions have the signatures and the results of their namesakes in
:mod:`lods.meshes.reference`, in single precision.
"""

import itertools

import numpy as np
import torch
from lods.gaussians.backends.simd import run, workers_for
from lods.gaussians.kernel_cache import are_kept
from lods.meshes.backends import kernels
from lods.meshes.fragments import Crossings, Fragments
from lods.meshes.reference import blend_pairs
from torch import Tensor


def is_compiled() -> bool:
    """Whether what draws a picture was compiled by an earlier process."""
    found = kernels.project, kernels.draw, kernels.weigh, kernels.find, kernels.shift
    return are_kept((*found, kernels.blend, kernels.look_up))


def _array(tensor: Tensor) -> np.ndarray:
    """A contiguous numpy view (or copy) of a tensor."""
    return tensor.detach().cpu().contiguous().numpy()


def _double(tensor: Tensor) -> np.ndarray:
    return _array(tensor.detach().double())


def _faces(faces: Tensor) -> np.ndarray:
    return _array(faces.to(torch.int32))


class _Weigh(torch.autograd.Function):
    """Weights and depths of the triangles that pixels show."""

    @staticmethod
    def forward(ctx, points, faces, Ks, face):
        cameras, height, width = face.shape
        weights = torch.empty(cameras, height, width, 3)
        depth = torch.empty(cameras, height, width)
        inputs = _double(points), _faces(faces), _double(Ks), _array(face)
        ctx.workers, ctx.inputs, ctx.like = workers_for(face.numel()), inputs, points
        run(kernels.weigh, ctx.workers, *inputs, weights.numpy(), depth.numpy())
        return weights, depth

    @staticmethod
    def backward(ctx, g_weights, g_depth):
        d_points = np.zeros(ctx.like.shape)
        parts = max(1, -(-ctx.workers // len(d_points)))
        grads = _array(g_weights), _array(g_depth), parts, d_points
        run(kernels.unweigh, ctx.workers, *ctx.inputs, *grads)
        return torch.from_numpy(d_points).to(ctx.like), None, None, None


def rasterize(points, faces, Ks, width, height, near_plane, far_plane) -> Fragments:
    """See ``reference.rasterize``."""
    cameras = len(points)
    face = torch.empty(cameras, height, width, dtype=torch.int32)
    inverse = np.empty(face.shape)
    workers = workers_for(face.numel() + cameras * len(faces))
    pieces = max(1, -(-workers // cameras)) if workers > 1 else 1
    edges = np.linspace(0, height, pieces + 1).astype(np.int64)
    bands = np.array(
        [(c, a, b) for c in range(cameras) for a, b in itertools.pairwise(edges) if b > a], np.int64
    ).reshape(-1, 3)
    arrays = _double(points), _faces(faces), _double(Ks)
    planes = float(near_plane), float(far_plane)
    places = np.empty((cameras, points.shape[1], 2))
    run(kernels.project, workers, arrays[0], arrays[2], planes[0], places)
    run(kernels.draw, workers, *arrays, *planes, places, bands, face.numpy(), inverse)
    weights, depth = _Weigh.apply(points, faces, Ks, face)
    return Fragments(face, weights, depth)


class _Interpolate(torch.autograd.Function):
    """``face`` (rows, W) and ``weights`` (rows, W, 3), of all images."""

    @staticmethod
    def forward(ctx, attributes, faces, face, weights):
        out = torch.empty(*face.shape, attributes.shape[1])
        ctx.inputs = _array(attributes.float()), _faces(faces), _array(face)
        ctx.weights, ctx.like = _array(weights), attributes
        ctx.workers = workers_for(face.numel())
        run(kernels.blend, ctx.workers, *ctx.inputs, ctx.weights, out.numpy())
        return out

    @staticmethod
    def backward(ctx, g_out):
        attributes, faces, face = ctx.inputs
        g_out, workers = _array(g_out), ctx.workers
        d_attributes = g_weights = None
        if ctx.needs_input_grad[0]:
            sums = np.zeros(attributes.shape)
            run(kernels.unblend, workers, faces, face, ctx.weights, g_out, workers, sums)
            d_attributes = torch.from_numpy(sums).to(ctx.like)
        if ctx.needs_input_grad[3]:
            out = np.empty(ctx.weights.shape, np.float32)
            run(kernels.unblend_weights, workers, *ctx.inputs, g_out, out)
            g_weights = torch.from_numpy(out)
        return d_attributes, None, None, g_weights


def interpolate(attributes, faces, fragments: Fragments) -> Tensor:
    """See ``reference.interpolate``."""
    face, weights = fragments.face.flatten(0, 1), fragments.weights.flatten(0, 1)
    return _Interpolate.apply(attributes, faces, face, weights).view(*fragments.face.shape, -1)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, texture, uv, face):
        out = torch.empty(*face.shape, texture.shape[2])
        ctx.inputs = _array(texture.float()), _array(uv.float()), _array(face)
        ctx.workers, ctx.like = workers_for(face.numel()), texture
        run(kernels.look_up, ctx.workers, *ctx.inputs, out.numpy())
        return out

    @staticmethod
    def backward(ctx, g_out):
        texture, uv, face = ctx.inputs
        g_out = _array(g_out)
        d_texture = g_uv = None
        if ctx.needs_input_grad[0]:
            sums = np.zeros(texture.shape, np.float32)
            run(kernels.un_look_up, ctx.workers, uv, face, g_out, ctx.workers, sums)
            d_texture = torch.from_numpy(sums).to(ctx.like)
        if ctx.needs_input_grad[1]:
            out = np.empty(uv.shape, np.float32)
            run(kernels.un_look_up_place, ctx.workers, *ctx.inputs, g_out, out)
            g_uv = torch.from_numpy(out)
        return d_texture, g_uv, None


def sample(texture, uv, fragments: Fragments) -> Tensor:
    """See ``reference.sample``."""
    face = fragments.face
    return _Sample.apply(texture, uv.flatten(0, 1), face.flatten(0, 1)).view(*face.shape, -1)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, *arrays):
        ctx.inputs, ctx.like = (_double(points), *arrays), points
        shifts = np.empty(len(arrays[2]))
        kernels.shift(*ctx.inputs, shifts)
        return torch.from_numpy(shifts).float()

    @staticmethod
    def backward(ctx, g_shifts):
        d_points = np.zeros(ctx.like.shape)
        kernels.unshift(*ctx.inputs, _double(g_shifts), d_points)
        return (torch.from_numpy(d_points).to(ctx.like), *[None] * 6)


def crossings(fragments: Fragments, points, faces, neighbours, Ks) -> Crossings:
    """See ``reference.crossings``."""
    face = _array(fragments.face)
    cameras, height, width = face.shape
    edges = np.empty((2, cameras, height, width), np.int32)
    arrays = _faces(faces), _double(Ks)
    run(
        kernels.find, workers_for(face.size), _double(points), arrays[0], _faces(neighbours),
        arrays[1], face, _array(fragments.depth), edges,
    )  # fmt: skip
    found = np.flatnonzero(edges != -1)
    axes, places = np.divmod(found, face.size)
    codes = edges.reshape(-1)[found].astype(np.int64)
    shifts = _Shift.apply(points, *arrays, places, codes, axes, (height, width))
    first = torch.from_numpy(places)
    second = first + torch.from_numpy(np.where(axes == 0, 1, width))
    return Crossings(first, second, shifts)


def antialias(image, fragments: Fragments, points, faces, neighbours, Ks) -> Tensor:
    """See ``reference.antialias``."""
    found = crossings(fragments, points, faces, neighbours, Ks)
    return blend_pairs(image.cpu(), found).to(image.device)
