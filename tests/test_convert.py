"""Checkpoint folders: what is written is read back byte for byte, and every defect is named."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from dancegrpo_jax import sharding
from dancegrpo_jax.models.files import convert
from dancegrpo_jax.models.files.convert import CheckpointError, from_torch, load_model, parse_config, save_model, to_torch
from dancegrpo_jax.models.layers import Conv, Embedding, LayerNorm, Linear, Stack, split

FILE = "diffusion_pytorch_model.safetensors"


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = LayerNorm(width, eps=1e-5)
        self.net = nnx.List([Linear(width, 2 * width, rngs=rngs), nnx.Module()])


class Model(nnx.Module):
    """One of everything that has its own layout."""

    LEGACY_KEYS = ((r"^old_conv\.", "conv."),)
    IGNORED_KEYS = (r".*\.position_ids",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int = 4
        num_layers: int = 2
        use_conv: bool = True
        sizes: tuple[int, ...] = (1, 2)
        FIXED: ClassVar = {"act_fn": "silu"}

    def __init__(self, config, *, rngs):
        self.config = config
        self.table = Embedding(5, config.width, rngs=rngs)
        if config.use_conv:
            self.conv = Conv(config.width, 3, 2, rngs=rngs)
        self.blocks = Stack(lambda rngs: Block(config.width, rngs=rngs), config.num_layers, rngs=rngs)


@pytest.fixture
def folder(tmp_path):
    """A folder with random weights in torch layout."""
    rng = np.random.default_rng(0)
    shapes = {"table.weight": (5, 4), "conv.weight": (3, 4, 2, 2), "conv.bias": (3,)}
    for i in range(2):
        shapes |= {f"blocks.{i}.norm.weight": (4,), f"blocks.{i}.norm.bias": (4,),
                   f"blocks.{i}.net.0.weight": (8, 4), f"blocks.{i}.net.0.bias": (8,)}
    save_file({key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}, tmp_path / FILE)
    config = {"_class_name": "Model", "_diffusers_version": "0.0.0", "width": 4, "sizes": [1, 2], "act_fn": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        assert ours[key].tobytes() == value.tobytes(), key


def test_load_then_export_is_identical(folder):
    model = load_model(Model, folder)
    assert model.config == Model.Config()
    tensors = load_file(folder / FILE)
    np.testing.assert_array_equal(model.blocks.stacked.net[0].kernel[1], tensors["blocks.1.net.0.weight"].T)
    np.testing.assert_array_equal(model.conv.kernel[1, 0, 2], tensors["conv.weight"][:, 2, 1, 0])
    assert_same(to_torch(split(model)[1]), tensors)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load_is_identical(folder, tmp_path, dtype):
    params = split(load_model(Model, folder, dtype=dtype))[1]
    save_model(tmp_path / "copy", Model, Model.Config(), params, dtype=dtype)
    again = load_model(Model, tmp_path / "copy", dtype=dtype)
    assert again.config == Model.Config()
    assert_same(jax.tree.map(np.asarray, split(again)[1]), jax.tree.map(np.asarray, params))
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["_class_name"] == "Model" and config["act_fn"] == "silu" and config["sizes"] == [1, 2]


class Recorded:
    """A tensor that notes how many of its entries are read at a time."""

    def __init__(self, array):
        self.array, self.shape, self.sizes = array, array.shape, []

    def __getitem__(self, index):
        part = self.array[index]
        self.sizes.append(part.size)
        return part


@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stacked"])
@pytest.mark.parametrize("spatial", [(), (3,), (3, 5), (3, 5, 7)], ids=["Linear", "Conv1d", "Conv2d", "Conv3d"])
def test_kernels_of_any_rank(spatial, stacked):
    """[*spatial, in, out] is torch's [out, in, *spatial] and back; on a mesh each device reads its own slice only."""
    rng, layers = np.random.default_rng(0), 2 if stacked else 1
    keys = [f"blocks.{i}.conv.weight" for i in range(layers)] if stacked else ["conv.weight"]
    name = "blocks.stacked.conv.kernel" if stacked else "conv.kernel"
    tensors = {key: rng.standard_normal((16, 8, *spatial), dtype=np.float32) for key in keys}
    ours = np.stack([np.moveaxis(tensor, (0, 1), (-1, -2)) for tensor in tensors.values()])
    ours = ours if stacked else ours[0]

    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    wheres = (None, NamedSharding(mesh, sharding.param_spec(name, ours.shape, mesh)),
              NamedSharding(mesh, P(*(None,) * (ours.ndim - 2), "tensor", "fsdp")))
    assert wheres[1].spec == P(*(None,) * (ours.ndim - 2), "fsdp", "tensor")
    for where in wheres:
        recorded = {key: Recorded(tensor) for key, tensor in tensors.items()}
        params = from_torch(recorded, {name: jax.ShapeDtypeStruct(ours.shape, jnp.float32, sharding=where)})
        np.testing.assert_array_equal(params[name], ours)
        assert_same(to_torch(params), tensors)
        for tensor in recorded.values():
            assert tensor.sizes == [tensor.array.size // 8] * 8 if where else [tensor.array.size]


def test_a_wrong_rank_is_an_error():
    abstract = {"conv.kernel": jax.ShapeDtypeStruct((3, 4, 6), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"'conv\.weight' has shape \(6, 4, 3, 1\), expected \(6, 4, 3\)"):
        from_torch({"conv.weight": np.zeros((6, 4, 3, 1), np.float32)}, abstract)


def shard(folder):
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    shards = {"a.safetensors": list(tensors)[:5], "b.safetensors": list(tensors)[5:]}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    return tensors


def test_shards(folder):
    tensors = shard(folder)
    assert_same(to_torch(split(load_model(Model, folder))[1]), tensors)


def test_released_spellings_and_ignored_keys(folder):
    tensors = load_file(folder / FILE)

    def change(tensors):
        tensors["old_conv.weight"] = tensors.pop("conv.weight")
        tensors["table.position_ids"] = np.arange(5)

    rewrite(folder, change)
    assert_same(to_torch(split(load_model(Model, folder))[1]), tensors)


def drop(tensors):
    tensors["blocks.1.net.00.bias"] = tensors.pop("blocks.1.net.0.bias")


def transpose(tensors):
    tensors["blocks.1.net.0.weight"] = np.ascontiguousarray(tensors["blocks.1.net.0.weight"].T)


def broadcastable(tensors):
    tensors["blocks.1.norm.bias"] = tensors["blocks.1.norm.bias"][:1].copy()


def add(tensors):
    tensors["blocks.2.norm.bias"] = np.zeros(4, np.float32)


def both_spellings(tensors):
    tensors["old_conv.weight"] = tensors["conv.weight"]


@pytest.mark.parametrize(("change", "message"), [
    (both_spellings, r"'(old_)?conv\.weight' and '(old_)?conv\.weight' both mean 'conv\.weight'"),
    (drop, r"missing key 'blocks\.1\.net\.0\.bias'; nearest: 'blocks\.1\.net\.00\.bias'"),
    (transpose, r"'blocks\.1\.net\.0\.weight' has shape \(4, 8\), expected \(8, 4\)"),
    (broadcastable, r"'blocks\.1\.norm\.bias' has shape \(1,\), expected \(4,\)"),
    (add, r"1 unknown key\(s\), first 'blocks\.2\.norm\.bias'; nearest: 'blocks\.[01]\.norm\.bias'"),
])
def test_wrong_keys(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"{folder}: {message}"):
        load_model(Model, folder)


def test_truncated_files(folder):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"{folder / FILE}: cannot be read .*copy the file again"):
        load_model(Model, folder)
    (folder / FILE).write_bytes(content)
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{folder / 'b.safetensors'}: cannot be read"):
        load_model(Model, folder)
    index = folder / f"{FILE}.index.json"
    index.write_text(index.read_text()[:-10])
    with pytest.raises(CheckpointError, match=f"{index}: cannot be read as JSON"):
        load_model(Model, folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'nowhere' / 'config.json'}: cannot be read as JSON"):
        load_model(Model, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'nowhere'}: no such folder"):
        convert.Folder(tmp_path / "nowhere")
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{folder}: none of {FILE}, model.safetensors"):
        load_model(Model, folder)


@pytest.mark.parametrize(("config", "message"), [
    ({"num_layer": 3}, "unknown key 'num_layer' for Config; nearest known key: num_layers"),
    ({"act_fm": "silu"}, "unknown key 'act_fm' for Config; nearest known key: act_fn"),
    ({"act_fn": "gelu"}, "act_fn='gelu' is not supported, only 'silu'"),
])
def test_wrong_config(folder, config, message):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{folder / 'config.json'}: {message}"):
        load_model(Model, folder)
    (folder / "config.json").write_text(json.dumps(config)[:-1])
    with pytest.raises(CheckpointError, match=f"{folder / 'config.json'}: cannot be read as JSON"):
        load_model(Model, folder)


@pytest.mark.parametrize(("spelling", "value"), [("true", True), ("False", False), (False, False)])
def test_booleans_written_as_strings(spelling, value):
    assert parse_config(Model.Config, {"use_conv": spelling, "sizes": [3]}) == Model.Config(use_conv=value, sizes=(3,))
