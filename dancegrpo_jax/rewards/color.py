"""Redness and its kin: a dense reward that any model can raise, to see in a minute that the loop moves a reward."""

import jax.numpy as jnp

from dancegrpo_jax.rewards.base import DeviceReward

CHANNELS = ("red", "green", "blue")


class Color(DeviceReward):
    """Mean over pixels of one channel minus the larger of the other two, in [-1, 1]. `channel`: red, green or blue."""

    def __init__(self, channel: str = "red"):
        if channel not in CHANNELS:
            raise ValueError(f"reward 'color': channel is {channel!r}, expected one of {', '.join(CHANNELS)}")
        self.channel = CHANNELS.index(channel)

    @classmethod
    def abstract(cls, options, mesh):
        return cls(**options)  # it has no parameters

    def apply(self, params, images, text):
        others = jnp.delete(images, self.channel, axis=-1, assume_unique_indices=True)
        return (images[..., self.channel] - others.max(-1)).mean((2, 3))
