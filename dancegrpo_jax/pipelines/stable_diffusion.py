"""Stable Diffusion 1.x: epsilon, v or sample prediction on a DDPM schedule."""

from transformers import CLIPTokenizer

from dancegrpo_jax.models.codecs.autoencoder_kl import AutoencoderKL
from dancegrpo_jax.models.denoisers.unet import UNet2DConditionModel
from dancegrpo_jax.models.encoders.clip import CLIPTextModel
from dancegrpo_jax.models.files.convert import CheckpointError, read_json
from dancegrpo_jax.models.layers import merge
from dancegrpo_jax.options import ConfigError
from dancegrpo_jax.pipelines.base import Defaults, Part, Pipeline
from dancegrpo_jax.registry import DIFFUSION_KERNELS, PREDICTIONS
from dancegrpo_jax.sde import ddim_schedule


class StableDiffusion(Pipeline):
    """UNet in latent space; betas and prediction type come from the checkpoint's scheduler_config.json."""

    kernels = DIFFUSION_KERNELS
    defaults = Defaults(steps=50, height=512, width=512, guidance_scale=7.5)

    def __init__(self, folder, **settings):
        super().__init__(folder, **settings)
        path = self.part("scheduler") / "scheduler_config.json"
        self.scheduler = read_json(path)
        self.prediction = self.scheduler.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS[1:]:
            raise CheckpointError(f"{path}: prediction_type={self.prediction!r} is not one of {PREDICTIONS[1:]}")

    def declare(self):
        return {"unet": Part(UNet2DConditionModel, "denoiser"), "vae": Part(AutoencoderKL, "codec"),
                "text_encoder": Part(CLIPTextModel, "text", ("tokenizer", CLIPTokenizer))}

    def geometry(self):
        codec, unet = self.configs["vae"], self.configs["unet"]
        return ((self.height // codec.factor, self.width // codec.factor, codec.latent_channels),
                codec.factor * 2 ** (len(unet.block_out_channels) - 1))

    def encode_text(self, frozen, tokens):
        return {"hidden": self.text(frozen, "text_encoder", tokens)[0]}

    def denoise(self, params, x, time, cond):
        return merge(self.graphs["unet"], params["unet"])(x, time, cond["hidden"], dtype=self.dtype, remat=self.remat)

    def schedule(self, steps, shift):
        trained = self.scheduler.get("num_train_timesteps", 1000)
        if steps > trained:
            raise ConfigError(f"config.sampler.steps={steps}: this model was trained on {trained} noise levels; lower it")
        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one")
        return ddim_schedule(steps, **{key: self.scheduler[key] for key in keys if key in self.scheduler})
