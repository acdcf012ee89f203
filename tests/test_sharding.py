"""The same numbers on every mesh, and attention's kernel for TPUs against the plain one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dancegrpo_jax import sharding
from dancegrpo_jax.algorithms.grpo import GRPO
from dancegrpo_jax.data import rows_of
from dancegrpo_jax.learner import Learner, init_state, make_batch, update
from dancegrpo_jax.models import attention as seam
from dancegrpo_jax.models.denoisers.flux import FluxTransformer2DModel, TokenLayout
from dancegrpo_jax.models.denoisers.unet import UNet2DConditionModel
from dancegrpo_jax.models.layers import merge, split
from dancegrpo_jax.pipelines.base import make_pipeline
from dancegrpo_jax.rollout import decode, encode, rollout
from dancegrpo_jax.sde import Kernel
from tests.pipelines import UNET, random_params, write_pipeline

MESHES = {"data 8": {}, "fsdp 8": dict(data=1, fsdp=8), "data 2, fsdp 4": dict(data=2, fsdp=4),
          "fsdp 4, tensor 2": dict(data=1, fsdp=4, tensor=2), "fsdp 2, seq 4": dict(data=1, fsdp=2, seq=4)}
CONFIG = FluxTransformer2DModel.Config(
    in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=24,
    pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
TEXT, GRID, BATCH = 7, (3, 5), 8  # 7 and 15 tokens: odd on every seq axis


def assert_same(found, expected, tolerance):
    """Every array within `tolerance` of the expected one's rms, and of what a large entry's own rounding is."""
    for name in expected:
        rms = float(jnp.sqrt(jnp.square(expected[name]).mean()))
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=tolerance * rms, err_msg=name)


def assert_same_gradients(found, expected):
    """Within 1e-5 of each one's norm; of a gradient that cancels to nothing only the rounding of the rest remains."""
    norms = {name: np.linalg.norm(leaf) for name, leaf in expected.items()}
    largest = max(norms.values())
    for name in expected:
        assert np.linalg.norm(found[name] - np.asarray(expected[name])) <= 1e-5 * norms[name] + 1e-7 * largest, name


# ------------------------------------------------------------------------------------------ one iteration


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory):
    folder = write_pipeline(tmp_path_factory.mktemp("flow"), "flow")
    return folder, iterate(folder, sharding.make_mesh(devices=jax.devices()[:1]))


def iterate(folder, mesh):
    """One training iteration of FLUX: text encoder, rollout, decoding, update. Outputs, gradients, the new weights."""
    prompts, group, steps = 8, 2, 3
    with jax.set_mesh(mesh):
        pipeline = make_pipeline(folder, height=24, width=40, remat="none")
        trainable, frozen = pipeline.load(mesh=mesh)
        inputs = pipeline.inputs(rows_of(["a red circle", "two blue squares", "a green star", "one"] * 2))
        cond = encode(pipeline, frozen, sharding.shard_batch(inputs, mesh), jax.random.key(0))
        schedule, kernel = pipeline.schedule(steps, 2.0), Kernel("flow", 0.7)
        trajectory = rollout(pipeline, kernel, trainable, frozen, cond, jax.random.key(1), schedule, group_size=group)
        images = decode(pipeline, frozen, trajectory.latents, group_size=group)
        learner = Learner(pipeline, kernel, GRPO(timestep_fraction=1.0), optax.trace(decay=0.0))  # its state is the gradient
        scores = {"r": (jax.random.normal(jax.random.key(2), (prompts, group)), jnp.ones((prompts, group), bool))}
        batch, _, _ = make_batch(learner.algorithm, jax.random.key(3), trajectory, schedule, scores, jnp.arange(prompts), {},
                                 cond, weights=(("r", 1.0),), updates=1, microbatch=prompts * group)
        state = init_state(learner, trainable, {})
        state, _ = update(learner, state, frozen, {}, batch, 0, jax.random.key(4), True)
    (trace,), (params,) = state.opt_state.trace.values(), state.trainable.values()
    return {"images": images, "log_probs": trajectory.log_probs[:-1]}, trace, params


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_an_iteration_is_the_same_on_every_mesh(unsharded, mesh):
    folder, (outputs, gradients, _) = unsharded
    found, sharded_gradients, params = iterate(folder, sharding.make_mesh(**mesh))
    assert_same(found, outputs, 1e-5)
    assert_same_gradients(sharded_gradients, gradients)
    for name, leaf in params.items():  # replicas have not drifted apart
        replicas = {}
        for shard in leaf.addressable_shards:
            first = replicas.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(np.asarray(shard.data), first, err_msg=name)


def test_prompts_that_do_not_divide_are_shared_out(unsharded):
    """Three prompts on eight devices: the values of one device, and each device encodes one, not all three."""
    folder, _ = unsharded
    rows, found, work = rows_of(["a red circle", "two blue squares", "one"]), [], []
    for mesh in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh()):
        with jax.set_mesh(mesh):
            pipeline = make_pipeline(folder, height=32, width=32)
            frozen, inputs = pipeline.load_text(mesh), sharding.shard_batch(pipeline.inputs(rows), mesh)
            found.append(encode(pipeline, frozen, inputs, jax.random.key(0)).positive)
            work.append(encode.lower(pipeline, frozen, inputs, jax.random.key(0)).compile().cost_analysis()["flops"])
    assert_same(found[1], found[0], 1e-5)
    assert found[1]["hidden"].shape[0] == 3 and work[1] < 0.5 * work[0]


@pytest.fixture(scope="module")
def unet():
    graphdef = split(nnx.eval_shape(lambda: UNet2DConditionModel(UNET, rngs=nnx.Rngs(0))))[0]
    params = random_params(UNet2DConditionModel, UNET)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    inputs = draw(BATCH, 6, 10, 4), np.linspace(1, 999, BATCH, dtype=np.float32), draw(BATCH, TEXT, 32), draw(BATCH, 6, 10, 4)
    return graphdef, params, inputs, unet_gradients(graphdef, params, inputs)


@jax.jit(static_argnums=0)
def unet_gradients(graphdef, params, inputs):
    *args, cotangent = inputs

    def loss(params):
        out = merge(graphdef, params)(*args, remat="none")
        return jnp.sum(out * cotangent), out
    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_the_unet_is_the_same_on_every_mesh(unet, mesh):
    graphdef, params, inputs, (gradients, out) = unet
    mesh = sharding.make_mesh(**mesh)
    with jax.set_mesh(mesh):
        found = unet_gradients(graphdef, sharding.place_params(params, mesh, UNet2DConditionModel.SHARDING),
                               sharding.shard_batch(inputs, mesh))
    assert_same({"out": found[1]}, {"out": out}, 1e-5)
    assert_same_gradients(found[0], gradients)


def test_parameters_are_split():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    spec = partial(sharding.param_spec, mesh=mesh, rules=sharding.row_parallel("to_out.0"))
    assert spec("blocks.stacked.attn.to_q.kernel", (3, 8, 8)) == P(None, "fsdp", "tensor")
    assert spec("blocks.stacked.attn.to_out.0.kernel", (3, 8, 8)) == P(None, "tensor", "fsdp")
    assert spec("blocks.stacked.attn.to_q.kernel", (3, 6, 8)) == P(None, None, "tensor")  # 6 does not divide by 4


# ------------------------------------------------------------------------------------------ tokens over devices


def flux_inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    return (draw(BATCH, 15, 8), draw(BATCH, TEXT, 24), draw(BATCH, 16), np.full(BATCH, 700, np.float32)), draw(BATCH, 15, 8)


@jax.jit(static_argnums=0)
def flux_gradients(graphdef, params, inputs, cotangent):
    def loss(params):
        *inputs_, time = inputs
        out = merge(graphdef, params)(*inputs_, time, GRID, guidance=jnp.full(BATCH, 3500.0), remat="attention")
        return jnp.sum(out * cotangent), out
    return jax.grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def flux():
    graphdef, rng = split(nnx.eval_shape(lambda: FluxTransformer2DModel(CONFIG, rngs=nnx.Rngs(0))))[0], np.random.default_rng(1)
    params = {name: leaf + 0.05 * rng.standard_normal(leaf.shape, dtype=np.float32)
              for name, leaf in random_params(FluxTransformer2DModel, CONFIG).items()}
    return graphdef, params, *flux_gradients(graphdef, params, *flux_inputs())


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_flux_with_tokens_and_heads_over_devices(flux, kernel, monkeypatch):
    graphdef, params, gradients, out = flux
    mesh = sharding.make_mesh(data=1, fsdp=2, seq=2, tensor=2)
    if kernel == "splash":
        monkeypatch.setattr(seam, "suits_splash", lambda q, k: True)
        monkeypatch.setattr(seam, "splash", partial(seam.splash, interpret=True))
    with jax.set_mesh(mesh):
        jax.clear_caches()  # the choice of kernel is no argument of the function
        found = flux_gradients(graphdef, sharding.place_params(params, mesh, FluxTransformer2DModel.SHARDING),
                               *sharding.shard_batch(flux_inputs(), mesh))
    assert_same({"out": found[1]}, {"out": out}, 1e-5)
    assert_same_gradients(found[0], gradients)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_token_layout_joins_and_separates(parts):
    layout = TokenLayout(TEXT, *GRID, parts)
    text, image = np.arange(TEXT)[None, :, None] + 1, np.arange(15)[None, :, None] + 101
    pad = lambda x: np.pad(x, ((0, 0), (0, -x.shape[1] % parts), (0, 0)))  # noqa: E731
    joined = layout.join(pad(text), pad(image))
    for whole, part in zip((pad(text), pad(image)), layout.separate(joined), strict=True):
        np.testing.assert_array_equal(part, whole)
    valid = layout.valid()
    np.testing.assert_array_equal(joined[0, :, 0] > 0, True if valid is None else valid)
    # every image token has its own place in the grid, wherever it lies in the sequence
    place = layout.positions()[joined[0, :, 0] > 100]
    order = joined[0, :, 0][joined[0, :, 0] > 100] - 101
    np.testing.assert_array_equal(place, np.stack([0 * order, order // GRID[1], order % GRID[1]], axis=1))


# ------------------------------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_splash_is_attention(padded):
    """Values and gradients, with odd lengths, narrow heads, and heads split over devices."""
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, n, 4, 40), dtype=np.float32)) for n in (150, 333, 333, 150))
    valid = np.arange(333) % 5 != 3 if padded else None

    def both(attend):
        return jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v))(q, k, v)

    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=2, seq=2, tensor=2)):
        found, back = both(lambda q, k, v: seam.splash(q, k, v, valid, 0.2, interpret=True))
        gradients = back(g)
    expected, back = both(lambda q, k, v: seam.attention(q, k, v, valid=valid, scale=0.2).reshape(q.shape))
    for name, ours, theirs in zip("oqkv", (found, *gradients), (expected, *back(g)), strict=True):
        assert_same({name: ours}, {name: theirs}, 1e-5)


def test_splash_is_for_long_sequences_on_tpus():
    assert not seam.suits_splash((8, 4096, 24, 128), (8, 4096, 24, 128))  # no mesh
    with jax.set_mesh(sharding.make_mesh()):
        assert not seam.suits_splash((8, 4096, 24, 128), (8, 4096, 24, 128))  # no TPU
