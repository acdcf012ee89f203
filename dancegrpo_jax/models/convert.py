"""Between diffusers / transformers folders and flat parameter dicts, both ways, strictly.

Because modules are built with the attribute paths of the released checkpoints (`layers.py`), one rule serves every
model: a leading layer axis under `stacked` becomes an index in the name, `kernel` is transposed to torch's layout
(Linear [out, in], Conv OIHW), and `kernel`, `scale`, `embedding` are all spelled `weight`.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from dancegrpo_jax.models.layers import Params, merge, split

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


class CheckpointError(ValueError):
    """A model folder does not hold what the model needs; the message names file, key and remedy."""


def parse_config(config_class, config: Mapping, source="config"):
    """Builds the frozen dataclass `config_class` from a config.json's content.

    Missing keys take the class defaults, lists become tuples, "true" and "false" are understood. A key that the
    dataclass lacks must stand in `config_class.FIXED` (key -> the only value the module implements); keys starting
    with "_" are metadata. Anything else raises CheckpointError naming the nearest key. A static method
    `config_class.adapt(config, source)`, if there is one, first turns the file's content into such keys.
    """
    if hasattr(config_class, "adapt"):
        config = config_class.adapt(config, source)
    fields = {field.name for field in dataclasses.fields(config_class)}
    fixed = getattr(config_class, "FIXED", {})
    values = {}
    for key, value in config.items():
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        value = tuple(value) if isinstance(value, list) else value
        if key in fields:
            values[key] = value
        elif key in fixed:
            if value != fixed[key]:
                raise CheckpointError(f"{source}: {key}={value!r} is not supported, only {fixed[key]!r}")
        elif not key.startswith("_"):
            nearest = difflib.get_close_matches(key, fields | set(fixed), 1)
            hint = f"; nearest known key: {nearest[0]}" if nearest else ""
            raise CheckpointError(f"{source}: unknown key {key!r} for {config_class.__name__}{hint}")
    return config_class(**values)


def torch_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """The checkpoint keys that parameter `name` is made of: one, or one per layer if it is stacked."""
    *parents, leaf = name.split(".")
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    if "stacked" not in parents:
        return [".".join([*parents, leaf])]
    axis = parents.index("stacked")
    return [".".join([*parents[:axis], str(i), *parents[axis + 1:], leaf]) for i in range(shape[0])]


def _to_torch_layout(name: str, array):
    if not name.endswith(".kernel"):
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def _from_torch_layout(name: str, array):
    if not name.endswith(".kernel"):
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def from_torch(tensors: Mapping[str, np.ndarray], abstract: Params, *, source="checkpoint", dtype=jnp.float32,
               rename=(), ignore=()) -> dict[str, np.ndarray]:
    """Converts checkpoint tensors to our parameters, consuming every key exactly once.

    Args:
      tensors: key -> array in torch layout; read one by one, so a lazy mapping keeps memory low.
      abstract: our parameters' names and shapes (`split` of a module or of its `nnx.eval_shape`).
      source: file or folder named in errors.
      dtype: of the result.
      rename: (regex, replacement) pairs that turn released spellings into today's.
      ignore: regexes of keys that carry no weights.
    Raises: CheckpointError for a missing, unknown or mis-shaped key, with the nearest known key.
    """
    available = {}
    for key in tensors:
        if any(re.fullmatch(pattern, key) for pattern in ignore):
            continue
        new = key
        for pattern, replacement in rename:
            new = re.sub(pattern, replacement, new)
        if new in available:
            raise CheckpointError(f"{source}: {available[new]!r} and {key!r} both mean {new!r}; remove one of them")
        available[new] = key

    params = {}
    for name, leaf in abstract.items():
        names = torch_names(name, leaf.shape)
        stacked = "stacked" in name.split(".")
        out = np.empty(leaf.shape, dtype)
        for i, key in enumerate(names):
            if key not in available:
                raise CheckpointError(f"{source}: missing key {key!r}{_nearest(key, available)}")
            original = available.pop(key)
            target = out[i] if stacked else out
            value = _from_torch_layout(name, np.asarray(tensors[original]))
            if value.shape != target.shape:
                raise CheckpointError(f"{source}: {original!r} has shape {np.shape(tensors[original])}, "
                                      f"expected {_to_torch_layout(name, target).shape}")
            target[...] = value.astype(dtype)
        params[name] = out
    if available:
        key = next(iter(available.values()))
        known = [n for name, leaf in abstract.items() for n in torch_names(name, leaf.shape)]
        raise CheckpointError(f"{source}: {len(available)} unknown key(s), first {key!r}{_nearest(key, known)}")
    return params


def to_torch(params: Params, dtype=None) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: our parameters as checkpoint tensors in torch layout."""
    tensors = {}
    for name, leaf in params.items():
        leaf = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        names = torch_names(name, leaf.shape)
        for i, key in enumerate(names):
            layer = leaf[i] if "stacked" in name.split(".") else leaf
            tensors[key] = np.asarray(_to_torch_layout(name, layer), order="C")  # keeps scalars 0-d
    return tensors


class Folder(Mapping):
    """Lazy view of a folder's safetensors: key -> numpy array, single file or shards with an index."""

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder")
        names = [f + suffix for f in WEIGHT_FILES for suffix in ("", ".index.json") if (self.path / (f + suffix)).exists()]
        if not names:
            raise CheckpointError(f"{self.path}: none of {', '.join(WEIGHT_FILES)} (or its .index.json) is here")
        if names[0].endswith(".index.json"):
            shards = sorted(set(read_json(self.path / names[0])["weight_map"].values()))
        else:
            shards = [names[0]]
        self._files, self._where = {}, {}
        for shard in shards:
            try:
                self._files[shard] = safe_open(self.path / shard, framework="numpy")
            except Exception as error:
                raise CheckpointError(f"{self.path / shard}: cannot be read ({error}); copy the file again") from error
            for key in self._files[shard].keys():  # noqa: SIM118 (not a dict)
                self._where[key] = shard

    def __getitem__(self, key):
        return self._files[self._where[key]].get_tensor(key)

    def __iter__(self):
        return iter(self._where)

    def __len__(self):
        return len(self._where)


def read_json(path: str | os.PathLike) -> dict:
    """Reads a JSON object; CheckpointError names the file if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error


def load_model(model_class, folder: str | os.PathLike, dtype=jnp.float32) -> nnx.Module:
    """Builds `model_class` from a folder's config.json and safetensors (host arrays, cast to `dtype`).

    `model_class` has `Config` (a frozen dataclass, see `parse_config`), is called as `model_class(config, rngs=...)`,
    and may name `LEGACY_KEYS` ((regex, replacement) pairs) and `IGNORED_KEYS` (regexes).
    """
    folder = Path(folder)
    config = parse_config(model_class.Config, read_json(folder / "config.json"), folder / "config.json")
    graphdef, abstract = split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    params = from_torch(Folder(folder), abstract, source=folder, dtype=dtype,
                        rename=getattr(model_class, "LEGACY_KEYS", ()), ignore=getattr(model_class, "IGNORED_KEYS", ()))
    return merge(graphdef, jax.tree.map(jnp.asarray, params))


def save_model(folder: str | os.PathLike, model_class, config, params: Params, dtype=jnp.bfloat16) -> None:
    """Writes `params` and `config` as a diffusers / transformers folder (one safetensors file, config.json)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transformers_model = getattr(model_class, "TRANSFORMERS_NAME", None)
    head = ({"architectures": [transformers_model]} if transformers_model
            else {"_class_name": getattr(model_class, "DIFFUSERS_NAME", model_class.__name__)})
    content = head | getattr(model_class.Config, "FIXED", {}) | dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file(to_torch(params, dtype), folder / WEIGHT_FILES[bool(transformers_model)], metadata={"format": "pt"})


def _nearest(key: str, known) -> str:
    match = difflib.get_close_matches(key, list(known), 1)
    return f"; nearest: {match[0]!r}" if match else ""
