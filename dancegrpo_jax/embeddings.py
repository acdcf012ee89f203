"""Embedding sets: prompts encoded once (launch/precompute.py), so that a run needs no text encoder in memory.

A folder with `prompts.jsonl` (one JSON string a line), array_record shards with one record a prompt, and
`manifest.json`, which is written last. A record is a small safetensors file: the conditioning of one prompt in
bfloat16, each array without its constant tail (rows equal to the last one) and with the bytes of a number in two
planes, of which the one with sign and exponent compresses well. Record i belongs to line i; the empty prompt, which
guidance needs, is among them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors.numpy import load, save

from dancegrpo_jax.models.files.convert import CheckpointError, read_json

FORMAT = 1
SHARD = 512  # prompts


def fingerprint(pipeline) -> dict:
    """What decides the embeddings: {"pipeline", "lengths", "encoders": {folder: hash}}.

    A hash covers all small files of the encoder and its tokenizer, and of every safetensors file its size and 16 blocks
    of 64 KiB, evenly spaced: two releases differ there, and ten gigabytes need not be read.
    """
    def digest(*folders):
        state = hashlib.sha256()
        for folder in folders:
            for file in sorted(folder.iterdir()):
                if file.suffix == ".safetensors":
                    size = file.stat().st_size
                    state.update(f"{size}".encode())
                    with file.open("rb") as stream:
                        for i in range(16):
                            stream.seek(max(0, size - 65536) * i // 15)
                            state.update(stream.read(65536))
                elif file.suffix in (".json", ".txt", ".model") and file.stat().st_size < 1 << 26:
                    state.update(file.name.encode() + file.read_bytes())
        return state.hexdigest()[:32]

    encoders = {name: digest(pipeline.part(name), pipeline.part(pipeline.parts[name].tokenizer[0]))
                for name in pipeline.named("text")}
    return {"pipeline": type(pipeline).__name__, "lengths": pipeline.lengths, "encoders": encoders}


def pack(cond: dict[str, np.ndarray]) -> bytes:
    """The record of one prompt: conditioning arrays [L, D] or [D]; any float type, stored as bfloat16."""
    tensors, shapes = {}, {}
    for name, array in cond.items():
        array = np.asarray(array).astype(ml_dtypes.bfloat16)
        kept = array
        if array.ndim == 2:
            differs = (array != array[-1]).any(axis=1)
            kept = array[:int(np.flatnonzero(differs)[-1]) + 2 if differs.any() else 1]
        shapes[name] = "x".join(map(str, array.shape))
        tensors[name] = np.ascontiguousarray(kept.view(np.uint8).reshape(*kept.shape, 2).transpose(-1, *range(kept.ndim)))
    return save(tensors, metadata=shapes)


def unpack(record: bytes) -> dict[str, np.ndarray]:
    """The inverse of `pack`: bfloat16 arrays."""
    length = int.from_bytes(record[:8], "little")
    shapes = json.loads(record[8:8 + length])["__metadata__"]
    cond = {}
    for name, planes in load(record).items():
        kept = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(ml_dtypes.bfloat16)[..., 0]
        shape = tuple(map(int, shapes[name].split("x")))
        if kept.ndim == 2:
            kept = np.concatenate([kept, np.repeat(kept[-1:], shape[0] - len(kept), axis=0)])
        cond[name] = kept.reshape(shape)
    return cond


def write(folder: str | os.PathLike, prompts: Sequence[str], encode: Callable[[list[str]], dict], source: dict,
          batch: int = 8, shard: int = SHARD) -> Iterator[tuple[int, int]]:
    """Encodes prompts into an embedding set; yields (done, total) after every shard. A second call resumes.

    Args:
      prompts: in any order; repetitions are dropped and the empty prompt is added.
      encode: list of `batch` prompts -> conditioning pytree of [batch, ...].
      source: the `fingerprint` of what encodes.
    Raises: CheckpointError if `folder` holds another job's shards.
    """
    folder = Path(folder)
    prompts = list(dict.fromkeys(["", *prompts]))
    listing = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    total = -(-len(prompts) // shard)
    job = {"format": FORMAT, "shards": total, "count": len(prompts), "source": source,
           "prompts": hashlib.sha256(listing.encode()).hexdigest()[:32]}
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / "job.json"
    if started.exists() and read_json(started) != job:
        raise CheckpointError(f"{folder}: holds an embedding set of other prompts, lengths or encoders; choose another "
                              "folder or delete this one")
    started.write_text(json.dumps(job))
    (folder / "prompts.jsonl").write_text(listing)
    for i in range(total):
        part, path = prompts[i * shard:(i + 1) * shard], folder / _name(i, total)
        if not path.exists():
            writer = ArrayRecordWriter(str(path) + ".part", "group_size:1,zstd:3")
            for start in range(0, len(part), batch):
                some = part[start:start + batch]
                cond = {name: np.asarray(array) for name, array in encode(some + some[-1:] * (batch - len(some))).items()}
                for j in range(len(some)):
                    writer.write(pack({name: array[j] for name, array in cond.items()}))
            writer.close()
            os.replace(str(path) + ".part", path)
        yield min((i + 1) * shard, len(prompts)), len(prompts)
    size = sum((folder / _name(i, total)).stat().st_size for i in range(total))
    (folder / "manifest.json").write_text(json.dumps(job | {"bytes": size}, indent=2) + "\n")


def _name(i: int, total: int) -> str:
    return f"embeddings.array_record-{i:05d}-of-{total:05d}"


class EmbeddingSet:
    """An embedding set on disk; calling it with prompts gives their conditioning.

    Raises: CheckpointError if the folder is incomplete, or was made by other encoders than those of `source`.
    """

    def __init__(self, folder: str | os.PathLike, source: dict):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise CheckpointError(f"{self.folder}: no finished embedding set (no manifest.json); run launch/precompute.py, "
                                  "which resumes where it stopped")
        manifest = read_json(self.folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{self.folder}: embedding set of format {manifest.get('format')}, expected {FORMAT}")
        for key, expected in source.items():
            if manifest["source"].get(key) != expected:
                raise CheckpointError(f"{self.folder}: embedding set made with {key} {manifest['source'].get(key)}, but "
                                      f"config.model has {expected}; run launch/precompute.py for this model")
        lines = (self.folder / "prompts.jsonl").read_text().splitlines()
        self.index = {json.loads(line): i for i, line in enumerate(lines)}
        paths = [str(self.folder / _name(i, manifest["shards"])) for i in range(manifest["shards"])]
        missing = [path for path in paths if not Path(path).exists()]
        if missing:
            raise CheckpointError(f"{missing[0]}: missing shard of the embedding set; copy it again")
        self.records = ArrayRecordDataSource(paths)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises: CheckpointError naming the first prompt that is not in the set."""
        absent = [prompt for prompt in prompts if prompt not in self.index]
        if absent:
            raise CheckpointError(f"{self.folder}: {len(absent)} of {len(prompts)} prompts are not in the embedding set, "
                                  f"first {absent[0][:80]!r}; add their file to launch/precompute.py and run it again")

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Conditioning {name: bfloat16 [P, ...]} of P prompts."""
        records = [unpack(record) for record in self.records.__getitems__([self.index[prompt] for prompt in prompts])]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}
