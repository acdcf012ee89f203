"""Low-rank adaptation (Hu et al., 2021): y = x W + b + (alpha / rank) (x A) B, with A, B trained and W frozen.

`Linear` itself adds the low-rank term once an adapter is declared (layers.py); `split(model, LoRAParam, ...)` then
separates what is trained from what is frozen.
"""

import difflib
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from dancegrpo_jax.models.files.convert import to_torch
from dancegrpo_jax.models.layers import Linear, LoRAParam, Params


def linear_paths(model: nnx.Module) -> dict[str, Linear]:
    """Every `Linear` by its checkpoint path without layer indices, e.g. `transformer_blocks.attn.to_out.0`."""
    return {".".join(str(key) for key in path if key != "stacked"): module
            for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def add_lora(model: nnx.Module, rank: int, alpha: float, targets: Sequence[str]) -> int:
    """Declares an adapter on every `Linear` whose path (see `linear_paths`) fully matches one of the regexes `targets`.

    The adapters A [.., in, rank] and B [.., rank, out] (one pair for each layer of a `Stack`) are abstract, fp32:
    `split(model, LoRAParam, ...)` and give their `init_adapters` instead.

    Args:
      model: changed in place; abstract (`nnx.eval_shape`) or not.
      rank, alpha: the adapter's rank and its strength: the low-rank term is scaled by alpha / rank.
      targets: e.g. `(r".*attn\\.to_(q|k|v|out\\.0)",)`.
    Returns: the number of adapted layers; a Stack of n blocks counts n times.
    Raises: ValueError, leaving the model as it was, for rank < 1, a target that matches nothing (naming the nearest
      paths), or a layer that already has an adapter.
    """
    if isinstance(targets, str):
        raise ValueError(f"add_lora: targets must be a sequence of regexes, not the string {targets!r}")
    if rank < 1:
        raise ValueError(f"add_lora: rank must be at least 1, got {rank}")
    paths = linear_paths(model)
    chosen = {}
    for target in targets:
        matched = {path: linear for path, linear in paths.items() if re.fullmatch(target, path)}
        if not matched:
            nearest = difflib.get_close_matches(target, paths, 3, cutoff=0.0)
            raise ValueError(f"add_lora: {target!r} matches no Linear; nearest paths: {', '.join(nearest) or 'none'}")
        chosen |= matched
    if not chosen:
        raise ValueError("add_lora: no targets given")
    for path, linear in chosen.items():
        if hasattr(linear, "lora_a"):
            raise ValueError(f"add_lora: {path} already has an adapter")

    count = 0
    for linear in chosen.values():
        *layers, fan_in, fan_out = linear.kernel.get_value().shape
        linear.lora_a = LoRAParam(jax.ShapeDtypeStruct((*layers, fan_in, rank), jnp.float32))
        linear.lora_b = LoRAParam(jax.ShapeDtypeStruct((*layers, rank, fan_out), jnp.float32))
        linear.lora_scale = alpha / rank
        count += layers[0] if layers else 1
    return count


def init_adapters(abstract: Params, rngs: nnx.Rngs) -> Params:
    """Fresh adapters for the names and shapes of `abstract`: B zero, so that the model's function is unchanged.

    A is normal with standard deviation 1 / rank (PEFT's "gaussian"), drawn independently for every layer.
    """
    return {name: jax.random.normal(rngs.params(), leaf.shape) / leaf.shape[-1] if name.endswith("lora_a")
            else jnp.zeros(leaf.shape) for name, leaf in abstract.items()}


def save_adapters(path, trainable: Mapping[str, Params], *, scale: float, dtype="float32") -> None:
    """Writes adapters as diffusers' `pytorch_lora_weights.safetensors` (PEFT names), for `pipeline.load_lora_weights`.

    Args:
      trainable: {part of the pipeline, "transformer" or "unet": adapters as `init_adapters` names them}.
      scale: alpha / rank; it is multiplied into B, because readers differ in how they find alpha.
    """
    tensors = {}
    for part, params in trainable.items():
        for key, value in to_torch(params).items():
            stem, _, leaf = key.rpartition(".")
            side, value = ("A", value) if leaf == "lora_a" else ("B", value * np.float32(scale))
            tensors[f"{part}.{stem}.lora_{side}.weight"] = np.ascontiguousarray(value.T.astype(jnp.dtype(dtype)))
    save_file(tensors, path, metadata={"format": "pt"})
