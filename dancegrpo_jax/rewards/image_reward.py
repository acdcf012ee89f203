"""ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977): BLIP that reads the prompt while it looks at the picture."""

import os

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancegrpo_jax.models.encoders.blip import Blip, BlipConfig
from dancegrpo_jax.models.files.convert import from_torch, stored_in
from dancegrpo_jax.models.files.torch_file import read_torch
from dancegrpo_jax.models.layers import merge, split
from dancegrpo_jax.rewards.base import DeviceReward
from dancegrpo_jax.rewards.clip import abstract_head, find, fold_head, preprocess, split_head

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw output, from the package
LENGTH = 35

RELEASED = BlipConfig()


class ImageReward(DeviceReward):
    """About -2.3 to 2. Unlike with CLIP, the text is computed anew for every image of a group.

    Args:
      model: `ImageReward.pt`, or "owner/name/ImageReward.pt" on the hub.
      tokenizer: folder or hub id of bert-base-uncased.
      dtype: compute type of the encoders; norms and the head are fp32 always.
      config: sizes, for tests.
    """

    sharding = Blip.SHARDING

    def __init__(self, model: str | os.PathLike = "THUDM/ImageReward/ImageReward.pt",
                 tokenizer: str | os.PathLike = "google-bert/bert-base-uncased", dtype: str = "float32",
                 config: BlipConfig = RELEASED):
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"reward 'image_reward': dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
        self.dtype, self.config = jnp.dtype(dtype), config
        self.graphdef, leaves = split(nnx.eval_shape(lambda: Blip(config, rngs=nnx.Rngs(0))))
        self.load(model, tokenizer, stored_in(self.dtype, leaves))

    def load(self, model, tokenizer, layout: dict):
        """Sets what the files hold: `params`, of which `layout` says how all but the head are stored, and `tokenizer`."""
        from transformers import BertTokenizer  # slow to import, and only needed here

        path = find(model)
        tensors = read_torch(path)
        self.params = from_torch(tensors, layout, source=path, rename=Blip.LEGACY_KEYS, ignore=Blip.IGNORED_KEYS)
        head = {key.removeprefix("mlp."): value for key, value in tensors.items() if key.startswith("mlp.")}
        self.params |= fold_head(head, self.config.text_width, path)
        self.tokenizer = BertTokenizer.from_pretrained(find(tokenizer), local_files_only=True)

    @classmethod
    def abstract(cls, options, mesh):
        def load(self, model, tokenizer, layout):
            self.params = layout | abstract_head(self.config.text_width)
            self.tokenizer = lambda prompts, max_length, **_: dict.fromkeys(
                ("input_ids", "attention_mask"), np.zeros((len(prompts), max_length), np.int32))
        return type(cls.__name__, (cls,), {"load": load})(**options)

    def signature(self):
        return type(self), self.graphdef, self.dtype, self.config

    def prepare(self, rows):
        found = self.tokenizer([row.prompt for row in rows], padding="max_length", truncation=True, max_length=LENGTH)
        return {"ids": np.array(found["input_ids"], np.int32), "mask": np.array(found["attention_mask"], bool)}

    def apply(self, params, images, text):
        params, head = split_head(params)
        pixels = preprocess(images.reshape(-1, *images.shape[2:]), self.config.image_size).astype(self.dtype)
        ids, mask = (jnp.repeat(text[name], images.shape[1], axis=0) for name in ("ids", "mask"))
        token = merge(self.graphdef, params)(pixels, ids, mask).astype(jnp.float32)
        return ((head(token) - MEAN) / STD).reshape(images.shape[:2])
