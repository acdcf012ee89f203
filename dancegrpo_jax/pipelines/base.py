"""The Policy contract: everything the algorithm knows of a base model, and how one is loaded.

A policy is the static half of a pipeline (graph definitions, tokenizers, transition kernel); its arrays travel beside
it as two pytrees, `trainable` (a flat dict: all denoiser weights, or only the LoRA adapters) and `frozen` (a dict of
flat dicts: the rest of the denoiser, VAE, text encoders, the encoded empty prompt). A new base model is a subclass with
its own `denoise` and `schedule`, and a line in `_REGISTRY`.
"""

import difflib
import importlib
import os
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import CLIPTokenizer

from dancegrpo_jax.data import PACKAGE
from dancegrpo_jax.models.encoders.clip import CLIPTextModel
from dancegrpo_jax.models.files.convert import CheckpointError, abstract_model, load_params, read_json, stored_in
from dancegrpo_jax.models.files.hub import PATTERNS, find_in_hub
from dancegrpo_jax.models.layers import LoRAParam, merge, split
from dancegrpo_jax.models.files.lora import add_lora, init_adapters
from dancegrpo_jax.models.codecs.autoencoder_kl import AutoencoderKL
from dancegrpo_jax.sde import Schedule
from dancegrpo_jax.sharding import Rules, map_slices, place_params

_REGISTRY = {"flux": "dancegrpo_jax.pipelines.flux:FluxPolicy",
             "stable_diffusion": "dancegrpo_jax.pipelines.stable_diffusion:StableDiffusionPolicy"}


class Policy:
    """Base class of text-to-image policies that work in an AutoencoderKL's latent space.

    Compared and hashed by identity, so it can be a static argument of jitted functions.

    Attributes:
      kernel, eta: the transition kernel of `sde.py` used in rollout and update.
      prediction: what the denoiser predicts (`sde.PREDICTIONS`).
      latent_shape: (h, w, C) of one latent, channels last.
      dtype: compute dtype of all networks; what is trained and everything outside the networks is fp32.
      guidance_scale: classifier-free guidance, 1 = off (one network pass per step instead of two).
    """

    pipeline: str  # diffusers' class, as in model_index.json
    prediction: str
    denoiser_class: type
    denoiser_folder: str
    kernels: tuple[str, ...]

    def __init__(self, folder, *, kernel: str, eta: float, height: int, width: int, dtype=jnp.float32,
                 remat: str = "full", guidance_scale: float = 1.0, embedded_guidance: float = 3.5, text_length: int = 0,
                 time_rounding: str = "exact", decode_batch: int = 0, decode_tile: int = 0):
        """Reads configs, no weights. The settings are those of `config.model` and `config.sampler`.

        Raises: CheckpointError if `folder` (or hub id) is no pipeline of this kind; ValueError for a wrong setting.
        """
        self.folder = find_folder(folder)
        if kernel not in self.kernels:
            raise ValueError(f"config.sampler.kernel={kernel!r}: {type(self).__name__} takes {' or '.join(self.kernels)}")
        index = self.folder / "model_index.json"
        found = read_json(index).get("_class_name") if index.exists() else self.pipeline
        if found != self.pipeline:
            right = [name for name in _REGISTRY if policy_class(name).pipeline == found]
            remedy = f"; set --config.model.policy={right[0]}" if right else ""
            raise CheckpointError(f"{index}: a {found}, but {type(self).__name__} needs a {self.pipeline}{remedy}")
        self.kernel, self.eta = kernel, float(eta)
        self.dtype, self.remat = jnp.dtype(dtype), remat
        self.guidance_scale, self.embedded_guidance = float(guidance_scale), float(embedded_guidance)
        self.time_rounding, self.decode_batch, self.decode_tile = time_rounding, decode_batch, decode_tile
        self.denoiser = abstract_model(self.denoiser_class, self.part(self.denoiser_folder))
        self.vae = abstract_model(AutoencoderKL, self.part("vae"))
        self.texts = {name: abstract_model(model, self.part(name)) for name, _, model, _ in self.text_encoders()}
        self.lengths = {name: self.context(folder) for name, folder, *_ in self.text_encoders()}
        if text_length:
            self.lengths[list(self.lengths)[-1]] = text_length
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_shape = (height // scale, width // scale, self.vae.config.latent_channels)

    @property
    def sharding(self) -> Rules:
        """The rules by which the denoiser's parameters lie on a mesh."""
        return self.denoiser_class.SHARDING

    def part(self, name: str) -> Path:
        """The folder of one component. Raises: CheckpointError if it is missing."""
        path = self.folder / name
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; config.model.folder must be a pipeline in the diffusers layout")
        return path

    def context(self, tokenizer: str) -> int:
        """The longest text, in tokens, of the tokenizer in that folder. Raises: CheckpointError if its config has none."""
        path = self.part(tokenizer) / "tokenizer_config.json"
        length = read_json(path).get("model_max_length")
        if not isinstance(length, int):
            raise CheckpointError(f"{path}: model_max_length={length!r} is not a number of tokens; write it there")
        return length

    def text_encoders(self) -> tuple[tuple[str, str, type, type], ...]:
        """(folder, folder of its tokenizer, model class, tokenizer class) of every text encoder, the longest last."""
        return (("text_encoder", "tokenizer", CLIPTextModel, CLIPTokenizer),)

    @cached_property
    def tokenizers(self) -> dict:
        """{text encoder: its tokenizer}, read when the first prompt comes."""
        return {name: tokenizer.from_pretrained(self.part(folder), local_files_only=True)
                for name, folder, _, tokenizer in self.text_encoders()}

    def abstract(self, lora: dict | None = None, mesh=None, *, text: bool = True) -> tuple[dict, dict]:
        """`(trainable, frozen)` as `load` makes them, of `jax.ShapeDtypeStruct`s, without reading weights."""
        if lora:
            add_lora(self.denoiser, lora["rank"], lora["alpha"], lora["targets"])
            self.lora_scale = lora["alpha"] / lora["rank"]
            self.graph, params, rest = split(self.denoiser, LoRAParam, ...)
            frozen = {"denoiser": stored_in(self.dtype, rest, mesh, self.sharding)}
        else:
            self.graph, params = split(self.denoiser)
            frozen = {"denoiser": {}}
        self.vae_graph, vae = split(self.vae)
        frozen["vae"] = stored_in(self.dtype, vae, mesh, AutoencoderKL.SHARDING)
        frozen |= self.abstract_text(mesh) if text else {}
        return stored_in(jnp.float32, params, mesh, self.sharding), frozen | {"negative": {}}

    def abstract_text(self, mesh=None) -> dict:
        """`load_text`'s result, of `jax.ShapeDtypeStruct`s."""
        texts = {name: split(model) for name, model in self.texts.items()}
        self.text_graphs = {name: graph for name, (graph, _) in texts.items()}
        rules = {name: model.SHARDING for name, _, model, _ in self.text_encoders()}
        return {name: stored_in(self.dtype, params, mesh, rules[name]) for name, (_, params) in texts.items()}

    def load(self, lora: dict | None = None, seed: int = 0, mesh=None, *, text: bool = True) -> tuple[dict, dict]:
        """Streams the pipeline's weights to the devices: `(trainable, frozen)`.

        `trainable` is fp32. Matrices of `frozen` have the compute dtype, to which every use would cast them anyway.

        Args:
          lora: None for full fine-tuning, or {"rank", "alpha", "targets"} (`lora.add_lora`).
          seed: of fresh adapters.
          mesh: where the arrays go, by the rules of `sharding.py`; None: the default device.
          text: False leaves the text encoders out, if prompts come already encoded (`frozen["negative"]` is then
            left for the caller to set when guidance is on).
        Raises: CheckpointError naming file and key.
        """
        folder = self.part(self.denoiser_folder)
        trainable, frozen = self.abstract(lora, mesh, text=False)
        if lora:
            trainable = init_adapters(trainable, nnx.Rngs(seed))
            if mesh:
                trainable = place_params(trainable, mesh, self.sharding)
            frozen["denoiser"] = load_params(self.denoiser_class, folder, frozen["denoiser"])
        else:
            trainable = load_params(self.denoiser_class, folder, trainable)
        frozen["vae"] = load_params(AutoencoderKL, self.part("vae"), frozen["vae"])
        frozen |= self.load_text(mesh) if text else {}
        frozen["negative"] = self.encode(frozen, self.tokenize([""])) if text and self.guidance_scale != 1 else {}
        return trainable, frozen

    def load_text(self, mesh=None) -> dict:
        """The part of `frozen` that `encode` needs: {folder: parameters} of the text encoders."""
        abstract = self.abstract_text(mesh)
        return {name: load_params(model_class, self.part(name), abstract[name])
                for name, _, model_class, _ in self.text_encoders()}

    def tokenize(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """int32 token ids {text encoder: [P, L]}, padded to the encoder's length, longer prompts cut."""
        return {name: tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="np",
                                max_length=self.lengths[name])["input_ids"].astype(np.int32)
                for name, tokenizer in self.tokenizers.items()}

    def truncated(self, prompts: list[str]) -> int:
        """How many prompts are too long for the longest text encoder, so that their end is not seen."""
        name = list(self.tokenizers)[-1]
        special = self.tokenizers[name].num_special_tokens_to_add()
        long = [prompt for prompt in prompts if len(prompt.encode()) > self.lengths[name] - special]  # a token has a byte
        counts = map(len, self.tokenizers[name](long, verbose=False)["input_ids"]) if long else ()
        return sum(count > self.lengths[name] for count in counts)

    def encode(self, frozen, tokens: dict) -> dict:
        """Token ids {text encoder: [P, L]} to conditioning {"hidden": [P, L, D], "pooled": [P, D]} in `dtype`."""
        model = merge(self.text_graphs["text_encoder"], frozen["text_encoder"])
        hidden, pooled = model(tokens["text_encoder"], self.dtype)
        return {"hidden": hidden, "pooled": pooled}

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
        """Latents [B, h, w, C] to images [B, H, W, 3] fp32 in [0, 1], `decode_batch` per device at a time (0: all)."""
        vae = merge(self.vae_graph, frozen["vae"])

        def decode(latents):
            images = vae.decode(vae.denormalize_latents(latents).astype(self.dtype), self.decode_tile)
            return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
        return map_slices(decode, latents, self.decode_batch)

    def denoise(self, model, x, time, cond):
        """One network pass: [B, h, w, C] (subclasses)."""
        raise NotImplementedError

    def schedule(self, steps: int, shift: float) -> Schedule:
        """The noise levels of a sampler with `steps` steps (subclasses); shift 0 takes the checkpoint's own."""
        raise NotImplementedError


def find_folder(folder: str | os.PathLike) -> Path:
    """A pipeline's folder: a path (relative ones also beside the package), or a hub id "owner/name[@revision]".

    Raises: CheckpointError if there is no such folder and the hub has none either.
    """
    try:  # the pipelines' parts lie in folders; single files beside them hold the same weights once more
        path = find_in_hub(folder, root=PACKAGE.parent, patterns=["model_index.json", *(f"*/{p}" for p in PATTERNS)])
    except CheckpointError as error:
        raise CheckpointError(f"config.model.folder: {error}") from error
    if not path.is_dir():
        raise CheckpointError(f"config.model.folder: {path} is a file; expected a pipeline in the diffusers layout")
    return path


def policy_class(name: str) -> type[Policy]:
    """The policy of a registered name or of an import path "package.module:Class".

    Raises: ValueError naming the nearest registered name.
    """
    path = _REGISTRY.get(name, name)
    if ":" not in path:
        nearest = difflib.get_close_matches(name, _REGISTRY, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"config.model.policy={name!r}: known are {', '.join(_REGISTRY)} or 'package.module:Class'{hint}")
    module, attribute = path.split(":")
    return getattr(importlib.import_module(module), attribute)


def make_policy(name: str, *args, **kwargs) -> Policy:
    """Builds a policy by registered name or by import path (`policy_class`)."""
    return policy_class(name)(*args, **kwargs)


def pipeline_policy(folder: Path) -> str:
    """The registered policy for a pipeline folder, by its model_index.json. Raises: CheckpointError if there is none."""
    found = read_json(folder / "model_index.json").get("_class_name")
    for name in _REGISTRY:
        if policy_class(name).pipeline == found:
            return name
    raise CheckpointError(f"{folder / 'model_index.json'}: no policy for a {found}; known are {', '.join(_REGISTRY)}")


def configured_policy(config) -> Policy:
    """The policy that a run's config describes."""
    model, sampler = config.model, config.sampler
    return make_policy(
        model.policy, model.folder, kernel=sampler.kernel, eta=sampler.eta, height=model.height, width=model.width,
        dtype=model.dtype, remat=model.remat, guidance_scale=model.guidance_scale, embedded_guidance=model.embedded_guidance,
        text_length=model.text_length, time_rounding=sampler.time_rounding, decode_batch=model.decode_batch,
        decode_tile=model.decode_tile)


def lora_settings(config) -> dict | None:
    """The `lora` argument of `Policy.load` that a run's config describes; None for full fine-tuning."""
    lora = config.model.lora
    return {"rank": lora.rank, "alpha": lora.alpha or 2 * lora.rank, "targets": lora.targets} if lora.rank else None
