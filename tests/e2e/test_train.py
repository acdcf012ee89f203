"""launch/train.py as a user runs it: on tiny random pipelines, killed, stopped, resumed, on one device and on eight."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dancegrpo_jax.metrics import read_metrics
from tests.pipelines import write_pipeline

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Tiny pipelines, and a compilation cache that spares the many launches most of their start-up."""
    root = tmp_path_factory.mktemp("e2e")
    for paradigm in ("flow", "diffusion"):
        write_pipeline(root / paradigm, paradigm)
    return root


def command(workspace: Path, run: str, *overrides: str, paradigm: str = "flow") -> list[str]:
    settings = {
        "run_dir": workspace / run, "steps": STEPS, "model.folder": workspace / paradigm, "sampler.steps": 4,
        "algorithm.grpo.window": 2, "sampler.eval_steps": 4, "model.lora.rank": 0,
        "data.prompts_per_step": 4, "data.group_size": 4, "data.chunks": 2, "optim.microbatch": 16,
        "evals.eval.count": 8, "evals.eval.batch": 8, "evals.eval.every": 3, "checkpoint.every": 1, "log.prompts_in_grid": 2,
        "optim.learning_rate": 1e-3, "optim.ema_decay": 0.9, "rewards": '{"color": {}, "jpeg": {"weight": 0.5}}',
        "evals.eval.rewards": '{"color": {}}'}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "launch/train.py", f"--config=configs/shapes_{paradigm}.py", *flags, *overrides]


def environment(workspace: Path, devices: int = 1) -> dict:
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
                         "JAX_COMPILATION_CACHE_DIR": str(workspace / "cache"),
                         "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def launch(workspace: Path, *args, devices: int = 1, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(workspace, *args, **kwargs), cwd=ROOT, env=environment(workspace, devices),
                          capture_output=True, text=True, timeout=600)


def training_metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    return [{key: value for key, value in record.items() if not key.startswith(("time/", "perf/"))}
            for record in read_metrics(run / "metrics.jsonl")]


def final_arrays(run: Path) -> dict:
    import jax
    import orbax.checkpoint as ocp
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda folder: int(folder.name))
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(newest / "state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def uninterrupted(workspace):
    result = launch(workspace, "whole", "--config.log.profile=2")
    assert result.returncode == 0, result.stderr
    return workspace / "whole"


def test_run_directory_is_complete(uninterrupted):
    for name in ("config.json", "versions.json", "metrics.jsonl", "before.png", "after.png", "report.html", "tensorboard"):
        assert (uninterrupted / name).exists(), name
    assert len(list(uninterrupted.glob("profile/**/*.xplane.pb"))) == 1
    records = [record for record in training_metrics(uninterrupted) if "train/loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert abs(record["train/ratio_first/min"] - 1) <= 1e-6 and abs(record["train/ratio_first/max"] - 1) <= 1e-6
        assert record["train/compiles/rollout"] == 1 and record["train/compiles/update"] == 1
    evaluated = [record["step"] for record in training_metrics(uninterrupted) if "eval/color/mean" in record]
    assert evaluated == [0, 3, 6]


def test_killed_at_random_moments_and_resumed_is_bitwise_the_same(workspace, uninterrupted):
    rng, run, kills = random.Random(0), workspace / "killed", 0
    for target in (1, 2, 3, 4, 5):  # kill after iteration `target` was logged: mostly while its checkpoint is written
        process = subprocess.Popen(command(workspace, "killed"), cwd=ROOT, env=environment(workspace),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 300
        while process.poll() is None and time.time() < deadline:
            file = run / "metrics.jsonl"
            if file.exists() and f'"step": {target}, "train/' in file.read_text():
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 5
    result = launch(workspace, "killed")
    assert result.returncode == 0, result.stderr
    assert training_metrics(run) == training_metrics(uninterrupted)
    expected, found = final_arrays(uninterrupted), final_arrays(run)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name


def test_sigterm_saves_and_exits_and_the_same_command_resumes(workspace, uninterrupted):
    run = workspace / "terminated"
    process = subprocess.Popen(command(workspace, "terminated", "--config.checkpoint.every=100"), cwd=ROOT,
                               env=environment(workspace), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("[2/"):
            process.send_signal(signal.SIGTERM)
            break
    out, error = process.communicate(timeout=300)
    assert process.returncode == 143, error  # not 0: a scheduler must start it again
    assert "run the same command to resume" in out
    assert not (run / "after.png").exists()
    result = launch(workspace, "terminated", "--config.checkpoint.every=100")
    assert result.returncode == 0, result.stderr
    assert training_metrics(run) == training_metrics(uninterrupted)


def test_corrupt_newest_checkpoint_is_skipped(workspace, uninterrupted):
    run = workspace / "corrupt"
    shutil.copytree(uninterrupted, run)
    for file in (run / "checkpoints" / str(STEPS)).rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-100])
    (run / "config.json").write_text((run / "config.json").read_text().replace("/whole", "/corrupt"))
    result = launch(workspace, "corrupt")
    assert result.returncode == 0, result.stderr
    assert f"checkpoints/{STEPS} is skipped" in result.stderr
    assert training_metrics(run) == training_metrics(uninterrupted)


def test_eight_devices_train_like_one(workspace):  # FLUX: tests/test_sharding.py, on every mesh
    runs = []
    for devices, mesh in ((1, ()), (8, ("--config.mesh.data=2", "--config.mesh.fsdp=4"))):
        run = f"diffusion_{devices}"
        result = launch(workspace, run, "--config.steps=2", "--config.evals.eval.every=0", "--config.optim.eps=1e-3", *mesh,
                        '--config.rewards={"color": {}}',  # continuous: JPEG sizes jump with one rounded pixel
                        devices=devices, paradigm="diffusion")
        assert result.returncode == 0, result.stderr
        runs.append([record for record in training_metrics(workspace / run) if "train/loss" in record])
    for one, eight in zip(*runs, strict=True):
        for key, value in one.items():
            if key.startswith(("train/reward", "train/advantage", "train/loss", "train/grad_norm", "train/ratio")):
                assert eight[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_command_line_errors_are_one_line(workspace):
    table = {
        "--config.smapler.eta=0.5": "sampler.eta",
        "--config.sampler.eta=-1": "sampler.eta",
        "--config.model.folder=/nowhere": "/nowhere",
        "--config.rewards={\"verifer\": {}}": "verifier",
        "--config.data.train=/nowhere.txt": "/nowhere.txt",
        "--config.mesh.fsdp=3": "mesh",
    }
    for override, named in table.items():
        result = launch(workspace, "bad", override)
        assert result.returncode == 2, (override, result.stderr)
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], (override, result.stderr)
        assert not (workspace / "bad" / "metrics.jsonl").exists()


def test_help(workspace):
    result = subprocess.run([sys.executable, "launch/train.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--config.sampler.eta" in result.stdout


def test_run_records_are_json(uninterrupted):
    assert json.loads((uninterrupted / "config.json").read_text())["steps"] == STEPS
    assert "jax" in json.loads((uninterrupted / "versions.json").read_text())
