"""CLIP's tokenizer as files of a model folder: a checkpoint in one file comes without it.

The merges (``clip_merges.txt.gz``, see ``clip_merges.LICENSE``) are OpenAI's; the vocabulary
follows from them. It imports nothing heavy.
"""

import functools
import gzip
import json
from pathlib import Path

MERGES = Path(__file__).parent / "clip_merges.txt.gz"
MARKS = ("<|startoftext|>", "<|endoftext|>")
LENGTH = 77  # tokens of a prompt, the two marks included
SIZE = 49_408


@functools.cache
def merges() -> tuple[str, ...]:
    """The pairs that are joined, first ones first: "i n"."""
    return tuple(gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")[:-1])


def characters() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order: those that are printable
    in Latin-1 stand for themselves, and come first; the others are moved above them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(byte) for byte in (*printable, *range(256, 256 + others))]


def vocabulary() -> dict[str, int]:
    """The id of each token: bytes, bytes that end a word, what the merges make, and the marks."""
    letters = characters()
    joined = [pair.replace(" ", "") for pair in merges()]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *joined, *MARKS]
    return {token: number for number, token in enumerate(tokens)}


def write_tokenizer(folder: Path, padding: str = MARKS[1]) -> None:
    """Write the files of the tokenizer to ``folder``. ``padding``: what a prompt is filled up with,
    the end mark, or "!" for OpenCLIP's encoders."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = MARKS
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": padding,
    }
    lines = ["#version: 0.2", *merges()]
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
