"""Between diffusers / transformers folders and flat parameter dicts, both ways, strictly.

Because modules are built with the attribute paths of the released checkpoints (`layers.py`), one rule serves every
model: a leading layer axis under `stacked` becomes an index in the name, `kernel` is transposed to torch's layout
(Linear [out, in], convolutions [out, in, *spatial]), and `kernel`, `scale`, `embedding` are all spelled `weight`.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from dancegrpo_jax.models.layers import Params, merge, split
from dancegrpo_jax.sharding import Rules, param_shardings

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")

# Keys of transformers' config.json files that do not change the forward pass: training, generation and bookkeeping.
# Files of transformers 4 spell out every default of its base class, hence the length.
TRANSFORMERS_METADATA = frozenset("""
    add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
""".split())  # noqa: SIM905 (sixty names, easier to read without quotes)


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


def _permuted(name: str, items: tuple) -> tuple:
    """One entry per dimension of ours -> the same entries in the order of torch's dimensions.

    Kernels of any rank, without a layer axis: [*spatial, in, out] -> [out, in, *spatial].
    """
    if name.split(".")[-1] != "kernel":
        return items
    *spatial, fan_in, fan_out = items
    return fan_out, fan_in, *spatial


def _to_torch_layout(name: str, array):
    return array.transpose(_permuted(name, tuple(range(array.ndim))))


def _from_torch_layout(name: str, array):
    return array.transpose(tuple(np.argsort(_permuted(name, tuple(range(array.ndim))))))


def match_keys(shapes: Mapping[str, tuple[int, ...]], abstract: Params, *, source="checkpoint", rename=(),
               ignore=()) -> dict[str, list[str]]:
    """Which checkpoint keys make each parameter: {parameter: [key, or one per layer]}, every key used exactly once.

    Args:
      shapes: key -> shape in torch layout.
      abstract: our parameters' names and shapes (`split` of a module or of its `nnx.eval_shape`).
      source: file or folder named in errors.
      rename: (regex, replacement) pairs that turn released spellings into today's.
      ignore: regexes of keys that carry no weights.
    Raises: CheckpointError for a missing, unknown or mis-shaped key, with the nearest known key.
    """
    available = {}
    for key in shapes:
        if any(re.fullmatch(pattern, key) for pattern in ignore):
            continue
        new = key
        for pattern, replacement in rename:
            new = re.sub(pattern, replacement, new)
        if new in available:
            raise CheckpointError(f"{source}: {available[new]!r} and {key!r} both mean {new!r}; remove one of them")
        available[new] = key

    matched = {}
    for name, leaf in abstract.items():
        expected = _permuted(name, leaf.shape[1:] if "stacked" in name.split(".") else leaf.shape)
        matched[name] = []
        for key in torch_names(name, leaf.shape):
            if key not in available:
                raise CheckpointError(f"{source}: missing key {key!r}{_nearest(key, available)}")
            original = available.pop(key)
            if tuple(shapes[original]) != expected:
                raise CheckpointError(f"{source}: {original!r} has shape {tuple(shapes[original])}, expected {expected}")
            matched[name].append(original)
    if available:
        key = next(iter(available.values()))
        known = [n for name, leaf in abstract.items() for n in torch_names(name, leaf.shape)]
        raise CheckpointError(f"{source}: {len(available)} unknown key(s), first {key!r}{_nearest(key, known)}")
    return matched


def from_torch(tensors: Mapping[str, np.ndarray], abstract: Params, *, source="checkpoint", rename=(),
               ignore=()) -> Params:
    """Converts checkpoint tensors to our parameters, with the dtype and sharding of the leaves of `abstract`.

    All keys and shapes are checked before anything is read. Then one parameter after the other is read, each device
    getting only its own part, so the host holds at most the parts of one parameter beside the result. Leaves without a
    sharding become arrays of the default device. `tensors` maps keys to arrays, or to safetensors slices (`Folder`).
    Other arguments and errors: `match_keys`.
    """
    shapes = {key: tensor.shape if hasattr(tensor, "shape") else tensor.get_shape() for key, tensor in tensors.items()}
    matched = match_keys(shapes, abstract, source=source, rename=rename, ignore=ignore)

    def read(name, leaf, index):  # index: slices of our dimensions
        stacked = "stacked" in name.split(".")
        layers = range(*index[0].indices(leaf.shape[0])) if stacked else [0]
        inner = _permuted(name, index[1:] if stacked else index)
        parts = (_from_torch_layout(name, tensors[matched[name][i]][inner]) for i in layers)
        first = next(parts)
        if not stacked:
            return np.asarray(first, dtype=leaf.dtype, order="C")
        out = np.empty((len(layers), *first.shape), leaf.dtype)
        out[0] = first
        for i, part in enumerate(parts, 1):
            out[i] = part
        return out

    params = {}
    for name, leaf in abstract.items():
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params[name] = jax.make_array_from_callback(leaf.shape, sharding, partial(read, name, leaf))
    return params


def to_torch(params: Params, dtype=None) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: our parameters as checkpoint tensors in torch layout."""
    parts = _torch_parts(params)
    return {key: _read_part(params, *part, dtype) for key, part in parts.items()}


def _torch_parts(params: Params) -> dict[str, tuple[str, int | None]]:
    """Checkpoint key -> (parameter, layer or None)."""
    return {key: (name, i if "stacked" in name.split(".") else None)
            for name, leaf in params.items() for i, key in enumerate(torch_names(name, leaf.shape))}


def _read_part(params: Params, name: str, layer: int | None, dtype=None) -> np.ndarray:
    leaf = params[name] if layer is None else params[name][layer]
    leaf = np.asarray(leaf if dtype is None else leaf.astype(dtype))
    return np.asarray(_to_torch_layout(name, leaf), order="C")  # keeps scalars 0-d


def save_params(folder: str | os.PathLike, params: Params, file_name: str, dtype=None, max_shard_size: str = "5GB") -> None:
    """Writes parameters as safetensors `file_name`, in shards with an index if they exceed `max_shard_size`.

    `dtype`: one for all, or {checkpoint key: dtype}. One shard at a time is in host memory.
    """
    parts = _torch_parts(params)
    dtypes = {key: np.dtype(dtype[key] if isinstance(dtype, Mapping) else dtype or params[name].dtype)
              for key, (name, _) in parts.items()}
    sizes = {key: params[name].size // (1 if layer is None else params[name].shape[0]) * dtypes[key].itemsize
             for key, (name, layer) in parts.items()}
    stem = file_name.removesuffix(".safetensors")
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size)
    for shard, keys in plan.filename_to_tensors.items():
        save_file({key: _read_part(params, *parts[key], dtypes[key]) for key in keys}, Path(folder) / shard,
                  metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (Path(folder) / f"{file_name}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class Folder(Mapping):
    """Lazy view of a folder's safetensors, single file or shards with an index: key -> slice.

    A slice has `get_shape()` and reads from disk what it is indexed with: `folder[key][...]` is the whole array.
    """

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
        return self._files[self._where[key]].get_slice(key)

    def dtypes(self) -> dict[str, np.dtype]:
        """Key -> dtype of the stored tensor."""
        return {key: jnp.dtype(DTYPES[self[key].get_dtype()]) for key in self}

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


def stored_in(dtype, abstract: Params, mesh=None, rules: Rules = (), *, within: tuple[str, ...] = ("",)) -> Params:
    """`abstract` as it is to be loaded: matrices in `dtype`, norms, biases and all else fp32, placed by the rules.

    Args:
      dtype: of the kernels and embeddings whose names start with one of `within`. In the compute dtype they give the same
        numbers as fp32 ones, which every use would cast.
      mesh: None leaves the leaves without a sharding.
      rules: the model's `SHARDING`.
    """
    shardings = param_shardings(abstract, mesh, rules) if mesh else dict.fromkeys(abstract)

    def leaf_dtype(name):
        return dtype if name.startswith(within) and name.endswith((".kernel", ".embedding")) else jnp.float32
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype(name), sharding=shardings[name])
            for name, leaf in abstract.items()}


def abstract_model(model_class, folder: str | os.PathLike) -> nnx.Module:
    """The module of a folder's config.json with `jax.ShapeDtypeStruct`s for parameters.

    `model_class` has `Config` (a frozen dataclass, see `parse_config`) and is called as `model_class(config, rngs=...)`.
    """
    path = Path(folder) / "config.json"
    config = parse_config(model_class.Config, read_json(path), path)
    return nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))


def load_params(model_class, folder: str | os.PathLike, abstract: Params) -> Params:
    """The parameters `abstract` of a `model_class` from a folder's safetensors (`from_torch`).

    `model_class` may name `LEGACY_KEYS` ((regex, replacement) pairs) and `IGNORED_KEYS` (regexes).
    """
    return from_torch(Folder(folder), abstract, source=folder, rename=getattr(model_class, "LEGACY_KEYS", ()),
                      ignore=getattr(model_class, "IGNORED_KEYS", ()))


def load_model(model_class, folder: str | os.PathLike, dtype=jnp.float32) -> nnx.Module:
    """Builds `model_class` from a folder's config.json and safetensors, cast to `dtype`, on the default device."""
    graphdef, abstract = split(abstract_model(model_class, folder))
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in abstract.items()}
    return merge(graphdef, load_params(model_class, folder, abstract))


def save_model(folder: str | os.PathLike, model_class, config, params: Params, dtype=jnp.bfloat16) -> None:
    """Writes `params` and `config` as a diffusers / transformers folder (safetensors, config.json)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transformers_model = getattr(model_class, "TRANSFORMERS_NAME", None)
    head = ({"architectures": [transformers_model]} if transformers_model
            else {"_class_name": getattr(model_class, "DIFFUSERS_NAME", model_class.__name__)})
    content = head | getattr(model_class.Config, "FIXED", {}) | dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    save_params(folder, params, WEIGHT_FILES[bool(transformers_model)], dtype)


def _nearest(key: str, known) -> str:
    match = difflib.get_close_matches(key, list(known), 1)
    return f"; nearest: {match[0]!r}" if match else ""
