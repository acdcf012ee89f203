"""Rows through grain: random access by iteration, so the data cursor of a resumed run is the iteration number."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

PACKAGE = Path(__file__).parent
FIELDS = ("prompt", "caption", "text")  # names that a prompt may have in files with several fields


class Row(NamedTuple):
    """One row of a dataset: its position among the kept rows of its file, its prompt, and every other field."""

    index: int
    prompt: str
    fields: Mapping[str, Any]


def find_rows(path: str) -> Path:
    """Where the file (or TFDS folder) of a config is: a relative path is looked up beside the package if it is not here."""
    return Path(path) if Path(path).exists() else PACKAGE.parent / path


def read_rows(path: str) -> list[Row]:
    """Reads a file of prompts, and of what else belongs to them, in the format of its suffix.

    .jsonl: one object a line; .csv: with a header; a folder: a TFDS dataset (split "train", else its first). These have
    a field `prompt`, `caption` or `text`; the others become `fields`, bytes decoded where they are UTF-8. Anything else is
    text, one prompt a line, where lines starting with # are skipped. Rows with a blank prompt are skipped; a prompt may
    stand in several rows. A relative path that does not exist in the working directory is looked up beside the package.
    Raises: ValueError naming the file (and line) if it is missing, malformed, empty or not UTF-8.
    """
    file = find_rows(path)
    try:
        found = [(prompt.strip(), fields) for prompt, fields in _read(file, path) if prompt.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {path}: cannot be read as UTF-8 text ({error})") from error
    if not found:
        raise ValueError(f"prompt file {path}: no prompts in it; write one a line")
    return [Row(i, prompt, fields) for i, (prompt, fields) in enumerate(found)]


def rows_of(prompts: Sequence[str]) -> list[Row]:
    """Rows of prompts alone."""
    return [Row(i, prompt, {}) for i, prompt in enumerate(prompts)]


def _read(file: Path, path: str) -> Iterable[tuple[str, dict]]:
    """(prompt, fields) of every row."""
    if file.is_dir():
        return [_split(row, f"prompts {path}") for row in _tfds(file)]
    if file.suffix == ".jsonl":
        lines = file.read_text(encoding="utf-8").splitlines()
        return [_split(_json(line, f"prompt file {path}:{i}"), f"prompt file {path}:{i}")
                for i, line in enumerate(lines, 1) if line.strip()]
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as stream:
            return [_split(row, f"prompt file {path}:{i}") for i, row in enumerate(csv.DictReader(stream), 2)]
    return [(line, {}) for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _json(line: str, where: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _split(row, where: str) -> tuple[str, dict]:
    """(prompt, the other fields) of a row as it was read."""
    name = next((name for name in FIELDS if isinstance(row, dict) and name in row), None)
    if name is None:
        raise ValueError(f"{where}: none of the fields {', '.join(FIELDS)}")
    value = row[name].decode() if isinstance(row[name], bytes) else row[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {value!r}, not text")
    # A csv line with more cells than its header has them under None.
    return value, {key: _decoded(other) for key, other in row.items() if key not in (name, None)}


def _decoded(value):
    """TFDS gives text as bytes, alone, in dicts and in arrays of objects; bytes that are no text (a file) stay."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _decoded(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_decoded(entry) for entry in value.tolist()]
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


def row_batches(rows: Sequence[Row], batch: int, seed: int) -> grain.MapDataset:
    """Endless shuffled batches: `dataset[i]` is the list of rows of iteration i, reshuffled every epoch.

    Raises: ValueError if there are fewer rows than a batch takes.
    """
    if len(rows) < batch:
        raise ValueError(f"config.data.prompts_per_step={batch} exceeds the {len(rows)} prompts of config.data.train")
    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(batch, batch_fn=list)
