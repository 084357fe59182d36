"""What the methods with a LoRA share: where it sits, its rows, its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from lods.cameras import Cameras
from lods.learned.lora import RowLora
from lods.methods import predictions
from lods.methods.learning import LearningMethod
from lods.models.base import Model
from lods.models.cards import canonical, noted

# what a model for the learned prediction must share with the other
ALIKE = ("latent_shape", "text_width", "image_size")


class LoraMethod(LearningMethod):
    """A method that learns a LoRA on the attention of the frozen model. The frozen and the learned
    predictions are rows of one call, unless ``pretrained_model_name_or_path_lora`` names another
    model for the learned ones."""

    @dataclass
    class Config(LearningMethod.Config):
        # rank, and strength of the learned prediction (0.5 in the original, 1 for VSD)
        lora_rank: Annotated[int, "[1, 1024]"] = 4
        lora_scale: Annotated[float, "[-1000, 1000]"] = 0.5
        # another model for it (same latents, text width and schedule; null: the same model)
        pretrained_model_name_or_path_lora: str | None = None

        def contradictions(self):
            """See :class:`lods.methods.base.Method`."""
            if self.lora_scale == 0:
                yield "lora_scale", "must not be 0: the LoRA would never act, nor learn"

    cfg: Config

    def create_learned(self) -> None:
        self.lora_model: Model = self.model
        other = self.cfg.pretrained_model_name_or_path_lora
        if other and canonical(other) != canonical(self.model.name):
            self.lora_model = self.model.sibling(other)
            self._check_alike(other)
        sites = getattr(self.lora_model, "lora_sites", None)
        self.lora = RowLora(self.lora_model.lora_network(), self.cfg.lora_rank, sites)
        self.unscale_gradients(self.lora.parameters())

    def _check_alike(self, other: str) -> None:
        one, two = self.model, self.lora_model
        for what in ALIKE:
            if getattr(one, what) != getattr(two, what):
                raise ValueError(
                    f"pretrained_model_name_or_path_lora {other!r} does not fit: its {what} is "
                    f"{getattr(two, what)}, not {getattr(one, what)}"
                )
        if not one.schedule.is_like(two.schedule):
            raise ValueError(
                f"pretrained_model_name_or_path_lora {other!r} does not fit: its noise schedule "
                "is another"
            )

    def models(self) -> tuple[Model, ...]:
        return (self.model,) if self.lora_model is self.model else (self.model, self.lora_model)

    def recompute_context(self):
        return self.lora.same_strength()

    @property
    def learned_on(self) -> str:
        return noted(self.lora_model.name)

    def predict_learned(self, x_t, t, text, cameras: Cameras | None = None):
        """eps_lora under ``text``, in a call of its own."""
        with self.lora.strength(self.cfg.lora_scale):
            return self.lora_model.predict(x_t, t, text, cameras)

    def predict_with_lora(
        self, x_t, t, conditions, texts: Sequence, learned_text
    ) -> predictions.Predictions:
        """(eps under each of ``texts``, LoRA off; eps_lora under ``learned_text``). With the
        negatives of Perp-Neg in the conditions the first of them is composed against the second
        prediction of all."""
        if self.lora_model is self.model:
            strengths = x_t.new_zeros(len(texts) + 1, len(x_t))
            strengths[-1] = self.cfg.lora_scale
            with self.lora.strength(strengths.flatten()):
                found = self.predict(x_t, t, conditions, *texts, learned_text)
            return self._kept(x_t, t, conditions, texts, found)
        if len(texts) > 1:
            eps_lora = self.predict_learned(x_t, t, learned_text, conditions.cameras)
            found = *self.predict(x_t, t, conditions, *texts), eps_lora
            return self._kept(x_t, t, conditions, texts, found)
        eps_u = self.predict_learned(x_t, t, learned_text, conditions.cameras)
        rows = (*texts, *conditions.negatives)
        eps_c, *negatives = predictions.one_call(self.model, x_t, t, conditions, *rows)
        found = predictions.perp_neg(eps_c, eps_u, tuple(negatives), conditions), eps_u
        return self._kept(x_t, t, conditions, texts, found)

    def _kept(self, x_t, t, conditions, texts: Sequence, found) -> predictions.Predictions:
        """``found``, of which the last is under no text but the learned part's."""
        if self.sight is not None:
            self.sight.keep(x_t, t, conditions, (*texts, None), found)
        return found

    def moved(self):
        """|s B A| / |W|, over all projections that it is on together, with s ``lora_scale``."""
        sizes = self.lora.sizes(self.lora_model.lora_network())
        if sizes is None:
            return None
        share = abs(self.cfg.lora_scale) * sizes[0] / sizes[1]
        return share, "|s B A| / |W|, W the weights of the model that it is on"

    def write_learned(self, path, metadata):
        """A LoRA for ``load_lora_weights`` of diffusers' pipelines, at ``lora_scale``."""
        return self.lora.save(path, self.cfg.lora_scale, metadata)

    def read_learned(self, path):
        return self.lora.load(path, self.cfg.lora_scale)
