"""DDPO: running statistics of each prompt against plain numpy, in both paradigms, and saved with the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.algorithms.ddpo import DDPO
from dancegrpo_jax.checkpoint import Checkpointer
from dancegrpo_jax.options import ConfigError


class Reference:
    """What DDPO's tracker does, one prompt at a time, in float64; invalid rewards are not remembered."""

    def __init__(self, size, least):
        self.size, self.least, self.seen = size, least, {}

    def __call__(self, prompts, values, ok):
        for prompt, row, valid in zip(prompts, values, ok, strict=True):
            self.seen[prompt] = (self.seen.get(prompt, []) + row[valid].tolist())[-self.size:]
        advantage = np.zeros(values.shape)
        for i, prompt in enumerate(prompts):
            own = self.seen[prompt] if len(self.seen[prompt]) >= self.least else values[ok]
            advantage[i] = (values[i] - np.mean(own)) / (np.std(own) + 1e-6)
        return np.where(ok, advantage, 0)


@pytest.mark.parametrize("group", [1, 3, 11])
def test_advantages_against_the_prompts_last_rewards(group):
    """Rings of 8 over many iterations; a batch may hold a prompt twice, and a group more than a ring."""
    rng, algorithm, reference = np.random.default_rng(0), DDPO(buffer=8, min_count=5), Reference(8, 5)
    memory = algorithm.memory(4, ("r",))
    advantages = jax.jit(lambda scores, prompts, memory: algorithm.advantages(scores, {"r": 1.0}, prompts, memory))
    own = 0
    for _ in range(12):
        prompts = rng.integers(0, 4, 5)
        values = (rng.standard_normal((5, group)) + prompts[:, None]).astype(np.float32)
        ok = rng.random((5, group)) < 0.9
        ok[0] = True
        found, memory = advantages({"r": (values, ok)}, prompts.astype(np.int32), memory)
        np.testing.assert_allclose(found, reference(prompts, values.astype(np.float64), ok), rtol=1e-3, atol=1e-4)
        own += sum(len(reference.seen[prompt]) >= 5 for prompt in prompts)
    assert own > 20  # both kinds of statistics were used
    np.testing.assert_array_equal(np.sort(memory["r"]["values"][0]), np.sort(np.float32(reference.seen[0])))


def test_several_rewards_are_weighted_sums_of_their_advantages():
    rng, algorithm = np.random.default_rng(1), DDPO()
    scores = {name: (rng.standard_normal((3, 4)).astype(np.float32) * scale, np.ones((3, 4), bool))
              for name, scale in (("a", 1.0), ("b", 100.0))}
    memory = algorithm.memory(3, ("a", "b"))
    prompts = np.arange(3, dtype=np.int32)
    both, _ = algorithm.advantages(scores, {"a": 1.0, "b": 0.5}, prompts, memory)
    alone = [algorithm.advantages({name: scores[name]}, {name: 1.0}, prompts, {name: memory[name]})[0] for name in scores]
    np.testing.assert_allclose(both, alone[0] + 0.5 * alone[1], rtol=1e-5)


def test_another_way_to_combine_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.ddpo.combine='gdpo'"):
        DDPO(combine="gdpo").check(8, 4, "algorithm.ddpo")


def test_equal_rewards_give_no_advantage():
    values, ok = np.full((2, 3), 0.28, np.float32), np.ones((2, 3), bool)
    found, _ = DDPO().advantages({"r": (values, ok)}, {"r": 1.0}, np.arange(2, dtype=np.int32), DDPO().memory(2, ("r",)))
    np.testing.assert_allclose(found, 0, atol=0.1)  # rounding of 0.28 over 1e-6


def test_the_memory_is_saved_with_the_run(tmp_path):
    algorithm = DDPO(buffer=4)
    memory = jax.tree.map(jnp.asarray, algorithm.memory(3, ("r",)))
    scores = {"r": (np.float32([[1, 2], [3, 4]]), np.ones((2, 2), bool))}
    _, memory = algorithm.advantages(scores, {"r": 1.0}, np.int32([2, 0]), memory)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"memory": memory})
        _, restored, _ = checkpoints.restore_latest({"memory": memory})
    jax.tree.map(np.testing.assert_array_equal, restored["memory"], memory)
    assert restored["memory"]["r"]["count"].tolist() == [2, 0, 2]
