"""Model files on disk, or else from the Hugging Face hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from dancegrpo_jax.models.files.convert import CheckpointError

# What the loaders read: configs, tokenizers, weights; no other formats and precisions.
CONFIGS = ("*.json", "*.txt", "*.model")
PATTERNS = (*CONFIGS, "*.safetensors")
IGNORED = ("*.fp16.*", "*.non_ema.*", "safety_checker/*")


def find_in_hub(path: str | os.PathLike, *, root: Path, patterns: Sequence[str] = PATTERNS) -> Path:
    """A path that exists (relative ones also under `root`), or the local copy of "owner/name[@revision][/file]".

    Raises: CheckpointError if there is neither.
    """
    for candidate in (Path(path), root / path):
        if candidate.exists():
            return candidate
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", str(path))
    if not match:
        raise CheckpointError(f"{path}: no such file or folder, and no hub id (owner/name)")
    name, revision, file = match.groups()
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns),
                                                      ignore_patterns=list(IGNORED)))
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not on this disk, and the hub did not give it ({text}); download it where there is a "
                              "network, or log in with `hf auth login`") from error
