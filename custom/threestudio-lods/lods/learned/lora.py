"""LoRA on the attention of a network, with a strength of its own for every row of a batch."""

import contextlib
import copy
import gc
import itertools
import json
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.learned.files import read_safetensors, write_safetensors
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# of a transformer with weights of their own for picture and text in its attention
JOINT_TARGETS = (*TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_PARTS = {"A": "down", "B": "up"}  # diffusers' names of the two factors


@dataclass(frozen=True)
class Sites:
    """Where a LoRA sits in a network: on the layers whose names end in one of ``targets``. ``part``
    is what pipelines of diffusers call the network, and what the names in a file begin with."""

    targets: tuple[str, ...] = TARGETS
    part: str = "unet"


class RowLora(nn.Module):
    """Low-rank updates (arXiv:2106.09685) of a network's attention projections (a UNet's, unless
    ``sites`` says more), injected by peft:

    row b of a projection gives  W x_b + r_b B A x_b,  with A (rank, in) ~ N(0, 1/rank^2), B
    (out, rank) zero at first, both float32, and r_b the row's strength, set by :meth:`strength`
    for the calls within it and 0 outside: there the UNet is what it was.

    The parameters are named as in the UNet (``down_blocks.0...to_q.lora_A.weight``); the UNet
    itself is not part of this module. Several of them can share a UNet, each with its own
    parameters and strength; one that is no longer used is taken out when the next one comes.
    """

    def __init__(self, unet: nn.Module, rank: int = 4, sites: Sites | None = None):
        super().__init__()
        self.sites = sites or Sites()
        if rank < 1:
            raise ValueError(f"lora_rank must be at least 1, not {rank}")
        from peft import LoraConfig, inject_adapter_in_model

        # lora_alpha = r: peft's own factor is 1, the strength is ours alone.
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights="gaussian",
            target_modules=list(self.sites.targets),
        )
        others = _remove_unused(unet)
        adapter = next(name for name in _names() if name not in others)
        with warnings.catch_warnings():  # of several adapters, which is what is wanted
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, unet, adapter)
        self._rows = _Strength()
        for name, layer in _lora_layers(unet):
            for part in ("lora_A", "lora_B"):
                # peft makes them in the UNet's dtype; half precision would lose the updates
                self._enter(f"{name}.{part}", getattr(layer, part)[adapter].float())
            layer.lora_B[adapter].register_forward_hook(self._rows.scale)
            if others:  # peft has switched them off
                layer.set_adapter([*others, adapter])
        others[adapter] = _Owner(self)

    def _enter(self, path: str, leaf: nn.Module) -> None:
        *parents, last = path.split(".")
        node: nn.Module = self
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, leaf)

    @contextlib.contextmanager
    def strength(self, rows: float | Float[Tensor, " B"] | None):
        """Within this, the UNet's calls use these strengths, one for all rows or one for each of
        the first rows (0 for those after them)."""
        before, self._rows.value = self._rows.value, rows
        try:
            yield
        finally:
            self._rows.value = before

    def same_strength(self) -> Callable[[], Any]:
        """A function that makes contexts with the strengths of now, for what is computed again
        when they have ended."""
        rows = self._rows.value
        return lambda: self.strength(rows)

    @torch.no_grad()
    def sizes(self, unet: nn.Module) -> tuple[float, float] | None:
        """Frobenius norms of all B A and of all W that they are added to, in the UNet it was made
        for; None where those weights are elsewhere (offloaded)."""
        update, weights = 0.0, 0.0
        for name, layer in _lora_layers(unet):
            weight = layer.get_base_layer().weight
            if weight.is_meta or not weight.is_floating_point():  # offloaded, or in fewer bits
                return None
            A, B = (self.get_parameter(f"{name}.{part}.weight") for part in ("lora_A", "lora_B"))
            # |B A|^2 = tr(B^T B A A^T), without the product
            update += float(((B.T @ B) * (A @ A.T)).sum())
            weights += float(weight.float().norm() ** 2)
        return (max(update, 0.0) ** 0.5, weights**0.5) if weights else None

    def save(self, path, strength: float, metadata: dict[str, str]) -> Path:
        """Write a LoRA that ``load_lora_weights`` of the model's pipeline in diffusers reads: of a
        UNet under the names that every diffusers since 0.14 knows, of a transformer under peft's.
        At its default weight of 1 it acts with ``strength``, which is multiplied into B here."""
        tensors = {}
        for name, value in self.state_dict().items():
            factor = strength if name.endswith("lora_B.weight") else 1.0
            tensors[self._file_name(name)] = value * factor
        return write_safetensors(path, tensors, {"format": "pt", **metadata})

    def load(self, path, strength: float) -> dict[str, str]:
        """Take over the LoRA of a file, ours or another of the UNet's attention (names of diffusers
        or of peft), such that with ``strength`` it acts as the file says. Returns the file's
        metadata. Raises ``ValueError`` for a file of something else, another rank or another UNet.
        """
        tensors, metadata = read_safetensors(path)
        own = self.state_dict()
        names = {self._file_name(name): name for name in own}
        names |= {f"{self.sites.part}.{name}": name for name in own}
        found: dict[Any, Tensor] = {names.get(key): value for key, value in tensors.items()}
        if set(found) != set(own) or len(found) != len(tensors):
            odd = [k for k in tensors if k not in names]
            odd += [self._file_name(name) for name in own if name not in found] or list(tensors)
            network = "UNet" if self.sites.part == "unet" else self.sites.part
            raise ValueError(
                f"{path} is not a LoRA of the attention of this {network} (and of nothing else): "
                f"see {odd[0]!r}"
            )
        alpha = _peft_factor(metadata, path, self.sites.part)
        for name, value in found.items():
            if value.shape != own[name].shape:
                rank = value.shape[0 if "lora_A" in name else -1]
                raise ValueError(
                    f"the LoRA in {path} does not fit: {name} is {tuple(value.shape)} there and "
                    f"{tuple(own[name].shape)} here (its rank is {rank}, see lora_rank)"
                )
            factor = alpha / strength if name.endswith("lora_B.weight") else 1.0
            own[name].copy_(value.float() * factor)
        return metadata

    def _file_name(self, name: str) -> str:
        """The name in a file; of a UNet ``X.to_out.0.lora_A.weight`` is there
        ``unet.X.processor.to_out_lora.down.weight``."""
        if self.sites.part != "unet":
            return f"{self.sites.part}.{name}"
        found = re.fullmatch(r"(.*)\.(to_[a-z]+)(?:\.0)?\.lora_([AB])\.weight", name)
        assert found is not None  # TARGETS have such names
        module, projection, part = found.groups()
        return f"unet.{module}.processor.{projection}_lora.{_PARTS[part]}.weight"


class _Strength:
    """r_b of a LoRA: all that a UNet holds of a :class:`RowLora`, so that it can be forgotten."""

    value: float | Tensor | None = None  # None: outside of every use of it

    def scale(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.value is None:
            # not 0 * output: a LoRA that has diverged to nan leaves others on the same UNet alone
            return torch.zeros_like(output)
        if not isinstance(self.value, Tensor):
            return output * self.value
        rows = F.pad(self.value, (0, len(output) - len(self.value)))
        return output * rows.view(-1, *[1] * (output.ndim - 1))


class _Owner:
    """Which :class:`RowLora` an adapter of a UNet belongs to, for as long as it is used. A copy or
    a pickle of a method belongs to the copied one."""

    def __init__(self, lora: RowLora):
        self.lora = weakref.ref(lora)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Owner":
        return self._with(copy.deepcopy(self.lora(), memo))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _Owner._with, (self.lora(),)

    @staticmethod
    def _with(lora: RowLora | None) -> "_Owner":
        return _Owner(RowLora.__new__(RowLora) if lora is None else lora)


def _names() -> Iterator[str]:
    """Names for peft's adapters."""
    yield "default"
    yield from (f"default_{n}" for n in itertools.count(2))


def _lora_layers(unet: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in unet.named_modules() if hasattr(layer, "lora_A")]


def _remove_unused(unet: Any) -> dict[str, _Owner]:
    """Take out the adapters of those that are gone; returns the others by name, in a table that
    belongs to the UNet."""
    table = unet.__dict__.setdefault("_row_loras", {})
    if table:
        gc.collect()  # a method refers to itself
    for name in [name for name, owner in table.items() if owner.lora() is None]:
        for _, layer in _lora_layers(unet):
            layer.delete_adapter(name)
        del unet.peft_config[name], table[name]
    return table


def _peft_factor(metadata: dict[str, str], path, network: str) -> float:
    """alpha / rank of a file in which peft noted them; 1 in any other."""
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        factor = noted.get(f"{network}.lora_alpha", 1.0) / noted.get(f"{network}.r", 1.0)
        if not 0 < factor < 1e4:
            raise ValueError(f"alpha / rank is {factor}")
        return factor
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: lora_adapter_metadata cannot be read ({error})") from None
