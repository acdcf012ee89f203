"""Layers shared by every model.

Conventions:

* Attribute paths follow the diffusers / transformers key names, so conversion needs no per-model table
  (`convert.py`): `kernel` is stored [in, out] (convolutions [*spatial, in, out]), `scale` is a norm's weight.
* Parameters are kept in their own dtype (fp32 masters) and cast to the dtype of the activations where they
  are used: the dtype of a model's input decides the compute dtype. Norm statistics are always fp32.
* Signals, images and videos are channels-last, [B, *spatial, C].
* `Stack` holds n equal blocks as one block whose parameters have a leading layer axis, under the attribute
  `stacked`, and applies them with `lax.scan`: one block is compiled, whatever the depth.

`split` and `merge` are the one boundary between nnx and plain JAX: beyond it a model is a static `graphdef` and
flat dicts `{"dotted.path": array}`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, jax.Array]


class LoRAParam(nnx.Param):
    """A low-rank adapter matrix; `split(model, LoRAParam)` separates adapters from base weights."""


def split(model: nnx.Module, *filters) -> tuple:
    """Splits a module into `(graphdef, params_1, ..., params_n)`, flat dicts keyed by dotted path.

    `filters` are nnx filters, e.g. `split(model, LoRAParam, ...)`; without any, one dict holds everything.
    Works on abstract modules (`nnx.eval_shape`) too: the leaves are then `jax.ShapeDtypeStruct`.
    """
    graphdef, *states = nnx.split(model, *filters)
    return graphdef, *({".".join(map(str, path)): leaf for path, leaf in _flat(state)} for state in states)


def merge(graphdef, *params: Params) -> nnx.Module:
    """Rebuilds the module from `split`'s pieces. Cheap: called inside jitted functions."""
    flat = {}
    for group in params:
        for name, leaf in group.items():
            flat[tuple(int(key) if key.isdigit() else key for key in name.split("."))] = leaf
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _flat(state) -> list:
    return [(path, leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf) for path, leaf in nnx.to_flat_state(state)]


class Linear(nnx.Module):
    """y = x W + b, plus (x A) B * lora_scale once `lora.add_lora` has added the adapter A, B."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (in_features, out_features)))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x):
        y = x @ self.kernel[...].astype(x.dtype)
        if hasattr(self, "lora_a"):
            low_rank = x @ self.lora_a[...].astype(x.dtype)
            y = y + low_rank @ self.lora_b[...].astype(x.dtype) * self.lora_scale
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


def _convolve(x, kernel, stride, padding):
    axes = "DHW"[-len(stride):]
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"))


def _ones(kernel) -> tuple[int, ...]:
    return (1,) * (kernel.ndim - 2)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x, kernel, padding):
    """Convolution [B, *spatial, Cin] x [*size, Cin, Cout] of stride 1, whose gradients are convolutions of the same layout.

    One to three spatial axes, `padding` one (low, high) for each. jax's own rules swap axes by their labels only. In a loop
    XLA's CPU backend then takes its slowest path: in 2-D the input's gradient is 4 times as fast this way, the kernel's
    68 times (docs/benchmarks.md).
    """
    return _convolve(x, kernel, _ones(kernel), padding)


def _convolve_backward(padding, saved, g):
    x, kernel = saved
    sizes = kernel.shape[:len(padding)]
    whole = [(size - 1 - low, size - 1 - high) for size, (low, high) in zip(sizes, padding, strict=True)]
    flipped = jnp.flip(kernel, tuple(range(len(padding)))).swapaxes(-2, -1)
    of_x = _convolve(g, flipped, _ones(kernel), whole)
    of_kernel = _convolve(x.swapaxes(0, -1), jnp.moveaxis(g, 0, -2), _ones(kernel), padding)  # channels as samples
    return of_x, jnp.moveaxis(of_kernel, 0, -2)


convolve.defvjp(lambda x, kernel, padding: (_convolve(x, kernel, _ones(kernel), padding), (x, kernel)), _convolve_backward)


class Conv(nnx.Module):
    """Convolution over one, two or three spatial axes, [B, *spatial, Cin] -> [B, *spatial', Cout].

    Args:
      kernel_size: one entry per spatial axis; an int means two equal ones, an image's.
      stride: int or one per axis.
      padding: int or one (low, high) per axis, e.g. ((top, bottom), (left, right)).
    Raises: ValueError if their lengths do not agree.
    """

    def __init__(self, in_features: int, out_features: int, kernel_size: int | tuple[int, ...], *,
                 stride: int | tuple[int, ...] = 1, padding: int | tuple[tuple[int, int], ...] = 0, use_bias: bool = True,
                 rngs: nnx.Rngs):
        size = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride = (stride,) * len(size) if isinstance(stride, int) else tuple(stride)
        self.padding = ((padding, padding),) * len(size) if isinstance(padding, int) else tuple(map(tuple, padding))
        if len(size) not in (1, 2, 3) or not len(size) == len(self.stride) == len(self.padding):
            raise ValueError(f"Conv: kernel_size={kernel_size}, stride={stride} and padding={padding} must agree in their "
                             "number of axes, at most three")
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (*size, in_features, out_features)))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x):
        kernel = self.kernel[...].astype(x.dtype)
        y = convolve(x, kernel, self.padding) if max(self.stride) == 1 else _convolve(x, kernel, self.stride, self.padding)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class Embedding(nnx.Module):
    """Rows of a table by integer index: int [...] -> [..., D]."""

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_embeddings, features)))

    def __call__(self, index, dtype=jnp.float32):
        return jnp.take(self.embedding[...], index, axis=0).astype(dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in fp32; `affine=False` has no parameters."""

    def __init__(self, features: int, *, eps: float, affine: bool = True):
        self.eps = eps
        if affine:
            self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        if hasattr(self, "scale"):
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in fp32, with a learned scale."""

    def __init__(self, features: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation of [B, ..., C] over all positions and C / groups channels, in fp32."""

    def __init__(self, groups: int, features: int, *, eps: float):
        if features % groups:
            raise ValueError(f"GroupNorm: {features} channels are not divisible into {groups} groups")
        self.groups, self.eps = groups, eps
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x):
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.eps)
        return (y.reshape(x.shape) * self.scale[...] + self.bias[...]).astype(x.dtype)


# What the backward pass of a block keeps instead of computing it again; the block's inputs are always kept.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention", "splash"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of all products with weights
    "none": jax.checkpoint_policies.everything_saveable,
}


def rematerialise(function: Callable, remat: str) -> Callable:
    """The function, with a backward pass that recomputes what the policy `remat` does not keep."""
    return function if remat == "none" else jax.checkpoint(function, policy=REMAT[remat])


class Stack(nnx.Module):
    """n blocks `make(rngs)` with stacked parameters: `stacked.<path>` has shape [n, ...]."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], n: int, *, rngs: nnx.Rngs):
        graphdef = split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
        keys = jax.random.split(rngs.params(), n)
        self.stacked = merge(graphdef, jax.vmap(lambda key: split(make(nnx.Rngs(key)))[1])(keys))

    def __call__(self, carry: tuple, *args, own: tuple = (), remat: str = "full", collect: bool = False):
        """Applies block after block: `carry = block(*carry, *own[layer], *args)`.

        `carry` is a tuple of arrays and each block returns the next one. `own` holds what each block gets for itself,
        with a leading layer axis. `remat` says what the backward pass recomputes (REMAT). With `collect` returns
        `(carry, every)` where `every` holds the carries after each block, stacked on a leading axis.
        """
        graphdef, params = split(self.stacked)

        def body(carry, inputs):
            layer, own = inputs
            carry = merge(graphdef, layer)(*carry, *own, *args)
            return carry, (carry if collect else None)

        carry, every = jax.lax.scan(rematerialise(body, remat), carry, (params, own))
        return (carry, every) if collect else carry

    def each(self, method: str, *args):
        """`block.method(*args)` of all blocks at once; results have a leading layer axis."""
        graphdef, params = split(self.stacked)
        return jax.vmap(lambda layer: getattr(merge(graphdef, layer), method)(*args))(params)


def timestep_embedding(t, dim: int, max_period: float = 10_000.0):
    """Sinusoidal features [B, dim] in fp32 of times [B] (0..1000): [cos | sin], as `flip_sin_to_cos` with shift 0."""
    half = dim // 2
    # On the host, from the reference's fp32 exponents: one ulp of a device's exp would turn the angle by 1e-4.
    exponent = np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear: [B, in_features] -> [B, features] (also used for pooled text and guidance)."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_features, features, rngs=rngs)
        self.linear_2 = Linear(features, features, rngs=rngs)

    def __call__(self, x):
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def gelu_erf(x):
    """Exact GELU."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x):
    """x sigmoid(1.702 x), OpenAI CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


gelu_tanh = partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {"gelu": gelu_erf, "quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh, "gelu_new": gelu_tanh,
               "silu": jax.nn.silu}


class Projection(nnx.Module):
    """`proj` followed by GELU, or by a GEGLU gate (first half value, second half gate), diffusers' `net.0`."""

    def __init__(self, in_features: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        self.proj = Linear(in_features, 2 * hidden if activation == "geglu" else hidden, rngs=rngs)

    def __call__(self, x):
        x = self.proj(x)
        if self.activation == "geglu":
            value, gate = jnp.split(x, 2, axis=-1)
            return value * gelu_erf(gate)
        return ACTIVATIONS[self.activation](x)


class FeedForward(nnx.Module):
    """diffusers' FeedForward: `net.0` projection with activation, `net.1` dropout (none here), `net.2` Linear."""

    def __init__(self, features: int, *, activation: str, mult: int = 4, rngs: nnx.Rngs):
        self.net = nnx.List([Projection(features, mult * features, activation, rngs=rngs), nnx.Module(),
                             Linear(mult * features, features, rngs=rngs)])

    def __call__(self, x):
        return self.net[2](self.net[0](x))
