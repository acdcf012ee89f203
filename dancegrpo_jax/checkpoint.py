"""The whole run state on disk, through orbax: asynchronous saves, checked restores, stopping on a signal.

A checkpoint is the folder `<directory>/<step>/` with the items `state` (the arrays, under flat names such as
`trainable.blocks.attn.to_q.kernel`) and `meta` (JSON: the caller's, and shape and dtype of every array), plus
`checksums.json`. Orbax writes into a temporary folder and renames it at the end, so a folder of that name is complete;
orbax does not notice a flipped bit in array data, hence the checksums, written just before that rename.
"""

import json
import logging
import os
import signal
import threading
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dancegrpo_jax.models.files.convert import CheckpointError
from dancegrpo_jax.multihost import on_primary

__all__ = ["CheckpointError", "Checkpointer", "PreemptionGuard"]

CHECKSUMS = "checksums.json"
BLOCK = 1 << 24

# Orbax logs the same failure several times, a hundred lines of traceback each; here it is raised as one line.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
# Replicas share the writing of an array, each a slice that is compiled for every shape and device: only where it pays.
ocp.type_handlers.register_type_handler(jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=BLOCK),
                                        override=True)


class Checkpointer:
    """Saves and restores run state in one folder.

    Every process of a pod must make the same calls in the same order, on a folder that all of them see.

    Args:
      directory: created at the first save; a local path or one that `epath` knows (gs://...).
      keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, directory, keep: int = 2):
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._bad: list[int] = []

    def save(self, step: int, state, meta: Mapping[str, Any] | None = None) -> None:
        """Starts writing a checkpoint and returns when the arrays are copied, so their buffers may be donated.

        Waits for the previous save first. Older checkpoints go only after the new one is complete.

        Args:
          step: the iteration; must be larger than that of every usable checkpoint in the folder.
          state: pytree of jax.Arrays; global arrays on a pod.
          meta: anything JSON can hold.
        Raises: CheckpointError if this save, or the one before, failed (disk full, no permission, ...); older
          checkpoints stay as they were and a later save may succeed.
        """
        self.wait()
        leaves = _named(state)
        record = {"meta": dict(meta or {}), "arrays": {name: _describe(leaf) for name, leaf in leaves.items()}}
        self._saving = step
        try:
            saved = self._open().save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(record)))
        except Exception as error:
            raise self._failed(error) from error
        if not saved:
            raise CheckpointError(f"{self.directory}: step {step} was not saved: the folder already holds step "
                                  f"{self._manager.latest_step()}; resume from it, or use another run_dir")

    def restore_latest(self, abstract_state) -> tuple[int, Any, dict] | None:
        """Restores the newest intact checkpoint; damaged and half-written ones are skipped with a warning.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings (or of arrays), as the config builds it; the
            checkpoint may have been written on another mesh.
        Returns: (step, state, meta), or None if there is no usable checkpoint.
        Raises: CheckpointError if an intact checkpoint does not fit `abstract_state`, naming the first key that
          differs, or cannot be read.
        """
        expected = _named(abstract_state)
        step, record = self._newest()
        if step is None:
            return None
        folder = self.directory / str(step)
        _compare(folder, record["arrays"], expected)
        restored = _read(folder, expected)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in expected])
        return step, state, record["meta"]

    def restore_weights(self, abstract_params) -> tuple[int, Any]:
        """The weights to evaluate and export of the newest intact checkpoint, without optimizer state: (step, params).

        They are the moving average, if the run keeps one. Args and errors as for `restore_latest`; also
        CheckpointError if there is no usable checkpoint.
        """
        step, record = self._newest()
        if step is None:
            raise CheckpointError(f"{self.directory}: no usable checkpoint; train first, or name another run")
        folder = self.directory / str(step)
        prefix = "ema." if any(name.startswith("ema.") for name in record["arrays"]) else "trainable."
        expected = {prefix + name: leaf for name, leaf in _named(abstract_params).items()}
        _compare(folder, {name: text for name, text in record["arrays"].items() if name.startswith(prefix)}, expected)
        restored = _read(folder, expected)
        return step, jax.tree.unflatten(jax.tree.structure(abstract_params), [restored[name] for name in expected])

    def wait(self) -> None:
        """Returns when the save under way is complete. Raises: CheckpointError if it failed."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits, then frees the threads. Raises: CheckpointError if the last save failed."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # ---------------------------------------------------------------- inside

    def _newest(self) -> tuple[int | None, dict | None]:
        """(step, record) of the newest intact checkpoint; damaged and half-written ones are skipped with a warning."""
        self.wait()
        self._bad = []
        steps, unfinished = self._scan()
        for name in unfinished:
            _warn(f"checkpoint {self.directory / name} is half-written; it is skipped")
        for step in sorted(steps, reverse=True):
            folder = self.directory / str(step)
            record, reason = on_primary(lambda folder=folder: _check(folder))
            if not reason:
                return step, record
            _warn(f"checkpoint {folder} is skipped: {reason}")
            self._bad.append(step)
        if steps:
            _warn(f"{self.directory} holds no usable checkpoint")
        return None, None

    def _open(self) -> ocp.CheckpointManager:
        """The manager, made at the first save: restoring alone must not touch the folder of a run that is writing."""
        if self._manager is None:
            on_primary(self._set_aside)
            self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)))
        return self._manager

    def _set_aside(self) -> None:
        """Renames the checkpoints that a restore skipped: orbax would refuse to save the same step again."""
        for step in self._bad:
            folder, count = self.directory / str(step), 0
            while (target := self.directory / f"damaged-{step}-{count}").exists():
                count += 1
            if folder.exists():
                folder.rename(target)
        self._bad = []

    def _write_checksums(self) -> None:
        """Called by orbax, in its thread, when all items are written and before the folder gets its final name."""
        if jax.process_index() != 0:
            return
        _, unfinished = self._scan()
        names = [name for name in unfinished if name.startswith(f"{self._saving}.")] or [str(self._saving)]
        for name in names:
            folder = self.directory / name
            (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder, _files(folder)), indent=0))

    def _scan(self) -> tuple[list[int], list[str]]:
        """Steps of the complete folders, and names of those that orbax did not finish."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        return ([int(name) for name in names if name.isdigit()],
                [name for name in names if ocp.utils.TMP_DIR_SUFFIX in name])

    def _failed(self, error: Exception) -> CheckpointError:
        """Forgets the manager, whose state after a failure is undefined; the next save makes a new one."""
        self._manager = None
        steps = sorted(self._scan()[0])
        kept = f"steps {', '.join(map(str, steps))} are kept" if steps else "there is no older one"
        return CheckpointError(f"{self.directory}: saving step {self._saving} failed: {_one_line(error)}; {kept}")


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # orbax wraps; the cause says "No space left on device"
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: " + (text if len(text) < 300 else f"{text[:100]} ... {text[-180:]}")


def _named(tree) -> dict:
    """Leaves by dotted path. Flat names spare the checkpoint from python types: a renamed NamedTuple still restores."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise ValueError("state: two leaves have the same dotted path; rename one of the keys")
    return leaves


def _describe(leaf) -> str:
    return f"{jax.numpy.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _target(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read(folder, expected: dict) -> dict:
    """The arrays named in `expected`, with its shardings; other arrays of the checkpoint are not read."""
    targets = {name: _target(leaf) for name, leaf in expected.items()}
    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(folder / "state", args=ocp.args.PyTreeRestore(
                item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets), partial_restore=True))
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder} is intact but unreadable: {_one_line(error)}") from error


def _compare(folder, stored: dict[str, str], expected: dict) -> None:
    """Orbax would silently cast another dtype, so shapes and dtypes are compared here."""
    for name in sorted(stored.keys() | expected.keys()):
        there, here = stored.get(name, "nothing"), _describe(expected[name]) if name in expected else "nothing"
        if there != here:
            raise CheckpointError(f"checkpoint {folder} does not fit this config: {name} is {there} in the checkpoint "
                                  f"and {here} in the config; use the run's own config or another run_dir")


# ---------------------------------------------------------------- integrity


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """The files of all items; what lies beside the items is orbax's own and changes after the checksums are taken."""
    found, todo = {}, [path for path in folder.iterdir() if path.is_dir()]
    while todo:
        for path in todo.pop().iterdir():
            if path.is_dir():
                todo.append(path)
            else:
                found[path.relative_to(folder).as_posix()] = path
    return found


def _checksum(path: epath.Path) -> list[int]:
    """[size, crc32]: it must catch accidents, not forgery, and run at the speed of the disk."""
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _checksums(folder: epath.Path, files: dict[str, epath.Path]) -> dict[str, list[int]]:
    with ThreadPoolExecutor(8) as pool:  # zlib and reads release the GIL
        return dict(zip(files, pool.map(_checksum, files.values()), strict=True))


def _check(folder: epath.Path) -> tuple[dict | None, str | None]:
    """(record, None) of an intact checkpoint, else (None, reason)."""
    try:
        noted = json.loads((folder / CHECKSUMS).read_text())
        files = _files(folder)
        missing = sorted(noted.keys() - files.keys())
        if missing:
            return None, f"{missing[0]} is missing"
        found = _checksums(folder, {name: files[name] for name in noted})
        for name in sorted(noted):
            if found[name] != noted[name]:
                what = "size" if found[name][0] != noted[name][0] else "checksum"
                return None, f"{name} has the wrong {what}"
        record = json.loads((folder / "meta" / "metadata").read_text())
        return {"meta": dict(record["meta"]), "arrays": dict(record["arrays"])}, None
    except FileNotFoundError as error:
        return None, f"half-written, {os.path.basename(error.filename or CHECKSUMS)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"unreadable ({_one_line(error)})"


# ---------------------------------------------------------------- stopping


class PreemptionGuard:
    """While entered, SIGTERM and SIGINT only set `requested`, for the loop to save and stop; a second one exits.

    On a pod a signal may reach one process only, so ask `reached(step)`, which all processes answer alike.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # python allows handlers nowhere else
            # With several processes SIGTERM belongs to jax's own notifier, which `reached` consults.
            chosen = self.SIGNALS if jax.process_count() == 1 else ()
            self._old = {number: signal.signal(number, self._handle) for number in chosen}
        return self

    def __exit__(self, *exception):
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def reached(self, step: int) -> bool:
        """True if the run should save and stop at this step. On a pod every process must ask at every step."""
        return self.requested if jax.process_count() == 1 else ocp.multihost.reached_preemption(step)

    def _handle(self, number, frame):
        if self.requested:
            os._exit(128 + number)  # neither finally blocks nor threads: the user asked twice
        self.requested = True
        os.write(2, b"stop requested: finishing this iteration (once more to exit at once)\n")
