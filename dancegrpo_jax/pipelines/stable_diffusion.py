"""Stable Diffusion 1.x as a policy: epsilon, v or sample prediction on a DDPM schedule."""

from dancegrpo_jax.pipelines.base import Policy
from dancegrpo_jax.models.files.convert import CheckpointError, read_json
from dancegrpo_jax.models.denoisers.unet import UNet2DConditionModel
from dancegrpo_jax.sde import DIFFUSION_KERNELS, PREDICTIONS, ddim_schedule


class StableDiffusionPolicy(Policy):
    """UNet in latent space; betas and prediction type come from the checkpoint's scheduler_config.json."""

    pipeline = "StableDiffusionPipeline"
    denoiser_class, denoiser_folder = UNet2DConditionModel, "unet"
    kernels = DIFFUSION_KERNELS

    def __init__(self, folder, **kwargs):
        super().__init__(folder, **kwargs)
        path = self.part("scheduler") / "scheduler_config.json"
        self.scheduler = read_json(path)
        self.prediction = self.scheduler.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS[1:]:
            raise CheckpointError(f"{path}: prediction_type={self.prediction!r} is not one of {PREDICTIONS[1:]}")

    def denoise(self, model, x, time, cond):
        return model(x, time, cond["hidden"], dtype=self.dtype, remat=self.remat)

    def schedule(self, steps, shift):
        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one")
        return ddim_schedule(steps, **{key: self.scheduler[key] for key in keys if key in self.scheduler})
