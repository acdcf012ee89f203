"""Stable Diffusion UNet against diffusers: forward, every gradient, bf16, key set of the released size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dancegrpo_jax.models.denoisers.unet import UNet2DConditionModel
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

CONFIG = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(12, 24), norm_num_groups=4,
              cross_attention_dim=10)
# (config, remat): recomputing must change neither outputs nor gradients.
VARIANTS = {
    "sd 1": (dict(layers_per_block=2, attention_head_dim=3), "full"),
    "sd 2": (dict(layers_per_block=1, attention_head_dim=(3, 6), transformer_layers_per_block=(2, 1),
                  use_linear_projection=True, norm_eps=1e-4), "none"),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def case(request, tmp_path_factory):
    """(torch model, our model loaded from the folder it was saved to, remat)."""
    config, remat = request.param
    reference = diffusers.UNet2DConditionModel(**CONFIG | config).eval()
    perturb(reference)
    folder = tmp_path_factory.mktemp("unet")
    reference.save_pretrained(folder)
    return reference, convert.load_model(UNet2DConditionModel, folder), remat


def inputs():
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    return (normal(2, 6, 4, 4), np.array([937, 112], np.float32), normal(2, 5, 10)), normal(2, 6, 4, 4)


def test_forward_and_gradients(case):
    """One compiled program: the output, and gradients of its product with a random cotangent."""
    reference, model, remat = case
    (sample, timestep, context), cotangent = inputs()
    theirs = reference(to_torch(sample), torch.from_numpy(timestep), torch.from_numpy(context)).sample
    (theirs * to_torch(cotangent)).sum().backward()

    graphdef, params = split(model)

    @jax.jit
    def run(params):
        def loss(params):
            ours = merge(graphdef, params)(sample, timestep, context, remat=remat)
            return jnp.sum(ours * cotangent), ours

        return jax.grad(loss, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        gradients, ours = run(params)
    assert ours.dtype == jnp.float32
    assert_close(ours, from_torch(theirs))
    assert_gradients_close(gradients, reference)
    assert_round_trip(model, reference)
    assert_same_epsilons(model, reference)


def test_bfloat16(case):
    reference, model, _ = case
    (sample, timestep, context), _ = inputs()
    with torch.no_grad():
        theirs = reference(to_torch(sample), torch.from_numpy(timestep), torch.from_numpy(context)).sample
    graphdef, params = split(model)
    low = jax.jit(lambda params: merge(graphdef, params)(sample, timestep, context, dtype=jnp.bfloat16))(params)
    assert low.dtype == jnp.float32
    assert_low_precision_close(low, from_torch(theirs))


def test_released_size():
    config = UNet2DConditionModel.Config(sample_size=64, cross_attention_dim=768)
    assert_released_size(UNet2DConditionModel, config, "sd14_unet", 859_520_964)


def test_class_defaults_equal_diffusers():
    """A released config.json may omit any key: our defaults, and the fixed values, must be diffusers' own."""
    theirs = diffusers.UNet2DConditionModel(**CONFIG).config
    ours = UNet2DConditionModel.Config()
    given = CONFIG.keys() | {"_use_default_values"}
    for key, value in theirs.items():
        if key in given:
            continue
        assert (ours.FIXED[key] if key in ours.FIXED else getattr(ours, key)) == value, key


def test_errors():
    model = nnx.eval_shape(lambda: UNet2DConditionModel(UNet2DConditionModel.Config(**CONFIG | VARIANTS["sd 1"][0]),
                                                        rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="latents of 6x5 are not a multiple of 2"):
        model(jnp.zeros((1, 6, 5, 4)), jnp.zeros(1), jnp.zeros((1, 5, 10)))
    with pytest.raises(ValueError, match="down_block_types must hold 2 of 'DownBlock2D' and 'CrossAttnDownBlock2D'"):
        UNet2DConditionModel.Config(**CONFIG | {"down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D")})
    with pytest.raises(ValueError, match="width 12 is not divisible into 5 heads"):
        UNet2DConditionModel.Config(**CONFIG, attention_head_dim=5)
    with pytest.raises(ValueError, match="transformer_layers_per_block must be one integer or 2"):
        UNet2DConditionModel.Config(**CONFIG, attention_head_dim=3, transformer_layers_per_block=(1, 1, 1))
    with pytest.raises(ValueError, match="layers_per_block must be one integer"):
        UNet2DConditionModel.Config(**CONFIG, attention_head_dim=3, layers_per_block=(1, 2))
    with pytest.raises(convert.CheckpointError, match="flip_sin_to_cos=False is not supported"):
        convert.parse_config(UNet2DConditionModel.Config, {"flip_sin_to_cos": False})
