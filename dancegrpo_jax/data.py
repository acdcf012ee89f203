"""Prompts through grain: random access by iteration, so the data cursor of a resumed run is the iteration number."""

import csv
import json
from pathlib import Path

import grain

PACKAGE = Path(__file__).parent
FIELDS = ("prompt", "caption", "text")  # names that a prompt may have in files with several fields


def read_prompts(path: str) -> list[str]:
    """Reads a prompt file in the format of its suffix.

    .jsonl: one object a line; .csv: with a header; a folder: a TFDS dataset (split "train", else its first). These have
    a field `prompt`, `caption` or `text`. Anything else is text, one prompt a line, where lines starting with # are
    skipped. Blank prompts are skipped. A relative path that does not exist in the working directory is looked up
    beside the package.
    Raises: ValueError naming the file (and line) if it is missing, malformed, empty or not UTF-8.
    """
    file = Path(path) if Path(path).exists() else PACKAGE.parent / path
    try:
        if file.is_dir():
            prompts = [_field(row, f"prompts {path}") for row in _tfds(file)]
        elif file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            prompts = [_field(_json(line, f"prompt file {path}:{i}"), f"prompt file {path}:{i}")
                       for i, line in enumerate(lines, 1) if line.strip()]
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as stream:
                prompts = [_field(row, f"prompt file {path}:{i}") for i, row in enumerate(csv.DictReader(stream), 2)]
        else:
            prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {path}: cannot be read as UTF-8 text ({error})") from error
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path}: no prompts in it; write one a line")
    return prompts


def _json(line: str, where: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _field(row, where: str) -> str:
    name = next((name for name in FIELDS if isinstance(row, dict) and name in row), None)
    if name is None:
        raise ValueError(f"{where}: none of the fields {', '.join(FIELDS)}")
    value = row[name].decode() if isinstance(row[name], bytes) else row[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {value!r}, not text")
    return value


def _tfds(folder: Path):
    import tensorflow_datasets as tfds  # seconds to import, and only here

    try:
        builder = tfds.builder_from_directory(folder)
        split = "train" if "train" in builder.info.splits else next(iter(builder.info.splits))
        return grain.MapDataset.source(builder.as_data_source(split))
    except Exception as error:
        raise ValueError(f"prompts {folder}: cannot be read as a TFDS dataset in array_record format "
                         f"({str(error).splitlines()[0]})") from error


def prompt_batches(prompts: list[str], batch: int, seed: int) -> grain.MapDataset:
    """Endless shuffled batches: `dataset[i]` is the list of prompts of iteration i, reshuffled every epoch."""
    if len(prompts) < batch:
        raise ValueError(f"config.data.prompts_per_step={batch} exceeds the {len(prompts)} prompts of config.data.train")
    return grain.MapDataset.source(prompts).seed(seed).shuffle().repeat().batch(batch, batch_fn=list)
