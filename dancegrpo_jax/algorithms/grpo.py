"""GRPO over SDE rollouts (DanceGRPO, arXiv:2505.07818; Flow-GRPO, 2505.05470; with a window MixGRPO, 2507.21802)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dancegrpo_jax.algorithms.trajectory import TrajectoryAlgorithm
from dancegrpo_jax.options import at_least, option


@dataclass(frozen=True)
class GRPO(TrajectoryAlgorithm):
    """Advantages relative to the prompt's group, the clipped objective, and a KL penalty to the base weights if wanted.

    The penalty is kl_beta * mean((mean - mean_ref)^2) / (2 std^2), the divergence of the two transition kernels per latent
    dimension.
    """

    kl_beta: float = option(0.0, at_least(0), "weight of the KL divergence to the base weights")

    @property
    def reference(self):
        return self.kl_beta > 0

    def penalty(self, context, pairs, mean, std):
        if not self.kl_beta:
            return 0.0, {"kl_base": jnp.zeros(len(mean))}
        mean_ref, _ = context.transition(context.copies["reference"], *pairs.place)
        kl = (jnp.square(mean - jax.lax.stop_gradient(mean_ref)) / (2 * jnp.square(std))).mean(range(1, mean.ndim))
        return self.kl_beta * kl, {"kl_base": kl}
