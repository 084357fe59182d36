"""Z-Image: a flow over a transformer in which picture and text are one sequence."""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from lods.learned import lora
from lods.models import chat_text
from lods.models.cards import Location
from lods.models.families import serves
from lods.models.flow import FlowModel, side_by_vae
from lods.models.text import Loader, TextPlan
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

TOKENS = 512  # to which the pipeline cuts a text
LAYER = -2  # of the language model: the last but one
PATCH = 2  # pixels of a latent's side that are one token's
UNDISTILLED = "z-image"  # the card to take instead of another of the family


@serves("ZImageTransformer2DModel")
class ZImageModel(FlowModel):
    """The frozen transformer, VAE and schedule of Z-Image.

    Its network takes 1 - s as the time and gives z - eps, the negative of the velocity here; its
    pipeline turns the sign, too. Latents are (16, h, w). A text is what the last but one layer of a
    Qwen3 makes of its chat format, up to 512 rows with a mask. Only the rows that count are given
    to the network, which places the picture after them and fills both up with rows of its own.

    It knows no weights of tokens: a blend of texts has the tokens of all of them, each counted in
    full (:class:`lods.models.text_layout.TextLayout` has the rows that it then sees).
    """

    lora_sites = lora.Sites(lora.TARGETS, "transformer")
    half = torch.bfloat16  # its makers' own

    def __init__(self, transformer, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        if transformer.config.get("siglip_feat_dim") is not None:
            raise ValueError(
                f"{name!r} is told pictures beside the text (siglip_feat_dim, as Z-Image-Omni), "
                f"which methods of this library have none of: take {UNDISTILLED}"
            )
        if PATCH not in transformer.config.all_patch_size:
            raise ValueError(
                f"the transformer of {name!r} has all_patch_size "
                f"{str(transformer.config.all_patch_size)[:30]} without {PATCH}: the model folder "
                "is damaged, or of another kind"
            )
        super().__init__(transformer, vae, scheduler, device, name, shares_vae)

    @classmethod
    def network_class(cls):
        """See :class:`lods.models.latent.LatentModel`."""
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel

    @classmethod
    def side_of(cls, network, vae):
        """See :func:`lods.models.flow.side_by_vae`."""
        return side_by_vae(vae, PATCH)

    @classmethod
    def image_tokens(cls, transformer, vae):
        """See :class:`lods.models.flow.FlowModel`."""
        return super().image_tokens(transformer, vae) // PATCH**2

    @classmethod
    def width_of(cls, transformer):
        """Of the language model's rows."""
        return transformer.config.cap_feat_dim

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """One layer of Qwen3. Raises ``ValueError``, one line, for another language model."""
        chat_text.check_kind(model, "qwen3", "Z-Image", UNDISTILLED)
        return TextPlan(chat_text.PARTS, encode, f"z-image-{TOKENS}")

    @functools.cached_property
    def text_layout(self) -> TextLayout:  # type: ignore[override]
        """Of the tokens and their mask."""
        return TextLayout(TOKENS, self.text_width, masked=True)

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a time into what the blocks are modulated with."""
        return self.network.t_embedder

    def call(self, x_t, t, text: Parts):
        """See :class:`lods.models.latent.LatentModel`."""
        assert text.mask is not None
        found = self.network(
            list(x_t.unsqueeze(2)),  # a picture is a film of one frame
            1 - self.schedule.told(t, 1.0),  # type: ignore[attr-defined]
            [rows[counts] for rows, counts in zip(text.tokens, text.mask)],
        ).sample
        return -torch.stack(found).squeeze(2)


def encode(
    texts: Sequence[str], load: Loader, device: torch.device | str
) -> tuple[Float[Tensor, "N T D"], list[int]]:
    """Embeddings (N, T, D) of texts (:class:`ZImageModel`), and for each a number that is above T
    where the text is cut off."""
    reader = chat_text.Reader(load, device, thinking=True)
    layout = TextLayout(TOKENS, reader.width, masked=True)
    packed, counts = [], []
    for text in texts:
        rows, mask, count = reader(text, TOKENS, [LAYER])
        order = mask.long().argsort(descending=True, stable=True)  # the text first
        packed.append(layout.pack(rows[order][None], mask=mask[order][None]))
        counts.append(count + layout.mask_rows)
    return torch.cat(packed), counts
