"""Released reward checkpoints: torch files read without torch and without trust, open_clip's names, the scores' formulas."""

import json
import os
import zipfile
from collections import OrderedDict
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dancegrpo_jax.data import rows_of
from dancegrpo_jax.media import from_images
from dancegrpo_jax.models.encoders.clip import IMAGE_MEAN, IMAGE_STD, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from dancegrpo_jax.models.encoders.open_clip import ARCHITECTURES, to_transformers
from dancegrpo_jax.models.files.convert import CheckpointError, match_keys, save_model, to_torch
from dancegrpo_jax.models.files.torch_file import read_torch
from dancegrpo_jax.models.layers import split
from dancegrpo_jax.rewards import RewardSet, build
from dancegrpo_jax.rewards.clip import clean_text, preprocess
from dancegrpo_jax.worlds.tokenizer import MAX_LENGTH, write_tokenizer
from tests.pipelines import random_params
from tests.test_sharding import MESHES

torch = pytest.importorskip("torch")

TOWER = dict(hidden_size=16, intermediate_size=64, num_attention_heads=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(config, tensors under transformers' keys, folder of the model with its tokenizer)."""
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    config = CLIPConfig(
        CLIPTextConfig(**TOWER, num_hidden_layers=2, vocab_size=vocabulary, max_position_embeddings=MAX_LENGTH, eos_token_id=2),
        CLIPVisionConfig(**TOWER, num_hidden_layers=3, image_size=16, patch_size=8), projection_dim=12)
    params = random_params(CLIPModel, config)
    rng = np.random.default_rng(0)
    params = {name: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in params.items()}
    save_model(folder, CLIPModel, config, params, dtype=jnp.float32)
    return config, to_torch(params), folder


def open_clip(tensors):
    """transformers' tensors under open_clip's keys, written down independently of the code under test."""
    def block(prefix, new, i):
        layer = f"{prefix}.encoder.layers.{i}"
        out = {f"{new}.attn.in_proj_{kind}": np.concatenate([tensors[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
               for kind in ("weight", "bias")}
        for theirs, ours in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                             ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
            out |= {f"{new}.{theirs}.{kind}": tensors[f"{layer}.{ours}.{kind}"] for kind in ("weight", "bias")}
        return out

    vision, text = "vision_model.embeddings", "text_model.embeddings"
    out = {"logit_scale": tensors["logit_scale"], "visual.class_embedding": tensors[f"{vision}.class_embedding"],
           "visual.conv1.weight": tensors[f"{vision}.patch_embedding.weight"],
           "visual.positional_embedding": tensors[f"{vision}.position_embedding.weight"],
           "visual.proj": tensors["visual_projection.weight"].T, "text_projection": tensors["text_projection.weight"].T,
           "token_embedding.weight": tensors[f"{text}.token_embedding.weight"],
           "positional_embedding": tensors[f"{text}.position_embedding.weight"]}
    for kind in ("weight", "bias"):
        out |= {f"visual.ln_pre.{kind}": tensors[f"vision_model.pre_layrnorm.{kind}"],
                f"visual.ln_post.{kind}": tensors[f"vision_model.post_layernorm.{kind}"],
                f"ln_final.{kind}": tensors[f"text_model.final_layer_norm.{kind}"]}
    for i in range(3):
        out |= block("vision_model", f"visual.transformer.resblocks.{i}", i)
    for i in range(2):
        out |= block("text_model", f"transformer.resblocks.{i}", i)
    return out


def as_torch(tensors):
    return OrderedDict((key, torch.from_numpy(np.array(value))) for key, value in tensors.items())


# ------------------------------------------------------------------------------------------------- torch files


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
                                   "bool"])
def test_torch_files_are_read_as_torch_reads_them(tmp_path, dtype):
    base = torch.arange(24).reshape(4, 6).to(getattr(torch, dtype))
    state = OrderedDict(whole=base, scalar=base[1, 2], rows=base[1:3], columns=base[:, ::2], turned=base.T, empty=base[:0],
                        parameter=torch.nn.Parameter(base, requires_grad=False))
    torch.save(state, tmp_path / "x.pt")
    found = read_torch(tmp_path / "x.pt")
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].shape == tuple(value.shape) and found[key].dtype.name == dtype
        np.testing.assert_array_equal(found[key].astype(np.float64), value.detach().to(torch.float64).numpy())
        assert not found[key].flags.writeable or found[key].size == 0


@pytest.mark.parametrize("wrap", [lambda s: {"epoch": 3, "state_dict": s, "name": "x"}, lambda s: {"model": s},
                                  lambda s: {f"module.{key}": value for key, value in s.items()}])
def test_nested_state_dicts(tmp_path, wrap):
    torch.save(wrap({"a.weight": torch.ones(2), "b": torch.zeros(3)}), tmp_path / "x.pt")
    assert read_torch(tmp_path / "x.pt").keys() == {"a.weight", "b"}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "torch._utils._rebuild_device_tensor_from_numpy",
                                  "numpy.load", "collections.Counter", "torch.load"])
def test_malicious_files_execute_nothing(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    mark = tmp_path / "executed"
    if name == "posix.system":
        torch.save({"a": torch.ones(2), "evil": Evil(mark)}, tmp_path / "x.pt")
    else:
        payload = f"c{module}\n{attribute}\n(S'open({str(mark)!r}, \"w\")'\ntR.".encode()
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", payload)
    with pytest.raises(CheckpointError, match=rf"x\.pt: refused, it asks for {module}.{attribute}"):
        read_torch(tmp_path / "x.pt")
    assert not mark.exists()


def rewrite(path, change):
    """The archive again, with `change(name, data)` applied to every member."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read as a torch checkpoint"),
    (lambda p: p.write_bytes(b"\x80\x02}q\x00."), "cannot be read as a torch checkpoint"),
    (lambda p: p.unlink(), "cannot be read as a torch checkpoint"),
    (lambda p: rewrite(p, lambda n, d: d[:4] if "/data/" in n else d), "exceeds its record"),
    (lambda p: rewrite(p, lambda n, d: b"big" if "byteorder" in n else d), "big-endian"),
    (lambda p: torch.save({"a": 1}, p), "no tensors in it"),
    (lambda p: torch.save([1, 2], p), "no tensors in it"),
    (lambda p: torch.jit.script(torch.nn.Linear(2, 2)).save(str(p)), "TorchScript"),
], ids=["cut", "legacy", "missing", "short record", "byte order", "no tensors", "list", "script"])
def test_damaged_files(tmp_path, damage, message):
    torch.save({"a": torch.ones(8)}, tmp_path / "x.pt")
    damage(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        read_torch(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(error.value)


def test_numbers_that_reach_outside_are_refused(tmp_path):
    """A record may not be addressed outside its own bytes, however the sizes are forged."""
    from dancegrpo_jax.models.files.torch_file import _Storage
    (tmp_path / "f").write_bytes(bytes(64))
    storage = _Storage(tmp_path / "f", np.float32, 16, 32)
    assert storage.tensor(2, (3, 2), (2, 1)).shape == (3, 2)
    for forged in ((3, (3, 2), (2, 1)), (0, (9,), (1,)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,))):
        with pytest.raises(ValueError, match="exceeds|impossible"):
            storage.tensor(*forged)


# ------------------------------------------------------------------------------------------------- open_clip


def test_open_clip_names(clip):
    _, tensors, _ = clip
    found = to_transformers(open_clip(tensors) | {"attn_mask": np.zeros((2, 2))})
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[key], tensors[key]) for key in tensors)
    custom = {key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}": value
              for key, value in open_clip(tensors).items()}
    assert to_transformers(custom).keys() == tensors.keys()


@pytest.mark.parametrize(("name", "count"), [("ViT-H-14", 986_109_441), ("ViT-H-14-378-quickgelu", 986_714_881),
                                             ("ViT-L-14-quickgelu", 427_616_513)])
def test_full_sizes_in_both_namings(name, count):
    """The converter takes every key of the full-size model, as transformers and as open_clip spell them."""
    abstract = split(nnx.eval_shape(lambda: CLIPModel(ARCHITECTURES[name], rngs=nnx.Rngs(0))))[1]
    assert sum(leaf.size for leaf in abstract.values()) == count
    config, width = ARCHITECTURES[name], {"visual": 0, "text": 0}
    shapes = {}
    for side, tower, prefix in (("visual", config.vision_config, "visual.transformer"),
                                ("text", config.text_config, "transformer")):
        d, f = tower.hidden_size, tower.intermediate_size
        width[side] = d
        for i in range(tower.num_hidden_layers):
            block = f"{prefix}.resblocks.{i}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * d, d), f"{block}.attn.in_proj_bias": (3 * d,),
                       f"{block}.attn.out_proj.weight": (d, d), f"{block}.attn.out_proj.bias": (d,),
                       f"{block}.mlp.c_fc.weight": (f, d), f"{block}.mlp.c_fc.bias": (f,),
                       f"{block}.mlp.c_proj.weight": (d, f), f"{block}.mlp.c_proj.bias": (d,)}
            shapes |= {f"{block}.ln_{j}.{kind}": (d,) for j in (1, 2) for kind in ("weight", "bias")}
    v, t, e, size = width["visual"], width["text"], config.projection_dim, config.vision_config.image_size
    shapes |= {f"{norm}.{kind}": (d,) for norm, d in (("visual.ln_pre", v), ("visual.ln_post", v), ("ln_final", t))
               for kind in ("weight", "bias")}
    shapes |= {"visual.class_embedding": (v,), "visual.conv1.weight": (v, 3, 14, 14), "visual.proj": (v, e), "logit_scale": (),
               "visual.positional_embedding": ((size // 14) ** 2 + 1, v), "token_embedding.weight": (49408, t),
               "positional_embedding": (77, t), "text_projection": (t, e)}
    weightless = {key: np.broadcast_to(np.int8(0), shape) for key, shape in shapes.items()}
    found = {key: value.shape for key, value in to_transformers(weightless).items()}
    assert match_keys(found, abstract).keys() == abstract.keys()


IMAGES = np.random.default_rng(0).random((2, 3, 20, 28, 3), dtype=np.float32)
PROMPTS = ["a red circle", "two blue squares"]
MEDIA, ROWS = from_images(IMAGES), rows_of(PROMPTS)


def scores(config):
    return {name: np.asarray(values) for name, (values, _) in RewardSet(config)(MEDIA, ROWS).items()}


def test_formulas(clip, tmp_path, monkeypatch):
    """HPS from an open_clip .pt, PickScore and aesthetic from a folder, against transformers' features."""
    import transformers
    config, tensors, folder = clip
    monkeypatch.setitem(ARCHITECTURES, "tiny", config)
    torch.save({"state_dict": as_torch(open_clip(tensors))}, tmp_path / "hps.pt")
    sizes = ((10, 12), (7, 10), (5, 7), (3, 5), (1, 3))  # as the released head, smaller
    rng = np.random.default_rng(1)
    head = {}
    for i, (out, into) in zip((0, 2, 4, 6, 7), sizes, strict=True):
        head |= {f"layers.{i}.weight": rng.standard_normal((out, into)).astype(np.float32),
                 f"layers.{i}.bias": rng.standard_normal(out).astype(np.float32)}
    torch.save(as_torch(head), tmp_path / "head.pth")
    found = scores({"hps": {"model": tmp_path / "hps.pt", "tokenizer": folder, "architecture": "tiny"},
                    "pickscore": {"model": folder, "tokenizer": None},
                    "aesthetic": {"model": folder, "head": tmp_path / "head.pth"},
                    "squash": {"reward": "clip_score", "model": folder, "resize": "squash"}})

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]

    def reference(resize):
        pixels = np.array(preprocess(IMAGES.reshape(-1, 20, 28, 3), 16, resize))
        with torch.no_grad():
            return model(ids, torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def cosines(out):
        all_pairs = (out.image_embeds @ out.text_embeds.T).numpy().reshape(2, 3, 2)
        return np.stack([all_pairs[i, :, i] for i in range(2)])

    np.testing.assert_allclose(found["hps"], cosines(reference("pad")), atol=1e-6)
    np.testing.assert_allclose(found["squash"], cosines(reference("squash")), atol=1e-6)
    crop = reference("crop")
    np.testing.assert_allclose(found["pickscore"], cosines(crop) * np.exp(tensors["logit_scale"]), rtol=1e-5, atol=1e-5)
    x = crop.image_embeds.double()
    for i in (0, 2, 4, 6, 7):
        x = x @ torch.from_numpy(head[f"layers.{i}.weight"]).double().T + torch.from_numpy(head[f"layers.{i}.bias"]).double()
    np.testing.assert_allclose(found["aesthetic"], x.numpy().reshape(2, 3), rtol=1e-5, atol=1e-5)


def test_scorers_of_one_architecture_share_a_compiled_function(clip):
    from dancegrpo_jax.rewards import base
    _, _, folder = clip
    first, second = (build("clip_score", {"model": folder}) for _ in range(2))
    other = build("clip_score", {"model": folder, "resize": "pad"})
    assert first.signature() == second.signature() != other.signature()
    first(MEDIA, ROWS)
    before = len(base._COMPILED)
    second(MEDIA, ROWS)
    assert len(base._COMPILED) == before


@pytest.mark.parametrize("mesh", [*MESHES.values(), dict(data=2, fsdp=2, tensor=2)], ids=[*MESHES, "data 2, fsdp 2, tensor 2"])
def test_sharded_scores(clip, mesh):
    """Eight devices, weights over fsdp and tensor, images over the batch axes: the scores of one device."""
    from dancegrpo_jax import sharding
    _, _, folder = clip
    config = {"clip_score": {"model": folder}}
    media, rows = from_images(np.concatenate([IMAGES] * 4)), rows_of(PROMPTS * 4)
    plain = RewardSet(config)(media, rows)["clip_score"][0]
    mesh = sharding.make_mesh(**mesh)
    with jax.set_mesh(mesh):
        rewards = RewardSet(config, mesh)
        sharded = rewards(media._replace(pixels=sharding.shard_batch(media.pixels, mesh)), rows)["clip_score"][0]
    assert len(rows) % 8 == 0
    np.testing.assert_allclose(plain, sharded, atol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "FOLDER", "resize": "stretch"}, "resize is 'stretch', expected one of 'crop', 'pad', 'squash'"),
    ({"model": "FOLDER", "clean": "html"}, "clean is 'html'"),
    ({"model": "TMP/x.pt"}, "x.pt: a file without config.json needs the option architecture, one of ViT-H-14"),
    ({"model": "TMP/x.pt", "architecture": "ViT-H-14"}, "x.pt: .* has shape"),
    ({"model": "TMP"}, "neither a transformers CLIPModel nor an open_clip checkpoint"),
])
def test_bad_options(clip, tmp_path, options, message):
    torch.save(as_torch(clip[1]), tmp_path / "x.pt")
    options = {key: value.replace("FOLDER", str(clip[2])).replace("TMP", str(tmp_path)) for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        build("clip_score", options | {"tokenizer": clip[2]})


# ------------------------------------------------------------------------------------------------- pixels and text


@pytest.mark.parametrize("shape", [(40, 56), (30, 17), (10, 12)], ids=["wide", "tall", "up"])
@pytest.mark.parametrize("resize", ["pad", "squash"])
def test_preprocessing_is_torchs(shape, resize):
    """torch's antialiased bicubic on floats; zeros around, centred, before the normalisation."""
    size = 16
    image = np.random.default_rng(1).random((1, *shape, 3), dtype=np.float32)
    scale = size / max(shape)
    new = (size, size) if resize == "squash" else (round(shape[0] * scale), round(shape[1] * scale))
    resized = torch.nn.functional.interpolate(torch.from_numpy(image).permute(0, 3, 1, 2), new, mode="bicubic", antialias=True,
                                              align_corners=False).permute(0, 2, 3, 1).numpy()
    expected = np.zeros((1, size, size, 3), np.float32)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    expected[:, top:top + new[0], left:left + new[1]] = np.clip(resized, 0, 1) if resize == "squash" else resized
    expected = (expected - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    np.testing.assert_allclose(preprocess(image, size, resize), expected, atol=3e-5)


@pytest.mark.parametrize(("prompt", "expected"), [
    ("  A  Red\n\tFox ", "a red fox"), ("caf&amp;amp;eacute;", "café"), ("it\u2019s \u201chere\u201d", 'it\'s "here"'),
    ("ＦＵＬＬ　ｗｉｄｔｈ", "full width"), ("schÃ¶n", "schön"), ("<b>bold</b>", "<b>bold</b>"), ("🌟 star", "🌟 star")])
def test_open_clip_cleaning(prompt, expected):
    assert clean_text(prompt) == expected


def bpe(folder, text, length):
    """OpenAI's tokenizer, written from its description: bytes as letters, greedy merges by rank, cut at `length`."""
    import regex
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    rank = {pair: i for i, pair in enumerate(merges)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ids = [vocabulary["<|startoftext|>"]]
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", text):
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            merged, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        ids += [vocabulary[part] for part in parts]
    end = vocabulary["<|endoftext|>"]
    return [*ids[:length - 1], end, *[end] * (length - 1 - len(ids))]


def test_tokens_of_a_thousand_prompts(clip):
    """Words, emoji, HTML entities, curly quotes, CJK, digits, tabs, prompts beyond the context; both cleanings."""
    import unicodedata

    import ftfy
    pieces = ["a", "red", "circle", "two blue squares", "CROSS", "don't", "it\u2019s", "\u201cquoted\u201d", "&amp;",
              "&lt;b&gt;", "🌟🎨", "赤い 円", "圆形", "n°5", "3.14", "1,000", "naïve", "cafe\u0301", "ﬁne", "\t", "  ", "\n",
              "#tag", "(x:1.2)", "--ar 16:9", "ＡＢＣ", "Ünïcode", "🇯🇵", "e\u0301te\u0301", "https://x.y/z?q=1", "…", "½",
              "ß", "schÃ¶n", "&quot;"]
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(pieces, rng.integers(0, 9))) for _ in range(1000)]
    _, _, folder = clip
    plain = build("clip_score", {"model": folder})
    cleaned = build("clip_score", {"model": folder, "clean": "open_clip"})

    def hf(text):
        return " ".join(unicodedata.normalize("NFC", text).split()).lower()

    def openai(text):
        import html
        return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()

    for reward, clean in ((plain, hf), (cleaned, openai)):
        found = reward.prepare(rows_of(prompts))
        wrong = [prompt for prompt, ids in zip(prompts, found, strict=True)
                 if ids.tolist() != bpe(folder, clean(prompt), MAX_LENGTH)]
        assert not wrong, (len(wrong), wrong[:3])
    assert (plain.prepare(rows_of(prompts)) != cleaned.prepare(rows_of(prompts))).any(axis=1).sum() > 100


def test_special_tokens_in_a_prompt_are_plain_text(clip):
    reward = build("clip_score", {"model": clip[2]})
    ids = reward.prepare(rows_of(["a <|endoftext|> circle"]))[0]
    end = reward.tokenizer.eos_token_id
    plain = reward.prepare(rows_of(["a circle"]))[0]
    assert (ids != plain).any() and np.argmax(ids == end) > np.argmax(plain == end)


def test_pickle_is_not_reachable_otherwise():
    """The unpickler's own list holds nothing that could call anything."""
    from dancegrpo_jax.models.files.torch_file import _Unpickler
    for (module, name), target in _Unpickler.KNOWN.items():
        assert module in ("collections", "torch._utils", "torch") and "load" not in name
        ours = not callable(target) or target.__module__ == "dancegrpo_jax.models.files.torch_file"
        assert target is OrderedDict or ours, name


# ------------------------------------------------------------------------------------------------- launch/score.py


def test_score_command(clip, tmp_path, capsys):
    """Images of two sizes through two rewards: the csv holds what the rewards say of each image."""
    import csv

    from PIL import Image

    from launch import score
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((16, 16), (20, 28), (16, 16))]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    prompts = ["a red circle", "two blue squares", "a green star"]
    lines = [json.dumps({"file": f"{i}.png", "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)]
    (tmp_path / "index.jsonl").write_text("".join(lines))
    rewards = json.dumps({"clip_score": {"model": str(clip[2])}, "color": {}})
    argv = ["score.py", f"--index={tmp_path / 'index.jsonl'}", f"--rewards={rewards}", f"--out={tmp_path / 'out.csv'}",
            "--batch=8"]
    assert score.main(argv) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["prompt"] for row in rows] == prompts
    for row, image, prompt in zip(rows, pixels, prompts, strict=True):
        for name, (values, _) in RewardSet(json.loads(rewards))(from_images(image[None, None]), rows_of([prompt])).items():
            np.testing.assert_allclose(float(row[name]), np.asarray(values)[0, 0], atol=1e-6)
    assert "clip_score" in capsys.readouterr().out
    lines = [{"path": f"{i}.png", "prompt": p, "count": i + 1, "more": 10} for i, p in enumerate(prompts)]
    (tmp_path / "index.jsonl").write_text("\n".join(map(json.dumps, lines)))  # other fields arrive as metadata
    counted = '--rewards={"n": {"reward": "tests.test_rewards:counted"}}'
    assert score.main([*argv[:2], counted, *argv[3:]]) == 0
    assert [float(row["n"]) for row in csv.DictReader((tmp_path / "out.csv").open())] == [11, 12, 13]
    (tmp_path / "index.jsonl").write_text('{"file": "9.png", "prompt": "x"}\n')
    assert score.main(argv) == 2 and "9.png: no such image" in capsys.readouterr().err
    (tmp_path / "index.jsonl").write_text('{"file": "9.png"}\n')
    assert score.main(argv) == 2 and "index.jsonl:1: expected" in capsys.readouterr().err
