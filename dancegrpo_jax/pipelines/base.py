"""The Pipeline contract: everything that the core knows of a base model, and how one is loaded.

A pipeline is the static half of a base model: the graph definitions of its parts, tokenizers, limits. Its arrays travel beside
it as two pytrees of flat dicts, {part: {parameter: array}}: `trainable` (the denoisers' weights, or only their LoRA adapters)
and `frozen` (the rest of the denoisers, codec, encoders). A new base model is one file: a subclass that names its parts and
says what one network pass and the noise schedule are, and a line in `registry.PIPELINES`.

Shapes: P rows, B samples, F frames (a picture has one), H W pixels.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancegrpo_jax import registry
from dancegrpo_jax.data import PACKAGE, Row
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.models.files.convert import CheckpointError, abstract_model, load_params, read_json, stored_in
from dancegrpo_jax.models.files.hub import CONFIGS, PATTERNS, find_in_hub
from dancegrpo_jax.models.files.lora import add_lora, init_adapters
from dancegrpo_jax.models.layers import LoRAParam, merge, split
from dancegrpo_jax.options import ConfigError
from dancegrpo_jax.sde import Schedule
from dancegrpo_jax.sharding import map_slices, place_params


class Part(NamedTuple):
    """One component of a pipeline, in the folder of its name.

    module: built from the folder's config.json (`convert.abstract_model`). role: "denoiser" (trained), "codec" or "text".
    tokenizer: of a text encoder, (its folder, its class).
    """

    module: type
    role: str
    tokenizer: tuple[str, Any] | None = None


class Defaults(NamedTuple):
    """What the pipeline is usually sampled with: `launch/sample.py` takes these. Sizes in pixels."""

    steps: int
    height: int
    width: int
    guidance_scale: float = 1.0
    embedded_guidance: float = 0.0


class Pipeline:
    """Base class of all base models. Frozen after construction; compared and hashed by identity, so it can be static.

    Attributes:
      prediction: what the denoiser predicts (`registry.PREDICTIONS`).
      kernels: names of the registered transition kernels that suit it.
      latent_shape: of one sample, channels last: (h, w, C), or (f, h, w, C) of a clip.
      multiple: height and width must be multiples of this many pixels.
      fps: frames a second of what `decode` gives; 0 for pictures.
      parts: {folder: Part}.
      dtype: compute dtype of all networks; what is trained and everything outside the networks is fp32.
      guidance_scale: classifier-free guidance, 1 = off (one network pass per step instead of two).
      sharding: the denoisers' sharding rules.
    """

    prediction: str
    kernels: Collection[str]
    defaults: Defaults
    fps = 0.0

    def __init__(self, folder, *, height: int = 0, width: int = 0, dtype="float32", remat: str = "full",
                 guidance_scale: float = 1.0, embedded_guidance: float = 0.0, negative_prompt: str = "", text_length: int = 0,
                 time_rounding: str = "exact", decode_batch: int = 0, decode_tile: int = 0, parts: Mapping | None = None,
                 lora: Mapping | None = None):
        """Reads configs, no weights. The settings are those of `config.model` and `config.sampler`; 0 pixels: the default size.

        Args:
          folder: in the diffusers layout, or a hub id. parts: {part: another folder or hub id to take it from}.
          lora: None trains all weights of the denoisers; or {"rank", "alpha", "targets"} (`lora.add_lora`).
        Raises: CheckpointError for a folder that is no pipeline of this kind; ConfigError for a setting outside its limits.
        """
        self.sources, self.folder = [folder, *(parts or {}).values()], find_folder(folder)
        self.parts = self.declare()
        self.elsewhere = {name: find_folder(path, f"model.parts.{name}") for name, path in (parts or {}).items()}
        if unknown := set(self.elsewhere) - set(self.parts):
            raise ConfigError(f"config.model.parts: {unknown.pop()!r} is no part of this pipeline; it has "
                              f"{', '.join(self.parts)}")
        self.height, self.width = height or self.defaults.height, width or self.defaults.width
        self.dtype, self.remat = jnp.dtype(dtype), remat
        self.guidance_scale, self.embedded_guidance = float(guidance_scale), float(embedded_guidance)
        self.negative_prompt, self.time_rounding = negative_prompt, time_rounding
        self.decode_batch, self.decode_tile = decode_batch, decode_tile
        models = {name: abstract_model(part.module, self.part(name)) for name, part in self.parts.items()}
        self.configs = {name: model.config for name, model in models.items()}
        self.lengths = {name: self.context(self.parts[name].tokenizer[0]) for name in self.named("text")}
        if text_length and self.lengths:
            self.lengths[list(self.lengths)[-1]] = text_length
        self.lora_scale = None
        if lora:
            self.lora_scale = lora["alpha"] / lora["rank"]
            for name in self.named("denoiser"):
                add_lora(models[name], lora["rank"], lora["alpha"], lora["targets"])
        self.sharding = tuple(dict.fromkeys(rule for name in self.named("denoiser")
                                            for rule in self.parts[name].module.SHARDING))
        self.graphs, self.shapes = {}, {}  # of each part; of a denoiser with adapters (what is trained, the rest)
        for name, model in models.items():
            filters = (LoRAParam, ...) if lora and name in self.named("denoiser") else ()
            self.graphs[name], *self.shapes[name] = split(model, *filters)
        self.latent_shape, self.multiple = self.geometry()
        for side, size in (("height", self.height), ("width", self.width)):
            if size % self.multiple:
                below = size // self.multiple * self.multiple
                raise ConfigError(f"config.model.{side}={size}: must be a multiple of {self.multiple} pixels for this model; "
                                  f"near are {below or self.multiple} and {below + self.multiple}")

    # ---------------------------------------------------------------- what a base model says of itself

    def declare(self) -> dict[str, Part]:
        """Its parts, by folder (subclasses). Text encoders in the order of their length, the longest last."""
        raise NotImplementedError

    def geometry(self) -> tuple[tuple[int, ...], int]:
        """(latent_shape, multiple) from the parts' configs and the size of the pictures (subclasses)."""
        raise NotImplementedError

    def encode_text(self, frozen, tokens: dict):
        """Token ids {encoder: [P, L]} to conditioning, a pytree of [P, ...] in `dtype` (subclasses)."""
        raise NotImplementedError

    def denoise(self, params, x, time, cond):
        """One network pass [B, ...] for latents x [B, ...] at times [B] in 0..1000 (subclasses).

        Args: params: {denoiser: all its parameters}; cond: as `encode_text` makes it, of [B, ...].
        """
        raise NotImplementedError

    def schedule(self, steps: int, shift: float) -> Schedule:
        """The noise levels of a sampler with `steps` steps (subclasses); shift 0 takes the checkpoint's own.

        Raises: CheckpointError for a scheduler setting that is not implemented; ConfigError for a number of steps it cannot do.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- inputs, conditioning, pixels

    def inputs(self, rows: Sequence[Row]) -> dict:
        """On the host: {"positive": token ids {encoder: int32 [P, L]}}; with guidance "negative", one for all or one a row.

        A negative prompt is the row's field `negative_prompt`, else `config.model.negative_prompt`.
        """
        found = {"positive": self.tokenize([row.prompt for row in rows])}
        if self.guidance_scale != 1:
            found["negative"] = self.tokenize(self.negatives(rows))
        return found

    def negatives(self, rows: Sequence[Row]) -> list[str]:
        """The negative prompts of the rows; a single one if no row has its own."""
        own = [row.fields.get("negative_prompt") for row in rows]
        return [self.negative_prompt if text is None else str(text) for text in own] if any(own) else [self.negative_prompt]

    def abstract_inputs(self, rows: Sequence[Row]) -> dict:
        """Shapes and dtypes of `inputs`, without tokenizers."""
        counts = {"positive": len(rows)} | ({"negative": len(self.negatives(rows))} if self.guidance_scale != 1 else {})
        return {part: {name: jax.ShapeDtypeStruct((count, length), np.int32) for name, length in self.lengths.items()}
                for part, count in counts.items()}

    def condition(self, frozen, inputs: dict, key) -> Cond:
        """`inputs` as arrays to conditioning; `key` is for what is drawn (a codec's posterior sample of a first frame)."""
        return Cond(*(self.encode_text(frozen, inputs[part]) for part in Cond._fields if part in inputs))

    def text(self, frozen, name: str, tokens: dict):
        """What the text encoder `name` makes of its tokens."""
        return merge(self.graphs[name], frozen[name])(tokens[name], self.dtype)

    def encode(self, frozen, pixels, key):
        """Pixels [B, F, H, W, 3] in [0, 1] to latents [B, *latent_shape] on the denoiser's scale, a sample of the posterior."""
        codec = self.codec(frozen)
        frames = pixels.reshape(-1, *pixels.shape[2:])  # a codec of pictures takes frames as samples
        mean, logvar = codec.encode((2 * frames - 1).astype(self.dtype))
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        return codec.normalize_latents(z.astype(jnp.float32)).reshape(len(pixels), *self.latent_shape)

    def decode(self, frozen, latents):
        """Latents [B, *latent_shape] to pixels [B, F, H, W, 3] fp32 in [0, 1], `decode_batch` per device at a time (0: all)."""
        codec = self.codec(frozen)

        def decode(latents):
            pixels = codec.decode(codec.denormalize_latents(latents).astype(self.dtype), self.decode_tile)
            pixels = jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)
            return pixels.reshape(len(latents), -1, *pixels.shape[-3:])
        return map_slices(decode, latents, self.decode_batch)

    def codec(self, frozen):
        (name,) = self.named("codec")
        return merge(self.graphs[name], frozen[name])

    # ---------------------------------------------------------------- files

    def named(self, role: str) -> list[str]:
        """The parts of one role."""
        return [name for name, part in self.parts.items() if part.role == role]

    def part(self, name: str) -> Path:
        """The folder of one component or tokenizer. Raises: CheckpointError if it is missing."""
        path = self.elsewhere.get(name, self.folder / name)
        path = path / name if name in self.elsewhere and (path / name).is_dir() else path
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

    @cached_property
    def tokenizers(self) -> dict:
        """{text encoder: its tokenizer}, read when the first prompt comes."""
        declared = {name: self.parts[name].tokenizer for name in self.named("text")}
        return {name: tokenizer.from_pretrained(self.part(folder), local_files_only=True)
                for name, (folder, tokenizer) in declared.items()}

    def tokenize(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """int32 token ids {text encoder: [P, L]}, padded to the encoder's length, longer prompts cut."""
        return {name: tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="np",
                                max_length=self.lengths[name])["input_ids"].astype(np.int32)
                for name, tokenizer in self.tokenizers.items()}

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are too long for the longest text encoder, so that their end is not seen."""
        if not self.lengths:
            return 0
        name = list(self.tokenizers)[-1]
        special = self.tokenizers[name].num_special_tokens_to_add()
        long = [prompt for prompt in prompts if len(prompt.encode()) > self.lengths[name] - special]  # a token has a byte
        counts = map(len, self.tokenizers[name](long, verbose=False)["input_ids"]) if long else ()
        return sum(count > self.lengths[name] for count in counts)

    def abstract(self, mesh=None, *, text: bool = True) -> tuple[dict, dict]:
        """`(trainable, frozen)` as `load` makes them, of `jax.ShapeDtypeStruct`s, without reading weights."""
        trainable, frozen = {}, {}
        for name, part in self.parts.items():
            rules = part.module.SHARDING
            if part.role == "denoiser":
                trainable[name] = stored_in(jnp.float32, self.shapes[name][0], mesh, rules)
                rest = self.shapes[name][1] if self.lora_scale else {}
                frozen[name] = stored_in(self.dtype, rest, mesh, rules)
            elif part.role != "text" or text:
                frozen[name] = stored_in(self.dtype, self.shapes[name][0], mesh, rules)
        return trainable, frozen

    def load(self, seed: int = 0, mesh=None, *, text: bool = True) -> tuple[dict, dict]:
        """Streams the pipeline's weights to the devices: `(trainable, frozen)`.

        `trainable` is fp32. Matrices of `frozen` have the compute dtype, to which every use would cast them anyway.

        Args:
          seed: of fresh adapters.
          mesh: where the arrays go, by each part's rules; None: the default device.
          text: False leaves the text encoders out, if prompts come already encoded.
        Raises: CheckpointError naming file and key.
        """
        trainable, frozen = self.abstract(mesh, text=text)
        self.fetch()
        rngs = nnx.Rngs(seed)
        for name in trainable:
            if self.lora_scale:
                trainable[name] = init_adapters(trainable[name], rngs)
                if mesh:
                    trainable[name] = place_params(trainable[name], mesh, self.sharding)
            else:
                trainable[name] = self.read(name, trainable[name])
        return trainable, {name: self.read(name, leaves) for name, leaves in frozen.items()}

    def load_text(self, mesh=None) -> dict:
        """The part of `frozen` that conditioning needs."""
        self.fetch()
        frozen = self.abstract(mesh)[1]
        return {name: self.read(name, frozen[name]) for name in self.named("text")}

    def read(self, name: str, abstract: dict) -> dict:
        """The parameters `abstract` of one part, from its files."""
        return load_params(self.parts[name].module, self.part(name), abstract) if abstract else {}

    def fetch(self) -> None:
        """Weights of a hub id come only now, when everything else has been checked."""
        for source in self.sources:
            find_folder(source, weights=True)


def find_folder(folder: str | os.PathLike, key: str = "model.folder", *, weights: bool = False) -> Path:
    """A pipeline's folder: a path (relative ones also beside the package), or a hub id "owner/name[@revision]".

    Of the hub only configs and tokenizers are fetched, unless `weights`.
    Raises: CheckpointError if there is no such folder and the hub has none either.
    """
    try:  # the pipelines' parts lie in folders; single files beside them hold the same weights once more
        patterns = PATTERNS if weights else CONFIGS
        patterns = ["model_index.json", *(f"*/{pattern}" for pattern in patterns)]
        path = find_in_hub(folder, root=PACKAGE.parent, patterns=patterns)
    except CheckpointError as error:
        raise CheckpointError(f"config.{key}: {error}") from error
    if not path.is_dir():
        raise CheckpointError(f"config.{key}: {path} is a file; expected a pipeline in the diffusers layout")
    return path


def pipeline_class(folder, name: str = "") -> type[Pipeline]:
    """The class for a pipeline's folder: by `_class_name` in its model_index.json, or `name` (registered, or an import path).

    Raises: CheckpointError if there is no such file, or no class for it; ConfigError for an unknown name.
    """
    if name:
        return registry.resolve(registry.PIPELINES, name, "model.pipeline")
    index = find_folder(folder) / "model_index.json"
    if not index.exists():
        raise CheckpointError(f"{index}: no such file, so the kind of pipeline is not known; copy it, or set "
                              f"--config.model.pipeline to one of {', '.join(registry.PIPELINES)}")
    found = read_json(index).get("_class_name")
    if found not in registry.PIPELINES:
        raise CheckpointError(f"{index}: no support for a {found}; known are {', '.join(registry.PIPELINES)}, or your own with "
                              "--config.model.pipeline=package.module:Class")
    return registry.resolve(registry.PIPELINES, found, "model.pipeline")


def make_pipeline(folder, name: str = "", **settings) -> Pipeline:
    """The pipeline in a folder; settings as for `Pipeline`."""
    return pipeline_class(folder, name)(folder, **settings)
