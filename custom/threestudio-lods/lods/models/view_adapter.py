"""MV-Adapter (arXiv:2412.03632): a Stable Diffusion 2.1 that sees six views of an object at once,
by what is added to its frozen UNet.

The published file, ``mvadapter_t2mv_sd21.safetensors``, has the names of its makers' code:

    adapter.*                          diffusers' ``T2IAdapter``, which is told the camera
    <block>.attn1.processor.to_q_mv    and to_k_mv, to_v_mv without a bias, to_out_mv.0 with one:
                                       beside the self-attention of each transformer block
"""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.cameras import Cameras
from lods.learned.files import read_safetensors
from lods.models.cards import ADAPTED_VIEWS, VIEW_ADAPTER, Location, first_line
from lods.models.families import serves
from lods.models.files import cannot_be_had
from lods.models.multiview import ViewsModel
from lods.models.text_layout import Parts
from torch import Tensor, nn

NUMBERS = 6  # of a camera
SHRINKS = 8  # pixels of the picture that tells the camera for one of the latents
NOISIER = 8.0  # by which the last timestep's ratio of picture and noise is divided
ENCODER = "adapter."  # its names in the file


class RowsOfViews(nn.Module):
    """Self-attention as it was, to which that of the views is added: an attention processor of
    diffusers, for rows that are the ``views`` of one object, then those of the next, ...

    Each token also looks at the tokens of its own row of latent pixels in all views, with
    projections of their own, A = to_out_mv(softmax(q k^T / sqrt(width)) v); pictures of cameras at
    one height that are far away have the same part of the object in a row. With to_out_mv = 0 it is
    ``AttnProcessor2_0`` of diffusers.
    """

    def __init__(self, width: int, inner: int, views: int):
        super().__init__()
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.views, self.plain = views, AttnProcessor2_0()
        self.to_q_mv = nn.Linear(width, inner, bias=False)
        self.to_k_mv = nn.Linear(width, inner, bias=False)
        self.to_v_mv = nn.Linear(width, inner, bias=False)
        self.to_out_mv = nn.ModuleList([nn.Linear(inner, width)])

    def forward(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "B L C"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B L C"]:
        """See the class."""
        own = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)
        return own + self.of_views(hidden_states, attn.heads)

    def of_views(self, x: Float[Tensor, "B L C"], heads: int) -> Float[Tensor, "B L C"]:
        """A. Raises ``ValueError`` for pictures that are not square."""
        count, length, _ = x.shape
        side = math.isqrt(length)
        if side**2 != length:
            raise ValueError(f"views are square pictures: {length} tokens are none")

        def rows(projected: Float[Tensor, "B L W"]) -> Float[Tensor, "N H K w"]:
            parts = projected.reshape(count // self.views, self.views, side, side, heads, -1)
            return parts.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 1)

        q, k, v = (rows(to(x)) for to in (self.to_q_mv, self.to_k_mv, self.to_v_mv))
        found = F.scaled_dot_product_attention(q, k, v)
        found = found.unflatten(0, (-1, side)).unflatten(3, (self.views, side))
        found = found.permute(0, 3, 1, 4, 2, 5).reshape(count, length, -1)
        return self.to_out_mv[0](found.to(x.dtype))


@serves(f"UNet2DConditionModel with {VIEW_ADAPTER}")
class AdaptedModel(ViewsModel):
    """A UNet of Stable Diffusion 2.1's shape with MV-Adapter, which sees six ``views`` at once:

    - the self-attention of its transformer blocks also goes over the views (:class:`RowsOfViews`);
    - an encoder is told the camera, and adds what it makes of it to each level of the UNet.

    The adapter knows orthographic pictures, 1.1 times as wide as a box around the object, from
    elevation 0 and the azimuths 0, 45, 90, 180, 270 and 315 degrees. Of a camera it is told where
    it looks and where it is, two directions (:meth:`numbers`), the same for all pixels: neither the
    distance nor the field of view.

    As its makers sample with it, there is more noise than in the base model's schedule: at the
    timestep t the ratio alpha^2 / sigma^2 is divided by 8^(t / (T - 1)).

    A folder holds it where ``mv_adapter/`` with one safetensors file is beside the base model's
    parts.
    """

    views = ADAPTED_VIEWS

    @classmethod
    def load_network(cls, model: Location, dtype: torch.dtype) -> Any:
        """The base model's UNet with the adapter in it."""
        network = super().load_network(model, dtype)
        path = _adapter_file(model)
        attach(network, read_safetensors(path)[0], cls.views, path, dtype)
        return network

    @classmethod
    def load_schedule(cls, model: Location, name: str) -> Any:
        """The base model's, with more noise."""
        scheduler = super().load_schedule(model, name)
        abar = scheduler.alphas_cumprod.double()
        part = torch.arange(len(abar), dtype=torch.float64) / max(len(abar) - 1, 1)
        ratio = abar / (1 - abar) * NOISIER**-part
        scheduler.alphas_cumprod = (ratio / (1 + ratio)).to(scheduler.alphas_cumprod)
        return scheduler

    def join(self) -> None:
        """See :class:`lods.models.multiview.ViewsModel`."""
        for name, processor in self.network.row_processors.items():
            self.network.get_submodule(name).set_processor(processor)

    def numbers(self, cameras: Cameras) -> Float[Tensor, "B 6"]:
        """(where it looks, where it is), both as directions in the adapter's axes, in which the
        front is seen from -y: (x, y, z) is (y, -x, z) there. From -1..1 to 0..1."""
        c2w = cameras.poses().unflatten(1, (4, 4))
        x, y, z = torch.stack([-c2w[:, :3, 2], c2w[:, :3, 3]], dim=1).unbind(-1)
        return (torch.stack([y, -x, z], dim=-1).flatten(1) / 2 + 0.5).clamp(0, 1)

    def call(self, x_t, t, text: Parts, *, numbers: Tensor):  # type: ignore[override]
        """See :class:`lods.models.latent.LatentModel`."""
        height, width = (SHRINKS * size for size in x_t.shape[2:])
        with torch.no_grad():
            picture = numbers[..., None, None].expand(-1, -1, height, width)
            levels = list(self.network.camera_adapter(picture))
        return self.unet(
            x_t,
            t,
            encoder_hidden_states=text.tokens,
            down_intrablock_additional_residuals=levels,
        ).sample


def attach(
    network: Any, tensors: dict[str, Tensor], views: int, where: str, dtype: torch.dtype
) -> None:
    """Put the adapter with these weights into a ``UNet2DConditionModel``. Raises ``ValueError``,
    one line, for weights that do not fit it; ``where`` is their file."""
    from diffusers import T2IAdapter

    if odd := next((name for name in tensors if "_ref" in name), None):
        raise ValueError(
            f"{where} is an adapter that is told a picture beside the text (see {odd[:80]!r}), "
            "which methods of this library have none of: take mvadapter_t2mv_sd21.safetensors"
        )
    network.row_processors = {}
    with torch.device("meta"):
        for name, module in list(network.named_modules()):
            if name.endswith(".attn1"):
                processor = RowsOfViews(module.query_dim, module.inner_dim, views)
                module.set_processor(processor)
                network.row_processors[name] = processor
        network.camera_adapter = T2IAdapter(
            in_channels=NUMBERS,
            channels=list(network.config.block_out_channels),
            num_res_blocks=network.config.layers_per_block,
            downscale_factor=SHRINKS,
        )
    state = network.state_dict()
    found = {
        f"camera_adapter.{name}" if name.startswith(ENCODER) else name: value.to(dtype)
        for name, value in tensors.items()
    }
    wanted = [name for name, value in state.items() if value.is_meta]
    for name in [*wanted, *found]:
        if name not in found or name not in state or found[name].shape != state[name].shape:
            raise ValueError(
                f"the adapter {where} does not fit the unet (see {name[:100]}): take "
                "mvadapter_t2mv_sd21.safetensors, on a model of Stable Diffusion 2.1's shape"
            )
    network.load_state_dict(found, strict=False, assign=True)


def _adapter_file(model: Location) -> str:
    """The file of an adapter, in the model's folder or of its card."""
    folder = os.path.join(model.path, VIEW_ADAPTER)
    if os.path.isdir(folder):
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        if len(files) != 1:
            raise ValueError(
                f"the folder {folder} holds {len(files)} .safetensors files, not the one of the "
                "adapter"
            )
        return os.path.join(folder, files[0])
    from huggingface_hub import hf_hub_download

    assert model.card is not None and model.card.file is not None
    repo, file = model.card.ids[0], model.card.file
    try:
        return hf_hub_download(repo, file, revision=model.card.revision)
    except Exception as error:  # of many kinds, by library and by version
        raise ValueError(cannot_be_had(repo, file, ValueError(first_line(error)))) from None
