"""Run folder, metric files, resume, progress line."""

import importlib.util
import io
import json
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dancegrpo_jax import config as c
from dancegrpo_jax import metrics as m
from dancegrpo_jax.algorithms.grpo import GRPO
from dancegrpo_jax.algorithms.nft import DiffusionNFT


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def events(folder):
    """Every (step, tag, value or None) in the TensorBoard files, read record by record."""
    import struct

    from tensorboardX.proto.event_pb2 import Event
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            size, = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12:12 + size])
            data = data[16 + size:]
            if event.HasField("session_log"):
                found.append((event.step, "start", None))
            found += [(event.step, value.tag, value.simple_value if value.HasField("simple_value") else None)
                      for value in event.summary.value]
    return found


def test_scalars_are_exact_and_flushed(tmp_path):
    writer = m.MetricWriter(tmp_path, tensorboard=False)
    values = {"a": 1 / 3, "b": np.float32(0.1), "c": jnp.float32(2) / 3, "d": 7, "e": float("nan")}
    writer.scalars(1, values)
    record, = (json.loads(line) for line in lines(tmp_path))  # before close
    assert record.pop("step") == 1 and math.isnan(record.pop("e"))
    assert record == {"a": 1 / 3, "b": float(np.float32(0.1)), "c": float(jnp.float32(2) / 3), "d": 7}
    writer.scalars(2, {"a": 5.0})
    assert writer.last["a"] == 5.0 and writer.last["d"] == 7
    writer.close()


def test_resume_drops_later_and_torn_lines(tmp_path):
    whole = m.MetricWriter(tmp_path, tensorboard=False)
    for step in range(5):
        whole.scalars(step, {"x": step / 7})
    whole.close()
    expected = lines(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "x": 0.7')
    writer = m.MetricWriter(tmp_path, tensorboard=False, resume_step=2)
    assert lines(tmp_path) == expected[:3]
    for step in (3, 4):
        writer.scalars(step, {"x": step / 7})
    writer.close()
    assert lines(tmp_path) == expected  # byte for byte what an uninterrupted run writes
    m.MetricWriter(tmp_path, tensorboard=False).close()
    assert lines(tmp_path) == []  # not resumed: nothing of the old run stays


def test_tensorboard_and_pictures(tmp_path):
    writer = m.MetricWriter(tmp_path, tensorboard=True)
    writer.scalars(3, {"train/x": 0.5})
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    writer.images(3, "eval/before", Image.fromarray(picture))
    writer.close()
    assert events(tmp_path) == [(0, "start", None), (3, "train/x", 0.5), (3, "eval/before", None)]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images/eval/before/000003.png")), picture)
    m.MetricWriter(tmp_path, tensorboard=True, resume_step=2).close()
    assert (3, "start", None) in events(tmp_path)  # hides step 3 of the first run


def test_full_disk_warns_once_and_the_run_goes_on(tmp_path):
    writer = m.MetricWriter(tmp_path, tensorboard=True)
    writer.scalars(1, {"x": 1.0})
    jsonl, board = (guard.sink for guard in writer._sinks)

    class Full(io.RawIOBase):
        """A file on a full disk: takes half of the line, or none."""

        def __init__(self, real, share):
            self.real, self.share = real, share

        def write(self, data):
            if not self.share:
                raise OSError(28, "No space left on device")
            return self.real.write(data[:len(data) // self.share])

        def flush(self):
            raise OSError(28, "No space left on device")

    real = jsonl.file
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        board.writer._py_recordio_writer._writer = Full(None, 0)
        for step, share in ((2, 2), (3, 0), (4, 2)):
            jsonl.file = Full(real, share)
            writer.scalars(step, {"x": float(step)})
        jsonl.file = real
        for step in range(5, 30):  # more than any queue would hold
            writer.scalars(step, {"x": float(step)})
        writer.close()
    messages = sorted(str(warning.message) for warning in caught if warning.category is RuntimeWarning)
    assert len(messages) == 2 and "metrics.jsonl" in messages[1]
    assert "TensorBoard events cannot be written" in messages[0]
    assert [record["step"] for record in m.read_metrics(tmp_path / "metrics.jsonl")] == [1, *range(5, 30)]


def test_wandb_is_asked_for_but_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(c.ConfigError, match="config.log.wandb='p': the package wandb is not installed; pip install"):
        m.MetricWriter(tmp_path, wandb_project="p")


def test_wandb_calls(tmp_path, monkeypatch):
    """Against a stand-in with the interface that is used: init, define_metric, log, Image, finish."""
    calls = []

    class Run:
        define_metric = log = finish = lambda self, *args, **kwargs: calls.append((args, kwargs))

    stand_in = type("wandb", (), {"init": staticmethod(lambda **kwargs: calls.append(("init", kwargs)) or Run()),
                                  "Image": staticmethod(lambda array: array.shape)})
    monkeypatch.setitem(__import__("sys").modules, "wandb", stand_in)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True)
    m.start_run_dir(tmp_path, c.default())
    for _ in range(2):
        writer = m.MetricWriter(tmp_path, tensorboard=False, wandb_project="p")
        writer.scalars(4, {"x": 1.0})
        writer.images(4, "grid", np.zeros((2, 2, 3), np.uint8))
        writer.close()
    init = [arguments for name, arguments in calls if name == "init"]
    assert init[0]["project"] == "p" and init[0]["resume"] == "allow" and init[0]["id"] == init[1]["id"]
    assert (({"step": 4, "x": 1.0},), {}) in calls and (({"step": 4, "grid": (2, 2, 3)},), {}) in calls


# ---------------------------------------------------------------- the run's folder


def make_config(**values):
    config = c.default()
    config.rewards = {"verifier": {"weight": 1.0}}
    for name, value in values.items():
        c.override(config, name.replace("__", "."), value)
    return config


def test_run_dir(tmp_path):
    folder = m.start_run_dir(tmp_path / "a" / "run", make_config())
    assert json.loads((folder / "config.json").read_text())["rewards"] == {"verifier": {"weight": 1.0}}
    found = json.loads((folder / "versions.json").read_text())
    assert {"python", "jax", "flax", "device", "devices"} <= found.keys()
    assert not any("/" in value for value in found.values())  # no paths
    m.start_run_dir(folder, make_config(steps="500", evals__eval__every="3", checkpoint__keep="9", log__images_every="1",
                                        mesh__fsdp="2"))
    assert json.loads((folder / "config.json").read_text())["steps"] == 500
    with pytest.raises(c.ConfigError, match="^[^\n]*$") as caught:
        m.start_run_dir(folder, make_config(optim__learning_rate="3e-4", rewards__verifier__weight="2"))
    message = str(caught.value)
    assert "optim.learning_rate (1e-05 there, 0.0003 now)" in message
    assert "rewards" in message and "steps" not in message
    assert json.loads((folder / "config.json").read_text())["steps"] == 500  # a refused config changes nothing


def test_run_dir_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(c.ConfigError, match="config.run_dir=.*file"):
        m.start_run_dir(tmp_path / "file" / "run", make_config())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(c.ConfigError, match="config.json cannot be read"):
        m.start_run_dir(tmp_path, make_config())


# ---------------------------------------------------------------- time, progress, pictures


def test_timer(monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(m.time, "perf_counter", lambda: next(clock))
    timer = m.StepTimer()
    timer.wait("rollout", jnp.zeros(1))
    timer.lap("decode")
    with timer("update"):
        pass
    assert timer.scalars() == {"time/rollout": 2.0, "time/decode": 1.0, "time/update": 4.0, "time/total": 20.0}


def test_progress_is_one_informative_line():
    out = io.StringIO()
    progress = m.Progress(120, start=10, headline=GRPO.headline, stream=out)
    record = {"train/reward/verifier/mean": 0.51234, "train/reward/verifier/std": 9.0, "train/ratio/mean": 1.0,
              "train/ratio/min": 0.999, "train/ratio/max": 1.002,
              "train/clip_fraction/low": 0.01, "train/clip_fraction/high": 0.02, "time/rollout": 2.0,
              "time/update": 1.5, "perf/samples_per_second": 12.0}
    progress.update(11, record | {"time/total": 90.0})  # compiles
    progress.update(12, record | {"time/total": 4.0})
    progress.update(13, {})
    first, second, third = out.getvalue().splitlines()
    assert first.startswith("[ 11/120] eta 2:43:30 |") and second.startswith("[ 12/120] eta 0:07:12 |")
    for text in ("reward 0.5123 verifier", "ratio-1 +0.0e+00 [-1.0e-03, +2.0e-03]", "clipped 3.0%", "12 samples/s",
                 "4 s (rollout 2 update 1.5)"):
        assert text in second, second
    assert third.startswith("[ 13/120]")


def test_progress_shows_what_the_algorithm_says():
    out = io.StringIO()
    progress = m.Progress(10, headline=DiffusionNFT.headline, stream=out)
    record = {"train/reward/own/mean": 0.5, "train/loss": 0.123456, "train/grad_norm": 2.0, "train/kl_base": 1e-5,
              "train/towards": 3.0}
    progress.update(1, record | {"time/total": 1.0})
    assert out.getvalue() == "[ 1/10] eta 0:00:09 | reward 0.5 own | loss 0.123 | grad_norm 2 | kl_base 1e-05 | 1 s ()\n"
