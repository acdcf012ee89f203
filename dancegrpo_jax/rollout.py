"""Sampling: one jitted `lax.scan` over the steps, with the log-probability of every transition."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dancegrpo_jax.sde import Schedule, gaussian_log_prob, transition
from dancegrpo_jax.sharding import constrain_batch


class Trajectory(NamedTuple):
    """What a rollout leaves for the update; everything fp32 and exactly the tensors that were scored.

    latents: [T+1, B, ...], from the initial noise to the final sample.
    log_probs: [T, B], mean over latent dimensions; 0 at deterministic steps.
    """

    latents: jax.Array
    log_probs: jax.Array


def step(policy, trainable, frozen, cond, x, time, sigma, sigma_next, stochastic):
    """Evaluates the policy and its transition at one noise level: the only place where rollout and update do so.

    Args:
      x: [B, ...] fp32 latents; time, sigma, sigma_next, stochastic: scalars or [B]; cond: pytree of [B, ...].
    Returns: (mean [B, ...], std [B, 1, ...]) of p(x_next | x).
    """
    output = policy.predict(trainable, frozen, x, jnp.broadcast_to(time, x.shape[:1]), cond)
    return transition(policy.kernel, policy.prediction, policy.eta, output, x, sigma, sigma_next, stochastic)


@partial(jax.jit, static_argnames=("policy", "group_size", "shared_noise"))
def rollout(policy, trainable, frozen, cond, key, schedule: Schedule, *, group_size: int = 1,
            shared_noise: bool = True) -> Trajectory:
    """Samples `group_size` trajectories for each of P prompts; B = P * group_size, a prompt's samples adjacent.

    Args:
      policy: the base model (`pipelines/base.py`).
      trainable, frozen: its parameters.
      cond: pytree of [P, ...] conditioning, one entry per prompt.
      key: PRNG key; all noise derives from it, so the same key gives the same noise on any mesh.
      schedule: T steps (`sde.py`); deterministic steps make this the ODE sampler.
      shared_noise: one initial noise per prompt for its whole group (DanceGRPO section 3.2: different noise invites
        reward hacking); False draws one per sample.
    """
    prompts = jax.tree.leaves(cond)[0].shape[0]
    batch = prompts * group_size
    key_init, key_noise = jax.random.split(key)
    if shared_noise:
        x = jnp.repeat(jax.random.normal(key_init, (prompts, *policy.latent_shape)), group_size, axis=0)
    else:
        x = jax.random.normal(key_init, (batch, *policy.latent_shape))
    cond = constrain_batch(jax.tree.map(lambda c: jnp.repeat(c, group_size, axis=0), cond))

    def body(x, inputs):
        index, time, sigma, sigma_next, stochastic = inputs
        mean, std = step(policy, trainable, frozen, cond, x, time, sigma, sigma_next, stochastic)
        x_next = constrain_batch(mean + std * jax.random.normal(jax.random.fold_in(key_noise, index), x.shape))
        return x_next, (x_next, gaussian_log_prob(x_next, mean, std))

    x = constrain_batch(x)
    sigmas = jnp.asarray(schedule.sigmas)
    inputs = (jnp.arange(len(schedule.times)), schedule.times, sigmas[:-1], sigmas[1:], schedule.stochastic)
    _, (latents, log_probs) = jax.lax.scan(body, x, inputs)
    return Trajectory(jnp.concatenate([x[None], latents]), log_probs)


@partial(jax.jit, static_argnames=("policy",))
def sample(policy, trainable, frozen, cond, key, schedule: Schedule):
    """One sample per prompt without keeping the trajectory: [P, ...] fp32 latents (evaluation, `launch/sample.py`)."""
    return rollout(policy, trainable, frozen, cond, key, schedule).latents[-1]
