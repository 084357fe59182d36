"""Text embeddings of any Stable-Diffusion-shaped model: a CLIP tokenizer and text encoder."""

import hashlib
import os
from dataclasses import dataclass

import torch

import threestudio
from threestudio.models.prompt_processors.base import PromptProcessor
from threestudio.utils.pretrained import find_model, load_part
from threestudio.utils.safe_models import read_object, weights_identity
from threestudio.utils.typing import *

PARTS = ("tokenizer", "text_encoder")
WEIGHTS = (".safetensors", ".bin", ".pt", ".msgpack", ".h5", ".onnx")


def fingerprint_folder(folder: str, parts: Tuple[str, ...] = PARTS) -> str:
    """Hash that changes when the text model in ``folder`` does: contents of the small files in its
    subfolders ``parts``, and the :func:`weights_identity` of those with weights. The folder's own
    path is part of it, which for a model of the hub holds the revision."""
    digest = hashlib.sha256(os.path.realpath(folder).encode())
    for part in parts:
        for name in sorted(os.listdir(os.path.join(folder, part))):
            path = os.path.join(folder, part, name)
            if not os.path.isfile(path):
                continue
            if name.endswith(WEIGHTS):
                content = weights_identity(path)
            else:
                with open(path, "rb") as file:
                    content = file.read()
            # with its length, so that no two lists of files give the same bytes
            digest.update(f"{part}/{name}:{len(content)}:".encode(errors="surrogateescape"))
            digest.update(content)
    return digest.hexdigest()


def hub_folder(model_id: str) -> Optional[str]:
    """The folder of the hub's local copy of ``model_id`` (its name is the revision), or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model_id, "text_encoder/config.json")
    except ValueError:  # not a valid name on the hub
        return None
    return os.path.dirname(os.path.dirname(found)) if isinstance(found, str) else None


@threestudio.register("stable-diffusion-prompt-processor")
class StableDiffusionPromptProcessor(PromptProcessor):
    """Embeddings are the encoder's last hidden states; T and D are the model's own.

    ``pretrained_model_name_or_path`` is a folder (relative to the current one, or absolute) or a
    hub id, with subfolders ``tokenizer`` and ``text_encoder``. A subclass that reads other
    subfolders names them in ``parts``, and loads each with :meth:`load_part`.
    """

    @dataclass
    class Config(PromptProcessor.Config):
        pass

    cfg: Config
    parts: Tuple[str, ...] = PARTS

    def fingerprint(self) -> Optional[str]:
        model = find_model(self.cfg.pretrained_model_name_or_path)
        folder = model if os.path.isdir(model) else hub_folder(model)
        if folder is None:
            return None
        try:
            return fingerprint_folder(folder, self.parts)
        except OSError:  # a part is missing, so there is nothing to identify
            return None

    def embedding_shape(self) -> Tuple[Optional[int], Optional[int]]:
        model = self.cfg.pretrained_model_name_or_path
        folder = model if os.path.isdir(model) else hub_folder(model)
        encoder, tokenizer = (
            read_object(path) if os.path.isfile(path) else {}
            for path in (
                os.path.join(folder or "", PARTS[1], "config.json"),
                os.path.join(folder or "", PARTS[0], "tokenizer_config.json"),
            )
        )
        lengths = [encoder.get("max_position_embeddings"), tokenizer.get("model_max_length")]
        lengths = [n for n in lengths if isinstance(n, int)]
        # without the encoder's own number, its default is not known here
        T = min(lengths) if isinstance(encoder.get("max_position_embeddings"), int) else None
        D = encoder.get("hidden_size")
        return T, D if isinstance(D, int) else None

    def encode(self, texts: List[str]) -> Tuple[Float[Tensor, "N T D"], List[int]]:
        tokenizer, text_encoder = self._load()
        limit = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        # counted here, so that the tokenizer's own warning per text is not needed
        counts = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
        tokens = tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self.device)
        masked = getattr(text_encoder.config, "use_attention_mask", False)
        with torch.no_grad():
            embeddings = text_encoder(
                tokens.input_ids, attention_mask=tokens.attention_mask if masked else None
            )[0]
        return embeddings, counts

    def _load(self) -> Tuple[Any, Any]:
        """Tokenizer and text encoder (float32, on ``self.device``)."""
        from transformers import AutoTokenizer, CLIPTextModel

        # not left to its default, which asks at the terminal
        tokenizer = self.load_part(AutoTokenizer, PARTS[0], trust_remote_code=False)
        text_encoder = self.load_part(CLIPTextModel, PARTS[1], use_safetensors=True)
        return tokenizer, text_encoder.to(self.device, torch.float32).eval()

    def load_part(self, cls: Any, part: str, **kwargs) -> Any:
        """``cls.from_pretrained`` of one subfolder of the model, after the checks of
        :func:`threestudio.utils.pretrained.load_part`."""
        return load_part(cls, self.cfg.pretrained_model_name_or_path, part, **kwargs)
