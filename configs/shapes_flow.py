"""Embedded world, rectified flow: a small FLUX transformer learns to draw what the caption says.

    python launch/train.py --config=configs/shapes_flow.py

No download, two CPU cores. The reward is the verifier: `strict` (everything right) with some `soft` (share of the
caption's clauses that the pixels satisfy). Held-out captions contain colour-shape pairs that training never shows.
Status: docs/embedded_world.md.
"""

from dancegrpo_jax.config import default


def get_config():
    config = default()
    config.run_dir = "runs/shapes_flow"
    config.steps = 80
    config.model.policy = "flux"
    config.model.folder = "dancegrpo_jax/worlds/weights/flow"
    config.model.height = config.model.width = 32
    config.model.remat = False
    config.sampler.kernel, config.sampler.eta = "flow", 1.0
    config.sampler.steps, config.sampler.shift = 8, 2.0
    config.sampler.eval_steps = 8
    # Noise only in the first three steps, where colour and layout are decided; the rest is the ODE, as in evaluation.
    config.sampler.window, config.sampler.window_interval = 3, 1_000_000
    config.data.train = "dancegrpo_jax/worlds/prompts/train.txt"
    config.data.heldout = "dancegrpo_jax/worlds/prompts/heldout.txt"
    config.data.prompts_per_step, config.data.group_size = 16, 12
    # The soft score alone rises at the cost of the strict one.
    config.rewards = config.eval.rewards = {"strict": {"reward": "verifier", "mode": "strict", "weight": 1.0},
                                            "soft": {"reward": "verifier", "weight": 0.5}}
    config.grpo.clip_range = 1e-4
    config.grpo.timestep_fraction = 1.0
    config.grpo.microbatch = 192
    config.optim.learning_rate, config.optim.b2 = 1e-4, 0.99
    config.optim.ema_decay = 0.9
    config.eval.every = 20
    config.eval.num_prompts = 512
    config.eval.batch = 128
    config.checkpoint.every = 20
    return config
