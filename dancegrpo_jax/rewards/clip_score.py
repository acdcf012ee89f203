"""CLIP score: the cosine between an image and its prompt (Hessel et al. 2021, arXiv:2104.08718, without the factor).

Serves every model in transformers' CLIPModel format: OpenAI and LAION CLIP, PickScore (up to its constant scale).
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax.models.clip import IMAGE_MEAN, IMAGE_STD, CLIPModel, cosine
from dancegrpo_jax.models.convert import load_model
from dancegrpo_jax.models.layers import merge, split
from dancegrpo_jax.rewards.base import DeviceReward, register


def preprocess(images, size: int):
    """Images [B, H, W, 3] in [0, 1] -> [B, size, size, 3] normalised for CLIP, in fp32.

    The shorter side is resized to `size` (antialiased bicubic, as PIL does it on floats), the centre is cut out.
    """
    height, width = images.shape[1:3]
    if (height, width) != (size, size):
        shorter = min(height, width)
        height, width = height * size // shorter, width * size // shorter
        shape = (images.shape[0], height, width, 3)
        images = jax.image.resize(images, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
        top, left = (height - size) // 2, (width - size) // 2
        images = jnp.clip(images[:, top:top + size, left:left + size], 0, 1)  # bicubic overshoots at edges
    return (images - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


@register("clip_score")
class ClipScore(DeviceReward):
    """Cosine in [-1, 1] of CLIP's image and text features; each prompt is encoded once for its group.

    Args:
      folder: a CLIPModel as transformers saves it (config.json, model.safetensors).
      tokenizer: folder of the tokenizer, default `folder`.
      dtype: compute type of the towers, "float32" or "bfloat16"; norms, projections and the cosine are fp32 always.
    Raises: CheckpointError if the folder does not hold such a model, OSError without a tokenizer.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer: str | os.PathLike | None = None, dtype: str = "float32"):
        from transformers import CLIPTokenizer  # slow to import, and only needed here

        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"reward 'clip_score': dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
        self.dtype = jnp.dtype(dtype)
        model = load_model(CLIPModel, folder)
        self.image_size = model.config.vision_config.image_size
        self.length = model.config.text_config.max_position_embeddings
        self.graphdef, self.params = split(model)
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer or folder, local_files_only=True)

    def prepare(self, prompts, metadata):
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.length)["input_ids"]
        return np.array(ids, np.int32)

    def apply(self, params, images, text):
        model = merge(self.graphdef, params)
        pixels = preprocess(images.reshape(-1, *images.shape[2:]), self.image_size)
        image_features = model.image_features(pixels, self.dtype).reshape(*images.shape[:2], -1)
        return cosine(image_features, model.text_features(text, self.dtype)[:, None])
