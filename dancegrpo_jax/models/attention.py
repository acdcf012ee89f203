"""Attention behind one seam: softmax(scale q k^T + bias) v, by the best way that the mesh's devices have.

* XLA: two matmuls and a softmax, anywhere. It writes the [Nq, Nk] matrix of every head to memory.
* splash (Pallas) on TPUs, for long sequences without bias or mask: the matrix stays on the chip.

The choice follows from the mesh and the shapes alone, so rollout and update make the same.

On a mesh with a `seq` axis the tokens are split over devices. Every query needs every key, so here heads are exchanged for
tokens: each device gets all tokens of some heads, and gives back its tokens of all heads (Ulysses, arXiv:2309.14509).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec as P

from dancegrpo_jax.sharding import BATCH, axis_size, batch_devices, constrain

LANES = 128  # of a TPU register: head dimensions and blocks are multiples
BLOCK = 512  # sequences are padded to multiples of it
# Tokens of queries and of keys that a block holds, where more than BLOCK fits into the chip's fast memory. Larger blocks
# read keys and values less often, which v6e needs: it has twice v5p's FLOPs at 0.6 of its memory bandwidth.
LARGE_BLOCKS = {"TPU v6 lite": 1024}
SPLASH_TOKENS = 1024  # from here on the matrix costs more than it is worth
SPLASH_WIDTH = 256  # widest head


def attention(q, k, v, mask=None, *, bias=None, valid: np.ndarray | None = None, scale: float | None = None):
    """softmax(scale q k^T + bias) v with the softmax in fp32.

    Args:
      q: [B, Nq, heads, d]; k, v: [B, Nk, heads, d].
      mask: optional bool, broadcastable to [B, heads, Nq, Nk]; False hides a key.
      bias: optional, added to the logits, broadcastable like `mask`.
      valid: optional static bool [Nk]; False marks padding, a key that nobody sees.
      scale: 1 / sqrt(d) if not given.
    Returns: [B, Nq, heads * d] in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None and bias is None and suits_splash(q.shape, k.shape):
        out = splash(q, k, v, valid, scale)
    else:
        if valid is not None:
            mask = valid if mask is None else mask & valid
        out = _xla(q, k, v, mask, bias, scale)
    return checkpoint_name(out.reshape(*out.shape[:2], -1), "attention")


def split_heads(x, heads: int):
    """[B, N, heads * d] -> [B, N, heads, d]."""
    return x.reshape(*x.shape[:2], heads, -1)


def _xla(q, k, v, mask, bias, scale):
    if axis_size("seq") > 1:
        q, k, v = (constrain(x, BATCH, None, ("seq", "tensor"), None) for x in (q, k, v))
    # Heads first, so that both products are plain batched matmuls: on CPUs the gradient is twice as fast.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v).swapaxes(1, 2)


def suits_splash(q_shape, k_shape) -> bool:
    """Whether `attention` without mask and bias takes splash: on TPU, long, and divisible over the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device.platform != "tpu":
        return False
    batch, tokens, heads, width = q_shape
    return (min(tokens, k_shape[1]) >= SPLASH_TOKENS and width <= SPLASH_WIDTH and batch % batch_devices() == 0
            and heads % (axis_size("seq") * axis_size("tensor")) == 0)


def splash(q, k, v, valid=None, scale: float = 1.0, *, interpret: bool = False):
    """Flash attention by jax's splash kernel, every device its own samples and heads; needs a mesh.

    Sequences are padded to multiples of BLOCK, heads' widths to multiples of LANES; padded keys belong to another
    segment, padded queries are cut off. Residuals are named "splash" for rematerialisation (`layers.REMAT`).

    Args: as for `attention`; interpret: emulate the kernel, on any device.
    """
    heads, mesh = ("seq", "tensor"), jax.sharding.get_abstract_mesh()
    n_q, n_k, width = q.shape[1], k.shape[1], q.shape[3]
    valid = np.ones(n_k, bool) if valid is None else valid

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, -width % LANES))).swapaxes(1, 2)

    def local(q, k, v):  # [b, heads, tokens, width], what one device holds
        n_q, n_k = q.shape[2], k.shape[2]
        segments = splash_kernel.SegmentIds(q=jnp.ones(n_q, jnp.int32),
                                            kv=jnp.asarray(np.pad(valid, (0, n_k - len(valid))), jnp.int32))
        kernel = splash_kernel.make_splash_mha(
            splash_mask.MultiHeadMask([splash_mask.FullMask((n_q, n_k))] * q.shape[1]), head_shards=1, q_seq_shards=1,
            block_sizes=_blocks(n_q, n_k, mesh.abstract_device.device_kind), interpret=interpret,
            residual_checkpoint_name="splash")
        return jax.vmap(kernel, (0, 0, 0, None))(q, k, v, segments)

    spec = P(BATCH, heads, None, None)
    # The kernel has no scale of its own. Its inputs carry no record of what varies over the mesh, hence check_vma.
    out = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(
        pad(q * jnp.asarray(scale, q.dtype)), pad(k), pad(v))
    return out.swapaxes(1, 2)[:, :n_q, :, :width]


def _blocks(n_q: int, n_k: int, device_kind: str) -> splash_kernel.BlockSizes:
    large = LARGE_BLOCKS.get(device_kind, BLOCK)
    q, k = (large if n % large == 0 else BLOCK for n in (n_q, n_k))
    return splash_kernel.BlockSizes(block_q=q, block_kv=k, block_kv_compute=BLOCK, block_q_dkv=BLOCK, block_kv_dkv=k,
                                    block_kv_dkv_compute=BLOCK, block_q_dq=q, block_kv_dq=BLOCK)
