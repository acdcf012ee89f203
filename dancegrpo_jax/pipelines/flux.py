"""FLUX.1: rectified flow on packed latents, T5 tokens and CLIP's pooled text."""

import math

import jax.numpy as jnp
from transformers import CLIPTokenizer, T5Tokenizer

from dancegrpo_jax.models.codecs.autoencoder_kl import AutoencoderKL
from dancegrpo_jax.models.denoisers.flux import FluxTransformer2DModel, pack, unpack
from dancegrpo_jax.models.encoders.clip import CLIPTextModel
from dancegrpo_jax.models.encoders.t5 import T5EncoderModel
from dancegrpo_jax.models.files.convert import read_json
from dancegrpo_jax.models.layers import merge
from dancegrpo_jax.pipelines.base import Defaults, Part, Pipeline
from dancegrpo_jax.registry import FLOW_KERNELS
from dancegrpo_jax.sde import flow_schedule


class Flux(Pipeline):
    """Velocity prediction, embedded guidance where the checkpoint has it.

    A pipeline without a second text encoder (the embedded world's) attends to CLIP's tokens instead of T5's.
    """

    prediction = "velocity"
    kernels = FLOW_KERNELS
    defaults = Defaults(steps=28, height=1024, width=1024, embedded_guidance=3.5)

    def declare(self):
        parts = {"transformer": Part(FluxTransformer2DModel, "denoiser"), "vae": Part(AutoencoderKL, "codec"),
                 "text_encoder": Part(CLIPTextModel, "text", ("tokenizer", CLIPTokenizer))}
        if (self.folder / "text_encoder_2").is_dir():
            parts["text_encoder_2"] = Part(T5EncoderModel, "text", ("tokenizer_2", T5Tokenizer))
        return parts

    def geometry(self):
        codec = self.configs["vae"]
        return (self.height // codec.factor, self.width // codec.factor, codec.latent_channels), 2 * codec.factor

    def encode_text(self, frozen, tokens):
        hidden, pooled = self.text(frozen, "text_encoder", tokens)
        if "text_encoder_2" in tokens:  # padding is not masked, here or in the transformer, as in training
            hidden = self.text(frozen, "text_encoder_2", tokens)
        return {"hidden": hidden, "pooled": pooled}

    def denoise(self, params, x, time, cond):
        grid = (self.latent_shape[0] // 2, self.latent_shape[1] // 2)
        guidance = None
        if self.configs["transformer"].guidance_embeds:
            guidance = jnp.full(x.shape[:1], 1000 * self.embedded_guidance, jnp.float32)
            if self.time_rounding == "bf16_ref":  # 3.5 becomes 3504
                guidance = guidance.astype(jnp.bfloat16).astype(jnp.float32)
        model = merge(self.graphs["transformer"], params["transformer"])
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
