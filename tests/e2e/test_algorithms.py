"""DDPO and DiffusionNFT through the trainer: stopped and resumed they are bitwise the uninterrupted run."""

import json

import jax
import numpy as np
import pytest

from dancegrpo_jax import config as c
from dancegrpo_jax import trainer
from dancegrpo_jax.checkpoint import Checkpointer
from dancegrpo_jax.metrics import read_metrics
from tests.pipelines import write_pipeline

RUNS = {"ddpo": ("diffusion", {"min_count": 4}), "nft": ("flow", {"levels": 2, "kl_beta": 0.01})}


def make_config(folder, run, steps, algorithm):
    paradigm, options = RUNS[algorithm]
    config = c.load_file(f"configs/shapes_{paradigm}.py")
    config.run_dir, config.steps, config.model.folder = str(run), steps, str(folder)
    config.sampler.steps = config.sampler.eval_steps = 4
    config.model.lora.targets = (r".*attn.*\.to_(q|k|v|out\.0)",)
    config.data.prompts_per_step, config.data.group_size, config.data.chunks = 4, 4, 2
    config.algorithm = {algorithm: options}
    config.sampler.shared_noise = algorithm != "nft"
    config.optim.microbatch, config.optim.schedule, config.optim.learning_rate = 8, "constant", 1e-3
    config.rewards = {"color": {}, "jpeg": {"weight": 0.5}}
    config.evals = {"eval": {"rows": "dancegrpo_jax/worlds/prompts/heldout.txt", "count": 4, "batch": 4}}
    config.log.images_every, config.log.tensorboard, config.log.prompts_in_grid, config.checkpoint.every = 0, False, 1, 1
    return config


def arrays(run) -> dict:
    """Every array of the newest checkpoint, by name."""
    step = max(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
    record = json.loads((run / "checkpoints" / str(step) / "meta" / "metadata").read_text())["arrays"]

    def leaf(text):
        dtype, _, shape = text.rstrip("]").partition("[")
        return jax.ShapeDtypeStruct(tuple(map(int, shape.split(","))) if shape else (), dtype)
    found, state, _ = Checkpointer(run / "checkpoints").restore_latest({name: leaf(text) for name, text in record.items()})
    assert found == step
    return {name: np.asarray(value) for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", RUNS)
def test_stopped_and_resumed_it_is_the_uninterrupted_run(algorithm, tmp_path):
    folder = write_pipeline(tmp_path / "base", RUNS[algorithm][0])
    trainer.train(make_config(folder, tmp_path / "whole", 4, algorithm))
    for steps in (2, 4):
        trainer.train(make_config(folder, tmp_path / "parts", steps, algorithm))
    whole, parts = arrays(tmp_path / "whole"), arrays(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    kept = {"ddpo": "memory.color.count", "nft": "copies.old."}[algorithm]
    assert any(name.startswith(kept) for name in whole)
    for name, value in whole.items():
        assert value.tobytes() == parts[name].tobytes(), name

    def metrics(run):
        return {(record["step"], key): value for record in read_metrics(tmp_path / run / "metrics.jsonl")
                for key, value in record.items() if key.startswith("train/") and "compiles" not in key}
    assert metrics("whole") == metrics("parts")
    if algorithm == "nft":  # the copy is behind what is trained
        moved = [name for name in whole if name.startswith("copies.old.") and name.endswith("lora_b")]
        assert any((whole[name] != whole[name.replace("copies.old.", "trainable.")]).any() for name in moved)
    else:
        assert whole["memory.color.count"].sum() == 4 * 4 * 4
