"""Embedded world, diffusion: a small Stable Diffusion UNet learns to draw what the caption says.

    python launch/train.py --config=configs/shapes_diffusion.py

No download, two CPU cores. As shapes_flow.py, with DDIM(eta = 1) in place of the rectified-flow SDE. What to expect:
docs/embedded_world.md.
"""

from configs import shapes_flow


def get_config():
    config = shapes_flow.get_config()
    config.run_dir = "runs/shapes_diffusion"
    config.steps = 40
    config.model.folder = "dancegrpo_jax/worlds/weights/diffusion"
    config.model.remat = "none"  # "dots" would compute convolutions twice
    config.model.lora.targets = (r".*attn2\.to_[qkv]",)  # where the caption enters
    config.sampler.kernel, config.sampler.eta = "ddim", 1.0
    config.sampler.steps, config.sampler.eval_steps = 10, 10
    config.sampler.shift = 1.0
    config.optim.microbatch = 1536  # all pairs at once
    config.optim.schedule = "constant"
    config.evals.eval.every = 10
    return config
