"""Floating-point operations of a traced program: matmuls and convolutions of its jaxpr, times the lengths of its loops.

XLA's own `cost_analysis` counts a loop's body once and a Pallas kernel as nothing, which for a training step is wrong by
two orders of magnitude.
"""

import math

from jax.interpreters import partial_eval


def count(jaxpr) -> float:
    """FLOPs (2 per multiply-add) of a jaxpr on global shapes, recomputation by `jax.checkpoint` included.

    `scan` counts its length, `cond` its most expensive branch, `while` one turn (its number of turns is not known),
    `shard_map` its body on every shard, a Pallas kernel its body at every grid point. Zeros that a convolution pads or
    dilates with count as numbers. Elementwise work is left out: it is bound by memory, not by arithmetic. So is what nothing
    uses, such as the kernels that a recomputation repeats although their results are kept: compilers drop it.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return float(_sum(used))


def _sum(jaxpr) -> float:
    return sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(eqn) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        return 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    inner = [_sum(sub) for value in params.values() for sub in (value if isinstance(value, (tuple, list)) else (value,))
             if hasattr(sub, "eqns") or hasattr(sub, "jaxpr")]
    if name == "cond":
        return max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(inner)
