"""Image VAE against diffusers: encode, decode, every gradient, bf16, released names and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dancegrpo_jax.models.codecs.autoencoder_kl import AutoencoderKL
from dancegrpo_jax.models.files import convert
from dancegrpo_jax.models.layers import merge, split

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from against_torch import (  # noqa: E402 (needs torch)
    assert_close,
    assert_gradients_close,
    assert_low_precision_close,
    assert_released_size,
    assert_round_trip,
    assert_same_epsilons,
    from_torch,
    perturb,
    to_torch,
)

CONFIG = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
              block_out_channels=(8, 12), norm_num_groups=4)
VARIANTS = {
    "stable diffusion": dict(latent_channels=4, layers_per_block=2),
    "flux": dict(latent_channels=6, layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False,
                 scaling_factor=0.3611, shift_factor=0.1159),
}
RELEASED = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path_factory):
    """(torch model, the folder it was saved to)."""
    reference = diffusers.AutoencoderKL(**CONFIG | request.param).eval()
    perturb(reference)
    folder = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(folder)
    return reference, folder


def inputs(reference):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    channels = reference.config.latent_channels
    images, latents = np.clip(normal(2, 8, 12, 3), -1, 1), normal(2, 4, 6, channels)
    return images, latents, (normal(2, 4, 6, channels), normal(2, 4, 6, channels), normal(2, 8, 12, 3))


def torch_outputs(reference, images, latents):
    posterior = reference.encode(to_torch(images)).latent_dist
    return posterior.mean, posterior.logvar, reference.decode(to_torch(latents)).sample


def test_encode_decode_and_gradients(pair):
    """One compiled program: outputs, and gradients of their product with random cotangents."""
    reference, folder = pair
    model = convert.load_model(AutoencoderKL, folder)
    images, latents, cotangents = inputs(reference)

    theirs = torch_outputs(reference, images, latents)
    sum((y * to_torch(ct)).sum() for y, ct in zip(theirs, cotangents, strict=True)).backward()

    graphdef, params = split(model)

    @jax.jit
    def run(params):
        def loss(params):
            vae = merge(graphdef, params)
            ours = *vae.encode(jnp.asarray(images)), vae.decode(jnp.asarray(latents))
            return sum(jnp.sum(y * ct) for y, ct in zip(ours, cotangents, strict=True)), ours

        return jax.grad(loss, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        gradients, ours = run(params)
    for y, expected in zip(ours, theirs, strict=True):
        assert_close(y, from_torch(expected))
    assert_gradients_close(gradients, reference)
    assert_round_trip(model, reference)
    assert_same_epsilons(model, reference)


def test_bfloat16(pair):
    reference, folder = pair
    graphdef, params = split(convert.load_model(AutoencoderKL, folder))
    images, latents, _ = inputs(reference)

    @jax.jit
    def run(params):
        vae = merge(graphdef, params)
        return *vae.encode(jnp.asarray(images, jnp.bfloat16)), vae.decode(jnp.asarray(latents, jnp.bfloat16))

    with torch.no_grad():
        theirs = torch_outputs(reference, images, latents)
    for low, full in zip(run(params), theirs, strict=True):
        assert low.dtype == jnp.bfloat16
        assert_low_precision_close(low, from_torch(full))


def test_without_attention(tmp_path):
    reference = diffusers.AutoencoderKL(**CONFIG, mid_block_add_attention=False).eval()
    perturb(reference)
    reference.save_pretrained(tmp_path)
    graphdef, params = split(convert.load_model(AutoencoderKL, tmp_path))
    _, latents, _ = inputs(reference)
    with torch.no_grad():
        expected = reference.decode(to_torch(latents)).sample
    assert_close(jax.jit(lambda params, z: merge(graphdef, params).decode(z))(params, latents), from_torch(expected))


def test_legacy_attention_names(pair, tmp_path):
    _, folder = pair
    tensors, old = load_file(folder / "diffusion_pytorch_model.safetensors"), {}
    for key, value in tensors.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        old[key] = value
    assert len(old.keys() - tensors.keys()) == 16
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours, again = (split(convert.load_model(AutoencoderKL, where))[1] for where in (folder, tmp_path))
    assert ours.keys() == again.keys()
    assert all(np.array_equal(ours[name], again[name]) for name in ours)


def test_latent_scale_and_clamp():
    """(z - shift) * scaling and back, a shift of null is none; log-variances stay in [-30, 20]."""
    small = dict(block_out_channels=(4,), norm_num_groups=2)
    z = np.linspace(-3, 3, 7, dtype=np.float32)
    shifted = AutoencoderKL(AutoencoderKL.Config(**small, scaling_factor=0.3611, shift_factor=0.1159), rngs=nnx.Rngs(0))
    plain = AutoencoderKL(AutoencoderKL.Config(**small), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(shifted.normalize_latents(z), (z - 0.1159) * 0.3611, rtol=1e-6)
    np.testing.assert_allclose(shifted.denormalize_latents(z), z / 0.3611 + 0.1159, rtol=1e-6)
    np.testing.assert_allclose(plain.normalize_latents(z), z * 0.18215, rtol=1e-6)
    np.testing.assert_allclose(plain.denormalize_latents(z), z / 0.18215, rtol=1e-6)

    graphdef, params = split(plain)
    params["quant_conv.bias"] = jnp.array([0, 0, 0, 0, 1e3, -1e3, 0, 0])
    logvar = jax.jit(lambda params: merge(graphdef, params).encode(jnp.zeros((1, 4, 4, 3)))[1])(params)
    assert logvar[..., 0].min() == 20 and logvar[..., 1].max() == -30


@pytest.mark.parametrize(("manifest", "variant", "total"), [
    ("sd14_vae", dict(sample_size=512), 83_653_863),
    ("flux_vae", dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False), 83_819_683)])
def test_released_size(manifest, variant, total):
    assert_released_size(AutoencoderKL, AutoencoderKL.Config(**RELEASED | variant), manifest, total)


def test_unsupported_configs():
    with pytest.raises(ValueError, match="down_block_types must be 2 x 'DownEncoderBlock2D'"):
        AutoencoderKL.Config(**CONFIG | {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")})
    with pytest.raises(ValueError, match="up_block_types must be 1 x"):
        AutoencoderKL.Config(up_block_types=("UpDecoderBlock2D",) * 2)
    with pytest.raises(convert.CheckpointError, match="latents_mean"):
        convert.parse_config(AutoencoderKL.Config, {"latents_mean": [0.0]})
