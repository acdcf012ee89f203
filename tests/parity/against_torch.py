"""What the parity tests share: an oracle that is the same on every processor, weights that show mistakes, comparisons."""

import gzip
import json
from functools import wraps
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from flax import nnx
from transformers.models.t5.modeling_t5 import T5Attention

try:
    from diffusers.models import embeddings
except ImportError:  # the encoders' tests do without
    embeddings = None

from dancegrpo_jax.models.files import convert
from dancegrpo_jax.models.layers import GroupNorm, LayerNorm, split


def _correctly_rounded(function):
    """The function with fp32 exponentials and logarithms that are those of float64, rounded.

    PyTorch's own are an ulp off on some processors. In a sinusoid's frequency that turns an angle of 1000 by 1e-4, ten
    times the tolerance, and at the edge of two position buckets it moves a token into the other one.
    """
    def rounded(operation):
        return lambda x: operation(x.double()).to(x.dtype)

    @wraps(function)
    def call(*args, **kwargs):
        with mock.patch.multiple(torch, exp=rounded(torch.exp), log=rounded(torch.log)):
            return function(*args, **kwargs)
    return call


T5Attention._relative_position_bucket = staticmethod(_correctly_rounded(T5Attention._relative_position_bucket))
if embeddings:
    embeddings.get_timestep_embedding = _correctly_rounded(embeddings.get_timestep_embedding)


def perturb(module, seed=0):
    """Norm scales 1 +- 0.25, biases +- 0.1, matrices of unit gain: no parameter can be swapped or dropped unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = 2 * torch.rand(p.shape, generator=generator) - 1
            if name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif p.ndim == 1:
                p.copy_(1 + 0.25 * noise)
            else:
                p.copy_((3 / p[0].numel()) ** 0.5 * noise)


def to_torch(x):
    """[B, H, W, C] -> torch's [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def from_torch(x):
    """[B, C, H, W] -> [B, H, W, C]."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def assert_close(ours, theirs, tolerance=1e-5):
    """max|difference| <= tolerance * rms(theirs)."""
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / rms(theirs)
    assert error <= tolerance, error


def assert_low_precision_close(low, full):
    """Relative rms error within 3 %, and not exact: it did run in low precision."""
    error = rms(np.asarray(low, np.float32) - full) / rms(full)
    assert 1e-4 < error <= 0.03, error


def assert_gradients_close(ours, module):
    """Our flat gradients against those in a torch module's parameters: the same set, 1e-4 * rms for each tensor."""
    ours = convert.to_torch(ours)
    theirs = {name: p.grad.numpy() for name, p in module.named_parameters()}
    assert ours.keys() == theirs.keys()
    # The softmax ignores a shift common to all keys: the exact gradient is 0, what is computed is rounding noise.
    scale = {name: rms(theirs[name.replace("to_k.bias", "to_q.bias")]) for name in theirs}
    errors = {name: np.abs(ours[name] - theirs[name]).max() / scale[name] for name in theirs}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-4, (worst, errors[worst])


def assert_same_epsilons(model, module):
    """Every norm has the epsilon of its torch counterpart; in outputs one ten times too small may pass as rounding."""
    ours = {}
    for path, norm in nnx.iter_graph(model):
        if isinstance(norm, GroupNorm | LayerNorm):
            keys = convert.torch_names(".".join(map(str, [*path, "scale"])), norm.scale.shape)
            ours |= {key.removesuffix(".weight"): norm.eps for key in keys}
    theirs = {name: norm.eps for name, norm in module.named_modules()
              if isinstance(norm, torch.nn.GroupNorm | torch.nn.LayerNorm)}
    assert ours == theirs


def assert_round_trip(model, module):
    """Loaded weights, written again, are the torch module's bytes."""
    ours, theirs = convert.to_torch(split(model)[1]), module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].numpy().tobytes() for key in theirs)


def assert_released_size(model_class, config, manifest, total):
    """The full-size model takes exactly the released checkpoint's keys and shapes, and has its parameter count."""
    content = (Path(__file__).parents[1] / "manifests" / f"{manifest}.json.gz").read_bytes()
    abstract = split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))[1]
    rename, ignore = getattr(model_class, "LEGACY_KEYS", ()), getattr(model_class, "IGNORED_KEYS", ())
    matched = convert.match_keys(json.loads(gzip.decompress(content)), abstract, rename=rename, ignore=ignore)
    assert matched.keys() == abstract.keys()
    assert sum(leaf.size for leaf in abstract.values()) == total
