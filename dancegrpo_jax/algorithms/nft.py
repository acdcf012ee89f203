"""DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117): final samples of an ODE sampler, noised again; no log-probabilities.

The policy is pushed towards good samples and away from bad ones by two implicit policies around the one that sampled:
v+ = b v + (1 - b) v_old and v- = (1 + b) v_old - b v, each asked to predict the sample x0, the first weighted by q, the
second by 1 - q, where q in [0, 1] is the advantage.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dancegrpo_jax import sde
from dancegrpo_jax.algorithms.base import Algorithm, Examples
from dancegrpo_jax.algorithms.trajectory import choose_timesteps
from dancegrpo_jax.options import POSITIVE, ConfigError, at_least, one_of, option

SMALLEST = 1e-5  # of the weights that make the losses of all noise levels alike


@dataclass(frozen=True)
class DiffusionNFT(Algorithm):
    """`advantage_clip` is the method's A_max. It trains guidance away: sample and train with guidance_scale 1.

    Rollouts are an ODE's, so samples must differ in their initial noise: sampler.shared_noise=false.
    """

    levels: int = option(4, at_least(1), "noise levels of the sampler's grid that each sample is trained at")
    beta: float = option(1.0, POSITIVE, "distance of the two implicit policies from the old one; 0.1 for several rewards")
    kl_beta: float = option(1e-4, at_least(0), "weight of the squared distance from the base model's prediction")
    old: str = option("early", one_of("early", "late"), "how the copy that samples follows: early = keeps min(0.001 i, 0.5) of "
                      "itself after iteration i, late = nothing until iteration 75, then min(0.0075 (i - 75), 0.999)")

    keeps_trajectory: ClassVar[bool] = False
    noisy_rollouts: ClassVar[bool] = False
    copies: ClassVar[tuple[str, ...]] = ("old",)
    behaviour: ClassVar[str | None] = "old"
    headline: ClassVar[tuple[str, ...]] = ("loss", "grad_norm", "kl_base")

    @property
    def reference(self):
        return self.kl_beta > 0

    def examples_per_sample(self, steps):
        return self.levels

    def check(self, steps, group, where):
        super().check(steps, group, where)
        if self.levels > usable(steps):
            raise ConfigError(f"config.{where}.levels={self.levels}: a sampler of {steps} steps has {usable(steps)} levels to "
                              "train at; lower it or raise config.sampler.steps")

    def plan(self, schedule, iteration):
        return sde.deterministic(schedule)

    def examples(self, key, trajectory, plan, advantage):
        eligible = jnp.arange(len(plan.times)) < usable(len(plan.times))
        index = choose_timesteps(key, advantage.size, eligible, self.levels)
        q = jnp.clip(advantage / self.advantage_clip, -1, 1) / 2 + 0.5
        return Examples({"time": jnp.asarray(plan.times)[index], "sigma": jnp.asarray(plan.sigmas)[index]},
                        {"x0": trajectory.latents[-1], "q": q.reshape(-1)})

    def loss(self, context, weights, pairs, samples, key):
        x0, q, prediction = samples["x0"], samples["q"], context.pipeline.prediction
        sigma = pairs["sigma"].reshape(-1, *(1,) * (x0.ndim - 1))
        x = sde.alpha(prediction, sigma) * x0 + sigma * jax.random.normal(key, x0.shape)
        v = context.predict(weights, x, pairs["time"])
        v_old = jax.lax.stop_gradient(context.predict(context.copies["old"], x, pairs["time"]))

        def distance(output):  # |z - x0|^2, relative to its own size
            error = sde.denoise(prediction, output, x, sigma)[0] - x0
            size = jax.lax.stop_gradient(jnp.maximum(mean(jnp.abs(error)), SMALLEST))
            return mean(jnp.square(error)) / size

        towards = distance(self.beta * v + (1 - self.beta) * v_old)
        away = distance((1 + self.beta) * v_old - self.beta * v)
        loss = self.advantage_clip / self.beta * (q * towards + (1 - q) * away)
        kl = jnp.zeros_like(q)
        if self.kl_beta:
            kl = mean(jnp.square(v - jax.lax.stop_gradient(context.predict(context.copies["reference"], x, pairs["time"]))))
        return loss + self.kl_beta * kl, {"towards": towards, "away": away, "kl_base": kl}

    def after(self, copies, trainable, iteration):
        keep = jnp.minimum(0.001 * iteration, 0.5) if self.old == "early" else jnp.clip(0.0075 * (iteration - 75), 0, 0.999)
        return {"old": jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, copies["old"], trainable)}


def usable(steps: int) -> int:
    """The first 99 % of a sampler's noise levels: at the last x is almost x0, and nothing is to be learned."""
    return max(1, int(0.99 * steps))


def mean(values):
    """Over all but the first dimension: [M]."""
    return values.mean(range(1, values.ndim))
