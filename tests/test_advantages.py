"""The algorithm's pure functions against numpy and hand-written numbers."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.algorithms import advantages, trajectory
from dancegrpo_jax.registry import COMBINE


def numpy_advantages(rewards, ok):
    """Float64, one group and one sample at a time."""
    advantage = np.zeros(rewards.shape)
    for p, (group, valid) in enumerate(zip(np.asarray(rewards, np.float64), ok, strict=True)):
        if valid.sum() >= 2 and np.ptp(group[valid]) > 0:
            advantage[p, valid] = (group[valid] - group[valid].mean()) / (group[valid].std(ddof=1) + 1e-8)
    return advantage


# ------------------------------------------------------------------------------------------------ advantages
def test_group_advantages_equal_numpy():
    rng = np.random.default_rng(0)
    rewards = (0.28 + 0.01 * rng.standard_normal((16, 12))).astype(np.float32)  # the scale of HPS-v2
    ok = rng.random((16, 12)) < 0.7
    ok[0], ok[1] = True, False
    found = advantages.group_advantages(rewards, ok)
    assert found.shape == (16, 12) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, numpy_advantages(rewards, ok), atol=2e-5)
    np.testing.assert_array_equal(np.asarray(found)[~ok], 0)
    np.testing.assert_allclose(advantages.group_advantages(np.float32([[1, 2, 3]]), np.ones((1, 3), bool)), [[-1, 0, 1]])


def test_zero_variance_groups_get_exactly_zero():
    """0.28 twelve times has a float32 mean unlike 0.28: dividing by a tiny std would amplify that to order one."""
    rewards = np.tile(np.float32([[0.28], [1 / 3], [1e4 / 3], [0.0]]), (1, 12))
    ok = np.ones((4, 12), bool)
    np.testing.assert_array_equal(advantages.group_advantages(rewards, ok), 0)
    rewards[:, 0], ok[:, 0] = 7, False  # a failed reward that differs does not count
    np.testing.assert_array_equal(advantages.group_advantages(rewards, ok), 0)


def test_groups_with_fewer_than_two_valid_samples_get_zero():
    rewards = np.float32([[1, 2, 3], [1, 2, 3], [1, 7, 3]])
    ok = np.array([[False, True, False], [False, False, False], [True, False, True]])
    expected = [[0, 0, 0], [0, 0, 0], [-0.5**0.5, 0, 0.5**0.5]]
    np.testing.assert_allclose(advantages.group_advantages(rewards, ok), expected, rtol=1e-6)


@pytest.mark.parametrize("failed", [np.nan, np.inf, -1e30])
def test_the_value_of_a_failed_reward_does_not_matter(failed):
    rewards, ok = np.random.default_rng(0).random((3, 5), dtype=np.float32), np.ones((3, 5), bool)
    ok[0, 1] = ok[2, :4] = False
    broken = np.where(ok, rewards, np.float32(failed))
    np.testing.assert_array_equal(advantages.group_advantages(broken, ok), advantages.group_advantages(rewards, ok))
    for how in COMBINE:
        found = advantages.combine_advantages({"a": (broken, ok)}, {"a": 1.0}, how)
        np.testing.assert_array_equal(found, advantages.combine_advantages({"a": (rewards, ok)}, {"a": 1.0}, how))


# ------------------------------------------------------------------------------------------------ several rewards
ALL = np.ones((2, 3), bool)
TWO = {"a": (np.float32([[1, 2, 3], [5, 5, 5]]), ALL), "b": (np.float32([[30, 20, 10], [10, 20, 30]]), ALL)}


def test_combine_by_hand():
    """Within each group, both rewards normalise to (-1, 0, 1) up to sign; a is constant in the second group."""
    weights = {"a": 2.0, "b": 0.5}
    summed = np.array([[-1.5, 0, 1.5], [-0.5, 0, 0.5]])
    np.testing.assert_allclose(advantages.combine_advantages(TWO, weights, "advantages"), summed, atol=1e-6)
    np.testing.assert_allclose(advantages.combine_advantages(TWO, weights), summed, atol=1e-6)  # the default
    # 2 a + b / 2 = (17, 14, 11), (15, 20, 25)
    np.testing.assert_allclose(advantages.combine_advantages(TWO, weights, "rewards"), [[1, 0, -1], [-1, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(advantages.combine_advantages(TWO, weights, "gdpo"), summed / (5 / 6)**0.5, atol=1e-6)


@pytest.mark.parametrize("how", COMBINE)
def test_combine_is_exactly_zero_where_nothing_can_be_learnt(how):
    """Failed samples and constant groups get no gradient beside groups that do."""
    rng = np.random.default_rng(0)
    rewards = rng.random((4, 8), dtype=np.float32)
    ok = rng.random((4, 8)) < 0.8
    rewards[1], ok[2] = 0.28, False
    found = np.asarray(advantages.combine_advantages({"a": (rewards, ok)}, {"a": 1.3}, how))
    np.testing.assert_array_equal(found[1:3], 0)
    np.testing.assert_array_equal(found[~ok], 0)
    assert np.abs(found[0][ok[0]]).min() > 0


def test_combine_ignores_scales_where_it_says_so():
    scaled = TWO | {"b": (1000 * TWO["b"][0] - 7, ALL)}
    weights = {"a": 1.0, "b": 0.3}
    for how in ("advantages", "gdpo"):
        np.testing.assert_allclose(advantages.combine_advantages(scaled, weights, how),
                                   advantages.combine_advantages(TWO, weights, how), atol=1e-5)
    found = [advantages.combine_advantages(rewards, weights, "rewards")[0] for rewards in (TWO, scaled)]
    assert np.sign(found[0][0]) == np.sign(found[1][0]) == 1
    weights = {"a": 1.0, "b": 0.05}  # a + b / 20 grows along the first group, a + 50 b falls
    found = [advantages.combine_advantages(rewards, weights, "rewards")[0] for rewards in (TWO, scaled)]
    assert np.sign(found[0][0]) == -1 and np.sign(found[1][0]) == 1


def test_combine_masks_each_reward_by_itself():
    """A sample that one reward model failed on keeps the others' advantage; a sum of rewards needs all of them."""
    ok = np.array([[True, True, False], [True, True, True]])
    rewards = TWO | {"a": (TWO["a"][0], ok)}
    half = 0.5**0.5
    np.testing.assert_allclose(advantages.combine_advantages(rewards, {"a": 1.0, "b": 1.0}),
                               [[-half + 1, half, -1], [-1, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(advantages.combine_advantages(rewards, {"a": 1.0, "b": 1.0}, "rewards"),
                               [[half, -half, 0], [-1, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(advantages.combine_advantages(rewards, {"a": 0.0, "b": 1.0}, "rewards"),
                               [[1, 0, -1], [-1, 0, 1]], atol=1e-6)  # weight 0: only logged


# ------------------------------------------------------------------------------------------------ what is trained
@pytest.mark.parametrize("k", [2, 4, 8])
def test_best_of_takes_the_extremes_of_each_prompt(k):
    advantage = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    advantage[1] += 100  # ranked within the prompt, not the batch
    found = np.asarray(advantages.best_of(advantage, k))
    for row, chosen in zip(advantage, found, strict=True):
        ranked = sorted(range(8), key=lambda i: row[i])
        assert chosen.tolist() == sorted(ranked[:k // 2] + ranked[-k // 2:])


def test_choose_timesteps_is_a_uniform_choice_of_eligible_steps():
    eligible, batch, k = np.array([True, False, True, True, True, False, True, False]), 4000, 3
    found = np.asarray(trajectory.choose_timesteps(jax.random.key(0), batch, eligible, k))
    assert found.shape == (batch, k) and found.dtype == np.int32
    assert (np.diff(found, axis=1) > 0).all()  # ascending, so distinct
    steps = np.flatnonzero(eligible)
    counts = dict.fromkeys(combinations(steps.tolist(), k), 0)
    for row in found.tolist():
        counts[tuple(row)] += 1  # KeyError: an ineligible step
    p = 1 / len(counts)
    np.testing.assert_allclose(list(counts.values()), batch * p, rtol=0, atol=5 * (batch * p * (1 - p))**0.5)
    assert not np.array_equal(found, trajectory.choose_timesteps(jax.random.key(1), batch, eligible, k))
    np.testing.assert_array_equal(trajectory.choose_timesteps(jax.random.key(0), 3, eligible, 5), np.tile(steps, (3, 1)))


# ------------------------------------------------------------------------------------------------ the objective
RATIOS = np.array([0.5, 0.9 - 1e-3, 0.9 + 1e-3, 1.0, 1.1 - 1e-3, 1.1 + 1e-3, 2.0])


def pairs():
    """(log_prob, old_log_prob, advantage, ratio): every ratio with a positive, a negative and a zero advantage."""
    ratio, advantage = (a.ravel() for a in np.meshgrid(RATIOS, [1.5, -0.7, 0.0]))
    old = np.random.default_rng(0).standard_normal(ratio.size)
    return (old + np.log(ratio)).astype(np.float32), old.astype(np.float32), advantage.astype(np.float32), ratio


def test_clipped_objective_equals_numpy():
    log_prob, old, advantage, ratio = pairs()
    loss, found = trajectory.clipped_objective(log_prob, old, advantage, 0.1)
    np.testing.assert_allclose(found, ratio, rtol=1e-6)
    expected = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.9, 1.1))
    np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-9)


def test_clipped_objective_gradient_vanishes_where_clipped_only():
    log_prob, old, advantage, ratio = pairs()
    found = np.asarray(jax.grad(lambda x: trajectory.clipped_objective(x, old, advantage, 0.1)[0].sum())(log_prob))
    clipped = ((advantage > 0) & (ratio > 1.1)) | ((advantage < 0) & (ratio < 0.9))
    assert clipped.sum() == 4
    np.testing.assert_array_equal(found[clipped], 0)
    np.testing.assert_allclose(found[~clipped], (-advantage * ratio)[~clipped], rtol=2e-6)


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio exactly 1 both branches of the maximum tie; the gradient is still -A, also with the clip range 1e-4."""
    advantage = jnp.array([2.0, -0.5, 0.0])
    found = jax.grad(lambda x: trajectory.clipped_objective(x, jnp.zeros(3), advantage, 1e-4)[0].sum())(jnp.zeros(3))
    np.testing.assert_array_equal(found, -advantage)


# ------------------------------------------------------------------------------------------------ diagnostics
def test_ratio_diagnostics():
    _, _, advantage, ratio = pairs()
    found = trajectory.ratio_diagnostics(jnp.float32(ratio), advantage, 0.1)
    expected = {"ratio/mean": ratio.mean(), "ratio/min": 0.5, "ratio/max": 2.0, "clip_fraction/low": 2 / 21,
                "clip_fraction/high": 2 / 21, "approx_kl": (ratio - 1 - np.log(ratio)).mean()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_reward_diagnostics():
    rng = np.random.default_rng(0)
    values, ok = rng.random((4, 6), dtype=np.float32), rng.random((4, 6)) < 0.8
    ok[0], values[0] = True, 0.5  # constant
    ok[1] = False  # all failed
    values[~ok] = np.nan
    found = advantages.reward_diagnostics({"hps": (values, ok), "clip": (TWO["a"][0], ALL)})
    valid = values[ok].astype(np.float64)
    expected = {"mean": valid.mean(), "std": valid.std(), "p10": np.percentile(valid, 10),
                "p90": np.percentile(valid, 90), "valid_ratio": ok.mean(), "zero_std_ratio": 0.5}
    assert found.keys() == {f"reward/{name}/{key}" for name in ("hps", "clip") for key in expected}
    for key, value in expected.items():
        np.testing.assert_allclose(found[f"reward/hps/{key}"], value, rtol=1e-5, err_msg=key)
    assert found["reward/clip/zero_std_ratio"] == 0.5 and found["reward/clip/valid_ratio"] == 1
