"""FLUX.1-dev with the HPS-v2.1 reward, all weights trained: DanceGRPO's 16-GPU preset.

    python launch/train.py --config=configs/flux_hps.py --config.data.train=hpdv2_train.txt

Mesh: fsdp over all devices; 11.9 B parameters with Adam and EMA are 240 GB of fp32, 15 GB on each of 16 devices.
Published for 16 H800 GPUs: 200 to 300 iterations in about 12 hours. The T5 encoder (9.5 GB of bfloat16, split over the
devices) runs while training, at under 0.1 % of a rollout's compute; launch/precompute.py spares its memory. The weights
are gated: accept the licence on the hub, or name a folder with `--config.model.folder`. The shipped prompts are for smoke
runs (README, "Prompts").
"""

from dancegrpo_jax.config import default


def get_config():
    config = default()
    config.run_dir = "runs/flux_hps"
    config.steps = 300
    config.model.folder = "black-forest-labs/FLUX.1-dev"
    config.model.dtype = "bfloat16"
    config.model.height = config.model.width = 720
    config.model.embedded_guidance = 3.5
    config.model.decode_batch = 1
    config.sampler.kernel, config.sampler.eta = "dance", 0.3
    config.sampler.steps, config.sampler.shift = 16, 3.0
    config.sampler.eval_steps = 28  # diffusers' default; rollouts have 16 for their cost
    # The reference feeds times and guidance rounded to bfloat16 (978 as 976, 3500 as 3504), which differs between it and
    # diffusers' pipeline. Exact values lie in the middle of both; "bf16_ref" reproduces the reference.
    config.sampler.time_rounding = "exact"
    config.data.train = "dancegrpo_jax/prompts/train.txt"
    config.data.prompts_per_step, config.data.group_size = 16, 12  # 16 devices with 1 prompt each
    config.data.chunks = 4
    config.rewards = {"hps": {"dtype": "bfloat16"}}
    config.algorithm = {"grpo": {"clip_range": 1e-4, "timestep_fraction": 0.6}}  # 9 of the first 15 steps
    config.optim.updates_per_rollout = 3  # 64 samples an update
    config.optim.microbatch = 48  # pairs; weights are gathered once for each micro-batch, so a few large ones
    config.optim.learning_rate = 1e-5
    config.optim.weight_decay = 1e-4
    config.optim.grad_clip = 1.0
    config.optim.ema_decay = 0.995  # of the 8-GPU preset
    config.evals = {"eval": {"rows": "dancegrpo_jax/prompts/heldout.txt", "count": 32, "batch": 16, "every": 25}}
    config.checkpoint.every = 25
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
