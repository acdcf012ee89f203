"""DDPO (Black et al. 2023, arXiv:2305.13301): advantages against running statistics of each prompt, the clipped objective."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax.algorithms.trajectory import TrajectoryAlgorithm
from dancegrpo_jax.options import ConfigError, at_least, between, option


@dataclass(frozen=True)
class DDPO(TrajectoryAlgorithm):
    """One sample a prompt is enough: its reward is compared with the prompt's last ones, of this iteration and before.

    A prompt with fewer than `min_count` rewards is compared with the whole batch.
    """

    timestep_fraction: float = option(1.0, between(0, 1, ends="(]"), "share of the steps that is trained, per sample")
    buffer: int = option(32, at_least(1), "rewards that are remembered of each prompt")
    min_count: int = option(16, at_least(1), "rewards from which on a prompt's own statistics are used")

    smallest_group: ClassVar[int] = 1

    def check(self, steps, group, where):
        super().check(steps, group, where)
        if self.combine != "advantages":
            raise ConfigError(f"config.{where}.combine={self.combine!r}: DDPO adds the advantages of several rewards, each "
                              "against its own statistics; leave it at 'advantages'")

    def memory(self, prompts, rewards):
        """{reward: {"values": [prompts, buffer], a ring; "count": how many were ever written [prompts]}}."""
        return {name: {"values": np.zeros((prompts, self.buffer), np.float32), "count": np.zeros(prompts, np.int32)}
                for name in rewards}

    def advantages(self, scores, weights, prompts, memory):
        total, after = 0.0, {}
        for name, (values, ok) in scores.items():
            after[name] = remember(memory[name], prompts, values, ok)
            total = total + weights[name] * self.standardised(after[name], prompts, values, ok)
        return total, after

    def standardised(self, memory, prompts, values, ok):
        """(r - mean) / (std + 1e-6) [P, G]; 0 where the reward could not be computed."""
        ring, filled = memory["values"][prompts], jnp.minimum(memory["count"][prompts], self.buffer)[:, None]
        mean, std = moments(ring, jnp.arange(self.buffer) < filled, axis=1)
        batch_mean, batch_std = moments(values, ok, axis=None)
        own = filled >= self.min_count
        return jnp.where(ok, (values - jnp.where(own, mean, batch_mean)) / (jnp.where(own, std, batch_std) + 1e-6), 0.0)


def moments(values, where, axis):
    """Mean and standard deviation (ddof 0) of the entries marked, along an axis that is kept."""
    count = jnp.maximum(where.sum(axis, keepdims=True), 1)
    mean = jnp.where(where, values, 0).sum(axis, keepdims=True) / count
    return mean, jnp.sqrt(jnp.where(where, jnp.square(values - mean), 0).sum(axis, keepdims=True) / count)


def remember(memory, prompts, values, ok):
    """Writes each prompt's valid rewards [P, G] behind its last ones; a prompt may occur several times."""
    def one(memory, row):
        prompt, values, ok = row
        size, order = memory["values"].shape[1], jnp.cumsum(ok) - 1
        kept = ok & (order >= ok.sum() - size)  # of more than fit, the last
        place = jnp.where(kept, (memory["count"][prompt] + order) % size, size)
        ring = memory["values"].at[prompt, place].set(values, mode="drop")
        return {"values": ring, "count": memory["count"].at[prompt].add(ok.sum())}, None
    return jax.lax.scan(one, memory, (prompts, values, ok))[0]
