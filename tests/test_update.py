"""The learner: the gradient, its accumulation, KL, EMA, and that nothing depends on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import grpo, sde
from dancegrpo_jax.config import default
from dancegrpo_jax.rollout import Trajectory, rollout
from dancegrpo_jax.update import Examples, Objective, init_state, loss_fn, make_examples, make_optimizer, rescore, update
from tests import oracle
from tests.toy import GROUP, MESHES, POLICY, PROMPTS, SCHEDULE, STEPS, MLPPolicy, on_mesh, placed

TRAINED = 4
PAIRS = PROMPTS * GROUP * TRAINED
SGD = optax.sgd(0.1)
OBJECTIVE = Objective(clip_range=1e-4)
WITH_KL = Objective(clip_range=1e-4, kl_beta=0.02)
RNG = np.random.default_rng(0)
ADVANTAGE = np.clip(RNG.standard_normal((PROMPTS, GROUP), dtype=np.float32), -5, 5)
CHOSEN = np.tile(np.arange(GROUP), (PROMPTS, 1))
TIME_INDEX = np.sort(RNG.permuted(np.tile(np.arange(STEPS - 1), (PROMPTS * GROUP, 1)), axis=1)[:, :TRAINED], axis=1)


LOSS_AND_GRADIENT = jax.jit(jax.value_and_grad(loss_fn, argnums=2, has_aux=True), static_argnums=(0, 1))


def collect(updates=1, microbatch=PAIRS, advantage=ADVANTAGE, mesh=None):
    """(trainable, frozen, examples) of one rollout, as the trainer makes them."""
    trainable, frozen = placed(POLICY, mesh)
    cond = POLICY.cond(PROMPTS)
    trajectory = rollout(POLICY, trainable, frozen, cond, jax.random.key(0), SCHEDULE, group_size=GROUP)
    examples = make_examples(trajectory, SCHEDULE, cond, advantage, CHOSEN, TIME_INDEX, updates=updates,
                             microbatch=microbatch)
    return trainable, frozen, examples


def gradient_of(trainable, frozen, pairs, objective=OBJECTIVE):
    """The loss's gradient from pairs [M, ...] at once."""
    return LOSS_AND_GRADIENT(POLICY, objective, trainable, frozen, {}, pairs)[1]


def fresh(trainable, tx=SGD, with_ema=False):
    return init_state(trainable, tx=tx, with_ema=with_ema, rules=POLICY.sharding)


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


# ------------------------------------------------------------------------------------------------ the gradient
def random_batch(policy, schedule, clip_range):
    """(trainable, frozen, reference, examples [M, ...]), float64, with ratios on both sides of the clip range."""
    rng, m = np.random.default_rng(1), 24
    trainable, frozen = policy.init(0, np.float64)
    reference, _ = policy.init(1, np.float64)
    reference = {name: value + 0.3 * (reference[name] - value) for name, value in trainable.items()}
    index = rng.integers(0, STEPS - 1, m)
    x, noise = rng.standard_normal((2, m, *policy.latent_shape))
    cond = {"text": rng.standard_normal((m, policy.text))}
    column = (m, 1, 1, 1)
    sigma, sigma_next = (schedule.sigmas[i].astype(np.float64) for i in (index, index + 1))
    time = schedule.times[index].astype(np.float64)
    output = policy.predict(trainable, frozen, x, time, cond)
    mean, std = oracle.transition(policy.kernel, policy.prediction, policy.eta, output, x, sigma.reshape(column),
                                  sigma_next.reshape(column))
    x_next = mean + std * noise
    offset = np.tile([-3 * clip_range, -clip_range / 2, clip_range / 2, 3 * clip_range], m // 4)
    old = oracle.log_prob(x_next, mean, std) + offset
    advantage = np.repeat([1.0, -2.0, 0.5, -0.25, 3.0, 0.0], 4)
    return trainable, frozen, reference, Examples(x, x_next, time, sigma, sigma_next, old, advantage, cond)


def numpy_loss(policy, objective, trainable, frozen, reference, batch):
    """(mean loss, kl per pair) in float64."""
    column = (-1, 1, 1, 1)

    def moments(params):
        output = policy.predict(params, frozen, batch.x, batch.time, batch.cond)
        return oracle.transition(policy.kernel, policy.prediction, policy.eta, output, batch.x,
                                 batch.sigma.reshape(column), batch.sigma_next.reshape(column))
    (mean, std), (mean_ref, _) = moments(trainable), moments(reference)
    ratio = np.exp(oracle.log_prob(batch.x_next, mean, std) - batch.log_prob)
    clipped = np.clip(ratio, 1 - objective.clip_range, 1 + objective.clip_range)
    loss = np.maximum(-batch.advantage * ratio, -batch.advantage * clipped)
    kl = ((mean - mean_ref)**2 / (2 * std**2)).mean((1, 2, 3))
    return (loss + objective.kl_beta * kl).mean(), kl


@pytest.mark.parametrize("policy, schedule, kl_beta", [
    (POLICY, SCHEDULE, 0.0), (POLICY, SCHEDULE, 0.5),
    (MLPPolicy("ddim", "epsilon", 1.0), sde.ddim_schedule(STEPS), 0.5)])
def test_gradient_equals_finite_differences(policy, schedule, kl_beta):
    """Reverse mode in float32 against central differences of an independent float64 loss."""
    objective = Objective(clip_range=0.1, kl_beta=kl_beta)
    trainable, frozen, reference, batch = random_batch(policy, schedule, objective.clip_range)
    single = jax.tree.map(jnp.float32, (trainable, frozen, reference, batch))
    (loss, aux), gradient = LOSS_AND_GRADIENT(policy, objective, *single)
    expected, kl = numpy_loss(policy, objective, trainable, frozen, reference, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    if kl_beta:
        np.testing.assert_allclose(aux["kl_base"], kl, rtol=1e-4)
    norm = float(optax.global_norm(gradient))
    rng, h = np.random.default_rng(2), 1e-6
    for _ in range(4):
        direction = {name: rng.standard_normal(value.shape) for name, value in trainable.items()}
        size = np.sqrt(sum((d**2).sum() for d in direction.values()))
        moved = [numpy_loss(policy, objective, {name: value + sign * h / size * direction[name]
                                                for name, value in trainable.items()}, frozen, reference, batch)[0]
                 for sign in (1, -1)]
        slope = sum((np.asarray(gradient[name], np.float64) * direction[name]).sum() for name in direction) / size
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / (2 * h), rtol=0, atol=2e-5 * norm)


def test_update_applies_the_mean_gradient_of_all_pairs():
    trainable, frozen, examples = collect()
    gradient = gradient_of(trainable, frozen, jax.tree.map(lambda a: a[0, 0], examples))
    state, metrics = update(POLICY, SGD, OBJECTIVE, fresh(trainable), frozen, {}, examples, 0)
    assert_close(state.trainable, {name: p - 0.1 * gradient[name] for name, p in trainable.items()}, 1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], -np.repeat(ADVANTAGE, TRAINED).mean(), atol=1e-6)  # ratio 1
    assert state.step == 1 and metrics["grad_norm"] > 0.01


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_over_micro_batches_is_one_big_batch(n):
    found = []
    for micro_batches in (1, n):
        trainable, frozen, examples = collect(microbatch=PAIRS // micro_batches)
        assert examples.advantage.shape == (1, micro_batches, PAIRS // micro_batches)
        state, metrics = update(POLICY, SGD, OBJECTIVE, fresh(trainable), frozen, {}, examples, 0)
        found.append((state.trainable, metrics))
    assert_close(found[1][0], found[0][0], 1e-6)
    assert_close(found[1][1], found[0][1], 1e-6)


def test_several_updates_train_each_pair_once():
    """Two updates of half the pairs: the second starts where the first ended, with its own pairs."""
    trainable, frozen, examples = collect(updates=2, microbatch=PAIRS // 4)
    assert examples.x.shape[:3] == (2, 2, PAIRS // 4)
    every = np.asarray(collect()[2].x).reshape(PAIRS, -1)
    np.testing.assert_array_equal(np.sort(np.asarray(examples.x).reshape(PAIRS, -1), axis=0), np.sort(every, axis=0))
    state, expected = fresh(trainable), trainable
    for i in range(2):
        half = jax.tree.map(lambda a: a[i].reshape(PAIRS // 2, *a.shape[3:]), jax.device_get(examples))
        gradient = gradient_of(expected, frozen, half)
        expected = {name: p - 0.1 * gradient[name] for name, p in expected.items()}
        state, _ = update(POLICY, SGD, OBJECTIVE, state, frozen, {}, examples, i)
        assert_close(state.trainable, expected, 2e-6)
    assert state.step == 2


def test_a_group_of_equal_rewards_contributes_exactly_nothing():
    rewards = np.random.default_rng(3).random((PROMPTS, GROUP), dtype=np.float32)
    rewards[1] = 0.28
    advantage = grpo.group_advantages(rewards, np.ones(rewards.shape, bool))
    trainable, frozen, examples = collect(advantage=advantage)
    moved = {name: p + 0.01 for name, p in trainable.items()}  # off-policy, so that ratios differ from 1
    for p in range(PROMPTS):
        group = jax.tree.map(lambda a: a.reshape(PROMPTS, -1, *a.shape[3:])[p], jax.device_get(examples))
        for value in gradient_of(moved, frozen, group, Objective(clip_range=10.0)).values():
            assert (np.asarray(value) == 0).all() if p == 1 else np.abs(value).max() > 1e-3


# ------------------------------------------------------------------------------------------------ ratio, KL, EMA, state
def test_ratio_is_one_before_the_first_update_and_then_moves():
    trainable, frozen, examples = collect(microbatch=PAIRS // 4)
    state, metrics = update(POLICY, SGD, OBJECTIVE, fresh(trainable), frozen, {}, examples, 0)
    for key in ("min", "max"):  # over every pair
        np.testing.assert_allclose(metrics[f"ratio/{key}"], 1, rtol=0, atol=1e-6)
    assert metrics["clip_fraction/low"] == metrics["clip_fraction/high"] == 0
    _, metrics = update(POLICY, SGD, OBJECTIVE, state, frozen, {}, examples, 0)
    assert metrics["ratio/max"] - metrics["ratio/min"] > 1e-3
    assert metrics["clip_fraction/high"] > 0.1 and metrics["approx_kl"] > 0


def test_on_policy_the_old_log_probability_is_the_updates_own():
    """A rollout that rounded differently changes neither ratio nor gradient, and is reported."""
    trainable, frozen, examples = collect()
    other = examples._replace(log_prob=examples.log_prob + 0.01)
    on_policy = Objective(on_policy=True)
    plain, first = update(POLICY, SGD, OBJECTIVE, fresh(trainable), frozen, {}, examples, 0)
    state, metrics = update(POLICY, SGD, on_policy, fresh(trainable), frozen, {}, other, 0)
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1 and metrics["clip_fraction/low"] == 0
    np.testing.assert_allclose(metrics["rollout_ratio/mean"], np.exp(-0.01), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.trainable, plain.trainable)
    again = rescore(POLICY, trainable, frozen, other)
    np.testing.assert_allclose(again.log_prob, examples.log_prob, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0, .5, 1, 1, 1, 1]), ("linear", [0, .5, 1, .75, .5, .25]),
                                                 ("cosine", [0, .5, 1, .853553, .5, .146447])])
def test_learning_rate_schedules(schedule, rates):
    """Two updates of warm-up, then the schedule over the other four."""
    config = default()
    config.optim.update({"learning_rate": 1.0, "warmup_steps": 2, "schedule": schedule, "weight_decay": 0.0, "grad_clip": 0.0})
    tx = make_optimizer(config.optim, 6)
    params, found = {"w": jnp.zeros(())}, []
    state = tx.init(params)
    for _ in range(6):  # with a constant gradient Adam's step is the learning rate
        step, state = tx.update({"w": jnp.ones(())}, state, params)
        found.append(-float(step["w"]))
    np.testing.assert_allclose(found, rates, atol=1e-5)


def test_kl_is_zero_at_the_reference_and_positive_after():
    trainable, frozen, examples = collect(microbatch=PAIRS // 2)
    state, metrics = update(POLICY, SGD, WITH_KL, fresh(trainable), frozen, trainable, examples, 0)
    assert 0 <= metrics["kl_base"] < 1e-9
    moved = jax.device_get(state.trainable)
    _, metrics = update(POLICY, SGD, WITH_KL, state, frozen, trainable, examples, 0)
    flat = jax.tree.map(lambda a: np.asarray(a, np.float64).reshape(PAIRS, *a.shape[3:]), examples)
    _, kl = numpy_loss(POLICY, WITH_KL, moved, frozen, trainable, flat)
    assert kl.mean() > 1e-5
    np.testing.assert_allclose(metrics["kl_base"], kl.mean(), rtol=1e-3)


def test_kl_pulls_back_to_the_reference():
    """With zero advantages only the KL term acts."""
    trainable, frozen, examples = collect(microbatch=PAIRS // 2, advantage=np.zeros_like(ADVANTAGE))
    state = fresh({name: p + 0.03 for name, p in trainable.items()})
    values = []
    for _ in range(4):
        state, metrics = update(POLICY, SGD, WITH_KL, state, frozen, trainable, examples, 0)
        values.append(float(metrics["kl_base"]))
    assert (np.diff(values) < 0).all()


def test_ema_is_the_moving_average_and_is_what_is_evaluated():
    trainable, frozen, examples = collect()
    objective = Objective(clip_range=1.0, ema_decay=0.9)
    state, expected = fresh(trainable, with_ema=True), trainable
    for _ in range(3):
        state, _ = update(POLICY, SGD, objective, state, frozen, {}, examples, 0)
        expected = {name: 0.9 * e + 0.1 * np.asarray(state.trainable[name]) for name, e in expected.items()}
        assert_close(state.ema, expected, 1e-6)
    assert state.eval_params is state.ema
    assert not np.allclose(state.ema["fc1.kernel"], state.trainable["fc1.kernel"], atol=1e-4)
    without = fresh(trainable)
    assert without.ema is None and without.eval_params is without.trainable


@pytest.mark.parametrize("with_ema", [False, True])
def test_the_old_state_is_donated(with_ema):
    trainable, frozen, examples = collect()
    trainable = jax.device_put(trainable)
    objective, tx = (Objective(clip_range=1.0, ema_decay=0.9), SGD) if with_ema else (OBJECTIVE, optax.adamw(1e-3))
    old = fresh(trainable, tx, with_ema)
    state, _ = update(POLICY, tx, objective, old, frozen, {}, examples, 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    state, _ = update(POLICY, tx, objective, state, frozen, {}, examples, 0)
    assert state.step == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in trainable.values())  # the caller's weights (the KL reference) survive


# ------------------------------------------------------------------------------------------------ layout of the pairs
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("updates, microbatch", [(1, 8), (2, 16)])
def test_make_examples_takes_exactly_the_chosen_pairs(mesh, updates, microbatch):
    """Every number of the trajectory is unique, so each pair tells where it came from."""
    prompts, group, k, trained, devices = 8, 6, 4, 3, int(np.prod(mesh or 1))
    rng, schedule = np.random.default_rng(0), sde.flow_schedule(STEPS, 3.0)
    latents = np.arange((STEPS + 1) * prompts * group * 3, dtype=np.float32).reshape(STEPS + 1, prompts * group, 3)
    log_probs = rng.standard_normal((STEPS, prompts * group), dtype=np.float32)
    cond = {"a": rng.standard_normal((prompts, 2), dtype=np.float32), "b": {"c": np.arange(prompts)}}
    advantage = rng.standard_normal((prompts, group), dtype=np.float32)
    chosen = np.sort(rng.permuted(np.tile(np.arange(group), (prompts, 1)), axis=1)[:, :k], axis=1)
    time_index = np.sort(rng.permuted(np.tile(np.arange(STEPS - 1), (prompts * k, 1)), axis=1)[:, :trained], axis=1)
    with on_mesh(mesh):
        found = make_examples(Trajectory(jnp.asarray(latents), jnp.asarray(log_probs)), schedule, cond, advantage,
                              chosen, time_index, updates=updates, microbatch=microbatch)
        assert len(found.x.sharding.device_set) == devices
    found = jax.device_get(found)
    n = prompts * k * trained // updates // microbatch
    assert found.advantage.shape == (updates, n, microbatch) and found.x.shape == (updates, n, microbatch, 3)

    remaining = {(row, t) for row in range(prompts * k) for t in time_index[row].tolist()}
    for u in range(updates):
        for i in range(n):
            for m in range(microbatch):
                pair = jax.tree.map(lambda a: a[u, i, m], found)
                t, b = divmod(int(pair.x[0]) // 3, prompts * group)
                p, g = divmod(b, group)
                row = p * k + chosen[p].tolist().index(g)
                remaining.remove((row, t))
                np.testing.assert_array_equal(pair.x, latents[t, b])
                np.testing.assert_array_equal(pair.x_next, latents[t + 1, b])
                assert pair.time == schedule.times[t] and pair.log_prob == log_probs[t, b]
                assert (pair.sigma, pair.sigma_next) == (schedule.sigmas[t], schedule.sigmas[t + 1])
                assert pair.advantage == advantage[p, g]
                np.testing.assert_array_equal(pair.cond["a"], cond["a"][p])
                assert pair.cond["b"]["c"] == p
                assert row // (prompts * k // devices) == m // (microbatch // devices)  # no pair changes its device
    assert not remaining


# ------------------------------------------------------------------------------------------------ devices, compilation
@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_update_on_eight_devices_equals_one(mesh):
    """Two updates of all pairs in micro-batches; which pairs share a micro-batch depends on the mesh, their sum not."""
    trained = []
    for shape in (None, mesh):
        with on_mesh(shape):
            trainable, frozen, examples = collect(microbatch=PAIRS // 4, mesh=shape)
            state = fresh(trainable, with_ema=True)
            layout = {name: p.sharding for name, p in state.trainable.items()}
            for _ in range(2):
                state, metrics = update(POLICY, SGD, Objective(clip_range=0.2, ema_decay=0.9), state, frozen, {},
                                        examples, 0)
            assert {name: p.sharding for name, p in state.trainable.items()} == layout
            trained.append((state, metrics))
    (one, one_metrics), (many, many_metrics) = trained
    assert_close(many.trainable, one.trainable, 1e-5)
    assert_close(many.ema, one.ema, 1e-5)
    assert_close(many_metrics, one_metrics, 1e-5)
    for p in many.trainable.values():  # every replica is the same
        assert len(p.sharding.device_set) == 8
        for shard in p.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(p)[shard.index])
    if mesh[1] > 1:
        assert many.trainable["fc1.kernel"].sharding.shard_shape((20, 32))[0] == 20 // mesh[1]


@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[2]], ids=str)
def test_rollout_and_update_compile_once(mesh):
    """Three iterations with a moving window of stochastic steps and two updates each."""
    policy, tx = MLPPolicy(), optax.adamw(1e-3)  # new static arguments: the caches know nothing of them
    before = [f._cache_size() for f in (rollout, make_examples, update)]
    with on_mesh(mesh):
        trainable, frozen = placed(policy, mesh)
        state = init_state(trainable, tx=tx, with_ema=False, rules=policy.sharding)
        for i in range(3):
            schedule = sde.window(SCHEDULE, i, 3)
            trajectory = rollout(policy, state.trainable, frozen, policy.cond(PROMPTS), jax.random.key(i), schedule,
                                 group_size=GROUP)
            time_index = np.tile(np.arange(i, i + 2), (PROMPTS * GROUP, 1))
            examples = make_examples(trajectory, schedule, policy.cond(PROMPTS), ADVANTAGE, CHOSEN, time_index,
                                     updates=2, microbatch=8)
            for u in range(2):
                state, metrics = update(policy, tx, OBJECTIVE, state, frozen, {}, examples, u)
                assert np.isfinite(metrics["loss"])
    after = [f._cache_size() for f in (rollout, make_examples, update)]
    assert [b - a for a, b in zip(before, after)] == [1, 1, 1]
