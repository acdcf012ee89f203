"""Low-rank adaptation (Hu et al., 2021): y = x W + b + (alpha / rank) (x A) B, with A, B trained and W frozen.

`Linear` itself adds the low-rank term once an adapter is set (layers.py); `split(model, LoRAParam, ...)` then separates
what is trained from what is frozen.
"""

import difflib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dancegrpo_jax.models.layers import Linear, LoRAParam


def linear_paths(model: nnx.Module) -> dict[str, Linear]:
    """Every `Linear` by its checkpoint path without layer indices, e.g. `transformer_blocks.attn.to_out.0`."""
    return {".".join(str(key) for key in path if key != "stacked"): module
            for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def add_lora(model: nnx.Module, rank: int, alpha: float, targets: Sequence[str], rngs: nnx.Rngs) -> int:
    """Adds an adapter to every `Linear` whose path (see `linear_paths`) fully matches one of the regexes `targets`.

    A [.., in, rank] is normal with standard deviation 1 / rank (PEFT's "gaussian"), drawn independently for each layer
    of a `Stack`; B [.., rank, out] is zero, so the model's function is unchanged. Both are fp32. On an abstract model
    (`nnx.eval_shape`) the adapters are abstract too, and `rngs` is not used.

    Args:
      model: changed in place.
      rank, alpha: the adapter's rank and its strength: the low-rank term is scaled by alpha / rank.
      targets: e.g. `(r".*attn\\.to_(q|k|v|out\\.0)",)`.
      rngs: its `params` stream draws A.
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
        kernel = linear.kernel.get_value()
        *layers, fan_in, fan_out = kernel.shape
        shape_a, shape_b = (*layers, fan_in, rank), (*layers, rank, fan_out)
        if isinstance(kernel, jax.ShapeDtypeStruct):
            a, b = jax.ShapeDtypeStruct(shape_a, jnp.float32), jax.ShapeDtypeStruct(shape_b, jnp.float32)
        else:
            a, b = jax.random.normal(rngs.params(), shape_a) / rank, jnp.zeros(shape_b)
        linear.lora_a, linear.lora_b, linear.lora_scale = LoRAParam(a), LoRAParam(b), alpha / rank
        count += layers[0] if layers else 1
    return count
