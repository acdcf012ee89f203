"""CLIP against transformers: forward, every gradient, cosines, files of both ages, released sizes."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dancegrpo_jax.models.encoders.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, cosine
from dancegrpo_jax.models.files import convert
from dancegrpo_jax.models.layers import merge, split

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from against_torch import (  # noqa: E402 (needs torch)
    assert_close,
    assert_low_precision_close,
    assert_released_size,
    rms,
    to_torch,
)

LENGTH, EOS = 11, 60
# Widths, heads and depths all differ, so that no mix-up of towers or axes can pass.
TEXT = dict(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=LENGTH, layer_norm_eps=1e-5, projection_dim=12, bos_token_id=59, pad_token_id=0)
VISION = dict(hidden_size=36, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, image_size=24,
              patch_size=8, layer_norm_eps=1e-5, projection_dim=12)
# Gradients of the text model are taken in the first variant, of both towers in the second.
VARIANTS = {"quick_gelu, largest id": ("quick_gelu", 2), "gelu, first eos": ("gelu", EOS)}
# One prompt shorter than the other; 63, above the eos, follows the end: only the old rule may look at it.
IDS = np.array([[59, 7, 33, EOS, 0, 0, 0, 0, 0, 0, 0], [59, 5, 5, 41, 2, 19, 8, EOS, 63, EOS, EOS]], np.int32)
PIXELS = np.random.default_rng(3).standard_normal((2, 24, 24, 3), dtype=np.float32)


def perturb(module):
    """Norm scales 1 +- 0.25, biases +- 0.1, matrices large enough that attention is not uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = 2 * torch.rand(p.shape, generator=generator) - 1
            if name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif "norm" in name or "layrnorm" in name:
                p.copy_(1 + 0.25 * noise)
            elif p.ndim:
                p.copy_(noise if "embedding" in name else 3**0.5 * noise * p[0].numel()**-0.5)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def text_pair(request, tmp_path_factory):
    """(torch text model, folder it was saved to)."""
    act, eos = request.param
    reference = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, hidden_act=act, eos_token_id=eos)).eval()
    perturb(reference)
    folder = tmp_path_factory.mktemp("text")
    reference.save_pretrained(folder)
    return reference, folder


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def clip_pair(request, tmp_path_factory):
    """(torch two-tower model, folder it was saved to)."""
    act, eos = request.param
    config = transformers.CLIPConfig(text_config=TEXT | {"hidden_act": act, "eos_token_id": eos},
                                     vision_config=VISION | {"hidden_act": act}, projection_dim=12)
    reference = transformers.CLIPModel(config).eval()
    perturb(reference)
    folder = tmp_path_factory.mktemp("clip")
    reference.save_pretrained(folder)
    return reference, folder


def check(reference, outputs, model, function, *, gradients, untouched=()):
    """Compares outputs (1e-5 rms) and the gradients of a random projection of them (1e-4 rms per tensor)."""
    rng = np.random.default_rng(1)
    cotangents = [rng.standard_normal(y.shape, dtype=np.float32) for y in outputs]
    graphdef, params = split(model)

    def loss(params):
        ours = function(merge(graphdef, params))
        return sum(jnp.sum(y * c) for y, c in zip(ours, cotangents, strict=True)), ours

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else
                               lambda params: (loss(params), {}))(params)
    for y, expected in zip(ours, outputs, strict=True):
        assert y.dtype == jnp.float32
        assert_close(y, expected.detach().numpy())
    if not gradients:
        return

    reference.zero_grad()
    sum((y * torch.from_numpy(c)).sum() for y, c in zip(outputs, cotangents, strict=True)).backward()
    ours = convert.to_torch(grads)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if name in untouched:
            assert expected is None and not ours[name].any()
            continue
        # The softmax ignores a shift common to all keys: that gradient is 0, and what is computed is rounding noise.
        scale = rms(theirs[name.replace("k_proj.bias", "q_proj.bias")].numpy())
        assert np.abs(ours[name] - expected.numpy()).max() <= 1e-4 * scale, name


def test_text_model(text_pair):
    reference, folder = text_pair
    expected = reference(torch.from_numpy(IDS).long())
    model = convert.load_model(CLIPTextModel, folder)
    check(reference, [expected.last_hidden_state, expected.pooler_output], model, lambda model: model(IDS),
          gradients=reference.config.eos_token_id == 2)


def test_towers_and_cosines(clip_pair):
    reference, folder = clip_pair
    expected = reference(torch.from_numpy(IDS).long(), to_torch(PIXELS))
    text, image = expected.text_model_output.pooler_output, expected.vision_model_output.pooler_output  # projected
    model = convert.load_model(CLIPModel, folder)
    check(reference, [text, image], model, lambda model: (model.text_features(IDS), model.image_features(PIXELS)),
          gradients=reference.config.text_config.eos_token_id == EOS, untouched={"logit_scale"})
    np.testing.assert_array_equal(model.logit_scale[...], reference.logit_scale.detach())

    ours = cosine(image.detach().numpy()[:, None], text.detach().numpy())
    theirs = (expected.image_embeds @ expected.text_embeds.T).detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip_pair", [("gelu", EOS)], indirect=True)
def test_bfloat16_towers_give_float32_features(clip_pair):
    model = convert.load_model(CLIPModel, clip_pair[1])

    @partial(jax.jit, static_argnums=0)
    def features(dtype):
        return model.text_features(IDS, dtype), model.image_features(PIXELS, dtype)

    for exact, low in zip(features(jnp.float32), features(jnp.bfloat16), strict=True):
        assert low.dtype == jnp.float32
        assert_low_precision_close(low, exact)
        assert (low != low.astype(jnp.bfloat16)).mean() > 0.9  # not rounded at the end
    hidden, pooled = jax.eval_shape(lambda: model.text_model(IDS, jnp.bfloat16))
    assert hidden.dtype == pooled.dtype == jnp.bfloat16


# Keys that transformers 4 wrote into every config.json, a few of each kind.
OLD_KEYS = {"_name_or_path": "x", "architectures": None, "torch_dtype": "float32", "transformers_version": "4.21.0",
            "dropout": 0.0, "id2label": {"0": "LABEL_0"}, "return_dict": True, "top_k": 50, "tie_word_embeddings": True,
            "max_length": 20, "suppress_tokens": None, "use_cache": True, "pruned_heads": {}, "bos_token_id": 0}


def rewrite(folder, new, change_config, rename, buffers):
    """A copy of a folder under an older spelling."""
    shutil.copytree(folder, new)
    config = json.loads((folder / "config.json").read_text())
    (new / "config.json").write_text(json.dumps(change_config(config)))
    tensors = {rename + key: value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors | buffers, new / "model.safetensors")
    return new


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_released_text_files(text_pair, tmp_path):
    _, folder = text_pair
    buffers = {"text_model.embeddings.position_ids": np.arange(LENGTH)[None]}
    old = rewrite(folder, tmp_path / "old", lambda config: config | OLD_KEYS, "text_model.", buffers)
    today, released = convert.load_model(CLIPTextModel, folder), convert.load_model(CLIPTextModel, old)
    assert same(split(today)[1], split(released)[1]) and today.config == released.config

    for bad, message in (({"hiden_size": 24}, "hidden_size"), ({"model_type": "bert"}, "model_type")):
        config = json.loads((folder / "config.json").read_text()) | bad
        (old / "config.json").write_text(json.dumps(config))
        with pytest.raises(convert.CheckpointError, match=message):
            convert.load_model(CLIPTextModel, old)


def test_released_clip_files(clip_pair, tmp_path):
    _, folder = clip_pair

    def older(config):
        # What counts is `*_config_dict`; `*_config` holds stale values in some released files.
        text, vision = config["text_config"] | OLD_KEYS, config["vision_config"] | OLD_KEYS
        return config | OLD_KEYS | {
            "text_config": text | {"hidden_act": "silu", "num_hidden_layers": 99}, "vision_config": vision,
            "text_config_dict": {key: text[key] for key in ("hidden_act", "num_hidden_layers")},
            "vision_config_dict": None}

    buffers = {f"{tower}_model.embeddings.position_ids": np.arange(9)[None] for tower in ("text", "vision")}
    old = rewrite(folder, tmp_path / "old", older, "", buffers)
    today, released = convert.load_model(CLIPModel, folder), convert.load_model(CLIPModel, old)
    assert same(split(today)[1], split(released)[1]) and today.config == released.config

    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["patchsize"] = 8
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(convert.CheckpointError, match="vision_config.*patchsize.*patch_size"):
        convert.load_model(CLIPModel, old)


def test_config_defaults_are_those_of_transformers():
    """Released files leave out what was the default when they were written."""
    ours = convert.parse_config(CLIPConfig, {"model_type": "clip", "text_config": {}, "vision_config": None})
    theirs = transformers.CLIPConfig()
    for mine, other in ((ours.text_config, theirs.text_config), (ours.vision_config, theirs.vision_config)):
        assert {key: getattr(other, key) for key in vars(mine)} == vars(mine)
    assert (ours.projection_dim, ours.logit_scale_init_value) == (theirs.projection_dim, theirs.logit_scale_init_value)


def round_trip(ours, reference, folder, new):
    """Our model saved and read by transformers, after checking that every weight is the same."""
    model = convert.load_model(ours, folder)
    convert.save_model(new, ours, model.config, split(model)[1], dtype=jnp.float32)
    again = type(reference).from_pretrained(new)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in reference.state_dict().items())
    return again


def test_transformers_loads_the_text_model_we_save(text_pair, tmp_path):
    reference, folder = text_pair
    again, ids = round_trip(CLIPTextModel, reference, folder, tmp_path), torch.from_numpy(IDS).long()
    with torch.no_grad():
        assert torch.equal(reference(ids).pooler_output, again(ids).pooler_output)


def test_transformers_loads_the_clip_we_save(clip_pair, tmp_path):
    reference, folder = clip_pair
    again = round_trip(CLIPModel, reference, folder, tmp_path)
    inputs = torch.from_numpy(IDS).long(), to_torch(PIXELS)
    with torch.no_grad():
        assert torch.equal(reference(*inputs).logits_per_image, again(*inputs).logits_per_image)


@pytest.mark.parametrize("text_pair", [("gelu", EOS)], indirect=True)
def test_later_tokens_change_nothing_before_them(text_pair):
    """Causality, and so padding invariance."""
    model = convert.load_model(CLIPTextModel, text_pair[1])
    run = jax.jit(lambda ids: model(ids))
    first, second = run(IDS), run(np.where(np.arange(LENGTH) > 7, 1, IDS))
    np.testing.assert_array_equal(first[0][:, :8], second[0][:, :8])
    np.testing.assert_array_equal(first[1], second[1])


def test_bad_sizes_raise():
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(CLIPTextConfig(**small, vocab_size=9, max_position_embeddings=4),
                        CLIPVisionConfig(**small, image_size=16, patch_size=8))
    model = nnx.eval_shape(lambda: CLIPModel(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="5 tokens.*4"):
        model.text_model(jnp.ones((1, 5), jnp.int32))
    with pytest.raises(ValueError, match="16x24.*16x16"):
        model.image_features(jnp.ones((1, 16, 24, 3)))
    with pytest.raises(ValueError, match="multiple"):
        CLIPTextConfig(hidden_size=10, num_attention_heads=4)
    with pytest.raises(ValueError, match="quick_gelu"):
        CLIPTextConfig(hidden_act="quickgelu")


def abstract(model_class, config):
    return split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))[1]


def test_released_size_of_the_text_encoder():
    """Every key of CLIP ViT-L/14's text encoder, as in Stable Diffusion and FLUX folders, and no other."""
    assert_released_size(CLIPTextModel, CLIPTextConfig(768, 3072, 12, 12, eos_token_id=2), "clip_l_text", 123_060_480)


@pytest.mark.parametrize(("text", "vision", "width", "count"), [
    (dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
     dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16), 768, 427_616_513),
    (dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"),
     dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16), 1024, 986_109_441),
], ids=["ViT-L-14", "ViT-H-14"])
def test_released_sizes_of_two_tower_models(text, vision, width, count):
    config = CLIPConfig(CLIPTextConfig(**text), CLIPVisionConfig(**vision, patch_size=14), width)
    assert sum(leaf.size for leaf in abstract(CLIPModel, config).values()) == count
