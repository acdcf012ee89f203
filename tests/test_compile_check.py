"""What compile_check reads from programs against closed forms, its arithmetic, and real compiles for TPU topologies."""

import functools
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax import config as c
from dancegrpo_jax.aot import flops, hlo, report, roofline
from dancegrpo_jax.aot.adapt import adapt, microbatches
from dancegrpo_jax.aot.phases import SHIPPED, Phase, Run, offline_config
from dancegrpo_jax.aot.topology import CHIPS, Topology, get_topology
from dancegrpo_jax.data import rows_of
from dancegrpo_jax.guidance import predict
from dancegrpo_jax.models.files.convert import match_keys
from dancegrpo_jax.rewards.set import RewardSet
from dancegrpo_jax.rollout import encode
from dancegrpo_jax.session import configured_pipeline

ROOT = Path(__file__).parents[1]
OPTIMISED = True


# ------------------------------------------------------------------------------------------ FLOPs


def looped(w, x):
    def body(x, w):
        return jnp.tanh(x @ w), None
    return jax.lax.scan(jax.checkpoint(body), x, w)[0].sum()


def test_flops_of_loops_and_recomputation():
    """A scan of n matmuls: forward n, with gradients of both arguments 3 n, and n more for the recomputation."""
    w, x = jnp.zeros((5, 16, 16)), jnp.zeros((8, 16))
    one = 2 * 8 * 16 * 16
    assert flops.count(jax.make_jaxpr(looped)(w, x)) == 5 * one
    assert flops.count(jax.make_jaxpr(jax.grad(looped, argnums=(0, 1)))(w, x)) == 5 * 4 * one


def test_flops_of_convolutions_branches_and_nested_loops():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert flops.count(jax.make_jaxpr(convolve)(jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 7)))) == 2 * (2 * 4 * 4 * 7) * 27
    assert flops.count(jax.make_jaxpr(branches)(jnp.zeros((4, 4)))) == 2 * 2 * 4**3
    nested = jax.make_jaxpr(lambda x: jax.lax.map(lambda row: jax.lax.fori_loop(0, 3, lambda i, y: y @ y, row), x))
    assert flops.count(nested(jnp.zeros((6, 4, 4)))) == 6 * 3 * 2 * 4**3


def test_flops_of_a_kernel():
    """A Pallas kernel counts its body at every point of its grid."""
    from jax.experimental import pallas as pl

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    block = pl.BlockSpec((8, 16), lambda i: (i, 0))
    call = pl.pallas_call(kernel, grid=(4,), in_specs=[block, pl.BlockSpec((16, 16), lambda i: (0, 0))], out_specs=block,
                          out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32))
    assert flops.count(jax.make_jaxpr(call)(jnp.zeros((32, 16)), jnp.zeros((16, 16)))) == 2 * 32 * 16 * 16


def test_flops_of_what_nothing_uses():
    product_and_sum = jax.jit(lambda x: (x @ x, x + 1))
    assert flops.count(jax.make_jaxpr(lambda x: product_and_sum(x)[1])(jnp.zeros((4, 4)))) == 0
    assert flops.count(jax.make_jaxpr(lambda x: product_and_sum(x)[0])(jnp.zeros((4, 4)))) == 2 * 4**3


def preset(name, **overrides):
    return c.load([f"--config={ROOT}/configs/{name}.py", *(f"--config.{key.replace('__', '.')}={value}"
                                                        for key, value in overrides.items())])


@functools.cache
def shipped(name):
    """(pipeline, trainable, frozen) of a preset, abstract."""
    pipeline = configured_pipeline(offline_config(preset(name)))
    return pipeline, *pipeline.abstract()


def forward_flops(name) -> float:
    """FLOPs of one evaluation of a preset's denoiser for one sample, guidance included."""
    pipeline, trainable, frozen = shipped(name)
    cond = encode.eval_shape(pipeline, frozen, pipeline.abstract_inputs(rows_of([""])), jax.random.key(0))
    latents = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    return flops.count(jax.make_jaxpr(functools.partial(predict, pipeline))(trainable, frozen, latents, time, cond))


def test_flux_forward():
    """37.28 TFLOP a sample at 720 x 720: 32.75 of layers, 4.51 of attention over 2537 tokens, 0.02 of the rest."""
    assert forward_flops("flux_hps") == pytest.approx(37.28e12, rel=1e-3)


def test_stable_diffusion_forward():
    """0.80 TFLOP an evaluation at 512 x 512 (0.40 T multiply-adds), twice with guidance."""
    assert forward_flops("sd_hps") == pytest.approx(2 * 0.80e12, rel=0.02)


# ------------------------------------------------------------------------------------------ shipped architectures


@pytest.mark.parametrize("name, parts", [
    ("flux_hps", {"transformer": "flux_transformer", "vae": "flux_vae", "text_encoder": "clip_l_text",
                  "text_encoder_2": "t5xxl_encoder"}),
    ("sd_hps", {"unet": "sd14_unet", "vae": "sd14_vae", "text_encoder": "clip_l_text"})])
def test_shipped_architectures_have_the_released_shapes(name, parts):
    pipeline, trainable, frozen = shipped(name)
    assert pipeline.parts.keys() == parts.keys()
    for part, manifest in parts.items():
        params = frozen.get(part) or trainable[part]
        shapes = json.loads(gzip.decompress((ROOT / "tests" / "manifests" / f"{manifest}.json.gz").read_bytes()))
        model = pipeline.parts[part].module
        matched = match_keys(shapes, params, rename=getattr(model, "LEGACY_KEYS", ()),
                             ignore=getattr(model, "IGNORED_KEYS", ()))
        assert matched.keys() == params.keys()
    assert pipeline.schedule(16, 0.0) is not None


def test_no_downloads():
    with pytest.raises(c.ConfigError, match="FLUX.1-dev"):
        offline_config(preset("flux_hps", model__folder="black-forest-labs/FLUX.9"))
    assert offline_config(preset("flux_hps")).model.folder == str(SHIPPED / "black-forest-labs/FLUX.1-dev")


def test_rewards_without_files():
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"))
    config = {"hps": {"dtype": "bfloat16"}, "jpeg": {}, "aesthetic": {"head": "x"}, "clip_score": {"model": "some/where"}}
    found = RewardSet.abstract(config, mesh)
    assert list(found.params) == ["hps", "aesthetic"] and len(found.notes) == 2
    assert sum(leaf.size for leaf in found.params["hps"].values()) == 986_109_441  # CLIP ViT-H/14
    assert found.rewards["hps"].prepare(rows_of("ab")).shape == (2, 77)


# ------------------------------------------------------------------------------------------ HLO


def test_loop_turns_multiply_what_a_body_moves():
    """Two nested loops on eight CPU devices: an all-gather in the inner one, a sum over devices after each of the outer."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("fsdp",), ()))

    def program(w, x):
        def outer(x, _):
            def inner(i, x):
                return jnp.tanh(jax.lax.with_sharding_constraint(jnp.sin(w + x[0, 0]), whole) @ x)
            return jax.lax.fori_loop(0, 7, inner, x), None
        return jax.lax.scan(outer, x, None, length=3)[0]

    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((64, 2), jnp.float32, sharding=whole)
    text = jax.jit(program).lower(w, x).compile().as_text()
    gathers = [each for each in hlo.analyse(text, 8).collectives if each.kind == "all-gather"]
    assert sum(each.count * each.bytes for each in gathers) == 21 * 64 * 64 * 4
    assert {each.group for each in gathers} == {tuple(range(8))}


HLO = """HloModule jit_step, is_scheduled=true

%cond (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused_slice (weights: bf16[57,16,32], index: s32[]) -> bf16[16,32] {
  %weights = bf16[57,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %index = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,16,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%weights, %index, %zero, %zero), dynamic_slice_sizes={1,16,32}
}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[16,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %reduced = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %kept = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%reduced), dynamic_slice_sizes={16,32}
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, /*index=2*/bf16[57,16,32]{2,1,0}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %stack = bf16[57,16,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %mine = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %kernel = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} custom-call(%mine), custom_call_target="tpu_custom_call", backend_config={"body": "
func {
  %0 = memref.load
 }
}"}
  %whole = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%mine), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  %scattered = bf16[16,32]{1,0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %scattered)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %t = (s32[], f32[4,8]{1,0:T(8,128)}) tuple(%a)
  %loop = (s32[], f32[4,8]{1,0:T(8,128)}) while(%t), condition=%cond, body=%body
  %start = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[32,8]{1,0} all-gather-done(%start)
  ROOT %swap = f32[4,8]{1,0} collective-permute(%a), source_target_pairs={{3,5},{5,3}}
}
"""  # noqa: E501 (as libtpu writes it)


def test_tpu_text():
    """As libtpu writes it: trips from the condition, a kernel's lines, all-reduce-scatter, sliced stacks, three spellings."""
    traffic = hlo.analyse(HLO, 8)
    assert set(traffic.collectives) == {
        hlo.Collective("all-gather", 64 * 32 * 2, (0, 2, 4, 6), 9),
        hlo.Collective("reduce-scatter", 64 * 32 * 2, (0, 1, 2, 3), 9),
        hlo.Collective("all-gather", 32 * 8 * 4, tuple(range(8)), 1),
        hlo.Collective("collective-permute", 4 * 8 * 4, (3, 5), 1)}
    weights = 16 * 32 * 2  # a layer's slice is read and written, then read by the kernel, which writes on chip
    assert traffic.hbm_bytes == 9 * (weights + 4 + weights + weights)


@pytest.mark.parametrize("spelling, group", [
    ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)), ("replica_groups={{4,6},{5,7}}", (4, 6)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)), ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)), ("replica_groups=mesh['x'=8] {'x':(2)4}", (0, 1, 2, 3)),
    ("replica_groups=mesh['x'=8] {'x':(1)2}", (0, 4)), ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y'}",
                                                   (0, 2, 4, 6, 1, 3, 5, 7))])
def test_replica_groups(spelling, group):
    assert hlo.first_group(spelling, 8) == group


def test_not_hlo():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.analyse("nothing", 8)
    with pytest.raises(ValueError, match="unknown spelling"):
        hlo.first_group("replica_groups=some_new_way", 8)


# ------------------------------------------------------------------------------------------ roofline and verdict


class Device:
    def __init__(self, *coords):
        self.coords = coords


def torus(name, *shape):
    devices = tuple(Device(*place) for place in np.ndindex(*shape))
    return Topology(f"{name}:{'x'.join(map(str, shape))}", CHIPS[name], shape, devices)


def test_links():
    """Both links of a ring, one of a line; v5p closes to rings in multiples of 4, v5e and v6e at 16."""
    v5p, v6e = torus("v5p", 4, 4, 4), torus("v6e", 8, 8)
    plane = [(x, y, 0) for x in range(4) for y in range(4)]
    assert roofline.links(plane, v5p.shape, v5p.chip.ring) == 4
    assert roofline.links(plane[:4], v5p.shape, v5p.chip.ring) == 2
    assert roofline.links(plane[:2], v5p.shape, v5p.chip.ring) == 1
    assert roofline.links([(x, y) for x in range(8) for y in range(8)], v6e.shape, v6e.chip.ring) == 2
    assert roofline.links([(x, 0) for x in range(16)], (16, 16), 16) == 2


def test_collective_seconds():
    """Closed forms on the 16 chips of a plane of v5p, four links of 100 GB/s."""
    v5p = torus("v5p", 4, 4, 4)
    devices = sorted(v5p.devices, key=lambda device: device.coords[::-1])  # the first 16 are the plane z = 0
    def seconds(kind, group=range(16)):
        return roofline.collective_seconds(hlo.Collective(kind, 16 * 10**9, tuple(group), 2), v5p, devices)
    assert seconds("all-gather") == seconds("reduce-scatter") == pytest.approx(2 * 15 / 400)
    assert seconds("all-reduce") == pytest.approx(2 * 2 * 15 / 400)
    assert seconds("all-to-all") == pytest.approx(2 * 15 / 4 / 100)
    assert seconds("collective-permute", range(2)) == pytest.approx(2 * 16 / 100)


def test_times():
    times = roofline.times(459e12, hlo.Traffic([], 2765 * 10**9 // 2), torus("v5p", 4, 4, 4), [])
    assert (times.compute, times.memory, times.ici) == pytest.approx((1, 0.5, 0))
    assert times.bound == pytest.approx(1) and times.expected == pytest.approx(1 / 0.61)
    assert times._replace(ici=4.0).bound == 4 and times._replace(ici=4.0).expected == pytest.approx(4 + 1 / 0.61)


def finished_run(total_gb: float, error: str = "", alias: int = 10**9) -> Run:
    """A run of 4 chips and 10 iterations whose phases take a second at the peak (rollout) and half a second (update)."""
    topology = torus("v5p", 2, 2, 1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 4, 1), ("data", "fsdp", "tensor"))
    config = preset("flux_hps", steps=10, data__chunks=2)
    memory = {"argument": 0, "output": 0, "temp": 0, "code": 0, "peak": 0, "alias": alias, "total": int(total_gb * 1e9)}
    return Run(topology, mesh, config, [
        Phase("rollout", 2, memory=memory, flops=459e12, model_flops=459e12, traffic=hlo.Traffic([], 0)),
        Phase("update", 3, memory={} if error else memory, flops=459e12 / 2, model_flops=459e12 / 4,
              traffic=None if error else hlo.Traffic([], 0), error=error)], {"trainable": 0}, 10**9, [])


def test_iteration():
    run = report.summarize(finished_run(50))
    iteration = run["iteration"]
    assert iteration["bound_seconds"] == pytest.approx(3.5) and iteration["expected_seconds"] == pytest.approx(3.5 / 0.61)
    assert iteration["mfu_bound"] == pytest.approx(2.75 / 3.5) and iteration["hfu"] == pytest.approx(0.61)
    assert iteration["samples_per_second"] == pytest.approx(192 * 0.61 / 3.5)
    assert iteration["chip_hours"] == pytest.approx(4 * 10 * 3.5 / 0.61 / 3600)
    assert "Nothing was measured on a TPU" in report.text(run, "x") and "| x | v5p:2x2x1 |" in report.table(["x"], [run])


def test_price_of_rescoring():
    """One more forward pass that "auto" may spare: the report gives the iteration with it and without."""
    run = finished_run(50)
    plain = report.summarize(run)["iteration"]
    assert "expected_seconds_without_rescore" not in plain
    run.phases.insert(1, Phase("rescore", 1, memory=run.phases[0].memory, flops=459e12 / 4, model_flops=459e12 / 4,
                               traffic=hlo.Traffic([], 0)))
    summary = report.summarize(run)
    both = summary["iteration"]
    assert both["expected_seconds"] == pytest.approx(3.75 / 0.61)
    assert both["expected_seconds_without_rescore"] == pytest.approx(plain["expected_seconds"])
    assert both["hours_without_rescore"] == pytest.approx(plain["hours"])
    assert both["hours"] == pytest.approx(plain["hours"] * 3.75 / 3.5)
    (line,) = [line for line in report.text(summary, "x").splitlines() if line.startswith("rescore=auto")]
    assert "6.1 s with" in line and "5.7 s (0.02 h) once" in line
    run.config.algorithm = {"grpo": {"rescore": "always"}}  # nothing to be spared
    assert "expected_seconds_without_rescore" not in report.summarize(run)["iteration"]


def test_verdict():
    limit = CHIPS["v5p"].memory / 1e9
    assert report.summarize(finished_run(0.89 * limit))["fits"]
    tight = report.summarize(finished_run(0.91 * limit))
    assert not tight["fits"] and "does not fit: rollout needs" in tight["verdict"]
    refused = report.summarize(finished_run(1, error="Used 48.6G of 15.75G hbm"))
    assert not refused["fits"] and "compiler refuses update (Used 48.6G" in refused["verdict"] and "iteration" not in refused
    assert "Used 48.6G" in report.text(refused, "x") and "**no**" in report.table(["x"], [refused])
    assert any("donation failed" in note for note in report.summarize(finished_run(1, alias=0))["notes"])


def test_adapt():
    """What it changes passes the trainer's own check, and the rollout divides."""
    for name, devices, shape in (("flux_hps", 64, (4, 4, 4)), ("flux_hps", 256, (16, 16)), ("sd_hps", 256, (16, 16)),
                                 ("flux_hps_lora", 8, (2, 4)), ("flux_hps", 4, (2, 2, 1))):
        config, changed = adapt(preset(name), devices, shape)
        c.validate(config, devices)
        assert config.data.prompts_per_step // config.data.chunks * config.data.group_size % devices == 0
        assert config.evals.eval.batch % devices == 0
        if shape == (4, 4, 4):
            assert changed == {"mesh.fsdp": 16, "mesh.data": -1, "data.chunks": 1, "optim.microbatch": 64,
                               "evals.eval.batch": 64}
    assert microbatches(576, 64) == [64, 192, 576]


def test_unknown_topologies():
    for name in ("v9:4x4", "v5p", "v5p:4x4", "v5e:4x4x4"):
        with pytest.raises(ValueError, match=name):
            get_topology(name)


# ------------------------------------------------------------------------------------------ real compiles for TPUs


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tests/requirements.txt)")
@pytest.mark.parametrize("name, topology, phases, options", [
    ("flux_hps", "v5p:4x4x4", "rollout,update", []), ("flux_hps", "v6e:8x8", "rollout,update", []),
    ("sd_hps", "v5e:4x4", "encode,decode", ["--config.mesh.data=1", "--config.mesh.fsdp=-1"])])
def test_compiles_and_fits(name, topology, phases, options, tmp_path):
    """Some phases of each, as many as CI has time for; all are in docs/compile_reports.md.

    An all-reduce of gigabytes in the transformer would mean that the partitioner splits something else than the batch; only
    the gradients' sum on v6e is one.
    """
    out = tmp_path / "report.json"
    result = subprocess.run(
        [sys.executable, "launch/compile_check.py", f"--config=configs/{name}.py", f"--topology={topology}", "--adapt",
         f"--phases={phases}", f"--json={out}", *options], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (summary,) = json.loads(out.read_text())
    assert summary["fits"], result.stdout
    assert [phase["name"] for phase in summary["phases"]] == phases.split(",")
    for phase in summary["phases"] if name == "flux_hps" else ():
        reduced = sum(entry["bytes"] for kind, entry in phase["collectives"].items() if kind.startswith("all-reduce"))
        gathered = sum(entry["bytes"] for kind, entry in phase["collectives"].items() if kind.startswith("all-gather"))
        assert reduced < 0.1 * gathered or (topology, phase["name"]) == ("v6e:8x8", "update")
        assert 0.9 < phase["flops"] / phase["model_flops"] < 1.5
    if "update" in phases:
        assert summary["donated"] > 0.99
