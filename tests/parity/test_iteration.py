"""A whole iteration against the PyTorch loop of benchmarks/: trajectory, log-probabilities, images, advantages, gradients."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import against_torch  # noqa: F401 (mends the sinusoids of the oracle)

from benchmarks.against_torch import Ours, Theirs, prove_equal
from dancegrpo_jax.config import load_file, override
from tests.pipelines import write_pipeline


def test_one_iteration(tmp_path):
    """FLUX with adapters; the benchmark asserts the same for Stable Diffusion, which takes longer to compile."""
    config = load_file("configs/shapes_flow.py")
    settings = {"model.folder": write_pipeline(tmp_path, "flow"), "model.lora.rank": 4, "sampler.steps": 4,
                "algorithm.grpo.window": 2, "data.prompts_per_step": 2, "data.group_size": 3, "optim.microbatch": 12}
    for name, value in settings.items():
        override(config, name, str(value))
    ours = Ours(config)
    prove_equal(ours, Theirs(ours), batch=5)
