"""The Colab notebook: well-formed, without outputs, and its cells run top to bottom, with tiny runs."""

import json
import linecache
import os
import re
import subprocess
from pathlib import Path

import pytest

from dancegrpo_jax.metrics import read_metrics

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "launch" / "colab.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TINY = {"data.prompts_per_step": 2, "data.group_size": 2, "optim.microbatch": 4, "sampler.steps": 3, "sampler.eval_steps": 2,
        "algorithm.grpo.window": 1, "evals.eval.count": 2, "evals.eval.batch": 12, "evals.eval.every": 0,
        "log.prompts_in_grid": 2}


def execute(cell, namespace: dict) -> None:
    """As IPython does: errors and `inspect` find the cell's lines."""
    source, name = "".join(cell["source"]), f"<cell {cell['id']}>"
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    exec(compile(source, name, "exec"), namespace)


@pytest.fixture
def parameters(tmp_path, monkeypatch) -> dict:
    """The cell of settings, executed: names and values that a test may replace, as papermill does."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))  # otherwise a cell would set it for all tests
    namespace = {}
    execute(next(cell for cell in CODE if "parameters" in cell["metadata"].get("tags", ())), namespace)
    return namespace


def test_format_and_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    assert "\n!" not in text and "\n%" not in text  # plain Python


def test_it_asks_for_the_repository(parameters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY is empty: put the git URL of your copy"):
        execute(CODE[1], parameters)
    with pytest.raises(subprocess.CalledProcessError):
        execute(CODE[1], parameters | {"REPOSITORY": str(tmp_path / "nothing")})


def test_interrupting_a_cell_stops_the_command_after_its_checkpoint(parameters, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = parameters | {"INSTALL": False}
    execute(CODE[1], namespace)
    printed = []

    def interrupted_print(text, end):
        printed.append(text)
        if text == "going\n":
            raise KeyboardInterrupt

    namespace["print"] = interrupted_print
    child = ("import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143))); "
             "print('going', flush=True); signal.pause()")
    with pytest.raises(RuntimeError, match="status 143"):
        namespace["run"]("-c", child)
    assert printed == ["going\n", "saved\n"]


def test_cells_run_top_to_bottom(parameters, tmp_path, monkeypatch, capsys):
    import matplotlib
    from matplotlib import pyplot
    matplotlib.use("Agg")
    for name in ("launch", "dancegrpo_jax", "configs", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for my_rewards, which lies here and not in the repository
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    namespace = parameters | {"STEPS": 2, "OWN_STEPS": 1, "INSTALL": False,
                              "OVERRIDES": tuple(f"--config.{key}={value}" for key, value in TINY.items())}
    for cell in CODE[1:]:
        execute(cell, namespace)
    out = capsys.readouterr().out
    assert "CpuDevice" in out and "blue and red: [ 1.  -0.5]" in out
    assert len(pyplot.get_fignums()) == 7  # two curves, before and after twice, the samples
    pyplot.close("all")
    first, own = (read_metrics(f"runs/{name}/metrics.jsonl") for name in ("shapes_flow", "own_shapes_flow"))
    assert max(record["step"] for record in first) == 2
    assert any("train/reward/own/mean" in record for record in own)
    assert os.listdir("runs/samples")
