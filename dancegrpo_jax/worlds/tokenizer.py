"""A CLIP tokenizer whose vocabulary is the world's: every word of the grammar is one token."""

import json
import os
from itertools import pairwise
from pathlib import Path

from dancegrpo_jax.worlds.shapes import words

MAX_LENGTH = 12  # the longest caption has 8 words, plus the start and end tokens


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, as in GPT-2 and CLIP."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """BPE merges that turn each word into one token.

    Words are finished one after the other; later merges rank lower, so they cannot disturb a finished word.
    """
    merges: list[tuple[str, str]] = []
    for word in vocabulary:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            ranks = [merges.index(pair) if pair in merges else len(merges) for pair in pairwise(symbols)]
            at = ranks.index(min(ranks))
            if ranks[at] == len(merges):
                merges.append((symbols[at], symbols[at + 1]))
            symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
    return merges


def write_tokenizer(folder: str | os.PathLike) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json for `transformers.CLIPTokenizer.from_pretrained`.

    Other text falls back to characters. The end token is the largest id and pads, as in CLIP.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges, symbols = _merges(sorted(words())), _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in merges),
              "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": MAX_LENGTH}, indent=2) + "\n")
