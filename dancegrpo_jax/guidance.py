"""Classifier-free guidance, once for all base models, and the conditioning that it reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cond(NamedTuple):
    """What a denoiser is conditioned on: pytrees of [B, ...].

    negative: None without guidance; its leaves may have a leading axis of 1, one negative prompt for the whole batch.
    """

    positive: Any
    negative: Any = None


def repeat(cond: Cond, times: int) -> Cond:
    """Every entry `times` times, neighbours: from one per prompt to one per sample. A shared negative stays one."""
    def one(leaf):
        return jnp.repeat(leaf, times, axis=0)
    negative = jax.tree.map(lambda leaf: one(leaf) if len(leaf) > 1 else leaf, cond.negative)
    return Cond(jax.tree.map(one, cond.positive), negative)


def predict(pipeline, trainable, frozen, x, time, cond: Cond):
    """The denoiser's output, fp32 as x [B, ...], at times [B] in 0..1000.

    With a negative, both prompts are one batch: negative + scale (positive - negative).
    """
    params = {part: frozen.get(part, {}) | leaves for part, leaves in trainable.items()}
    if cond.negative is None:
        return pipeline.denoise(params, x, time, cond.positive).astype(jnp.float32)
    both = jax.tree.map(lambda n, c: jnp.concatenate([jnp.broadcast_to(n, c.shape), c]), cond.negative, cond.positive)
    output = pipeline.denoise(params, jnp.concatenate([x, x]), jnp.concatenate([time, time]), both).astype(jnp.float32)
    negative, positive = jnp.split(output, 2)
    return negative + pipeline.guidance_scale * (positive - negative)
