"""Stable Diffusion v1.4 with the HPS-v2.1 reward: the preset of DanceGRPO's Stable Diffusion experiment.

    python launch/train.py --config=configs/sd_hps.py --config.data.train=hpdv2_train.txt

Mesh: data over all devices (0.86 B parameters fit a 32 GB device with optimizer and EMA; on smaller ones
`--config.mesh.data=1 --config.mesh.fsdp=-1`). Published for 8 GPUs and 300 iterations: HPS-v2.1 from 0.239 to about 0.365.
Weights come from the hub, or from a folder with `--config.model.folder`. The shipped prompts are for smoke runs:
train on your own, or on those of HPDv2 (README, "Prompts").
"""

from dancegrpo_jax.config import default


def get_config():
    config = default()
    config.run_dir = "runs/sd_hps"
    config.steps = 300
    config.model.folder = "CompVis/stable-diffusion-v1-4"
    config.model.dtype = "bfloat16"
    config.model.height = config.model.width = 512
    config.model.guidance_scale = 5.0
    config.model.decode_batch = 4
    config.sampler.kernel, config.sampler.eta = "ddim", 1.0
    config.sampler.steps = config.sampler.eval_steps = 50
    config.data.train = "dancegrpo_jax/prompts/train.txt"
    config.data.prompts_per_step, config.data.group_size = 32, 16  # 8 devices with 4 prompts each
    config.data.chunks = 8
    config.rewards = {"hps": {"dtype": "bfloat16"}}
    config.algorithm = {"grpo": {"clip_range": 1e-4, "timestep_fraction": 1.0}}  # all but the last step: 49 of 50
    config.optim.updates_per_rollout = 2  # 256 samples an update
    config.optim.microbatch = 64
    config.optim.learning_rate = 1e-5
    config.optim.weight_decay = 1e-4
    config.optim.grad_clip = 1.0
    config.optim.ema_decay = 0.995  # the preset has none; evaluation is steadier with it, training does not see it
    config.evals = {"eval": {"rows": "dancegrpo_jax/prompts/heldout.txt", "count": 32, "batch": 32, "every": 25}}
    config.checkpoint.every = 25
    return config
