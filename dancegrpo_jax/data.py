"""Prompts through grain: random access by iteration, so the data cursor of a resumed run is the iteration number."""

from pathlib import Path

import grain

PACKAGE = Path(__file__).parent


def read_prompts(path: str) -> list[str]:
    """Reads a prompt file, one prompt a line; blank lines and lines starting with # are skipped.

    A relative path that does not exist in the working directory is looked up beside the package.
    Raises: ValueError naming the file if it is missing, empty or not UTF-8.
    """
    file = Path(path) if Path(path).exists() else PACKAGE.parent / path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {path}: cannot be read as UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompt file {path}: no prompts in it; write one a line")
    return prompts


def prompt_batches(prompts: list[str], batch: int, seed: int) -> grain.MapDataset:
    """Endless shuffled batches: `dataset[i]` is the list of prompts of iteration i, reshuffled every epoch."""
    if len(prompts) < batch:
        raise ValueError(f"config.data.prompts_per_step={batch} exceeds the {len(prompts)} prompts of config.data.train")
    return grain.MapDataset.source(prompts).seed(seed).shuffle().repeat().batch(batch, batch_fn=list)
