"""FLUX as a policy: rectified flow on packed latents."""

import jax.numpy as jnp

from dancegrpo_jax.models.base import Policy
from dancegrpo_jax.models.flux import FluxTransformer2DModel, pack, unpack
from dancegrpo_jax.sde import FLOW_KERNELS, flow_schedule


class FluxPolicy(Policy):
    """FLUX.1: velocity prediction, embedded guidance where the checkpoint has it."""

    prediction = "velocity"
    denoiser_class, denoiser_folder = FluxTransformer2DModel, "transformer"
    kernels = FLOW_KERNELS

    def denoise(self, model, x, time, cond):
        grid = (self.latent_shape[0] // 2, self.latent_shape[1] // 2)
        guidance = None
        if self.denoiser_config.guidance_embeds:
            guidance = jnp.full(x.shape[:1], 1000 * self.embedded_guidance, jnp.float32)
        tokens = model(pack(x), cond["hidden"], cond["pooled"], time, grid, guidance, dtype=self.dtype, remat=self.remat)
        return unpack(tokens, grid)

    def schedule(self, steps, shift):
        return flow_schedule(steps, shift)
