"""Checkpoints: exact resume, damaged ones skipped, misfits refused, failed saves harmless, signals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import checkpoint as ck

ROOT = Path(ck.__file__).parents[1]


class State(NamedTuple):
    step: jax.Array
    trainable: dict
    opt_state: tuple
    ema: dict | None


def make_state(value: int, width: int = 48) -> State:
    key = jax.random.key(value)
    weights = {"block.attn.to_q.kernel": jax.random.normal(key, (3, width, 64)),
               "scale": jnp.full((5,), value, jnp.bfloat16)}
    return State(jnp.int32(value), weights, optax.adamw(1e-3).init(weights), None)


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def restore(folder, like=None):
    """(result, warnings as text)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ck.Checkpointer(folder).restore_latest(abstract(like or make_state(0)))
    return result, [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 10 and 20."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with ck.Checkpointer(folder, keep=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make_state(step), {"iteration": step, "note": ["ü", 1.5]})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_restores_the_newest_bit_for_bit(saved):
    (step, state, meta), messages = restore(saved)
    assert (step, meta, messages) == (20, {"iteration": 20, "note": ["ü", 1.5]}, [])
    assert_same(state, make_state(20))


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "none") == (None, [])
    assert not (tmp_path / "none").exists()


def test_keep_donated_buffers_and_saving_after_restore(folder):
    checkpoints = ck.Checkpointer(folder, keep=2)
    step, state, _ = checkpoints.restore_latest(abstract(make_state(0)))
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = advance(state)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(21, state)
    advance(state)  # overwrites the buffers while the save is under way
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["20", "21"]
    (step, state, meta), _ = restore(folder)
    assert (step, meta) == (21, {})
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_saving_compiles_nothing(tmp_path, caplog):
    """Replicas that share the writing of small arrays would compile a slice for every shape and device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = {str(n): jax.device_put(np.ones((8, n), np.float32), jax.NamedSharding(mesh, jax.P())) for n in range(1, 4)}
    writer = ck.Checkpointer(tmp_path)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        writer.save(1, state)
        writer.wait()
    assert not [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]


def test_same_step_twice_is_refused(folder):
    with pytest.raises(ck.CheckpointError, match="20 was not saved"), ck.Checkpointer(folder) as checkpoints:
        checkpoints.save(20, make_state(1))


# ---------------------------------------------------------------- damage


def array_file(step_folder: Path) -> Path:
    return max((path for path in step_folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


DAMAGE = {
    "array flipped": (lambda f: flip(array_file(f)), "wrong checksum"),
    "array cut": (lambda f: cut(array_file(f)), "wrong size"),
    "array deleted": (lambda f: array_file(f).unlink(), "is missing"),
    "array database flipped": (lambda f: flip(next((f / "state" / "d").iterdir())), "wrong checksum"),
    "tree metadata flipped": (lambda f: flip(f / "state" / "_METADATA"), "wrong checksum"),
    "meta flipped": (lambda f: flip(f / "meta" / "metadata"), "meta/metadata has the wrong checksum"),
    "meta deleted": (lambda f: (f / "meta" / "metadata").unlink(), "meta/metadata is missing"),
    "checksums cut": (lambda f: cut(f / ck.CHECKSUMS), "unreadable"),
    "checksums not an object": (lambda f: (f / ck.CHECKSUMS).write_text("[1]"), "unreadable"),
    "checksums deleted": (lambda f: (f / ck.CHECKSUMS).unlink(), "half-written, checksums.json is missing"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "half-written"),
    "not committed": (lambda f: f.rename(f.with_name("20.orbax-checkpoint-tmp")), "checkpoint-tmp is half-written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_skipped_and_the_one_before_used(folder, kind):
    damage, reason = DAMAGE[kind]
    damage(folder / "20")
    (step, state, meta), messages = restore(folder)
    assert (step, meta["iteration"]) == (10, 10)
    assert_same(state, make_state(10))
    assert len(messages) == 1 and str(folder / "20") in messages[0] and reason in messages[0], messages


def test_all_damaged(folder):
    for step in ("10", "20"):
        flip(array_file(folder / step))
    result, messages = restore(folder)
    assert result is None and len(messages) == 3 and "no usable checkpoint" in messages[-1]


def test_a_run_that_fell_back_can_save_the_damaged_step_again(folder):
    flip(array_file(folder / "20"))
    with ck.Checkpointer(folder) as checkpoints, pytest.warns(RuntimeWarning, match="wrong checksum"):
        checkpoints.restore_latest(abstract(make_state(0)))
        assert (folder / "20").exists()  # reading changes nothing
        checkpoints.save(20, make_state(7))
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "damaged-20-0"]
    (step, state, _), messages = restore(folder)
    assert step == 20 and int(state.step) == 7 and not messages


# ---------------------------------------------------------------- misfits


def changed(**leaves):
    state = make_state(0)
    return state._replace(trainable=state.trainable | leaves)


@pytest.mark.parametrize(("like", "words"), [
    (changed(scale=jnp.zeros(6, jnp.bfloat16)), ["trainable.scale is bfloat16[5]", "bfloat16[6]"]),
    (changed(scale=jnp.zeros(5)), ["trainable.scale is bfloat16[5]", "float32[5]"]),
    (changed(lora=jnp.zeros(5)), ["trainable.lora is nothing", "float32[5]"]),
    (make_state(0)._replace(trainable={"scale": jnp.zeros(5, jnp.bfloat16)}),
     ["trainable.block.attn.to_q.kernel", "nothing"]),
    (make_state(0)._replace(ema=make_state(0).trainable), ["ema.block.attn.to_q.kernel is nothing"]),
], ids=["shape", "dtype", "extra", "missing", "ema"])
def test_misfit_raises_and_names_the_first_key(saved, like, words):
    with pytest.raises(ck.CheckpointError, match="does not fit") as caught:
        restore(saved, like)
    message = str(caught.value)
    assert "\n" not in message and str(saved / "20") in message
    for word in words:
        assert word in message, message


def test_leaves_with_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same dotted path"):
        ck.Checkpointer(tmp_path).save(1, {"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})


# ---------------------------------------------------------------- saves that fail


def test_full_disk_keeps_older_checkpoints_and_later_saves_work(folder):
    checkpoints = ck.Checkpointer(folder, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writing more fails, as on a full disk
    try:
        failure = "saving step 30 failed.*File too large.*steps 10, 20 are kept"
        with pytest.raises(ck.CheckpointError, match=failure) as caught:
            checkpoints.save(30, make_state(30))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert restore(folder)[0][0] == 20
    checkpoints.save(40, make_state(40))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["20", "40"]


KILLED = """
import os, sys
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path[:0] = [{tests!r}, {root!r}]
import test_checkpoint as t
assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
def shard(leaf):
    return jax.device_put(leaf, NamedSharding(mesh, P(None, "fsdp") if leaf.ndim == 3 else P()))
checkpoints = t.ck.Checkpointer({folder!r})
checkpoints.save(1, jax.tree.map(shard, t.make_state(1)), {{"seed": 3}})
checkpoints.close()
checkpoints._write_checksums = lambda: os._exit(9)  # all written, not committed
checkpoints.save(2, jax.tree.map(shard, t.make_state(2)))
checkpoints.close()
"""


def test_killed_while_saving_on_four_devices_then_restored_on_one(tmp_path):
    folder = tmp_path / "checkpoints"
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"})
    assert done.returncode == 9, done.stderr
    (step, state, meta), messages = restore(folder)
    assert (step, meta) == (1, {"seed": 3})
    assert_same(state, make_state(1))
    assert any("half-written" in message for message in messages)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_the_flag_and_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in ck.PreemptionGuard.SIGNALS}
    with ck.PreemptionGuard() as guard:
        assert not guard.requested and not guard.reached(1)
        os.kill(os.getpid(), number)
        assert guard.requested and guard.reached(1)
    assert {n: signal.getsignal(n) for n in ck.PreemptionGuard.SIGNALS} == before
    with pytest.raises(RuntimeError), ck.PreemptionGuard():
        raise RuntimeError
    assert {n: signal.getsignal(n) for n in ck.PreemptionGuard.SIGNALS} == before


def test_second_signal_exits_at_once():
    code = ("import os, signal, sys\nfrom dancegrpo_jax.checkpoint import PreemptionGuard\n"
            "with PreemptionGuard() as guard:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    print(guard.requested, flush=True)\n"
            "    try: os.kill(os.getpid(), signal.SIGTERM)\n    finally: print('still here', flush=True)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "True\n" and "stop requested" in done.stderr


def test_checksums_cover_every_item_file(saved):
    noted = json.loads((saved / "20" / ck.CHECKSUMS).read_text())
    files = {path.relative_to(saved / "20").as_posix() for item in ("state", "meta")
             for path in (saved / "20" / item).rglob("*") if path.is_file()}
    assert noted.keys() == files
