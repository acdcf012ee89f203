"""BLIP's image encoder and its text encoder that looks at the image (Li et al. 2022, arXiv:2201.12086): ImageReward's backbone.

Attribute paths follow transformers' BlipVisionModel and BlipTextModel. Shapes: B batch, L text tokens, N image tokens, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from dancegrpo_jax.models.attention import attention, split_heads
from dancegrpo_jax.models.layers import Conv, Embedding, LayerNorm, Linear, Stack, gelu_erf
from dancegrpo_jax.sharding import constrain_batch, row_parallel


@dataclass(frozen=True)
class BlipConfig:
    """Widths and depths; the defaults are ImageReward's (ViT-L/16 and BERT-base)."""

    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 224
    patch_size: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab_size: int = 30524
    max_positions: int = 512


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        width, grid = config.vision_width, config.image_size // config.patch_size
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.patch_embedding = Conv(3, width, config.patch_size, stride=config.patch_size, rngs=rngs)
        self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, grid**2 + 1, width)))

    def __call__(self, x):
        patches = self.patch_embedding(x)
        patches = patches.reshape(len(x), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (len(x), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding[...].astype(x.dtype)


class VisionAttention(nnx.Module):
    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.heads = config.vision_heads
        self.qkv = Linear(config.vision_width, 3 * config.vision_width, rngs=rngs)
        self.projection = Linear(config.vision_width, config.vision_width, rngs=rngs)

    def __call__(self, x):
        q, k, v = (split_heads(part, self.heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.projection(attention(q, k, v))


class VisionMLP(nnx.Module):
    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.vision_width, 4 * config.vision_width, rngs=rngs)
        self.fc2 = Linear(4 * config.vision_width, config.vision_width, rngs=rngs)

    def __call__(self, x):
        return self.fc2(gelu_erf(self.fc1(x)))


class VisionLayer(nnx.Module):
    """Pre-norm block."""

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.vision_width, eps=1e-6)
        self.self_attn = VisionAttention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.vision_width, eps=1e-6)
        self.mlp = VisionMLP(config, rngs=rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return (constrain_batch(x + self.mlp(self.layer_norm2(x))),)


class VisionEncoder(nnx.Module):
    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.layers = Stack(lambda rngs: VisionLayer(config, rngs=rngs), config.vision_layers, rngs=rngs)


class BlipVisionModel(nnx.Module):
    """Normalised pixels [B, H, W, 3] -> all tokens [B, N, D], after the last norm."""

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.encoder = VisionEncoder(config, rngs=rngs)
        self.post_layernorm = LayerNorm(config.vision_width, eps=1e-6)

    def __call__(self, pixels):
        return self.post_layernorm(self.encoder.layers((self.embeddings(pixels),))[0])


class SelfAttention(nnx.Module):
    """Attention of text tokens to themselves, or to image tokens of width `context`."""

    def __init__(self, config: BlipConfig, context: int, *, rngs: nnx.Rngs):
        self.heads = config.text_heads
        self.query = Linear(config.text_width, config.text_width, rngs=rngs)
        self.key, self.value = (Linear(context, config.text_width, rngs=rngs) for _ in range(2))

    def __call__(self, x, context, mask=None):
        q, k, v = (split_heads(y, self.heads) for y in (self.query(x), self.key(context), self.value(context)))
        return attention(q, k, v, mask)


class Output(nnx.Module):
    """Linear, residual, norm (BERT's order)."""

    def __init__(self, features: int, config: BlipConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(features, config.text_width, rngs=rngs)
        self.LayerNorm = LayerNorm(config.text_width, eps=1e-12)

    def __call__(self, y, x):
        return self.LayerNorm(self.dense(y) + x)


class TextAttention(nnx.Module):
    def __init__(self, config: BlipConfig, context: int, *, rngs: nnx.Rngs):
        self.self = SelfAttention(config, context, rngs=rngs)
        self.output = Output(config.text_width, config, rngs=rngs)

    def __call__(self, x, context, mask=None):
        return self.output(self.self(x, context, mask), x)


class Intermediate(nnx.Module):
    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(config.text_width, 4 * config.text_width, rngs=rngs)


class TextLayer(nnx.Module):
    """Self-attention, attention to the image, feed-forward; each followed by its norm."""

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.attention = TextAttention(config, config.text_width, rngs=rngs)
        self.crossattention = TextAttention(config, config.vision_width, rngs=rngs)
        self.intermediate = Intermediate(config, rngs=rngs)
        self.output = Output(4 * config.text_width, config, rngs=rngs)

    def __call__(self, x, image, mask):
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image)
        return (constrain_batch(self.output(gelu_erf(self.intermediate.dense(x)), x)),)


class TextEmbeddings(nnx.Module):
    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.word_embeddings = Embedding(config.vocab_size, config.text_width, rngs=rngs)
        self.position_embeddings = Embedding(config.max_positions, config.text_width, rngs=rngs)
        self.LayerNorm = LayerNorm(config.text_width, eps=1e-12)

    def __call__(self, ids, dtype):
        return self.LayerNorm(self.word_embeddings(ids, dtype) + self.position_embeddings(jnp.arange(ids.shape[1]), dtype))


class TextEncoder(nnx.Module):
    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.layer = Stack(lambda rngs: TextLayer(config, rngs=rngs), config.text_layers, rngs=rngs)


class BlipTextModel(nnx.Module):
    """int32 ids [B, L], mask [B, L] (True: a token), image tokens [B, N, D] -> last hidden state [B, L, D]."""

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = TextEncoder(config, rngs=rngs)

    def __call__(self, ids, mask, image):
        return self.encoder.layer((self.embeddings(ids, image.dtype),), image, mask[:, None, None, :])[0]


class Blip(nnx.Module):
    """Both encoders: normalised pixels and text to the text's first token [B, D], which has seen the image."""

    SHARDING = row_parallel("projection", "fc2", "output.dense")
    # ImageReward.pt's names (those of BLIP's own code) -> transformers'.
    LEGACY_KEYS = (
        (r"^blip\.visual_encoder\.", "vision_model."), (r"^blip\.text_encoder\.", "text_model."),
        (r"^vision_model\.cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^vision_model\.pos_embed$", "vision_model.embeddings.position_embedding"),
        (r"^vision_model\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^vision_model\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
        (r"^vision_model\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
        (r"^vision_model\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
        (r"^vision_model\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
        (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    )
    IGNORED_KEYS = (r"blip\.(vision|text)_proj\..*", r"blip\.text_encoder\.embeddings\.position_ids", r"mlp\..*",
                    r"blip\.text_encoder\.pooler\..*")

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.vision_model = BlipVisionModel(config, rngs=rngs)
        self.text_model = BlipTextModel(config, rngs=rngs)

    def __call__(self, pixels, ids, mask):
        return self.text_model(ids, mask, self.vision_model(pixels))[:, 0]
