"""What the policy-gradient family shares: pairs (x, x_next) of a trajectory, importance ratios, the clipped objective.

A training example is a (sample, timestep) pair.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dancegrpo_jax.algorithms.advantages import best_of
from dancegrpo_jax.algorithms.base import Algorithm, Examples
from dancegrpo_jax.options import POSITIVE, ConfigError, at_least, between, one_of, option
from dancegrpo_jax.sde import gaussian_log_prob, window


class Pairs(NamedTuple):
    """Transitions of a trajectory, leaves [R, K, ...] or [M, ...]; log_prob is that of the rollout."""

    x: jax.Array
    x_next: jax.Array
    time: jax.Array
    sigma: jax.Array
    sigma_next: jax.Array
    log_prob: jax.Array

    @property
    def place(self):
        """What `Context.transition` asks for."""
        return self.x, self.time, self.sigma, self.sigma_next


@dataclass(frozen=True)
class TrajectoryAlgorithm(Algorithm):
    """Which samples and steps of the rollout are trained, and the clipped surrogate on their ratios."""

    clip_range: float = option(1e-4, POSITIVE, "of the ratio; it refers to the mean log-probability per dimension")
    timestep_fraction: float = option(0.6, between(0, 1, ends="(]"), "share of the steps that is trained, per sample")
    best_of: int = option(0, at_least(0, 2), "train only the best and worst halves of this many samples; 0 = all")
    window: int = option(0, at_least(0), "noisy and trained steps only within a moving window of this size; 0 = all")
    window_stride: int = option(1, at_least(1), "steps by which the window moves")
    window_interval: int = option(25, at_least(1), "iterations between two moves of the window")
    rescore: str = option("auto", one_of("auto", "always", "never"), "with several updates a rollout, old log-probabilities of "
                          "the update instead of the rollout: never, always (one more forward pass), or auto, if they differ")

    headline: ClassVar[tuple[str, ...]] = ("ratio/mean", "ratio/min", "ratio/max", "clip_fraction/low", "clip_fraction/high")

    def examples_per_sample(self, steps):
        """The fraction of the first T - 1 steps, or of the window; at least 1."""
        return max(1, int((self.window or steps - 1) * self.timestep_fraction))

    def samples_per_prompt(self, group):
        return self.best_of or group

    def check(self, steps, group, where):
        super().check(steps, group, where)
        if self.window > steps - 1:
            raise ConfigError(f"config.{where}.window={self.window}: must be 0..{steps - 1} (config.sampler.steps - 1: the "
                              "last step is never trained); lower it, or set 0 for all steps")
        if self.best_of > group:
            raise ConfigError(f"config.{where}.best_of={self.best_of}: must be 0 or an even number up to "
                              f"config.data.group_size={group}; lower it or raise the group size")

    def plan(self, schedule, iteration):
        if not self.window:
            return schedule
        moves = iteration // self.window_interval * self.window_stride
        return window(schedule, moves % (len(schedule.times) - self.window), self.window)

    def examples(self, key, trajectory, plan, advantage):
        """Gathers the chosen pairs: of each sample that is trained K different noisy steps, in order."""
        prompts, group = advantage.shape
        k, steps = self.samples_per_prompt(group), len(plan.times)
        chosen = best_of(advantage, k) if k < group else jnp.tile(jnp.arange(k), (prompts, 1))
        # The last transition is never trained (DanceGRPO section 3; for flow models it is deterministic anyway).
        eligible = jnp.asarray(plan.stochastic).at[-1].set(False)
        time_index = choose_timesteps(key, chosen.size, eligible, self.examples_per_sample(steps))

        def of_chosen(a):  # [P, G, ...] -> [R, ...]
            index = chosen.reshape(prompts, k, *(1,) * (a.ndim - 2))
            return jnp.take_along_axis(a, index, axis=1).reshape(prompts * k, *a.shape[2:])

        def at_times(a, offset=0):  # [T(+1), B, ...] -> [R, K, ...]
            a = of_chosen(jnp.moveaxis(a, 0, 1).reshape(prompts, group, a.shape[0], *a.shape[2:]))
            return jnp.take_along_axis(a, (time_index + offset).reshape(*time_index.shape, *(1,) * (a.ndim - 2)), axis=1)

        sigmas = jnp.asarray(plan.sigmas)
        pairs = Pairs(at_times(trajectory.latents), at_times(trajectory.latents, 1), jnp.asarray(plan.times)[time_index],
                      sigmas[time_index], sigmas[time_index + 1], at_times(trajectory.log_probs))
        return Examples(pairs, {"advantage": of_chosen(advantage)})

    def rescored(self, context, weights, pairs, samples):
        log_prob = gaussian_log_prob(pairs.x_next, *context.transition(weights, *pairs.place))
        return pairs._replace(log_prob=log_prob), jnp.abs(jnp.exp(log_prob - pairs.log_prob) - 1).max()

    def loss(self, context, weights, pairs, samples, key):
        """The clipped surrogate, with the update's own log-probability as the old one where the context says so."""
        mean, std = context.transition(weights, *pairs.place)
        log_prob = gaussian_log_prob(pairs.x_next, mean, std)
        old = jax.lax.stop_gradient(jnp.where(context.on_policy, log_prob, pairs.log_prob))
        loss, ratio = clipped_objective(log_prob, old, samples["advantage"], self.clip_range)
        penalty, more = self.penalty(context, pairs, mean, std)
        return loss + penalty, more | {"ratio": ratio, "rollout_ratio": jnp.exp(log_prob - pairs.log_prob),
                                       "advantage": samples["advantage"]}

    def penalty(self, context, pairs: Pairs, mean, std):
        """(a term added to the loss, [M] or 0, {name: [M]})."""
        return 0.0, {}

    def summary(self, found):
        own = {"ratio", "rollout_ratio", "advantage"}
        first = found["rollout_ratio"]
        return (super().summary({name: values for name, values in found.items() if name not in own})
                | ratio_diagnostics(found["ratio"], found["advantage"], self.clip_range)
                | {f"ratio_first/{name}": getattr(first, name)() for name in ("mean", "min", "max")})


def choose_timesteps(key, batch: int, eligible, k: int):
    """For each sample k different steps, uniformly among the eligible ones: int32 [B, k], ascending.

    Args: eligible [T] bool with at least k True.
    """
    score = jnp.where(eligible, jax.random.uniform(key, (batch, eligible.shape[0])), -1.0)
    return jnp.sort(jax.lax.top_k(score, k)[1], axis=1).astype(jnp.int32)


def clipped_objective(log_prob, old_log_prob, advantage, clip_range: float):
    """PPO's clipped surrogate as a loss, one value per (sample, timestep) pair (DanceGRPO eq. 8).

    max(-A rho, -A clip(rho, 1 - c, 1 + c)) with rho = exp(log_prob - old_log_prob).

    Args: log_prob, old_log_prob, advantage [M] fp32. Returns: (loss [M], ratio [M]).
    """
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    return jnp.maximum(-advantage * ratio, -advantage * clipped), ratio


def ratio_diagnostics(ratio, advantage, clip_range: float) -> dict:
    """Scalars of a set of pairs: how far the policy has moved and how often the clip acts.

    clip_fraction/low: share of pairs with ratio < 1 - c and a negative advantage; high: ratio > 1 + c and a positive
    one, i.e. where the clip removes the gradient. approx_kl = mean(rho - 1 - log rho).
    """
    return {
        "ratio/mean": ratio.mean(), "ratio/min": ratio.min(), "ratio/max": ratio.max(),
        "clip_fraction/low": ((ratio < 1 - clip_range) & (advantage < 0)).mean(),
        "clip_fraction/high": ((ratio > 1 + clip_range) & (advantage > 0)).mean(),
        "approx_kl": (ratio - 1 - jnp.log(ratio)).mean(),
    }
