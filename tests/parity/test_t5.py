"""The T5 encoder against transformers: forward, every gradient, position buckets, released sizes and spellings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dancegrpo_jax.models.encoders.t5 import T5Config, T5EncoderModel, relative_buckets
from dancegrpo_jax.models.files import convert
from dancegrpo_jax.models.layers import merge, split

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from against_torch import (  # noqa: E402 (needs torch)
    assert_close,
    assert_low_precision_close,
    assert_released_size,
    perturb,
    rms,
)

# heads * d_kv differs from d_model, and the prompts are longer than the distance from which on buckets are shared.
CONFIG = dict(vocab_size=50, d_model=24, d_kv=10, d_ff=40, num_layers=3, num_heads=2, relative_attention_num_buckets=8,
              relative_attention_max_distance=12, layer_norm_epsilon=1e-6)
IDS = np.concatenate([np.random.default_rng(0).integers(2, 50, (2, 19)), [[1, 0], [7, 1]]], axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(torch encoder, folder it was saved to)."""
    reference = transformers.T5EncoderModel(transformers.T5Config(**CONFIG, feed_forward_proj="gated-gelu")).eval()
    perturb(reference)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                p.mul_(CONFIG["d_kv"] ** -0.5)  # where T5 keeps attention's 1 / sqrt(d)
    folder = tmp_path_factory.mktemp("t5")
    reference.save_pretrained(folder)
    return reference, folder


def test_forward_and_gradients(pair):
    reference, folder = pair
    expected = reference(torch.from_numpy(IDS).long()).last_hidden_state
    cotangent = np.random.default_rng(1).standard_normal(expected.shape, dtype=np.float32)
    (expected * torch.from_numpy(cotangent)).sum().backward()
    graphdef, params = split(convert.load_model(T5EncoderModel, folder))

    def loss(params):
        y = merge(graphdef, params)(IDS)
        return jnp.sum(y * cotangent), y

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(ours, expected.detach().numpy())
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    ours = {key.replace("encoder.relative", "encoder.block.0.layer.0.SelfAttention.relative"): value
            for key, value in convert.to_torch(grads).items()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-4 * rms(value), name


def test_bfloat16(pair):
    model = convert.load_model(T5EncoderModel, pair[1])
    low = jax.jit(lambda: model(IDS, jnp.bfloat16))()
    assert low.dtype == jnp.bfloat16
    assert_low_precision_close(low, jax.jit(lambda: model(IDS))())


@pytest.mark.parametrize(("length", "buckets", "distance"), [(512, 32, 128), (77, 8, 12)])
def test_position_buckets(length, buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention
    position = torch.arange(length)[None] - torch.arange(length)[:, None]
    theirs = T5Attention._relative_position_bucket(position, True, buckets, distance).numpy()
    np.testing.assert_array_equal(relative_buckets(length, buckets, distance), theirs)


def test_released_files(pair, tmp_path):
    """Old files repeat the embeddings and spell out every default; both spellings give the same model."""
    _, folder = pair
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.embed_tokens.weight", None)
    old = config | {"torch_dtype": "bfloat16", "output_past": True, "n_positions": 512, "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(old))
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, tmp_path / "model.safetensors")
    ours, released = (split(convert.load_model(T5EncoderModel, path))[1] for path in (folder, tmp_path))
    assert all(np.array_equal(value, released[name]) for name, value in ours.items())

    for bad, message in (({"feed_forward_proj": "relu"}, "gated-gelu"), ({"d_modell": 24}, "d_model")):
        (tmp_path / "config.json").write_text(json.dumps(old | bad))
        with pytest.raises(convert.CheckpointError, match=message):
            convert.load_model(T5EncoderModel, tmp_path)


def test_defaults_are_those_of_transformers():
    theirs = transformers.T5Config()
    assert vars(T5Config()) == {key: getattr(theirs, key) for key in vars(T5Config())}


def test_released_size():
    assert_released_size(T5EncoderModel, T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64), "t5xxl_encoder",
                         4_762_310_656)
