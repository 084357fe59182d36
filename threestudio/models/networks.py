"""Encodings and small networks, by the names that YAML files use.

``get_encoding(n_input_dims, config)`` and ``get_mlp(n_in, n_out, config)`` take tiny-cuda-nn's
configuration keys. With a CUDA device and the package ``tinycudann`` its kernels are used where it
has them; everything here also runs without, on any device.
"""

import math
from typing import Annotated, TypedDict

import torch
from torch import nn

import threestudio
from threestudio.models.hashgrid import HashGrid, native
from threestudio.models.spherical import SphericalHarmonics
from threestudio.utils.base import Updateable
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.misc import get_device
from threestudio.utils.ops import get_activation
from threestudio.utils.typing import *


def _options(config, known: Iterable[str], what: str) -> Dict[str, Any]:
    """The entries of ``config`` except ``otype``; a key that is not ``known`` is an error."""
    options = {str(k): v for k, v in dict(config).items() if k != "otype"}
    for key in options:
        if key not in known:
            raise UserError(f"{what} has no option {key!r}{nearest(key, known)}")
    return options


class Frequency(nn.Module):
    """x (N, D) -> sin and cos of 2^k pi x, k = 0 .. n_frequencies - 1: (N, 2 D n_frequencies).

    The order is tiny-cuda-nn's: input, then frequency, then (sin, cos). NeRF, arXiv:2003.08934,
    eq. 4.
    """

    def __init__(self, n_input_dims: int, n_frequencies: int = 12) -> None:
        super().__init__()
        self.n_output_dims = 2 * n_input_dims * n_frequencies
        scales = math.pi * 2.0 ** torch.arange(n_frequencies)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        angles = x[..., None] * self.scales
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Identity(nn.Module):
    """x (N, D) -> scale * x + offset."""

    def __init__(self, n_input_dims: int, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.n_output_dims, self.scale, self.offset = n_input_dims, scale, offset

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.scale * x + self.offset


class ProgressiveBandFrequency(nn.Module, Updateable):
    """x (N, D) -> sin and cos of 2^k x, each band k times its window of the coarse-to-fine
    schedule (1 - cos(pi clamp(step / n_masking_step * K - k, 0, 1))) / 2 (Nerfies,
    arXiv:2011.12948, eq. 8). ``n_masking_step <= 0``: all bands from the start.

    The order is band, then (sin, cos), then input.
    """

    def __init__(self, n_input_dims: int, n_frequencies: int = 12, n_masking_step: int = 0):
        super().__init__()
        self.n_frequencies, self.n_masking_step = n_frequencies, n_masking_step
        self.n_output_dims = 2 * n_input_dims * n_frequencies
        self.register_buffer("scales", 2.0 ** torch.arange(n_frequencies), persistent=False)
        self.register_buffer("mask", torch.ones(n_frequencies), persistent=False)
        self.update_step(0, 0)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set the windows of this step."""
        if self.n_masking_step > 0:
            bands = torch.arange(self.n_frequencies, device=self.mask.device)
            part = (global_step / self.n_masking_step * self.n_frequencies - bands).clamp(0, 1)
            self.mask = (1 - torch.cos(math.pi * part)) / 2

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        angles = x[:, None, :] * self.scales[:, None]
        bands = torch.stack([angles.sin(), angles.cos()], dim=2)  # N, K, 2, D
        return (bands * self.mask[:, None, None]).flatten(1)


class ProgressiveBandHashGrid(nn.Module, Updateable):
    """A hash grid whose levels above ``start_level`` are zero at first; from ``start_step`` on,
    one more is let through every ``update_steps`` steps (Neuralangelo, arXiv:2306.03092)."""

    def __init__(
        self,
        n_input_dims: int,
        start_level: int,
        start_step: int,
        update_steps: int,
        **grid: Any,
    ) -> None:
        super().__init__()
        self.start_level, self.start_step, self.update_steps = start_level, start_step, update_steps
        self.encoding = HashGrid(n_input_dims, **grid)
        self.n_output_dims = self.encoding.n_output_dims
        self.n_level = int(grid.get("n_levels", 16))
        self.n_features_per_level = self.n_output_dims // self.n_level
        self.register_buffer("mask", torch.zeros(self.n_output_dims), persistent=False)
        self.update_step(0, 0)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Let the levels of this step through."""
        grown = max(global_step - self.start_step, 0) // self.update_steps
        self.current_level = min(self.start_level + grown, self.n_level)
        self.mask[: self.current_level * self.n_features_per_level] = 1.0

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        return self.encoding(x) * self.mask


GRID = (
    "n_levels",
    "n_features_per_level",
    "log2_hashmap_size",
    "base_resolution",
    "per_level_scale",
    "interpolation",
    "backend",
)
ENCODINGS = {  # otype -> class, names of its options
    "HashGrid": (HashGrid, GRID),
    "Grid": (HashGrid, (*GRID, "type")),
    "SphericalHarmonics": (SphericalHarmonics, ("degree",)),
    "Frequency": (Frequency, ("n_frequencies",)),
    "Identity": (Identity, ("scale", "offset")),
    "ProgressiveBandFrequency": (ProgressiveBandFrequency, ("n_frequencies", "n_masking_step")),
    "ProgressiveBandHashGrid": (
        ProgressiveBandHashGrid,
        (*GRID, "start_level", "start_step", "update_steps"),
    ),
}
SHARED = ("include_xyz",)  # options of the wrapper around every encoding


class EncodingOptions(TypedDict, total=False):
    """Ranges of the options of all ENCODINGS."""

    n_levels: Annotated[int, "[1, 128]"]
    n_features_per_level: Annotated[int, (1, 2, 4, 8)]
    log2_hashmap_size: Annotated[int, "[1, 28]"]
    base_resolution: Annotated[int, "[1, 1048575]"]
    per_level_scale: Annotated[float, "[1, 1e6]"]
    degree: Annotated[int, "[1, 8]"]
    n_frequencies: Annotated[int, "[1, 64]"]
    scale: Annotated[float, "(-inf, inf)"]
    offset: Annotated[float, "(-inf, inf)"]
    n_masking_step: Annotated[int, "[-1e12, 1e12]"]
    start_level: Annotated[int, "[0, 128]"]
    start_step: Annotated[int, "[0, 1e12]"]
    update_steps: Annotated[int, "[1, 1e12]"]


class TCNNEncoding(nn.Module, Updateable):
    """One of ENCODINGS behind the attribute ``encoding``: checkpoints of upstream have a hash
    grid's parameters as ``...encoding.encoding.params``. Computed in float32 under autocast."""

    def __init__(self, in_channels: int, config: dict, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        otype = config["otype"]
        if otype not in ENCODINGS:
            hint = nearest(otype, [*ENCODINGS, SPATIAL_TIME])
            raise UserError(f"unknown encoding otype {otype!r}{hint}")
        cls, known = ENCODINGS[otype]
        options = _options(config, (*known, *SHARED), f"encoding {otype}")
        kind = options.pop("type", "Hash")
        if kind != "Hash":
            raise UserError(f"encoding Grid: only type 'Hash' is there, not {kind!r}")
        for key in SHARED:
            options.pop(key, None)
        self.n_input_dims = in_channels
        self.encoding = cls(in_channels, **options)
        self.n_output_dims = self.encoding.n_output_dims
        self.dtype = dtype

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        with torch.autocast(x.device.type, enabled=False):
            return self.encoding(x.float()).to(self.dtype)


SPATIAL_TIME = "HashGridSpatialTime"  # an otype that is not one of tiny-cuda-nn's
TIME = ("static", "num_frames", "n_key_frames", "use_key_frame")  # beside GRID


class TCNNEncodingSpatialTime(nn.Module):
    """Two hash grids, one of space and one of space and time (4D-fy, arXiv:2311.17984, sec. 3.2):

        x (N, D) -> grid(x) + grid_time(x, t),  t = ``frame_time`` in 0..1

    ``frame_time`` is None (0), a number, or a tensor with one number for all points or one for
    each; whoever renders sets it. With ``static`` the second grid is not trained. Checkpoints of
    upstream fit. ``num_frames``, ``n_key_frames`` and ``use_key_frame`` are for code that reads
    them here: they do not change the encoding, upstream's neither.
    """

    def __init__(
        self,
        in_channels: int,
        config: dict,
        dtype: torch.dtype = torch.float32,
        init_time_zero: bool = False,
    ) -> None:
        super().__init__()
        options = _options(config, (*GRID, *TIME, *SHARED), "encoding HashGridSpatialTime")
        if "static" not in options:
            raise UserError("encoding HashGridSpatialTime needs the option 'static'")
        self.static = bool(options.pop("static"))
        self.num_frames = int(options.pop("num_frames", 1))
        self.n_key_frames = int(options.pop("n_key_frames", 1))
        self.use_key_frame = bool(options.pop("use_key_frame", False))
        for key in SHARED:
            options.pop(key, None)
        self.n_input_dims, self.dtype = in_channels, dtype
        self.encoding = HashGrid(in_channels, **options)
        self.encoding_time = HashGrid(in_channels + 1, **options)
        if init_time_zero:
            nn.init.zeros_(self.encoding_time.params)
        self.n_output_dims = self.encoding.n_output_dims
        self.frame_time: Optional[Union[float, Tensor]] = None
        self.is_video, self.update_occ_grid = True, False  # which renderers of 4D-fy read and set
        if self.static:
            self.set_temp_param_grad(False)

    def set_temp_param_grad(self, requires_grad: bool = False) -> None:
        """Whether the grid of space and time is trained."""
        self.set_param_grad(self.encoding_time, requires_grad)

    def set_param_grad(self, param_list: Any, requires_grad: bool = False) -> None:
        """The same for a parameter, or for all of a module."""
        several = isinstance(param_list, nn.Module)
        for parameter in param_list.parameters() if several else [param_list]:
            parameter.requires_grad_(requires_grad)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            time = torch.as_tensor(0.0 if self.frame_time is None else self.frame_time).to(x)
            time = time.reshape(-1, 1).expand(len(x), 1)
            encoded = self.encoding(x) + self.encoding_time(torch.cat([x, time], dim=1))
        return encoded.to(self.dtype)


class CompositeEncoding(nn.Module, Updateable):
    """``encoding``, with ``xyz_scale * x + xyz_offset`` in front when ``include_xyz``."""

    def __init__(
        self,
        encoding: nn.Module,
        include_xyz: bool = False,
        xyz_scale: float = 2.0,
        xyz_offset: float = -1.0,
    ) -> None:
        super().__init__()
        self.encoding = encoding
        self.include_xyz, self.xyz_scale, self.xyz_offset = include_xyz, xyz_scale, xyz_offset
        self.n_output_dims = encoding.n_output_dims + include_xyz * encoding.n_input_dims

    def forward(self, x: Float[Tensor, "N D"], *args) -> Float[Tensor, "N F"]:
        encoded = self.encoding(x, *args)
        if not self.include_xyz:
            return encoded
        return torch.cat([x * self.xyz_scale + self.xyz_offset, encoded], dim=-1)


def get_encoding(n_input_dims: int, config) -> CompositeEncoding:
    """The encoding that ``config`` describes: ``otype`` is one of ENCODINGS, or HashGridSpatialTime
    (:class:`TCNNEncodingSpatialTime`); the other keys are its options, and ``include_xyz`` puts
    2 x - 1 in front. It maps (N, n_input_dims) in [0, 1] to (N, ``n_output_dims``). Raises
    ``UserError`` for an unknown otype or option."""
    kind = TCNNEncodingSpatialTime if config["otype"] == SPATIAL_TIME else TCNNEncoding
    encoding = kind(n_input_dims, dict(config))
    return CompositeEncoding(encoding, include_xyz=bool(config.get("include_xyz", False)))


class VanillaMLP(nn.Module):
    """Linear layers without bias, ReLU between them, ``output_activation`` behind the last.

    Computed in float32 under autocast.
    """

    def __init__(self, dim_in: int, dim_out: int, config: dict) -> None:
        super().__init__()
        self.n_neurons, self.n_hidden_layers = config["n_neurons"], config["n_hidden_layers"]
        widths = [dim_in, *[self.n_neurons] * self.n_hidden_layers, dim_out]
        layers: List[nn.Module] = []
        for i in range(len(widths) - 1):
            last = i == len(widths) - 2
            layers.append(self.make_linear(widths[i], widths[i + 1], i == 0, last))
            if not last:
                layers.append(self.make_activation())
        self.layers = nn.Sequential(*layers)
        self.output_activation = get_activation(config.get("output_activation"))

    def make_linear(self, dim_in: int, dim_out: int, is_first: bool, is_last: bool) -> nn.Module:
        return nn.Linear(dim_in, dim_out, bias=False)

    def make_activation(self) -> nn.Module:
        return nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        with torch.autocast(x.device.type, enabled=False):
            return self.output_activation(self.layers(x.float()))


class SphereInitVanillaMLP(VanillaMLP):
    """An MLP that starts as the signed distance to a sphere of ``sphere_init_radius`` in its first
    three inputs, nearly (SAL, arXiv:1911.10414, theorem 1); ``inside_out`` flips the sign.
    Weight-normal layers with bias, softplus(100 x) / 100 between them, which rounds off the centre.
    """

    def __init__(self, dim_in: int, dim_out: int, config: dict) -> None:
        if "sphere_init_radius" not in config:
            raise UserError("network SphereInitVanillaMLP: sphere_init_radius is missing")
        self.sphere_init_radius = config["sphere_init_radius"]
        self.sphere_init_inside_out = bool(config.get("inside_out", False))
        super().__init__(dim_in, dim_out, config)

    def make_linear(self, dim_in: int, dim_out: int, is_first: bool, is_last: bool) -> nn.Module:
        layer = nn.Linear(dim_in, dim_out, bias=True)
        sign = -1.0 if self.sphere_init_inside_out else 1.0
        with torch.no_grad():
            if is_last:
                layer.weight.normal_(sign * math.sqrt(math.pi / dim_in), 1e-4)
                layer.bias.fill_(-sign * self.sphere_init_radius)
            else:
                layer.bias.zero_()
                if is_first:
                    layer.weight.zero_()
                fan = layer.weight[:, :3] if is_first else layer.weight
                fan.normal_(0.0, math.sqrt(2.0 / dim_out))
        return nn.utils.parametrizations.weight_norm(layer)

    def make_activation(self) -> nn.Module:
        return nn.Softplus(beta=100)


class TCNNNetwork(nn.Module):
    """A network of tiny-cuda-nn, cast to float32; needs a CUDA device."""

    def __init__(self, dim_in: int, dim_out: int, config: dict) -> None:
        super().__init__()
        import tinycudann

        self.network = tinycudann.Network(dim_in, dim_out, dict(config))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        return self.network(x).float()


MLP = ("activation", "output_activation", "n_neurons", "n_hidden_layers")
SPHERE = ("sphere_init", "sphere_init_radius", "inside_out")
TCNN_NETWORKS = ("FullyFusedMLP", "CutlassMLP")


class NetworkOptions(TypedDict, total=False):
    """Ranges of a network's options."""

    n_neurons: Annotated[int, "[1, 65536]"]
    n_hidden_layers: Annotated[int, "[0, 1000]"]
    sphere_init_radius: Annotated[float, "(0, 1e6]"]


def get_mlp(n_input_dims: int, n_output_dims: int, config) -> nn.Module:
    """The network that ``config`` describes: ``VanillaMLP``, ``SphereInitVanillaMLP``, or
    tiny-cuda-nn's ``FullyFusedMLP`` and ``CutlassMLP``, whose place a ``VanillaMLP`` takes where
    tiny-cuda-nn cannot run. Keys: ``n_neurons``, ``n_hidden_layers``, ``activation`` (ReLU),
    ``output_activation``; ``sphere_init_radius`` and ``inside_out`` for the second. Raises
    ``UserError`` for what it does not know."""
    config = dict(config)
    otype = config.get("otype")
    names = ("VanillaMLP", "SphereInitVanillaMLP", *TCNN_NETWORKS)
    if otype not in names:
        raise UserError(f"unknown network otype {otype!r}{nearest(otype, names)}")
    _options(config, MLP + SPHERE, f"network {otype}")
    for key in ("n_neurons", "n_hidden_layers"):
        if key not in config:
            raise UserError(f"network {otype} needs the option {key!r}")
    if otype in TCNN_NETWORKS:
        why = native.missing()
        if not why:
            return TCNNNetwork(n_input_dims, n_output_dims, config)
        tell = threestudio.warn if get_device().type == "cuda" else threestudio.info
        tell(f"network {otype}: VanillaMLP in its place ({why})")
    if str(config.get("activation", "ReLU")).lower() != "relu":
        raise UserError(f"network {otype}: activation is ReLU here, not {config['activation']!r}")
    if otype == "SphereInitVanillaMLP" or config.get("sphere_init", False):
        return SphereInitVanillaMLP(n_input_dims, n_output_dims, config)
    return VanillaMLP(n_input_dims, n_output_dims, config)


class NetworkWithInputEncoding(nn.Module, Updateable):
    """``network(encoding(x))``."""

    def __init__(self, encoding: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.encoding, self.network = encoding, network

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        return self.network(self.encoding(x))


def create_network_with_input_encoding(
    n_input_dims: int, n_output_dims: int, encoding_config, network_config
) -> NetworkWithInputEncoding:
    """``get_encoding`` followed by ``get_mlp``."""
    encoding = get_encoding(n_input_dims, encoding_config)
    network = get_mlp(encoding.n_output_dims, n_output_dims, network_config)
    return NetworkWithInputEncoding(encoding, network)


class ToDTypeWrapper(nn.Module, Updateable):
    """``module`` with its result cast to ``dtype``."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.module(x).to(self.dtype)
