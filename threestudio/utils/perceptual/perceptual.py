"""LPIPS (Zhang et al., arXiv:1801.03924) with VGG-16, from files of weights."""

import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

# widths of the convolutions, block by block; the features are those before each pooling
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CHANNELS = tuple(block[-1] for block in BLOCKS)
VGG = "vgg16-397923af.pth"  # torchvision's weights of ImageNet
LPIPS = "vgg.pth"  # version 0.1 of the five linear layers
FOLDER = Path("threestudio", "utils", "lpips")  # where upstream keeps the second


def vgg_file() -> Path:
    """Where torchvision and torch.hub keep the first file."""
    return Path(torch.hub.get_dir(), "checkpoints", VGG)


def lpips_file() -> Path:
    """Where the second is: in upstream's folder under the current one, or in the installed package
    ``lpips``, which brings it and is not imported."""
    package = importlib.util.find_spec("lpips")
    if not (FOLDER / LPIPS).exists() and package is not None and package.origin:
        return Path(os.path.dirname(package.origin), "weights", "v0.1", LPIPS)
    return FOLDER / LPIPS


class PerceptualLoss(nn.Module):
    """``loss(input, target)``, both (N, 3, H, W) in -1..1, gives (N, 1, 1, 1):

        d = sum over 5 layers of mean over pixels of  w . (f(input) - f(target))^2

    f the features of VGG-16 before each pooling, of unit length at each pixel, w >= 0 learned.
    With ``use_dropout`` a module in training mode drops half of the squares, as upstream's does.
    Frozen. Nothing is downloaded: without the two files it raises :class:`UserError`, which says
    where they belong.
    """

    def __init__(self, use_dropout: bool = True) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.net = _Vgg16()
        self.chns = list(CHANNELS)
        for i, width in enumerate(CHANNELS):
            layers = [nn.Dropout()] if use_dropout else []
            self.add_module(f"lin{i}", nn.Sequential(*layers, nn.Conv2d(width, 1, 1, bias=False)))
        self.load_from_pretrained()
        self.requires_grad_(False)

    def load_from_pretrained(self) -> None:
        """Read the weights of the network and of the linear layers."""
        network = _read(vgg_file(), "of torchvision's vgg16, from download.pytorch.org/models")
        self._take(self.net.features, network, "features.{}", vgg_file())
        linear = _read(lpips_file(), "of LPIPS, which pip install lpips brings")
        for i in range(len(CHANNELS)):
            layer = getattr(self, f"lin{i}")
            # the file's layers have a dropout before their convolution
            kernel = linear.get(f"lin{i}.model.1.weight")
            if kernel is None or kernel.shape != layer[-1].weight.shape:
                raise UserError(f"{lpips_file()} is not LPIPS for VGG-16: see lin{i}")
            layer[-1].weight.data.copy_(kernel)

    @staticmethod
    def _take(module: nn.Module, state: Dict[str, Tensor], name: str, file: Path) -> None:
        own = module.state_dict()
        found = {key: state.get(name.format(key)) for key in own}
        odd = [k for k, v in found.items() if v is None or v.shape != own[k].shape]
        if odd:
            raise UserError(f"{file} is not torchvision's vgg16: see {name.format(odd[0])}")
        module.load_state_dict(found)

    @classmethod
    def from_pretrained(cls, name: str = "vgg_lpips") -> "PerceptualLoss":
        """Upstream's other way to make one; there is only this name."""
        if name != "vgg_lpips":
            raise UserError(f"there is only vgg_lpips, not {name!r}")
        return cls()

    def forward(
        self, input: Float[Tensor, "N 3 H W"], target: Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, "N 1 1 1"]:
        pairs = zip(
            self.net((input - self.shift) / self.scale),
            self.net((target - self.shift) / self.scale),
        )
        total = 0.0
        for i, features in enumerate(pairs):
            a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in features)
            layer = getattr(self, f"lin{i}")
            total = total + layer((a - b).square()).mean(dim=(2, 3), keepdim=True)
        return total


class _Vgg16(nn.Module):
    """The convolutions of VGG-16 (arXiv:1409.1556), numbered as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        layers: List[nn.Module] = []
        self.ends: List[int] = []
        before = 3
        for block in BLOCKS:
            for width in block:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.ends.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # nothing is asked for after the last pooling

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> List[Float[Tensor, "N C h w"]]:
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.ends:
                found.append(x)
        return found


def _read(file: Path, what: str) -> Dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise UserError(f"the weights {what}, are not there: put them at {file}") from None
    except Exception as error:  # of many kinds, by how it is damaged
        detail = " ".join(str(error).split())[:160]
        raise UserError(f"{file} cannot be read as weights ({detail})") from None
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no weights")
    return state
