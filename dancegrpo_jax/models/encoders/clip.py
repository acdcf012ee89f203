"""CLIP: the text encoder of Stable Diffusion and FLUX, and the two-tower model behind CLIP-type rewards.

Pre-norm transformers (Radford et al. 2021, arXiv:2103.00020) under the key names of transformers' CLIPTextModel and
CLIPModel. Load either with `convert.load_model(CLIPTextModel | CLIPModel, folder)`, whatever the age of its files.

Shapes: B batch, L text tokens, D width, E width of the shared embedding space.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dancegrpo_jax.models.attention import attention, split_heads
from dancegrpo_jax.models.files.convert import TRANSFORMERS_METADATA, parse_config
from dancegrpo_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    Embedding,
    LayerNorm,
    Linear,
    Stack,
)
from dancegrpo_jax.sharding import constrain_batch, row_parallel

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SHARDING = row_parallel("out_proj", "fc2")  # of a tower


def _drop_ignored(config: Mapping, *more: str) -> dict:
    return {key: value for key, value in config.items() if key not in TRANSFORMERS_METADATA and key not in more}


@dataclass(frozen=True)
class TransformerConfig:
    """What both towers share. Defaults are transformers' (ViT-B/32): released files may leave them out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"  # OpenAI's weights; LAION's ViT-H uses "gelu" (erf)
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of "
                             f"num_attention_heads {self.num_attention_heads}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")

    @staticmethod
    def adapt(config: Mapping, source) -> dict:
        """Drops what has no meaning here (`projection_dim` of a tower: CLIPConfig has the one that counts)."""
        return _drop_ignored(config, "projection_dim")


@dataclass(frozen=True)
class CLIPTextConfig(TransformerConfig):
    """config.json of a CLIPTextModel. `eos_token_id` 2 is the old mark for "the largest id ends the text"."""

    FIXED: ClassVar = {"model_type": "clip_text_model"}
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclass(frozen=True)
class CLIPVisionConfig(TransformerConfig):
    """The vision tower's part of a CLIPModel's config.json."""

    FIXED: ClassVar = {"model_type": "clip_vision_model"}
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3


@dataclass(frozen=True)
class CLIPConfig:
    """config.json of a CLIPModel."""

    FIXED: ClassVar = {"model_type": "clip"}
    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @staticmethod
    def adapt(config: Mapping, source) -> dict:
        """Parses the towers' parts. In older files a `text_config_dict` overrides `text_config`; same for vision."""
        config = _drop_ignored(config)
        for tower, config_class in (("text", CLIPTextConfig), ("vision", CLIPVisionConfig)):
            parts = [config.pop(f"{tower}_config{suffix}", None) or {} for suffix in ("", "_dict")]
            config[f"{tower}_config"] = parse_config(config_class, parts[0] | parts[1], f"{source}, {tower}_config")
        return config


class Attention(nnx.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x, mask=None):
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, mask))


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x):
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, mask=None):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return (constrain_batch(x + self.mlp(self.layer_norm2(x))),)


class Encoder(nnx.Module):
    """The stack of layers, scanned."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.layers = Stack(lambda rngs: EncoderLayer(config, rngs=rngs), config.num_hidden_layers, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.layers((x,), mask)[0]


class TextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, input_ids, dtype):
        return self.token_embedding(input_ids, dtype) + self.position_embedding(jnp.arange(input_ids.shape[1]), dtype)


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width,)))
        self.patch_embedding = Conv(config.num_channels, width, patch, stride=patch, use_bias=False, rngs=rngs)
        self.position_embedding = Embedding((config.image_size // patch) ** 2 + 1, width, rngs=rngs)

    def __call__(self, x):
        patches = self.patch_embedding(x)
        patches = patches.reshape(x.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]), x.dtype)


class CLIPTextModel(nnx.Module):
    """Causal text transformer. No padding mask: what follows the end-of-text token cannot reach it."""

    Config = CLIPTextConfig
    TRANSFORMERS_NAME = "CLIPTextModel"
    SHARDING = SHARDING
    LEGACY_KEYS = ((r"^text_model\.", ""),)  # files written before transformers 5, which are the released ones
    IGNORED_KEYS = (r"(text_model\.)?embeddings\.position_ids",)

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden(self, input_ids, dtype=jnp.float32):
        """The residual stream [B, L, D] after the last layer, before `final_layer_norm`."""
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens, but CLIP's context is {self.config.max_position_embeddings}")
        return self.encoder(self.embeddings(input_ids, dtype), jnp.tri(length, dtype=bool)[None, None])

    def end_of_text(self, x, input_ids):
        """The token [B, D] of x [B, L, D] at each text's first end-of-text id (position 0 if it has none)."""
        eos = self.config.eos_token_id
        position = jnp.argmax(input_ids if eos == 2 else input_ids == eos, axis=1)
        return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]

    def __call__(self, input_ids, dtype=jnp.float32):
        """Encodes int32 ids [B, L] in compute type `dtype`.

        Returns `(last_hidden_state [B, L, D], pooled [B, D])`, both after `final_layer_norm`: Stable Diffusion
        conditions on the first, FLUX on the second, which is the end-of-text token.
        Raises: ValueError if L exceeds the context.
        """
        x = self.final_layer_norm(self.hidden(input_ids, dtype))
        return x, self.end_of_text(x, input_ids)


class CLIPVisionModel(nnx.Module):
    """Vision transformer over patches and one class token."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # (sic), as released
        self.encoder = Encoder(config, rngs=rngs)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden(self, pixels, dtype=jnp.float32):
        """The residual stream [B, 1 + patches, D] after the last layer, before `post_layernorm`."""
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"images of {pixels.shape[1]}x{pixels.shape[2]}, but this CLIP sees {size}x{size}")
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels.astype(dtype))))


class CLIPModel(nnx.Module):
    """Text and vision towers with projections into one space. Cosines of its features are CLIP scores.

    The towers run in `dtype`; final norm, projection and everything after are fp32 at highest matmul precision:
    in bf16 the scores of a group round to a few values (one step is 0.002 near 0.28).
    """

    Config = CLIPConfig
    TRANSFORMERS_NAME = "CLIPModel"
    SHARDING = SHARDING
    IGNORED_KEYS = (r"(text|vision)_model\.embeddings\.position_ids",)

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextModel(config.text_config, rngs=rngs)
        self.vision_model = CLIPVisionModel(config.vision_config, rngs=rngs)
        self.text_projection = Linear(config.text_config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(config.vision_config.hidden_size, config.projection_dim, use_bias=False,
                                        rngs=rngs)
        self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init_value))

    def text_features(self, input_ids, dtype=jnp.float32):
        """int32 ids [B, L] -> projected features fp32 [B, E], not normalised."""
        text = self.text_model
        x = text.end_of_text(text.hidden(input_ids, dtype), input_ids)
        with jax.default_matmul_precision("highest"):
            return self.text_projection(text.final_layer_norm(x.astype(jnp.float32)))

    def image_features(self, pixels, dtype=jnp.float32):
        """Pixels [B, H, W, 3], normalised by IMAGE_MEAN and IMAGE_STD -> projected features fp32 [B, E].

        Raises: ValueError if H or W differs from the configured image size.
        """
        x = self.vision_model.hidden(pixels, dtype)[:, 0]
        with jax.default_matmul_precision("highest"):
            return self.visual_projection(self.vision_model.post_layernorm(x.astype(jnp.float32)))


def cosine(a, b):
    """Cosine similarity [...] of feature vectors a, b [..., E], in fp32 (elementwise, so at full precision)."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    a, b = (x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True)) for x in (a, b))
    return (a * b).sum(-1)
