"""Whole pipelines against diffusers: what is loaded from folders of either age, conditioning, ODE images, tiles, export."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from against_torch import assert_close  # noqa: E402

from dancegrpo_jax.data import rows_of  # noqa: E402
from dancegrpo_jax.models.files.convert import CheckpointError, Folder, save_params  # noqa: E402
from dancegrpo_jax.pipelines.base import make_pipeline  # noqa: E402
from dancegrpo_jax.rollout import decode, encode, sample  # noqa: E402
from tests.released import T5_LENGTH, respell, write_flux, write_sd  # noqa: E402

HEIGHT, WIDTH = 24, 40
PROMPTS = ["a red circle", "two blue squares above the green star and a yellow triangle"]
PART = {"sd": "unet", "flux": "transformer"}


@pytest.fixture(scope="module", params=["sd", "flux"])
def saved(request, tmp_path_factory):
    """(kind, diffusers' pipeline, its folder, a copy in the released spelling)."""
    root = tmp_path_factory.mktemp(request.param)
    reference = (write_sd if request.param == "sd" else write_flux)(root / "today")
    return request.param, reference, root / "today", respell(root / "today", root / "released")


def load(folder, name="", mesh=None, **options):
    pipeline = make_pipeline(folder, name, **{"height": HEIGHT, "width": WIDTH, "embedded_guidance": 3.5} | options)
    return pipeline, *pipeline.load(mesh=mesh)


def conditioning(pipeline, frozen, prompts):
    return encode(pipeline, frozen, pipeline.inputs(rows_of(prompts)), jax.random.key(0))


def reference_conditioning(kind, reference):
    if kind == "sd":
        return {"hidden": reference.encode_prompt(PROMPTS, "cpu", 1, False)[0]}
    hidden, pooled, _ = reference.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=T5_LENGTH)
    return {"hidden": hidden, "pooled": pooled}


def reference_images(kind, reference, noise, prompts=PROMPTS, **options):
    """Images [B, H, W, 3] of diffusers' pipeline from our initial noise [B, h, w, C]."""
    latents = torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 1).copy())
    if kind == "flux":
        latents = reference._pack_latents(latents, *latents.shape)
        options |= {"max_sequence_length": T5_LENGTH, "guidance_scale": 3.5}
    with torch.no_grad():
        return reference(prompts, height=HEIGHT, width=WIDTH, num_inference_steps=4, latents=latents, output_type="np",
                         **options).images


def our_images(pipeline, params, frozen, prompts=PROMPTS):
    """(images, initial noise) of 4 deterministic steps."""
    key = jax.random.key(3)
    latents = sample(pipeline, params, frozen, conditioning(pipeline, frozen, prompts), key, pipeline.schedule(4, 0))
    noise = jax.random.normal(jax.random.split(key)[0], latents.shape[1:])  # what the rollout draws first
    return pictures(pipeline, frozen, latents[-1]), noise


def pictures(pipeline, frozen, latents):
    """[B, H, W, 3] of latents [B, h, w, C]."""
    pixels = np.asarray(decode(pipeline, frozen, latents[None]))
    assert pixels.shape == (len(latents), 1, 1, HEIGHT, WIDTH, 3)
    return pixels[:, 0, 0]


def test_both_spellings_are_one_model(saved):
    _, _, today, released = saved
    (_, *ours), (_, *theirs) = load(today), load(released)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs)
    assert all(jax.tree.leaves(same)) and len(jax.tree.leaves(same)) > 50


def test_conditioning(saved):
    kind, reference, folder, _ = saved
    pipeline, _, frozen = load(folder)
    ours, negative = conditioning(pipeline, frozen, PROMPTS)
    assert negative is None and ours.keys() == reference_conditioning(kind, reference).keys()
    for name, expected in reference_conditioning(kind, reference).items():
        assert_close(np.asarray(ours[name]), expected.detach().numpy())


def test_images(saved):
    """Four steps of DDIM with classifier-free guidance, or of Euler with dynamic shift and guidance as an input."""
    kind, reference, folder, _ = saved
    options = {"guidance_scale": 5.0} if kind == "sd" else {}
    ours, noise = our_images(*load(folder, **options))
    theirs = reference_images(kind, reference, noise, **options)
    assert theirs.std() > 0.05
    assert_close(ours, theirs, 1e-4)


def test_tiles_and_slices(saved):
    """Tiles are diffusers' tiles; slices of the batch change nothing, on one device and on eight, padded or not."""
    _, reference, folder, _ = saved
    tiles, _, frozen = load(folder, decode_tile=16)
    latents = np.random.default_rng(0).standard_normal((3, *tiles.latent_shape), dtype=np.float32)
    reference.vae.tile_sample_min_size, reference.vae.tile_latent_min_size = 16, 8
    reference.vae.enable_tiling()
    raw = latents / reference.vae.config.scaling_factor + (reference.vae.config.shift_factor or 0)
    with torch.no_grad():
        expected = reference.vae.decode(torch.from_numpy(np.moveaxis(raw, -1, 1).copy())).sample
    reference.vae.disable_tiling()
    expected = np.clip(np.moveaxis(expected.numpy(), 1, -1) / 2 + 0.5, 0, 1)
    tiled = pictures(tiles, frozen, latents)
    assert_close(tiled, expected)

    slices, _, frozen = load(folder, decode_batch=2)
    sliced = pictures(slices, frozen, latents)
    whole, _, frozen = load(folder)
    assert_close(sliced, pictures(whole, frozen, latents), 1e-6)
    assert np.abs(sliced - tiled).max() > 1e-3  # tiles do differ


def test_slices_take_equal_parts_of_all_devices():
    from dancegrpo_jax import sharding
    mesh = sharding.make_mesh(data=8)
    x = jnp.arange(24 * 3.0).reshape(24, 3)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.map_slices(lambda part: 2 * part + part.shape[0], x, 2))(sharding.shard_batch(x, mesh))
    np.testing.assert_array_equal(y, 2 * x + 16)  # 2 on each of 8 devices at a time


def test_exported_weights_are_the_bytes_of_the_base(saved, tmp_path):
    """Loaded and written again, in shards: the same keys, dtypes and bytes."""
    kind, reference, folder, _ = saved
    part = PART[kind]
    _, params, _ = load(folder)
    assert list(params) == [part]
    save_params(tmp_path, params[part], "diffusion_pytorch_model.safetensors", max_shard_size="40KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    ours, base = Folder(tmp_path), Folder(folder / part)
    assert ours.dtypes() == base.dtypes()
    assert all(ours[key][...].tobytes() == base[key][...].tobytes() for key in base)
    shutil.copy(folder / part / "config.json", tmp_path)
    loaded = type(reference.components[part]).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in reference.components[part].state_dict().items())


def test_adapters_in_diffusers(saved, tmp_path):
    """Adapters written for diffusers give the images that we draw with them."""
    from dancegrpo_jax.models.files.lora import save_adapters
    kind, reference, folder, _ = saved
    more = r".*\.proj_out" if kind == "flux" else r".*ff\.net\.2"
    lora = {"rank": 4, "alpha": 8.0, "targets": (r".*attn.*\.to_(q|k|v|out\.0)", more)}
    pipeline, params, frozen = load(folder, lora=lora)
    rng = np.random.default_rng(5)
    params = {part: {name: value if name.endswith("lora_a") else
                     jnp.asarray(0.3 * rng.standard_normal(value.shape, dtype=np.float32)) for name, value in leaves.items()}
              for part, leaves in params.items()}
    ours, noise = our_images(pipeline, params, frozen)
    guidance = {"guidance_scale": 1.0} if kind == "sd" else {}
    base = reference_images(kind, reference, noise, **guidance)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_adapters(path, params, scale=pipeline.lora_scale)
    assert len(load_file(path)) == sum(1 if leaf.ndim == 2 else leaf.shape[0] for leaf in params[PART[kind]].values())
    reference.load_lora_weights(tmp_path)
    theirs = reference_images(kind, reference, noise, **guidance)
    reference.unload_lora_weights()
    assert np.abs(theirs - base).max() > 0.01
    assert_close(ours, theirs, 1e-4)


def test_streaming_onto_a_mesh(saved):
    """Each device reads its own part: sharded loading gives the arrays of plain loading."""
    from dancegrpo_jax import sharding
    _, _, folder, _ = saved
    (_, *plain), mesh = load(folder), sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _, *sharded = load(folder, mesh=mesh)
    split = [leaf for leaf in jax.tree.leaves(sharded) if leaf.addressable_shards[0].data.size < leaf.size]
    assert len(split) > 20
    jax.tree.map(np.testing.assert_array_equal, plain, sharded)


def test_half_precision_keeps_small_parameters(saved):
    """bfloat16 compute stores frozen matrices in bfloat16; what is trained, norms and biases stay fp32."""
    kind, _, folder, _ = saved
    _, trainable, frozen = load(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in trainable[PART[kind]].values()} == {"float32"}
    for name, leaf in frozen["vae"].items():
        assert leaf.dtype == (jnp.bfloat16 if name.endswith("kernel") else jnp.float32), name


def test_wrong_folders(saved, tmp_path):
    kind, _, folder, _ = saved
    other, missing = ("FluxPipeline", "transformer") if kind == "sd" else ("StableDiffusionPipeline", "unet")
    with pytest.raises(CheckpointError, match=f"{missing}: no such folder; config.model.folder"):
        load(folder, other)
    copy = shutil.copytree(folder, tmp_path / "copy")
    part = copy / PART[kind]
    shards = sorted(part.glob("*.safetensors"))
    data = shards[-1].read_bytes()
    shards[-1].write_bytes(data[:len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{shards[-1].name}: cannot be read"):
        load(copy)
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match=part.name):
        load(copy)
    config = json.loads((part / "config.json").read_text()) | {"num_layerz": 2}
    (part / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_layerz"):
        load(copy)
