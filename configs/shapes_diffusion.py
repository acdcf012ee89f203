"""Embedded world, diffusion: a small Stable Diffusion UNet learns to draw what the caption says.

    python launch/train.py --config=configs/shapes_diffusion.py

No download, two CPU cores. As shapes_flow.py with DDIM(eta = 1) in place of the rectified-flow SDE. The base model is
still too weak to learn from (docs/embedded_world.md).
"""

from dancegrpo_jax.config import default


def get_config():
    config = default()
    config.run_dir = "runs/shapes_diffusion"
    config.steps = 60
    config.model.policy = "stable_diffusion"
    config.model.folder = "dancegrpo_jax/worlds/weights/diffusion"
    config.model.height = config.model.width = 32
    config.model.remat = False
    config.sampler.kernel, config.sampler.eta = "ddim", 1.0
    config.sampler.steps, config.sampler.eval_steps = 10, 10
    config.data.train = "dancegrpo_jax/worlds/prompts/train.txt"
    config.data.heldout = "dancegrpo_jax/worlds/prompts/heldout.txt"
    config.data.prompts_per_step, config.data.group_size = 16, 12
    config.rewards = config.eval.rewards = {"strict": {"reward": "verifier", "mode": "strict", "weight": 1.0},
                                            "soft": {"reward": "verifier", "weight": 0.5}}
    config.grpo.clip_range = 1e-4
    config.grpo.timestep_fraction = 0.45
    config.grpo.microbatch = 192
    config.optim.learning_rate, config.optim.b2 = 1e-4, 0.99
    config.optim.ema_decay = 0.9
    config.eval.every = 20
    config.eval.num_prompts = 512
    config.eval.batch = 128
    config.checkpoint.every = 20
    return config
