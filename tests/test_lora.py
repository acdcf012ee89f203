"""LoRA adapters: where they go, that they start at nothing, and that they equal merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dancegrpo_jax.models.denoisers.flux import FluxTransformer2DModel
from dancegrpo_jax.models.files.lora import add_lora, init_adapters, linear_paths
from dancegrpo_jax.models.layers import LoRAParam, merge, split

TARGETS = (r".*attn\.to_(q|k|v|out\.0)", r"x_embedder")
CONFIG = FluxTransformer2DModel.Config(
    in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6))
ADAPTED = 4 * 2 + 3 * 3 + 1  # dual blocks, single blocks (no to_out), x_embedder


def flux():
    return FluxTransformer2DModel(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def base():
    """(graphdef, params) without adapters; `merge` makes a new module of it for each test."""
    graphdef, abstract = split(nnx.eval_shape(flux))
    rng = np.random.default_rng(3)
    return graphdef, {name: jnp.asarray(0.2 * rng.standard_normal(leaf.shape, dtype=np.float32))
                      for name, leaf in abstract.items()}


def run(graphdef, *params):
    rng = np.random.default_rng(0)
    x, text, pooled = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 6, 8), (2, 3, 12), (2, 12)))
    times = np.array([900, 100], np.float32)

    def predict(*params):
        return merge(graphdef, *params)(x, text, pooled, times, (2, 3))

    # Tiny arrays: compiling is all the cost.
    return jax.jit(predict, compiler_options={"xla_backend_optimization_level": 0})(*params)


def test_adapters_start_at_nothing_and_equal_merged_weights(base):
    plain, weights = base
    model = merge(plain, weights)
    before = run(plain, weights)
    assert add_lora(model, 4, 8.0, TARGETS) == ADAPTED
    graphdef, adapters, frozen = split(model, LoRAParam, ...)
    adapters = init_adapters(adapters, nnx.Rngs(1))
    assert frozen.keys() == weights.keys()
    assert all(name.endswith((".lora_a", ".lora_b")) for name in adapters)
    assert adapters["transformer_blocks.stacked.attn.to_out.0.lora_a"].shape == (2, 32, 4)
    assert adapters["x_embedder.lora_b"].shape == (4, 32)
    np.testing.assert_array_equal(before, run(graphdef, adapters, frozen))

    keys = iter(jax.random.split(jax.random.key(2), len(adapters)))
    adapters = {name: 0.1 * jax.random.normal(next(keys), value.shape) if name.endswith("lora_b") else value
                for name, value in adapters.items()}
    merged = dict(weights)
    for name in adapters:
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            a, b = (np.asarray(adapters[stem + leaf], np.float64) for leaf in (".lora_a", ".lora_b"))
            merged[stem + ".kernel"] = weights[stem + ".kernel"] + (8.0 / 4 * a @ b).astype(np.float32)
    after, expected = run(graphdef, adapters, frozen), run(plain, merged)
    scale = float(jnp.sqrt(jnp.mean(expected**2)))
    assert float(jnp.abs(expected - before).max()) > 0.1 * scale  # the adapters do something
    assert float(jnp.abs(after - expected).max()) <= 1e-5 * scale


def test_a_is_gaussian_and_independent_per_layer():
    model = nnx.eval_shape(flux)
    add_lora(model, 16, 16.0, (r"single_transformer_blocks\.proj_out",))
    adapters = init_adapters(split(model, LoRAParam, ...)[1], nnx.Rngs(1))
    a, b = (np.asarray(adapters[f"single_transformer_blocks.stacked.proj_out.lora_{x}"]) for x in "ab")
    assert a.shape == (3, 160, 16) and a.dtype == np.float32
    assert abs(a.std() * 16 - 1) < 0.05
    assert abs(np.corrcoef(a.reshape(3, -1))[0, 1]) < 0.1
    assert b.shape == (3, 16, 32) and not b.any()


def test_abstract_model(base):
    model, concrete = nnx.eval_shape(flux), merge(*base)
    assert add_lora(model, 4, 4.0, TARGETS) == add_lora(concrete, 4, 4.0, TARGETS) == ADAPTED
    assert split(model, LoRAParam, ...)[:2] == split(concrete, LoRAParam, ...)[:2]


def test_paths_have_no_stack_level():
    paths = linear_paths(nnx.eval_shape(flux))
    assert {"transformer_blocks.attn.to_out.0", "transformer_blocks.ff.net.0.proj", "x_embedder",
            "time_text_embed.timestep_embedder.linear_1", "norm_out.linear"} <= paths.keys()


@pytest.mark.parametrize(("rank", "targets", "message"), [
    (0, TARGETS, "rank must be at least 1, got 0"),
    (4, (), "no targets"),
    (4, "x_embedder", "must be a sequence"),
    (4, ("to_q",), r"'to_q' matches no Linear; nearest paths: .*attn\.to_q"),
    (4, ("x_embedder", "x_embeder"), r"'x_embeder' matches no Linear; nearest paths: x_embedder"),
])
def test_errors_leave_the_model_alone(rank, targets, message):
    model = nnx.eval_shape(flux)
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, 1.0, targets)
    assert not split(model, LoRAParam, ...)[1]


def test_adding_twice_is_an_error():
    model = nnx.eval_shape(flux)
    add_lora(model, 2, 1.0, (r"transformer_blocks\.attn\.to_q",))
    with pytest.raises(ValueError, match=r"transformer_blocks\.attn\.to_q already has an adapter"):
        add_lora(model, 2, 1.0, TARGETS)
    assert len(split(model, LoRAParam, ...)[1]) == 2
