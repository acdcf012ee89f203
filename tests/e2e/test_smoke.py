"""The shipped model, the real command, a dense reward: in about a minute the loop visibly moves it."""

import os
import subprocess
import sys
from pathlib import Path

from dancegrpo_jax.metrics import read_metrics

ROOT = Path(__file__).parents[2]
OPTIMISED = True


def test_colour_reward_goes_up(tmp_path):
    settings = {
        "run_dir": tmp_path / "run", "steps": 20, "data.prompts_per_step": 8, "data.group_size": 8, "optim.microbatch": 64,
        "rewards": '{"color": {}}', "evals.eval.rewards": '{"color": {}}', "evals.eval.count": 64,
        "evals.eval.batch": 64, "evals.eval.every": 0, "log.prompts_in_grid": 2, "log.images_every": 0,
        "optim.learning_rate": 3e-4, "model.lora.rank": 0, "algorithm.grpo.window": 3, "sampler.eta": 1.0}
    command = [sys.executable, "launch/train.py", "--config=configs/shapes_flow.py"]
    result = subprocess.run(command + [f"--config.{key}={value}" for key, value in settings.items()], cwd=ROOT,
                            env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
                            timeout=600)
    assert result.returncode == 0, result.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    before, after = [record["eval/color/mean"] for record in records if "eval/color/mean" in record]
    stderr = max(record["eval/color/stderr"] for record in records if "eval/color/stderr" in record)
    # The same 64 prompts and noise; one standard error of the unpaired mean is already far outside of chance.
    assert after > before + stderr
