"""FLUX transformer against diffusers: forward, every gradient, bf16, key set of the released size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dancegrpo_jax.models.denoisers.flux import FluxTransformer2DModel, pack, unpack
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
    perturb,
)

BATCH, TEXT, GRID = 2, 5, (3, 4)
CONFIG = dict(in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
              joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6))


FAST_COMPILE = {"xla_backend_optimization_level": 0}  # tiny arrays: compiling is all the cost


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "plain"])
def pair(request, tmp_path_factory):
    """(torch model, our model loaded from the sharded folder it was saved to)."""
    torch.manual_seed(0)
    reference = diffusers.FluxTransformer2DModel(**CONFIG, guidance_embeds=request.param).eval()
    perturb(reference)
    folder = tmp_path_factory.mktemp("flux")
    reference.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    return reference, convert.load_model(FluxTransformer2DModel, folder)


def inputs(guided):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    return dict(hidden_states=normal(BATCH, GRID[0] * GRID[1], CONFIG["in_channels"]),
                encoder_hidden_states=normal(BATCH, TEXT, CONFIG["joint_attention_dim"]),
                pooled_projections=normal(BATCH, CONFIG["pooled_projection_dim"]),
                timestep=np.array([937, 112], np.float32),
                guidance=np.array([3500, 1000], np.float32) if guided else None), normal(BATCH, 12, 8)


def torch_forward(reference, batch):
    batch = {key: None if value is None else torch.from_numpy(value) for key, value in batch.items()}
    for key in ("timestep", "guidance"):  # diffusers multiplies by 1000 itself
        if batch[key] is not None:
            batch[key] = (batch[key].double() / 1000).to(batch[key].dtype)
    rows, cols = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, cols], dim=-1).reshape(-1, 3).float()
    return reference(**batch, img_ids=image_ids, txt_ids=torch.zeros(TEXT, 3), return_dict=False)[0]


def test_forward(pair):
    """fp32 against the reference, bf16 against fp32."""
    reference, model = pair
    batch, _ = inputs(model.config.guidance_embeds)
    with torch.no_grad():
        expected = torch_forward(reference, batch).numpy()
    graphdef, params = split(model)
    run = jax.jit(lambda params, dtype: merge(graphdef, params)(**batch, grid=GRID, dtype=dtype), static_argnums=1,
                  compiler_options=FAST_COMPILE)
    out, low = run(params, jnp.float32), run(params, jnp.bfloat16)
    assert out.dtype == low.dtype == jnp.float32
    assert_close(out, expected)
    assert_low_precision_close(low, out)


def test_gradients(pair):
    reference, model = pair
    batch, cotangent = inputs(model.config.guidance_embeds)
    reference.zero_grad()
    (torch_forward(reference, batch) * torch.from_numpy(cotangent)).sum().backward()
    graphdef, params = split(model)
    remat = "full" if model.config.guidance_embeds else "none"

    def objective(params):
        return jnp.sum(merge(graphdef, params)(**batch, grid=GRID, remat=remat) * cotangent)

    assert_gradients_close(jax.jit(jax.grad(objective), compiler_options=FAST_COMPILE)(params), reference)


def test_weights_survive_the_round_trip(pair):
    reference, model = pair
    assert_round_trip(model, reference)


def test_qk_norm_epsilon(pair):
    """Inputs near sqrt(eps): in the whole model an epsilon ten times off stays within the tolerance."""
    reference, model = pair
    x = 1e-3 * np.random.default_rng(2).standard_normal((2, 3, 2, 16), dtype=np.float32)
    for ours, theirs in ((model.transformer_blocks, reference.transformer_blocks),
                         (model.single_transformer_blocks, reference.single_transformer_blocks)):
        graphdef, params = split(ours.stacked)
        ours, theirs = merge(graphdef, {name: value[0] for name, value in params.items()}).attn, theirs[0].attn
        names = [name for name, module in theirs.named_children() if isinstance(module, torch.nn.RMSNorm)]
        assert len(names) in (2, 4)
        for name in names:
            expected = getattr(theirs, name)(torch.from_numpy(x)).detach().numpy()
            assert_close(getattr(ours, name)(x), expected, 1e-6)


def test_pack_and_unpack():
    from diffusers import FluxPipeline

    x = np.arange(2 * 6 * 4 * 3, dtype=np.float32).reshape(2, 6, 4, 3)
    packed = FluxPipeline._pack_latents(torch.from_numpy(x).permute(0, 3, 1, 2), 2, 3, 6, 4)
    np.testing.assert_array_equal(pack(x), packed)
    expected = FluxPipeline._unpack_latents(packed, 6, 4, 1).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(unpack(packed.numpy(), (3, 2)), expected)
    np.testing.assert_array_equal(unpack(pack(x), (3, 2)), x)


def test_released_size():
    config = FluxTransformer2DModel.Config(guidance_embeds=True)
    assert_released_size(FluxTransformer2DModel, config, "flux_transformer", 11_901_408_320)


@pytest.mark.parametrize(("num_layers", "num_single_layers"), [(1, 1), (0, 1), (1, 0)])
def test_few_layers_and_batch_of_one(num_layers, num_single_layers):
    layers = {"num_layers": num_layers, "num_single_layers": num_single_layers}
    config = FluxTransformer2DModel.Config(**CONFIG | layers)
    batch, _ = inputs(False)
    batch = {key: None if value is None else value[:1] for key, value in batch.items()}
    out = nnx.eval_shape(lambda: FluxTransformer2DModel(config, rngs=nnx.Rngs(0))(**batch, grid=GRID))
    assert (out.shape, out.dtype) == ((1, 12, 8), jnp.float32)


def test_errors():
    model = nnx.eval_shape(lambda: FluxTransformer2DModel(FluxTransformer2DModel.Config(**CONFIG), rngs=nnx.Rngs(0)))
    batch, _ = inputs(False)
    with pytest.raises(ValueError, match="grid 4 x 4 does not fit 12 image tokens"):
        model(**batch, grid=(4, 4))
    with pytest.raises(ValueError, match="guidance must be given exactly when"):
        model(**batch | {"guidance": batch["timestep"]}, grid=GRID)
    with pytest.raises(ValueError, match="axes_dims_rope"):
        FluxTransformer2DModel.Config(attention_head_dim=64)
