"""Embedded world, rectified flow: a small FLUX transformer learns to draw what the caption says.

    python launch/train.py --config=configs/shapes_flow.py

No download, less than ten minutes on two CPU cores. The reward is the verifier: `strict` (everything right) with some `soft`
(share of the caption's clauses that the pixels satisfy). Held-out captions contain colour-shape pairs that training
never shows. What to expect: docs/embedded_world.md.
"""

from dancegrpo_jax.config import default


def get_config():
    config = default()
    config.run_dir = "runs/shapes_flow"
    config.steps = 50
    config.model.folder = "dancegrpo_jax/worlds/weights/flow"
    config.model.height = config.model.width = 32
    config.model.remat = "dots"  # on a CPU a fifth faster than "none", which moves more through memory
    # The layers through which the caption enters. Only they need to change, and with fewer directions to move in, the
    # signal of the few samples of a small run stands out from the noise of their gradient.
    config.model.lora.rank = 16
    config.model.lora.targets = (r"context_embedder", r"time_text_embed\.text_embedder\.linear_[12]", r".*add_[qkv]_proj")
    config.sampler.kernel, config.sampler.eta = "flow", 0.7
    config.sampler.steps, config.sampler.shift = 8, 2.0
    config.sampler.eval_steps = 8
    config.data.train = "dancegrpo_jax/worlds/prompts/train.txt"
    config.data.prompts_per_step, config.data.group_size = 32, 12
    # The soft score alone rises at the cost of the strict one.
    config.rewards = {"strict": {"reward": "verifier", "mode": "strict", "weight": 1.0},
                      "soft": {"reward": "verifier", "weight": 0.5}}
    # Noise only in the first four steps, where colour and layout are decided; the rest is the ODE, as in evaluation.
    config.algorithm = {"grpo": {"clip_range": 1e-4, "timestep_fraction": 1.0, "window": 4, "window_interval": 1_000_000}}
    config.optim.microbatch = 384
    config.optim.learning_rate, config.optim.b2 = 4e-3, 0.99
    config.optim.schedule = "linear"
    config.optim.ema_decay = 0.9
    config.evals = {"eval": {"rows": "dancegrpo_jax/worlds/prompts/heldout.txt", "count": 512, "batch": 256, "every": 25}}
    config.checkpoint.every = 5
    return config
