"""A CLIP tokenizer with a vocabulary of its own: all bytes, and one token for each given word; and
what a text encoder for it looks like."""

import itertools
import json
from pathlib import Path
from typing import Any

from pocket.portable import make_portable


def byte_characters() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes with (GPT-2's table)."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]


def _apply(merges: list[tuple[str, str]], word: str) -> list[str]:
    """Byte-pair encoding of one word: the earliest merge that fits is applied first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    rank = {pair: i for i, pair in enumerate(merges)}
    while True:
        pairs = [(rank.get(p, len(rank)), i) for i, p in enumerate(itertools.pairwise(pieces))]
        if not pairs or min(pairs)[0] == len(rank):
            return pieces
        i = min(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def vocabulary(words) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges under which every word is one token.

    A later word's merges have lower priority, and earlier words are whole by then, so they cannot
    be broken by it.
    """
    letters = byte_characters()
    tokens = letters + [c + "</w>" for c in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply(merges, word)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens.append(pieces[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: i for i, token in enumerate(tokens)}, merges


def text_config(tokens, length: int, width: int, layers: int, **more):
    """The configuration of a small CLIP text encoder for these tokens, ``length`` a prompt."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        projection_dim=width,
        **more,
    )


def save_tokenizer(folder: Path, words, length: int):
    """Write the tokenizer to ``folder`` (``length`` tokens a prompt) and return it."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary(words)
    # Older versions of transformers read these two files, newer ones tokenizer.json.
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    try:
        rules: Any = merges
        tokenizer = CLIPTokenizer(vocab=vocab, merges=rules, model_max_length=length)
    except TypeError:  # transformers < 5 takes the two files
        tokenizer = CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
        )
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    return tokenizer
