"""ImageReward's BLIP against transformers: image tokens, the text's first token, gradients, the released names, the score."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dancegrpo_jax.data import rows_of
from dancegrpo_jax.media import from_images
from dancegrpo_jax.models.encoders.blip import Blip, BlipConfig
from dancegrpo_jax.models.files.convert import CheckpointError, from_torch, to_torch
from dancegrpo_jax.models.layers import merge, split
from dancegrpo_jax.rewards import RewardSet, build
from dancegrpo_jax.rewards.clip import preprocess

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from against_torch import assert_close, perturb, rms  # noqa: E402 (needs torch)

CONFIG = BlipConfig(vision_width=24, vision_layers=3, vision_heads=2, image_size=32, patch_size=8, text_width=20, text_layers=2,
                    text_heads=4, vocab_size=60, max_positions=48)
SIZES = ((10, 20), (7, 10), (5, 7), (3, 5), (1, 3))  # of the head
PIXELS = np.random.default_rng(0).standard_normal((2, 32, 32, 3), dtype=np.float32)
IDS = np.array([[2, 9, 33, 41, 3, 0, 0], [2, 5, 3, 0, 0, 0, 0]], np.int32)
MASK = IDS > 0


@pytest.fixture(scope="module")
def reference():
    """transformers' (vision, text) models."""
    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        layer_norm_eps=1e-6, hidden_act="gelu"))
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    text = BlipTextModel(transformers.BlipTextConfig(
        vocab_size=60, hidden_size=20, encoder_hidden_size=24, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=48, layer_norm_eps=1e-12, hidden_act="gelu", is_decoder=True), add_pooling_layer=False)
    for i, module in enumerate((vision, text)):
        perturb(module, i)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if re.search(r"query\.weight", name):
                    p.mul_(0.3)
    return vision.eval(), text.eval()


def released(reference):
    """The two state dicts under the names of ImageReward.pt, with what that file holds besides."""
    vision, text = (module.state_dict() for module in reference)
    names = ((r"^embeddings\.class_embedding$", "cls_token"), (r"^embeddings\.position_embedding$", "pos_embed"),
             (r"^embeddings\.patch_embedding\.", "patch_embed.proj."), (r"^post_layernorm\.", "norm."),
             (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."), (r"layer_norm([12])", r"norm\1"),
             (r"self_attn\.projection", "attn.proj"), (r"self_attn\.qkv", "attn.qkv"))
    out = {}
    for key, value in vision.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        out[f"blip.visual_encoder.{key}"] = value
    out |= {f"blip.text_encoder.{key}": value for key, value in text.items()}
    generator = torch.Generator().manual_seed(3)
    for i, (rows, columns) in zip((0, 2, 4, 6, 7), SIZES, strict=True):
        out |= {f"mlp.layers.{i}.weight": torch.randn(rows, columns, generator=generator) / columns**0.5,
                f"mlp.layers.{i}.bias": torch.randn(rows, generator=generator)}
    return out | {"blip.vision_proj.weight": torch.zeros(2, 24), "blip.text_proj.bias": torch.zeros(2),
                  "blip.text_encoder.embeddings.position_ids": torch.arange(48)[None]}


def torch_token(reference, pixels=PIXELS, ids=IDS, mask=MASK):
    vision, text = reference
    image = vision(torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)).last_hidden_state
    hidden = text(torch.from_numpy(np.array(ids)).long(), attention_mask=torch.from_numpy(np.array(mask)).long(),
                  encoder_hidden_states=image, is_decoder=False).last_hidden_state
    return image, hidden[:, 0]


def load(reference):
    graphdef, abstract = split(nnx.eval_shape(lambda: Blip(CONFIG, rngs=nnx.Rngs(0))))
    tensors = {key: value.numpy() for key, value in released(reference).items()}
    return graphdef, from_torch(tensors, abstract, rename=Blip.LEGACY_KEYS, ignore=Blip.IGNORED_KEYS)


def test_forward_and_gradients(reference):
    graphdef, params = load(reference)
    image, token = torch_token(reference)
    cotangent = np.random.default_rng(1).standard_normal(token.shape, dtype=np.float32)
    for module in reference:
        module.zero_grad()
    (token * torch.from_numpy(cotangent)).sum().backward()

    def loss(params):
        y = merge(graphdef, params)(PIXELS, IDS, MASK)
        return jnp.sum(y * cotangent), y

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(np.asarray(jax.jit(lambda p: merge(graphdef, p).vision_model(PIXELS))(params)), image.detach().numpy())
    assert_close(np.asarray(ours), token.detach().numpy())
    ours, theirs = to_torch(grads), {}
    for prefix, module in zip(("vision_model", "text_model"), reference, strict=True):
        theirs |= {f"{prefix}.{name}": p.grad for name, p in module.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None:  # nothing of it reaches the first token
            assert not ours[name].any(), name
            continue
        # The softmax ignores a shift common to all keys: that gradient is 0, and what is computed is rounding noise.
        if name.endswith("qkv.bias"):
            width = len(expected) // 3
            mine, other = (np.delete(np.asarray(x), slice(width, 2 * width)) for x in (ours[name], expected.numpy()))
        else:
            mine, other = ours[name], expected.numpy()
        scale = rms(theirs[name.replace("key.bias", "query.bias")].numpy())
        assert np.abs(mine - other).max() <= 1e-4 * scale, name


def test_padding_changes_nothing(reference):
    graphdef, params = load(reference)
    run = jax.jit(lambda ids, mask: merge(graphdef, params)(PIXELS, ids, mask))
    np.testing.assert_allclose(run(IDS, MASK), run(np.where(MASK, IDS, 7), MASK), atol=1e-6)
    assert np.abs(run(IDS, MASK) - run(IDS, np.ones_like(MASK))).max() > 1e-3


def test_reward(reference, tmp_path):
    """From a file in the released layout and a WordPiece vocabulary: the package's formula on transformers' encoders."""
    torch.save(released(reference), tmp_path / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "square", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    options = {"model": tmp_path / "ImageReward.pt", "tokenizer": tmp_path, "config": CONFIG}
    images = np.random.default_rng(2).random((2, 3, 40, 56, 3), dtype=np.float32)
    prompts = ["a red circle", "Two BLUE squares"]
    values, ok = RewardSet({"image_reward": options})(from_images(images), rows_of(prompts))["image_reward"]
    assert ok.all()

    ids = np.zeros((2, 35), np.int64)
    ids[0, :5], ids[1, :6] = [2, 5, 6, 7, 3], [2, 8, 9, 10, 11, 3]
    ids = np.repeat(ids, 3, axis=0)
    pixels = preprocess(images.reshape(-1, 40, 56, 3), 32)
    with torch.no_grad():
        x = torch_token(reference, pixels, ids, ids > 0)[1]
        for i in (0, 2, 4, 6, 7):
            head = released(reference)
            x = x @ head[f"mlp.layers.{i}.weight"].T + head[f"mlp.layers.{i}.bias"]
    expected = (x.numpy().reshape(2, 3) - 0.16717362830052426) / 1.0333394966054072
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)

    with pytest.raises(CheckpointError, match="ImageReward.pt: .* has shape"):
        build("image_reward", options | {"config": BlipConfig()})


def test_released_size():
    abstract = split(nnx.eval_shape(lambda: Blip(BlipConfig(), rngs=nnx.Rngs(0))))[1]
    head = sum(rows * columns + rows for rows, columns in ((1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)))
    assert round((sum(leaf.size for leaf in abstract.values()) + head) / 1e6, 1) == 446.2
