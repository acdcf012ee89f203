"""The embedded world's own judge: are the right shapes, colours, counts and relations in the picture?"""

from dancegrpo_jax.rewards.base import HostReward
from dancegrpo_jax.worlds.verifier import score_batch


class Verifier(HostReward):
    """Share of the caption's demands that the image meets (`mode: soft`), or 1 if it meets all, else 0 (`strict`).

    Prompts must be captions of `worlds.shapes`; others are masked.
    """

    def __init__(self, mode: str = "soft"):
        if mode not in ("soft", "strict"):
            raise ValueError(f"reward 'verifier': mode is {mode!r}, expected 'soft' or 'strict'")
        self.mode = mode

    def score(self, images, prompts, metadata):
        strict, soft = score_batch(images, prompts)
        return strict if self.mode == "strict" else soft
