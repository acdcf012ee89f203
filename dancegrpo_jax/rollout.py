"""Sampling: conditioning, one jitted `lax.scan` over the steps with the log-probability of every transition, decoding."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dancegrpo_jax import guidance
from dancegrpo_jax.data import Row
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.media import Media
from dancegrpo_jax.sde import Kernel, Schedule, deterministic, gaussian_log_prob, transition
from dancegrpo_jax.sharding import batch_devices, constrain_batch


class Trajectory(NamedTuple):
    """What a rollout leaves; everything fp32 and exactly the tensors that were scored.

    latents: [T+1, B, ...], from the initial noise to the final sample; [1, B, ...], the final sample alone, if not kept.
    log_probs: [T, B], mean over latent dimensions, 0 at deterministic steps; None if not kept.
    """

    latents: jax.Array
    log_probs: jax.Array | None


def step(pipeline, kernel: Kernel, trainable, frozen, cond: Cond, x, time, sigma, sigma_next, stochastic):
    """Evaluates the policy and its transition at one noise level: the only place where rollout and update do so.

    Args:
      x: [B, ...] fp32 latents; time, sigma, sigma_next, stochastic: scalars or [B]; cond: of [B, ...].
    Returns: (mean [B, ...], std [B, 1, ...]) of p(x_next | x).
    """
    output = guidance.predict(pipeline, trainable, frozen, x, jnp.broadcast_to(time, x.shape[:1]), cond)
    return transition(kernel.name, pipeline.prediction, kernel.eta, output, x, sigma, sigma_next, stochastic)


@partial(jax.jit, static_argnames=("pipeline",))
def encode(pipeline, frozen, inputs, key) -> Cond:
    """What `pipeline.inputs` made of P rows, to conditioning of [P, ...].

    A pod has often more devices than an iteration has prompts: rows are added until they divide, or each would encode all.
    """
    def padded(leaf):
        return jnp.pad(leaf, ((0, -len(leaf) % batch_devices()), *((0, 0),) * (leaf.ndim - 1)))

    cond = pipeline.condition(frozen, constrain_batch(jax.tree.map(padded, inputs)), jax.random.fold_in(key, 1))
    cut = [jax.tree.map(lambda leaf, part=part: leaf[:len(jax.tree.leaves(inputs[part])[0])], getattr(cond, part))
           for part in Cond._fields if part in inputs]
    return Cond(*cut)


@partial(jax.jit, static_argnames=("pipeline", "kernel", "group_size", "shared_noise", "keep"))
def rollout(pipeline, kernel: Kernel, trainable, frozen, cond: Cond, key, schedule: Schedule, *, group_size: int = 1,
            shared_noise: bool = True, keep: bool = True) -> Trajectory:
    """Samples `group_size` trajectories for each of P prompts; B = P * group_size, a prompt's samples adjacent.

    Args:
      pipeline: the base model (`pipelines/base.py`), with its parameters trainable, frozen.
      kernel: the transition of the stochastic steps.
      cond: conditioning of [P, ...], one entry per prompt.
      key: PRNG key; all noise derives from it, so the same key gives the same noise on any mesh.
      schedule: T steps (`sde.py`); deterministic steps make this the ODE sampler.
      shared_noise: one initial noise per prompt for its whole group (DanceGRPO section 3.2: different noise invites
        reward hacking); False draws one per sample.
      keep: False keeps the final sample only, and memory does not grow with T.
    """
    prompts = jax.tree.leaves(cond.positive)[0].shape[0]
    batch = prompts * group_size
    key_init, key_noise = jax.random.split(key)
    if shared_noise:
        x = jnp.repeat(jax.random.normal(key_init, (prompts, *pipeline.latent_shape)), group_size, axis=0)
    else:
        x = jax.random.normal(key_init, (batch, *pipeline.latent_shape))
    cond = constrain_batch(guidance.repeat(cond, group_size))

    def body(x, inputs):
        index, time, sigma, sigma_next, stochastic = inputs
        mean, std = step(pipeline, kernel, trainable, frozen, cond, x, time, sigma, sigma_next, stochastic)
        x_next = constrain_batch(mean + std * jax.random.normal(jax.random.fold_in(key_noise, index), x.shape))
        return x_next, (x_next, gaussian_log_prob(x_next, mean, std)) if keep else None

    x = constrain_batch(x)
    sigmas = jnp.asarray(schedule.sigmas)
    inputs = (jnp.arange(len(schedule.times)), schedule.times, sigmas[:-1], sigmas[1:], schedule.stochastic)
    final, kept = jax.lax.scan(body, x, inputs)
    if not keep:
        return Trajectory(final[None], None)
    latents, log_probs = kept
    return Trajectory(jnp.concatenate([x[None], latents]), log_probs)


@partial(jax.jit, static_argnames=("pipeline",))
def sample(pipeline, trainable, frozen, cond: Cond, key, schedule: Schedule):
    """The final sample [1, P, ...] of one ODE rollout per prompt: evaluation, `launch/sample.py`."""
    return rollout(pipeline, Kernel(), trainable, frozen, cond, key, deterministic(schedule), keep=False).latents


@partial(jax.jit, static_argnames=("pipeline", "group_size"))
def decode(pipeline, frozen, latents, group_size: int = 1):
    """The final latents of a trajectory's [T+1, B, ...], as pixels fp32 [P, G, F, H, W, 3] in [0, 1]."""
    pixels = pipeline.decode(frozen, latents[-1])
    return pixels.reshape(-1, group_size, *pixels.shape[1:])


def run(name: str, function: Callable, *args, **kwargs):
    """How a jitted function is called. The ahead-of-time check compiles it instead and gives abstract results."""
    return function(*args, **kwargs)


def generate(pipeline, trainable, frozen, rows: Sequence[Row], schedule: Schedule, *, condition: Callable, batch: int,
             seed: int, call: Callable = run) -> Iterator[tuple[list[Row], Media, int]]:
    """ODE samples, one per row, batch by batch: yields (rows, their pictures or clips on the devices, how many count).

    A sample depends on its row, the seed, its place and the batch size. The last batch is padded with its last row, so that
    everything compiles once. Nothing of a batch is held here once the next is asked for.

    Args: condition: (rows, key, call) -> Cond.
    """
    for start in range(0, len(rows), batch):
        part = list(rows[start:start + batch])
        padded = part + part[-1:] * (batch - len(part))
        key = jax.random.fold_in(jax.random.key(seed), start // batch)
        latents = call("sample", sample, pipeline, trainable, frozen, condition(padded, key, call), key, schedule)
        yield padded, Media(call("decode", decode, pipeline, frozen, latents), pipeline.fps), len(part)
