"""Models that see several views of an object at once, as MVDream does (arXiv:2308.16512)."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods import log
from lods.cameras import Cameras, no_views, refuse_rows
from lods.learned.files import read_safetensors
from lods.models import multiview_keys
from lods.models.cards import MULTI_VIEW, VIEWS, Location, first_line
from lods.models.families import serves
from lods.models.files import cannot_be_had, load_model_config, load_weights, only_errors
from lods.models.text_layout import Parts
from lods.models.unet import UNetModel
from torch import Tensor, nn

OURS, PUBLISHED = MULTI_VIEW
MOST = 64  # views
NUMBERS = 16  # of a camera
FILES = tuple(f"diffusion_pytorch_model{part}.safetensors" for part in ("", ".fp16"))


class JointViews:
    """Self-attention over the tokens of all ``views`` of an object: an attention processor of
    diffusers, for rows that are the views of one object, then those of the next, ...

    With one view it is ``AttnProcessor2_0`` of diffusers, to the last bit. Projections stay within
    their rows, so that the strength of a LoRA is that of the row (:mod:`lods.learned.lora`).
    """

    def __init__(self, views: int):
        self.views = views

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(width)) v, all (B, heads, tokens, width)."""
        return F.scaled_dot_product_attention(q, k, v)

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "B L C"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B L C"]:
        rows = len(hidden_states)

        def heads(projected: Float[Tensor, "B L W"]) -> Tensor:
            together = projected.reshape(rows // self.views, -1, projected.shape[-1])
            return together.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        found = self.attend(q, k, v).transpose(1, 2).flatten(2)
        found = found.reshape(rows, -1, found.shape[-1]).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](found))


def join_views(network: nn.Module, views: int, kind: type[JointViews] = JointViews) -> None:
    """Let the self-attention of each transformer block of a ``UNet2DConditionModel`` go over all
    ``views`` of an object."""
    for name, module in network.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(kind(views))  # type: ignore[operator]


class ViewsModel(UNetModel):
    """What models share whose UNet sees the ``views`` pictures of an object at once. Rows come
    object by object, and a call has a multiple of ``views`` of them; it needs cameras, so that
    ``settings.cameras`` is tokens or both.

    A family defines :meth:`join`, :meth:`numbers` and ``call``.
    """

    always_told = True

    def join(self) -> None:
        """Let the attention of the network go over all views of an object."""
        raise NotImplementedError(f"{type(self).__name__} does not define join")

    def numbers(self, cameras: Cameras) -> Float[Tensor, "B N"]:
        """What the network is told of each camera."""
        raise NotImplementedError(f"{type(self).__name__} does not define numbers")

    def prepare(self, context=None) -> None:
        """See :class:`lods.models.base.Model`."""
        first = not self._prepared
        super().prepare(context)
        if first:
            # slices, where they are wanted, would be of one view's attention
            self.join()
            if self.settings.enable_attention_slicing:
                log.warn(
                    "model: enable_attention_slicing has no effect on the self-attention of a "
                    "multi-view model, which is torch's own"
                )

    def told(self, cameras: Cameras | None, count: int) -> dict[str, Tensor]:
        """The cameras' numbers. Raises ``ValueError``, one line, without cameras, for another
        number of them, and for rows that are no whole objects."""
        if cameras is None:
            raise ValueError(no_views(self.views))
        if len(cameras) != count:
            raise ValueError(f"there are {len(cameras)} cameras for {count} pictures")
        refuse_rows(count, self.views)
        return {"numbers": self.numbers(cameras).to(self.device, self.dtype)}


@serves(PUBLISHED)
@serves(OURS)
class MultiViewModel(ViewsModel):
    """A UNet of Stable Diffusion's shape that sees the ``views`` pictures of an object at once:

    - its self-attention goes over the tokens of all of them (:class:`JointViews`);
    - to the embedding of the time it adds W_2 silu(W_1 c + b_1) + b_2, c the camera's 16 numbers
      (:meth:`lods.cameras.Cameras.poses`).

    That is diffusers' ``UNet2DConditionModel`` with ``class_embed_type`` "projection" of 16 numbers
    and another attention processor. Of cameras it reads nothing but their poses: not the distance,
    nor the field of view.

    A folder holds it where ``unet/config.json`` says ``_class_name`` MultiViewUNet, with the fields
    of diffusers' class and ``num_frames`` (4 if it is not there); or MultiViewUNetModel, as the
    published ``mvdream-sd2.1-diffusers`` has it (:mod:`lods.models.multiview_keys`). No code of
    such a folder is run.
    """

    def __init__(self, unet, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        super().__init__(unet, vae, scheduler, device, name, shares_vae)
        config = unet.config
        if config.class_embed_type != "projection" or (
            config.projection_class_embeddings_input_dim != NUMBERS
        ):
            raise ValueError(
                f"the UNet of {name!r} takes no camera of {NUMBERS} numbers (class_embed_type "
                "projection): the model folder is damaged, or of another kind"
            )
        self.views = getattr(unet, "views", VIEWS)
        self.join()

    @classmethod
    def network_names(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        return MULTI_VIEW

    @classmethod
    def load_network(cls, model: Location, dtype: torch.dtype) -> Any:
        """See :class:`lods.models.latent.LatentModel`."""
        config = load_model_config(model.path, cls.part, model.revision)
        views = config.get("num_frames", VIEWS)
        if isinstance(views, bool) or not isinstance(views, int) or not 1 <= views <= MOST:
            raise ValueError(
                f"the unet of {model.path!r} has num_frames={str(views)[:30]}, not 1 to {MOST}: "
                "the model folder is damaged"
            )
        if config.get("_class_name") == PUBLISHED:
            network = _load_published(cls.network_class(), model, config, dtype)
        else:
            with only_errors():  # num_frames is no field of diffusers' class
                network = load_weights(cls.network_class(), model, cls.part, dtype)
        network.views = views
        return network

    def join(self) -> None:
        """See :class:`ViewsModel`."""
        join_views(self.network, self.views)

    def numbers(self, cameras: Cameras) -> Float[Tensor, "B 16"]:
        """The cameras' poses."""
        return cameras.poses()

    def call(self, x_t, t, text: Parts, *, numbers: Tensor):  # type: ignore[override]
        """See :class:`lods.models.latent.LatentModel`."""
        return self.unet(x_t, t, encoder_hidden_states=text.tokens, class_labels=numbers).sample


def _load_published(kind: Any, model: Location, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """diffusers' network from the config and the weights of the published layout."""
    fields = multiview_keys.fields(config, model.path)
    try:
        with torch.device("meta"), only_errors():  # no random numbers are drawn
            network = kind.from_config(fields)
    except Exception as error:  # of many kinds, by field
        raise ValueError(
            f"the unet of {model.path!r} cannot be made ({first_line(error)}): the model folder is "
            "damaged"
        ) from None
    tensors, _ = read_safetensors(_weights_file(model))
    found = multiview_keys.renamed(tensors, fields)
    wanted = network.state_dict()
    for name in [*wanted, *found]:
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            raise ValueError(
                f"the weights of the unet of {model.path!r} do not fit its config.json (see "
                f"{name}): download the model again"
            )
    network.load_state_dict({name: value.to(dtype) for name, value in found.items()}, assign=True)
    return network


def _weights_file(model: Location) -> str:
    if os.path.isdir(model.path):
        for name in FILES:
            path = os.path.join(model.path, "unet", name)
            if os.path.isfile(path):
                return path
        raise ValueError(
            f"the folder {model.path!r} has no unet/{FILES[0]}: download the model again"
        )
    from huggingface_hub import hf_hub_download

    errors: list[Exception] = []
    for name in FILES:
        try:
            return hf_hub_download(model.path, name, subfolder="unet", revision=model.revision)
        except Exception as error:  # of many kinds, by library and by version
            errors.append(error)
    raise ValueError(cannot_be_had(model.path, "unet (.safetensors)", errors[0]))
