"""T5: the encoder whose token embeddings FLUX attends to (t5-v1_1-xxl).

Raffel et al. 2020, arXiv:1910.10683, with the gated GELU of version 1.1, under the key names of transformers'
T5EncoderModel. Shapes: B batch, L tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancegrpo_jax.models.attention import attention, split_heads
from dancegrpo_jax.models.files.convert import TRANSFORMERS_METADATA
from dancegrpo_jax.models.layers import Embedding, Linear, RMSNorm, Stack, gelu_tanh
from dancegrpo_jax.sharding import constrain_batch, row_parallel


@dataclass(frozen=True)
class T5Config:
    """config.json of a T5EncoderModel. Defaults are transformers': released files may leave them out."""

    FIXED: ClassVar = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @staticmethod
    def adapt(config: Mapping, source) -> dict:
        """Drops what the encoder does not use."""
        unused = TRANSFORMERS_METADATA | {"classifier_dropout", "dense_act_fn", "dropout_rate", "eos_token_id", "is_gated_act",
                                          "n_positions", "num_decoder_layers", "output_past", "scale_decoder_outputs"}
        return {key: value for key, value in config.items() if key not in unused}


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """int32 [L, L]: the bucket of key position - query position.

    Half of the buckets are for keys after the query. Of each half, the first half are exact distances and the rest grow
    logarithmically up to `max_distance`, beyond which all share the last.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    # The reference's fp32 arithmetic, with a logarithm that is no ulp off: some distances are just at the edge of a bucket.
    far = np.log(np.maximum(np.abs(distance), 1) / exact).astype(np.float32) / np.float32(np.log(max_distance / exact))
    far = exact + (far * (half - exact)).astype(np.int32)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(far, half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


class SelfAttention(nnx.Module):
    """Attention without biases and without the 1 / sqrt(d), which T5 absorbs into its initialisation."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        inner, self.heads = config.num_heads * config.d_kv, config.num_heads
        self.q, self.k, self.v = (Linear(config.d_model, inner, use_bias=False, rngs=rngs) for _ in range(3))
        self.o = Linear(inner, config.d_model, use_bias=False, rngs=rngs)

    def __call__(self, x, bias):
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q, self.k, self.v))
        return self.o(attention(q, k, v, bias=bias, scale=1.0))


class DenseReluDense(nnx.Module):  # the released name; its activation is a gated GELU
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.wi_0, self.wi_1 = (Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs) for _ in range(2))
        self.wo = Linear(config.d_ff, config.d_model, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.wo(gelu_tanh(self.wi_0(x)) * self.wi_1(x))


class AttentionLayer(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.SelfAttention = SelfAttention(config, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class FeedForwardLayer(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.DenseReluDense = DenseReluDense(config, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class Block(nnx.Module):
    """Pre-norm block: attention with relative position bias [1, heads, L, L], then the gated feed-forward."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.layer = nnx.List([AttentionLayer(config, rngs=rngs), FeedForwardLayer(config, rngs=rngs)])

    def __call__(self, x, bias):
        attend, feed = self.layer
        x = x + attend.SelfAttention(attend.layer_norm(x), bias)
        return (constrain_batch(x + feed.DenseReluDense(feed.layer_norm(x))),)


class Encoder(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.block = Stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs)
        self.relative_attention_bias = Embedding(config.relative_attention_num_buckets, config.num_heads, rngs=rngs)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class T5EncoderModel(nnx.Module):
    """Bidirectional encoder. FLUX uses no padding mask: the padding is part of what its transformer reads."""

    Config = T5Config
    TRANSFORMERS_NAME = "T5EncoderModel"
    # The position bias has a value for each head, and heads are what attention splits.
    SHARDING = (*row_parallel("o", "wo"), (r".*\.relative_attention_bias\.embedding", (None, "tensor")))
    # Files keep the bias in block 0, which cannot be part of a stack of equal blocks, and may repeat the embeddings.
    LEGACY_KEYS = ((r"^encoder\.block\.0\.layer\.0\.SelfAttention\.(relative_attention_bias\.)", r"encoder.\1"),)
    IGNORED_KEYS = (r"encoder\.embed_tokens\.weight",)

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)

    def __call__(self, input_ids, dtype=jnp.float32):
        """Encodes int32 ids [B, L]: last hidden state [B, L, D] in `dtype`, after the final norm."""
        config, encoder = self.config, self.encoder
        buckets = relative_buckets(input_ids.shape[1], config.relative_attention_num_buckets,
                                   config.relative_attention_max_distance)
        bias = jnp.moveaxis(encoder.relative_attention_bias(buckets), -1, 0)[None]
        return encoder.final_layer_norm(encoder.block((self.shared(input_ids, dtype),), bias)[0])
