"""FLUX as a policy: rectified flow on packed latents, T5 tokens and CLIP's pooled text."""

import math

import jax.numpy as jnp
from transformers import T5Tokenizer

from dancegrpo_jax.pipelines.base import Policy
from dancegrpo_jax.models.files.convert import read_json
from dancegrpo_jax.models.denoisers.flux import FluxTransformer2DModel, pack, unpack
from dancegrpo_jax.models.layers import merge
from dancegrpo_jax.models.encoders.t5 import T5EncoderModel
from dancegrpo_jax.sde import FLOW_KERNELS, flow_schedule


class FluxPolicy(Policy):
    """FLUX.1: velocity prediction, embedded guidance where the checkpoint has it.

    A pipeline without a second text encoder (the embedded world's) attends to CLIP's tokens instead of T5's.
    """

    pipeline = "FluxPipeline"
    prediction = "velocity"
    denoiser_class, denoiser_folder = FluxTransformer2DModel, "transformer"
    kernels = FLOW_KERNELS

    def text_encoders(self):
        clip = super().text_encoders()
        if not (self.folder / "text_encoder_2").is_dir():
            return clip
        return *clip, ("text_encoder_2", "tokenizer_2", T5EncoderModel, T5Tokenizer)

    def encode(self, frozen, tokens):
        cond = super().encode(frozen, tokens)
        if "text_encoder_2" in tokens:  # padding is not masked, here or in the transformer, as in training
            model = merge(self.text_graphs["text_encoder_2"], frozen["text_encoder_2"])
            cond["hidden"] = model(tokens["text_encoder_2"], self.dtype)
        return cond

    def denoise(self, model, x, time, cond):
        grid = (self.latent_shape[0] // 2, self.latent_shape[1] // 2)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = jnp.full(x.shape[:1], 1000 * self.embedded_guidance, jnp.float32)
            if self.time_rounding == "bf16_ref":  # 3.5 becomes 3504
                guidance = guidance.astype(jnp.bfloat16).astype(jnp.float32)
        tokens = model(pack(x), cond["hidden"], cond["pooled"], time, grid, guidance, dtype=self.dtype, remat=self.remat)
        return unpack(tokens, grid)

    def schedule(self, steps, shift):
        return flow_schedule(steps, shift or self.own_shift(), self.time_rounding)

    def own_shift(self) -> float:
        """The shift of diffusers' pipeline: by the scheduler's config, for dynamic shifting by the number of tokens."""
        config = read_json(self.part("scheduler") / "scheduler_config.json")
        if not config.get("use_dynamic_shifting", False):
            return config.get("shift", 1.0)
        tokens = self.latent_shape[0] * self.latent_shape[1] // 4
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return math.exp(base + (top - base) * (tokens - low) / (high - low))
