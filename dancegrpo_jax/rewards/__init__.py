"""Rewards: the contract in `base`, several of them scoring together in `set`, one file per reward, names in `registry`."""

from dancegrpo_jax.rewards.base import DeviceReward, HostReward, Reward  # noqa: F401
from dancegrpo_jax.rewards.set import RewardSet, build  # noqa: F401
