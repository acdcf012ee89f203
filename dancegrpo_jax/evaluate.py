"""Held-out evaluation: the ODE sampler, EMA weights, the same prompts and noise every time."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax.checkpoint import Checkpointer
from dancegrpo_jax.config import run_config
from dancegrpo_jax.pipelines.base import configured_policy, lora_settings
from dancegrpo_jax.multihost import fetch
from dancegrpo_jax.rollout import sample
from dancegrpo_jax.sde import Schedule, deterministic
from dancegrpo_jax.sharding import batch_devices, constrain_batch, shard_batch


@partial(jax.jit, static_argnames=("policy",))
def decode(policy, frozen, latents):
    """Final latents [B, ...] to images [B, H, W, 3] fp32 in [0, 1]."""
    return policy.decode(frozen, latents)


@partial(jax.jit, static_argnames=("policy",))
def encode(policy, frozen, tokens):
    """Token ids {encoder: [P, L]} to the conditioning pytree of [P, ...].

    A pod has often more devices than an iteration has prompts: rows are added until they divide, or each would encode all.
    """
    count = len(jax.tree.leaves(tokens)[0])
    rows = -count % batch_devices()
    padded = constrain_batch(jax.tree.map(lambda ids: jnp.pad(ids, ((0, rows), (0, 0))), tokens))
    return jax.tree.map(lambda leaf: leaf[:count], policy.encode(frozen, padded))


def encode_prompts(policy, frozen, mesh, prompts: list[str]):
    """Prompts to conditioning, split over the mesh."""
    return encode(policy, frozen, shard_batch(policy.tokenize(prompts), mesh))


def generate(policy, params, frozen, prompts: list[str], schedule: Schedule, *, embed, batch: int, seed: int) -> np.ndarray:
    """ODE samples, one per prompt: uint8 [N, H, W, 3]. Image i depends on its prompt, the seed, i and the batch size.

    `embed` turns a list of prompts into conditioning. Runs in batches of `batch` prompts (the last one is padded), so it
    compiles once.
    """
    schedule = deterministic(schedule)
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start:start + batch]
        cond = embed(part + part[-1:] * (batch - len(part)))
        key = jax.random.fold_in(jax.random.key(seed), start // batch)
        latents = sample(policy, params, frozen, cond, key, schedule)
        images.append(decode(policy, frozen, latents)[:len(part)])
    return np.concatenate([to_uint8(part) for part in images])


def to_uint8(images) -> np.ndarray:
    """Images in [0, 1] to uint8, rounded, on every process."""
    return fetch(jnp.round(images * 255).astype(jnp.uint8))


def evaluate(images: np.ndarray, prompts: list[str], rewards, mesh) -> dict[str, float]:
    """Mean and standard error over images of every reward: {"<name>/mean", "<name>/stderr"}.

    Args: images uint8 [N, H, W, 3]; rewards: a `rewards.RewardSet`. Invalid scores are left out.
    """
    metrics = {}
    for name, (values, ok) in score_images(images[:, None], prompts, rewards, mesh).items():
        valid = values[ok]
        metrics[f"{name}/mean"] = float(valid.mean()) if valid.size else float("nan")
        metrics[f"{name}/stderr"] = float(valid.std(ddof=1) / valid.size**0.5) if valid.size > 1 else float("nan")
    return metrics


def score_images(images: np.ndarray, prompts: list[str], rewards, mesh) -> dict:
    """Scores uint8 images [P, G, H, W, 3] that every process has: {name: (values [P, G], ok [P, G])} as numpy arrays."""
    return fetch(rewards(shard_batch(images / np.float32(255), mesh), prompts))


def load_run(run_dir, mesh=None, *, text: bool = True):
    """What a training run has made of its base model: (config, policy, params, frozen, step).

    Args:
      mesh: where the weights go, by the rules of `sharding.py`; None: the default device.
      text: False leaves the text encoders out.
    Raises: ConfigError or CheckpointError if the folder holds no run or no checkpoint.
    """
    config = run_config(run_dir)
    policy = configured_policy(config)
    params, frozen = policy.load(lora_settings(config), config.seed, mesh, text=text)
    step, params = Checkpointer(Path(run_dir) / "checkpoints").restore_weights(params)
    return config, policy, params, frozen, step
