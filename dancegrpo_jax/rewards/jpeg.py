"""Compressibility: the size of an image as JPEG (Black et al. 2023, DDPO, arXiv:2305.13301, section 5.1)."""

import io

import numpy as np
from PIL import Image

from dancegrpo_jax.rewards.base import HostReward


def jpeg_kilobytes(image: np.ndarray, quality: int) -> float:
    """Size of an image uint8 [H, W, 3] as JPEG, in units of 1000 bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


class Compressibility(HostReward):
    """-KB as JPEG: rewards smooth, empty images. `quality`: 1 to 95."""

    sign = -1

    def __init__(self, quality: int = 95):
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 95:
            raise ValueError(f"reward 'jpeg': quality is {quality!r}, expected an integer from 1 to 95")
        self.quality = quality

    def score(self, images, prompts, metadata):
        return [self.sign * jpeg_kilobytes(image, self.quality) for image in images]


class Incompressibility(Compressibility):
    """+KB as JPEG: rewards texture and noise."""

    sign = 1
