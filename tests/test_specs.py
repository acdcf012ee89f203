"""How every model's parameters are cut at their released sizes, and small encoders on a mesh with a tensor axis.

Between a column-parallel layer, whose outputs are split over `tensor`, and the row-parallel one that consumes them nothing
travels. If the second is cut like the first, the numbers stay right and every block gathers its activations.
"""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dancegrpo_jax import sharding
from dancegrpo_jax.models import layers
from dancegrpo_jax.models.codecs import autoencoder_kl
from dancegrpo_jax.models.denoisers import flux, unet
from dancegrpo_jax.models.encoders import blip, clip, t5
from dancegrpo_jax.models.encoders.open_clip import ARCHITECTURES
from dancegrpo_jax.models.files.lora import add_lora
from dancegrpo_jax.models.layers import Conv, Linear, merge, split
from tests.pipelines import random_params

FSDP, TENSOR = 2, 4
MESH = AbstractMesh((1, FSDP, 1, TENSOR), sharding.AXES)

MODELS = {
    "flux": (flux.FluxTransformer2DModel, flux.FluxTransformer2DModel.Config(guidance_embeds=True)),
    "unet": (unet.UNet2DConditionModel, unet.Config(sample_size=64, cross_attention_dim=768)),
    "vae": (autoencoder_kl.AutoencoderKL, autoencoder_kl.Config(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2)),
    "clip text": (clip.CLIPTextModel, clip.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
    "clip": (clip.CLIPModel, ARCHITECTURES["ViT-H-14"]),
    "t5": (t5.T5EncoderModel, t5.T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)),
    "blip": (blip.Blip, blip.BlipConfig()),
}

# {module class: {layer: the layers whose outputs it consumes, features split as they come}}
JOINT = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
PAIRS = {
    layers.FeedForward: {"net.2": ("net.0.proj",)},
    layers.TimestepEmbedding: {"linear_2": ("linear_1",)},
    flux.DualBlock: {"attn.to_out.0": tuple(f"attn.{name}" for name in JOINT),
                     "attn.to_add_out": tuple(f"attn.{name}" for name in JOINT)},
    flux.SingleBlock: {"proj_out": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
    unet.Attention: {"to_out.0": ("to_q", "to_k", "to_v")},
    autoencoder_kl.SpatialAttention: {"to_out.0": ("to_q", "to_k", "to_v")},
    clip.Attention: {"out_proj": ("q_proj", "k_proj", "v_proj")},
    clip.MLP: {"fc2": ("fc1",)},
    t5.SelfAttention: {"o": ("q", "k", "v")},
    t5.DenseReluDense: {"wo": ("wi_0", "wi_1")},
    blip.VisionAttention: {"projection": ("qkv",)},
    blip.VisionMLP: {"fc2": ("fc1",)},
    blip.TextAttention: {"output.dense": ("self.query", "self.key", "self.value")},
    blip.TextLayer: {"output.dense": ("intermediate.dense",)},
}
# Layers from and to whole features (a residual stream, a norm's output): nothing to follow, nothing that follows.
ALONE = re.compile(r"(context_embedder|x_embedder|proj_out|norm_out\.linear"  # FLUX's first and last layers
                   r"|.*\.(norm|norm1|norm1_context)\.linear"  # its modulations
                   r"|.*\.time_emb_proj|.*\.attentions\.\d\.proj_out"  # UNet
                   r"|(text|visual)_projection)")  # CLIP
ROW_PARALLEL = [(name, layer) for name, (model_class, _) in MODELS.items() for layer in {
    "flux": ("to_out.0", "to_add_out", "net.2", "proj_out", "linear_2"), "unet": ("to_out.0", "net.2", "linear_2"),
    "vae": ("to_out.0",), "clip text": ("out_proj", "fc2"), "clip": ("out_proj", "fc2"), "t5": ("o", "wo"),
    "blip": ("projection", "fc2", "output.dense")}[name]]


@cache
def released(name, lora=False):
    """The abstract model and its parameters {name: shape}."""
    model_class, config = MODELS[name]
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    if lora:
        add_lora(model, 32, 64, (".*",))
    return model, {key: leaf.shape for key, leaf in split(model)[1].items()}


def axes(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def check(name, rules):
    """Raises AssertionError where a layer does not take its inputs as those before it leave their outputs."""
    model, shapes = released(name)

    def kernel_axes(path):  # of the inputs, of the outputs
        shape = shapes[f"{path}.kernel"]
        spec = sharding.param_spec(f"{path}.kernel", shape, MESH, rules)
        return tuple(axes(entry) for entry in (*spec, *(None,) * (len(shape) - len(spec)))[-2:])

    seen = set()
    for path, module in nnx.iter_modules(model):
        for consumer, producers in PAIRS.get(type(module), {}).items():
            consumer, *producers = (".".join(map(str, (*path, layer))) for layer in (consumer, *producers))
            assert kernel_axes(consumer) == (("tensor",), ("fsdp",)), f"{consumer} is not row-parallel"
            for producer in producers:
                assert kernel_axes(producer) == (("fsdp",), ("tensor",)), f"{producer} is not column-parallel"
            seen |= {consumer, *producers}
    for path, module in nnx.iter_modules(model):
        path = ".".join(map(str, path))
        if isinstance(module, Linear) and path not in seen:
            assert ALONE.fullmatch(path), f"{path} is neither in PAIRS nor in ALONE: what comes before and after it?"


@pytest.mark.parametrize("name", MODELS)
def test_row_parallel_follows_column_parallel(name):
    check(name, MODELS[name][0].SHARDING)


@pytest.mark.parametrize(("name", "layer"), ROW_PARALLEL, ids=" ".join)
def test_every_wrong_rule_is_seen(name, layer):
    """One layer cut like the others: the check above must name it."""
    wrong = ((rf"(.*\.)?{re.escape(layer)}\.kernel", ("fsdp", "tensor")),)
    with pytest.raises(AssertionError, match=rf"{re.escape(layer)} is not row-parallel"):
        check(name, wrong + MODELS[name][0].SHARDING)


@pytest.mark.parametrize("name", MODELS)
def test_large_parameters_are_split_once_over_each_axis(name):
    """Features only, never layers or space; whole are the few dimensions that do not divide (channels of an image)."""
    model_class, _ = MODELS[name]
    _, shapes = released(name)
    assert hash(model_class.SHARDING) is not None
    for pattern, _ in model_class.SHARDING:
        assert "lora" in pattern or any(re.fullmatch(pattern, parameter) for parameter in shapes), f"{pattern} is of no use"
    for parameter, shape in shapes.items():
        spec = sharding.param_spec(parameter, shape, MESH, model_class.SHARDING)
        if not parameter.endswith((".kernel", ".embedding")):
            assert spec == P(), parameter
            continue
        used = [axis for entry in spec for axis in axes(entry)]
        assert len(used) == len(set(used)), parameter
        assert all(entry is None for entry in spec[:-2]), parameter
        if all(size % (FSDP * TENSOR) == 0 for size in shape[-2:]):
            expected = {"tensor"} if "relative_attention_bias" in parameter else {"fsdp", "tensor"}
            assert set(used) == expected, parameter


@pytest.mark.parametrize("name", ["flux", "unet", "t5"])
def test_adapters_follow_their_kernels(name):
    """A takes its inputs as the kernel does, B leaves its outputs so; the rank between them is whole."""
    model_class, _ = MODELS[name]
    _, shapes = released(name, lora=True)
    adapted = [key.removesuffix(".lora_a") for key in shapes if key.endswith(".lora_a")]
    assert adapted
    for layer in adapted:
        kernel, a, b = ([axes(entry) for entry in sharding.param_spec(name, shapes[name], MESH, model_class.SHARDING)[-2:]]
                        for name in (f"{layer}.kernel", f"{layer}.lora_a", f"{layer}.lora_b"))
        assert ("tensor" in a[0]) == ("tensor" in kernel[0]) and ("tensor" in b[1]) == ("tensor" in kernel[1]), layer
        assert a[1] == b[0] == () and "fsdp" in a[0], layer


@pytest.mark.parametrize("spatial", [(), (3,), (3, 3), (3, 3, 3)])
def test_convolutions_of_any_rank(spatial):
    spec = sharding.param_spec("conv.kernel", (*spatial, 8, 16), MESH)
    assert spec == P(*(None,) * len(spatial), "fsdp", "tensor")
    spec = sharding.param_spec("conv.kernel", (*spatial, 8, 16), MESH, sharding.row_parallel("conv"))
    assert spec == P(*(None,) * len(spatial), "tensor", "fsdp")
    assert Conv(4, 8, spatial or (1,), rngs=nnx.Rngs(0)).kernel.shape[-2:] == (4, 8)


# ------------------------------------------------------------------------------------------ on devices

BATCH = 4
RNG = np.random.default_rng(0)
TEXT = RNG.integers(2, 48, (BATCH, 6)).astype(np.int32)
PIXELS = RNG.standard_normal((BATCH, 8, 8, 3), dtype=np.float32)
CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SMALL = {
    "t5": (t5.T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), ("o", "wo"),
           lambda model: model(TEXT)),
    "clip": (clip.CLIPConfig(clip.CLIPTextConfig(**CLIP, vocab_size=48, max_position_embeddings=8, eos_token_id=2),
                             clip.CLIPVisionConfig(**CLIP, image_size=8, patch_size=4), 16), ("out_proj", "fc2"),
             lambda model: (model.text_features(TEXT), model.image_features(PIXELS))),
    "blip": (blip.BlipConfig(vision_width=32, vision_layers=2, vision_heads=4, image_size=8, patch_size=4, text_width=64,
                             text_layers=2, text_heads=4, vocab_size=48, max_positions=8),
             ("projection", "fc2", "output.dense"), lambda model: model(PIXELS, TEXT, TEXT > 4)),
}


@pytest.mark.parametrize("name", SMALL)
def test_encoders_on_a_tensor_axis(name):
    """Eight devices give the numbers of one, each with an eighth of the matrices and not much more of the work."""
    model_class, (config, row_parallel, call) = MODELS[name][0], SMALL[name]
    graphdef = split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))[0]
    params = {key: leaf + 0.05 * RNG.standard_normal(leaf.shape, dtype=np.float32)
              for key, leaf in random_params(model_class, config).items()}
    run = jax.jit(lambda params: call(merge(graphdef, params)))
    one = run.lower(params).compile()

    mesh = sharding.make_mesh(data=1, fsdp=FSDP, tensor=TENSOR)
    with jax.set_mesh(mesh):
        placed = sharding.place_params(params, mesh, model_class.SHARDING)
        eight = run.lower(placed).compile()
    for key, leaf in placed.items():
        path, _, kind = key.rpartition(".")
        if kind == "kernel" and "stacked" in path:
            row = re.search(rf"\.({'|'.join(map(re.escape, row_parallel))})$", path)
            assert leaf.sharding == NamedSharding(mesh, P(None, *(("tensor", "fsdp") if row else ("fsdp", "tensor")))), key
            assert leaf.addressable_shards[0].data.size == leaf.size // 8
            assert eight.input_shardings[0][0][key].is_equivalent_to(leaf.sharding, leaf.ndim), key
    assert eight.cost_analysis()["flops"] < 0.25 * one.cost_analysis()["flops"]

    for ours, expected in zip(jax.tree.leaves(eight(placed)), jax.tree.leaves(one(params)), strict=True):
        scale = float(jnp.sqrt(jnp.square(expected).mean()))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-6 * scale)
