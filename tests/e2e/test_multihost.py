"""Two processes with four devices each, on loopback: the same run as one process with eight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.e2e.test_train import ROOT, command, environment, launch, training_metrics
from tests.pipelines import write_pipeline

# Sums over devices round by their order. Adam would make whole steps of gradients that are nothing but rounding, hence the
# eps.
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=-1", "--config.evals.eval.every=0", "--config.steps=4",
        "--config.model.remat=none",
        "--config.optim.eps=1e-3",
        '--config.rewards={"color": {}, "bright": {"reward": "tests.e2e.test_multihost:brightness"}}')


def brightness(images, prompts):
    """A host reward that needs the whole group of a prompt."""
    assert len(images) == 4 and len(set(prompts)) == 1
    corner = images[:, :8, :8].astype(np.float64)  # corners differ more within a group than whole pictures
    return corner.mean((1, 2, 3)) / corner.mean()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("multihost")
    write_pipeline(root / "flow", "flow")
    return root


@pytest.fixture(scope="module")
def single(workspace):
    result = launch(workspace, "single", *MESH, devices=8)
    assert result.returncode == 0, result.stderr
    return training_metrics(workspace / "single")


def start(workspace, run, *overrides, processes=2, devices=4) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [subprocess.Popen(
        command(workspace, run, *MESH, *overrides), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(workspace, devices) | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                                               "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(i)})
        for i in range(processes)]


def wait_for(line: str, process: subprocess.Popen) -> None:
    for found in process.stdout:
        if found.startswith(line):
            return
    raise AssertionError(process.stderr.read())


def finish(processes, timeout=600) -> list[tuple[int, str]]:
    """(status, stderr) of each."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()


def assert_same_metrics(found, expected):
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (theirs["step"], key)


def test_two_processes_train_like_one(workspace, single):
    for status, error in finish(start(workspace, "double")):
        assert status == 0, error
    assert_same_metrics(training_metrics(workspace / "double"), single)
    assert json.loads((workspace / "double" / "versions.json").read_text())["processes"] == "2"
    assert (workspace / "double" / "report.html").exists()


def test_sigterm_to_one_stops_both_at_one_step_and_fewer_devices_resume(workspace, single):
    processes = start(workspace, "stopped", "--config.checkpoint.every=100")
    wait_for("[1/", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    for status, error in finish(processes):
        assert status == 143, error
    steps = [path.name for path in (workspace / "stopped" / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(steps) == 1 and int(steps[0]) < 4
    result = launch(workspace, "stopped", *MESH, "--config.checkpoint.every=100", devices=4)
    assert result.returncode == 0, result.stderr
    assert_same_metrics(training_metrics(workspace / "stopped"), single)


def test_when_one_dies_the_other_says_so_and_the_run_resumes(workspace, single):
    processes = start(workspace, "died")
    wait_for("[2/", processes[0])
    processes[1].kill()
    began = time.monotonic()
    (status, error), _ = finish(processes, timeout=150)
    assert status != 0 and time.monotonic() - began < 120
    assert "another process" in error
    for status, error in finish(start(workspace, "died")):
        assert status == 0, error
    assert_same_metrics(training_metrics(workspace / "died"), single)


def test_incomplete_variables_are_an_error():
    result = subprocess.run([sys.executable, "launch/train.py", "--config=configs/shapes_flow.py"], cwd=ROOT, text=True,
                            capture_output=True, timeout=120, env=os.environ | {
                                "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234"})
    assert result.returncode == 2 and "JAX_NUM_PROCESSES, JAX_PROCESS_ID" in result.stderr
