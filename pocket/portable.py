"""Model folders that old and new versions of the libraries read alike.

transformers 5 saves a CLIP text encoder without the prefix ``text_model.`` of its keys, under which
older versions look for them: those find nothing, and take random weights. Its tokenizers save the
merges of ``tokenizer.json`` as pairs, which tokenizers before 0.20 refuse. The older forms, written
here, are read by all versions.
"""

import json
import shutil
from pathlib import Path

from pocket.tools import whole_file

PREFIX = "text_model."
BARE = ("embeddings.", "encoder.", "final_layer_norm.")


def make_portable(folder: Path) -> None:
    """Rewrite the tokenizers and text encoders in the subfolders of ``folder``, a diffusers model
    or the folder of one of its tokenizers; what is in the older form already stays as it is."""
    for file in folder.rglob("tokenizer.json"):
        merges_as_text(file)
    for file in folder.glob("text_encoder*/model.safetensors"):
        prefix_keys(file)


def merges_as_text(file: Path) -> None:
    """In a ``tokenizer.json``, write the merge of a and b as "a b"."""
    content = json.loads(file.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    if all(isinstance(merge, str) for merge in merges):
        return
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    with whole_file(file) as tmp:
        tmp.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def prefix_keys(file: Path) -> None:
    """Give the keys of a CLIP text model the prefix ``text_model.``; tensors stay bit for bit."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    if not any(key.startswith(BARE[0]) for key in tensors):  # in the older form, or a T5 encoder
        return
    named = {PREFIX + k if k.startswith(BARE) else k: v for k, v in tensors.items()}
    with whole_file(file) as tmp:
        save_file(named, tmp, metadata=metadata)
        shutil.copymode(file, tmp)
