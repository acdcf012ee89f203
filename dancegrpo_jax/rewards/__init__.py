"""Reward models: the contract and `RewardSet` in `base`, one file per reward. Importing this registers them all."""

from dancegrpo_jax.rewards import clip, color, geneval, image_reward, jpeg, ocr, remote, world  # noqa: F401
from dancegrpo_jax.rewards.base import DeviceReward, HostReward, Reward, RewardSet, build, register  # noqa: F401
