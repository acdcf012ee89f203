"""What a run leaves to read: metrics.jsonl, TensorBoard events, one line per iteration, its config.

On a pod only process 0 writes and prints; the calls are the same everywhere.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dancegrpo_jax.config import KEYS, ConfigError, flatten

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections", "numpy",
            "transformers", "safetensors", "pillow")


# ------------------------------------------------------------------------------------------ the run's folder


def start_run_dir(run_dir, config: ConfigDict) -> Path:
    """Makes the folder of a run and writes config.json and versions.json; an existing one must hold the same config.

    Number of iterations, cadence of evaluation, checkpoints and logs, mesh and folder name may differ (`Key.changeable`).

    Returns: the folder.
    Raises: ConfigError naming the keys that differ, or if the folder cannot be written or read.
    """
    folder, name = Path(run_dir), f"config.run_dir={str(run_dir)!r}"
    file = folder / "config.json"
    mine = json.loads(json.dumps(flatten(config)))  # as it comes back: tuples become lists
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            theirs = flatten(ConfigDict(json.loads(file.read_text(encoding="utf-8"))))
            _compare(folder, theirs, mine)
        if jax.process_index() == 0:
            _write_json(file, config.to_dict())
            _write_json(folder / "versions.json", versions())
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}; choose a folder that can be written") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: its config.json cannot be read ({error}); use another folder") from error
    return folder


def _compare(folder: Path, theirs: Mapping, mine: Mapping) -> None:
    names = [name for name in sorted(theirs.keys() | mine.keys()) if theirs.get(name) != mine.get(name)
             and not (name in KEYS and KEYS[name].changeable)]
    if names:
        listed = ", ".join(f"{name} ({json.dumps(theirs.get(name))} there, {json.dumps(mine.get(name))} now)"
                           for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ConfigError(f"config.run_dir={str(folder)!r}: it holds a run with another config: {listed}; set the old "
                          "values to resume it, or choose another run_dir")


def _write_json(file: Path, value) -> None:
    """Through a temporary file, so that a crash leaves the old content."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter, platform, kind and number of devices."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind,
                    "devices": str(jax.device_count()), "processes": str(jax.process_count())}


# ------------------------------------------------------------------------------------------ the writer


class MetricWriter:
    """Writes scalars and images of a run to metrics.jsonl, TensorBoard and, if asked, Weights & Biases.

    metrics.jsonl has one JSON object a line, `{"step": n, name: value, ...}`, floats in full precision. A disk that is
    full must not end a run: a file that cannot be written is warned about once.

    Args:
      run_dir: the run's folder, existing.
      tensorboard: write events into `<run_dir>/tensorboard`.
      wandb_project: project name; empty = off.
      resume_step: the step the run goes on after: later lines are dropped, and a torn last one. None starts afresh.
    Raises: ConfigError if wandb is asked for and not installed.

    `last` is the latest value of every scalar, `{name: value}`.
    """

    def __init__(self, run_dir, tensorboard: bool = True, wandb_project: str = "", resume_step: int | None = None):
        if wandb_project and importlib.util.find_spec("wandb") is None:
            raise ConfigError(f"config.log.wandb={wandb_project!r}: the package wandb is not installed; "
                              "pip install wandb, or set --config.log.wandb=")
        self.folder = Path(run_dir)
        self.last: dict[str, float] = {}
        self._sinks: list = []
        if jax.process_index() != 0:
            return
        after = -1 if resume_step is None else resume_step
        file = self.folder / "metrics.jsonl"
        self._sinks.append(_Guard(file.name, lambda: _JsonLines(file, after), permanent=False))
        if tensorboard:
            self._sinks.append(_Guard("TensorBoard events", lambda: _TensorBoard(self.folder / "tensorboard", after)))
        if wandb_project:
            self._sinks.append(_Guard("wandb", lambda: _Wandb(self.folder, wandb_project)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the scalars of one step: python, numpy or jax numbers."""
        plain = {name: value if isinstance(value, (int, float)) else np.asarray(value).item()
                 for name, value in values.items()}
        self.last |= plain
        for sink in self._sinks:
            sink.call("scalars", step, plain)

    def images(self, step: int, tag: str, image) -> None:
        """Writes one picture, a PIL image or uint8 [H, W, 3]; also kept as `<run_dir>/images/<tag>/<step>.png`."""
        array = np.asarray(image)
        for sink in self._sinks:
            sink.call("images", step, tag, array)

    def close(self) -> None:
        """Flushes and closes all files."""
        for sink in self._sinks:
            sink.call("close")
        self._sinks = []


class _Guard:
    """Keeps a sink's errors from ending the run: warns once, and leaves a `permanent` failure alone from then on."""

    def __init__(self, name: str, make, permanent: bool = True):
        self.name, self.permanent, self.warned, self.sink = name, permanent, False, None
        try:
            self.sink = make()
        except Exception as error:
            self.warn(error)

    def call(self, method: str, *args) -> None:
        if self.sink is None:
            return
        try:
            getattr(self.sink, method)(*args)
        except Exception as error:  # whatever a tracker raises: the run is worth more
            self.warn(error)
            if self.permanent:
                self.sink = None

    def warn(self, error: Exception) -> None:
        if not self.warned:
            warnings.warn(f"{self.name} cannot be written ({error}); the run goes on without", RuntimeWarning,
                          stacklevel=4)
        self.warned = True


class _JsonLines:
    """metrics.jsonl and the pictures."""

    def __init__(self, file: Path, after: int):
        self.folder, self.torn = file.parent, False
        kept = [line for line, record in read_lines(file) if record["step"] <= after] if file.exists() else []
        part = file.with_name(file.name + ".part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(part, file)
        # A buffer would write a failed line again later.
        self.file = open(file, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def scalars(self, step: int, values: Mapping) -> None:
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        torn, self.torn = self.torn, True
        if self.file.write(b"\n" * torn + line) != torn + len(line):
            raise OSError("no space left")
        self.torn = False

    def images(self, step: int, tag: str, array: np.ndarray) -> None:
        folder = self.folder / "images" / tag
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{step:06d}.png")

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    """Event files, written in this thread: tensorboardX's own writer thread dies at a full disk, and then its queue
    blocks the caller for ever."""

    def __init__(self, folder: Path, after: int):
        # tensorboardX imports torch where it is installed, for seconds and in vain; None makes that import fail.
        hidden = "torch" not in sys.modules and sys.modules.setdefault("torch", None) is None
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        finally:
            if hidden:
                del sys.modules["torch"]
        folder.mkdir(parents=True, exist_ok=True)
        self.summary, self.event = summary, Event
        self.writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{uuid.uuid4().hex[:6]}")
        # Hides what an interrupted run wrote after the step this one goes on from.
        start = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(wall_time=time.time(), step=after + 1, session_log=start))

    def _write(self, step: int, summaries) -> None:
        for value in summaries:
            self.writer.write_event(self.event(wall_time=time.time(), step=step, summary=value))
        self.writer.flush()

    def scalars(self, step: int, values: Mapping) -> None:
        self._write(step, [self.summary.scalar(name, value) for name, value in values.items()])

    def images(self, step: int, tag: str, array: np.ndarray) -> None:
        self._write(step, [self.summary.image(tag, array, dataformats="HWC")])

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """The run's identity is kept in its folder, so that a resumed run continues the same curves."""

    def __init__(self, folder: Path, project: str):
        import wandb
        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        self.wandb = wandb
        self.run = wandb.init(project=project, id=file.read_text(), name=folder.name, dir=str(folder), resume="allow",
                              config=json.loads((folder / "config.json").read_text()))
        # Own step axis: wandb's counter cannot go back to where a resumed run starts.
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping) -> None:
        self.run.log({"step": step, **values})

    def images(self, step: int, tag: str, array: np.ndarray) -> None:
        self.run.log({"step": step, tag: self.wandb.Image(array)})

    def close(self) -> None:
        self.run.finish()


def read_lines(file) -> list[tuple[str, dict]]:
    """(line, record) of every whole line of a metrics.jsonl; torn ones (killed run, full disk) are left out."""
    lines = []
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            lines.append((line, record))
    return lines


def read_metrics(file) -> list[dict]:
    """The records of a metrics.jsonl, in order."""
    return [record for _, record in read_lines(file)]


# ------------------------------------------------------------------------------------------ time and progress


class StepTimer:
    """Seconds per phase of one iteration. Starts at construction.

    `with timer("update"): ...` times a block; `lap(name)` books the time since the last lap, block or the start;
    `wait(name, arrays)` first waits until the arrays are computed, since jax returns before they are.
    """

    def __init__(self):
        self._start = self._mark = time.perf_counter()
        self.phases: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name] = self.phases.get(name, 0.0) + now - self._mark
        self._mark = now

    def wait(self, name: str, arrays) -> None:
        jax.block_until_ready(arrays)
        self.lap(name)

    @contextmanager
    def __call__(self, name: str):
        self._mark = time.perf_counter()
        try:
            yield self
        finally:
            self.lap(name)

    def scalars(self) -> dict[str, float]:
        """{"time/<phase>": seconds, ..., "time/total": seconds since construction}."""
        return {f"time/{name}": seconds for name, seconds in self.phases.items()} | {
            "time/total": time.perf_counter() - self._start}


class Progress:
    """One line per iteration on stdout.

    Args: total: iterations of the run; start: those already done. headline: scalars of training that are shown beside the
    rewards. stream: where to print.
    """

    def __init__(self, total: int, start: int = 0, headline: Sequence[str] = (), stream=None):
        self.total, self.headline, self.stream = total, headline, stream
        self._durations: list[float] = []

    def update(self, step: int, record: Mapping[str, float]) -> None:
        """Prints iteration `step` (1-based) from its scalars, named as in metrics.jsonl; missing ones are skipped."""
        parts = [f"{record[name]:.4g} {name.split('/')[2]}" for name in record
                 if name.startswith("train/reward/") and name.endswith("/mean")]
        parts = ["reward " + ", ".join(parts)] if parts else []
        parts += _brief({name: record[f"train/{name}"] for name in self.headline if f"train/{name}" in record})
        if "perf/samples_per_second" in record:
            parts.append(f"{record['perf/samples_per_second']:.3g} samples/s")
        seconds = record.get("time/total")
        if seconds is not None:
            phases = " ".join(f"{name.removeprefix('time/')} {value:.2g}" for name, value in record.items()
                              if name.startswith("time/") and name != "time/total")
            parts.append(f"{seconds:.3g} s ({phases})")
            self._durations.append(seconds)
            # The first iteration compiles; until there are others, it is the best guess.
            recent = sorted(self._durations[1:][-20:] or self._durations)
            parts.insert(0, f"eta {_clock(recent[len(recent) // 2] * (self.total - step))}")
        self.note(step, " | ".join(parts))

    def note(self, step: int, text: str) -> None:
        """Prints any other line, with the iteration in front."""
        if jax.process_index() == 0:
            print(f"[{step:>{len(str(self.total))}}/{self.total}] {text}", file=self.stream or sys.stdout, flush=True)


TOGETHER = {  # scalars that are shorter in one
    ("ratio/mean", "ratio/min", "ratio/max"):  # they are 1 and a little
        lambda mean, low, high: f"ratio-1 {mean - 1:+.1e} [{low - 1:+.1e}, {high - 1:+.1e}]",
    ("clip_fraction/low", "clip_fraction/high"): lambda low, high: f"clipped {low + high:.1%}"}


def _brief(values: Mapping[str, float]) -> list[str]:
    """Scalars as text, in their order."""
    together = [names for names in TOGETHER if set(names) <= values.keys()]
    parts = []
    for name, value in values.items():
        names = next((names for names in together if name in names), None)
        if names is None:
            parts.append(f"{name} {value:.3g}")
        elif name == names[0]:
            parts.append(TOGETHER[names](*(values[each] for each in names)))
    return parts


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
