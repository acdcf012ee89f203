"""The Policy contract: everything the algorithm knows of a base model, and how one is loaded.

A policy is the static half of a pipeline (graph definitions, tokenizer, transition kernel); its arrays travel beside
it as two pytrees, `trainable` (a flat dict: all denoiser weights, or only the LoRA adapters) and `frozen` (a dict of
flat dicts: the rest of the denoiser, VAE, text encoder, the encoded empty prompt). A new base model is a subclass with
four methods, decorated with `@register`.
"""

import difflib
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import CLIPTokenizer

from dancegrpo_jax.models.clip import CLIPTextModel
from dancegrpo_jax.models.convert import CheckpointError, load_model
from dancegrpo_jax.models.layers import LoRAParam, merge, split
from dancegrpo_jax.models.lora import add_lora
from dancegrpo_jax.models.vae import AutoencoderKL
from dancegrpo_jax.sde import Schedule

_REGISTRY = {"flux": "dancegrpo_jax.models.flux_policy:FluxPolicy",
             "stable_diffusion": "dancegrpo_jax.models.stable_diffusion:StableDiffusionPolicy"}


class Policy:
    """Base class of text-to-image policies that work in an AutoencoderKL's latent space.

    Compared and hashed by identity, so it can be a static argument of jitted functions.

    Attributes:
      kernel, eta: the transition kernel of `sde.py` used in rollout and update.
      prediction: what the denoiser predicts (`sde.PREDICTIONS`).
      latent_shape: (h, w, C) of one latent, channels last.
      dtype: compute dtype of all networks; parameters and everything outside stay fp32.
      guidance_scale: classifier-free guidance, 1 = off (one network pass per step instead of two).
    """

    prediction: str
    denoiser_class: type
    denoiser_folder: str
    kernels: tuple[str, ...]

    def __init__(self, folder, *, kernel: str, eta: float, height: int, width: int, dtype=jnp.float32,
                 remat: bool = True, guidance_scale: float = 1.0, embedded_guidance: float = 3.5):
        self.folder = Path(folder)
        if kernel not in self.kernels:
            raise ValueError(f"config.sampler.kernel={kernel!r}: {type(self).__name__} takes {' or '.join(self.kernels)}")
        self.kernel, self.eta = kernel, float(eta)
        self.dtype, self.remat = jnp.dtype(dtype), remat
        self.guidance_scale, self.embedded_guidance = float(guidance_scale), float(embedded_guidance)
        self.tokenizer = CLIPTokenizer.from_pretrained(self._part("tokenizer"))
        self._size = (height, width)

    def _part(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; config.model.folder must be a pipeline in the diffusers layout")
        return path

    def load(self, lora: dict | None = None, seed: int = 0) -> tuple[dict, dict]:
        """Loads the pipeline's weights: `(trainable, frozen)`, on the host.

        Args: lora: None for full fine-tuning, or {"rank", "alpha", "targets"} (`lora.add_lora`).
        Raises: CheckpointError naming file and key.
        """
        denoiser = load_model(self.denoiser_class, self._part(self.denoiser_folder))
        vae = load_model(AutoencoderKL, self._part("vae"))
        text = load_model(CLIPTextModel, self._part("text_encoder"))
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (self._size[0] // scale, self._size[1] // scale, vae.config.latent_channels)
        self.denoiser_config = denoiser.config
        if lora:
            add_lora(denoiser, lora["rank"], lora["alpha"], lora["targets"], nnx.Rngs(seed))
            self.graph, trainable, rest = split(denoiser, LoRAParam, ...)
        else:
            (self.graph, trainable), rest = split(denoiser), {}
        self.vae_graph, vae_params = split(vae)
        self.text_graph, text_params = split(text)
        frozen = {"denoiser": rest, "vae": vae_params, "text_encoder": text_params}
        frozen["negative"] = self.encode(frozen, self.tokenize([""])) if self.guidance_scale != 1 else {}
        return trainable, frozen

    def tokenize(self, prompts: list[str]) -> np.ndarray:
        """int32 token ids [P, L], padded to the tokenizer's length, longer prompts cut."""
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="np",
                              max_length=self.tokenizer.model_max_length)["input_ids"].astype(np.int32)

    def encode(self, frozen, tokens) -> dict:
        """Token ids [P, L] to conditioning: {"hidden": [P, L, D], "pooled": [P, D]} fp32."""
        hidden, pooled = merge(self.text_graph, frozen["text_encoder"])(tokens, self.dtype)
        return {"hidden": hidden.astype(jnp.float32), "pooled": pooled.astype(jnp.float32)}

    def predict(self, trainable, frozen, x, time, cond):
        """The denoiser's output [B, h, w, C] fp32 for latents x [B, h, w, C] at times [B] in 0..1000.

        With guidance, negative and conditional prompts are one batch: negative + scale (conditional - negative).
        """
        model = merge(self.graph, trainable, frozen["denoiser"])
        if self.guidance_scale == 1:
            return self.denoise(model, x, time, cond).astype(jnp.float32)
        both = jax.tree.map(lambda n, c: jnp.concatenate([jnp.broadcast_to(n, c.shape), c]), frozen["negative"], cond)
        output = self.denoise(model, jnp.concatenate([x, x]), jnp.concatenate([time, time]), both).astype(jnp.float32)
        negative, conditional = jnp.split(output, 2)
        return negative + self.guidance_scale * (conditional - negative)

    def decode(self, frozen, latents):
        """Latents [B, h, w, C] to images [B, H, W, 3] fp32 in [0, 1]."""
        vae = merge(self.vae_graph, frozen["vae"])
        images = vae.decode(vae.denormalize_latents(latents).astype(self.dtype))
        return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)

    def denoise(self, model, x, time, cond):
        """One network pass: [B, h, w, C] (subclasses)."""
        raise NotImplementedError

    def schedule(self, steps: int, shift: float) -> Schedule:
        """The noise levels of a sampler with `steps` steps (subclasses)."""
        raise NotImplementedError


def make_policy(name: str, *args, **kwargs) -> Policy:
    """Builds a policy by registered name or by import path "package.module:Class".

    Raises: ValueError naming the nearest registered name.
    """
    path = _REGISTRY.get(name, name)
    if ":" not in path:
        nearest = difflib.get_close_matches(name, _REGISTRY, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"config.model.policy={name!r}: known are {', '.join(_REGISTRY)} or 'package.module:Class'{hint}")
    module, attribute = path.split(":")
    return getattr(importlib.import_module(module), attribute)(*args, **kwargs)
