"""The learner: the gradient, its accumulation, KL, EMA, and that nothing depends on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import sde
from dancegrpo_jax.algorithms.advantages import best_of, group_advantages
from dancegrpo_jax.algorithms.base import Context
from dancegrpo_jax.algorithms.grpo import GRPO
from dancegrpo_jax.algorithms.trajectory import Pairs
from dancegrpo_jax.config import default
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.learner import Learner, init_state, lay_out, make_batch, make_optimizer, micro_batch, rescore, update
from dancegrpo_jax.rollout import Trajectory, rollout
from tests import oracle
from tests.toy import GROUP, MESHES, PROMPTS, SCHEDULE, STEPS, TOY, MLPPipeline, joined, on_mesh, placed

TRAINED = 4
PAIRS = PROMPTS * GROUP * TRAINED
SGD = optax.sgd(0.1)
RNG = np.random.default_rng(0)
ADVANTAGE = np.clip(RNG.standard_normal((PROMPTS, GROUP), dtype=np.float32), -5, 5)
KEY = jax.random.key(4)


def learner_of(tx=SGD, toy=TOY, ema_decay=0.0, **options):
    """The learner of GRPO on four of the five steps; equal ones compile once."""
    return Learner(toy, toy.kernel, GRPO(timestep_fraction=TRAINED / (STEPS - 1), **options), tx, ema_decay)


PLAIN = learner_of()
WITH_KL = learner_of(kl_beta=0.02)


def loss_fn(learner, trainable, frozen, reference, pairs, samples, cond):
    """(mean loss, diagnostics) of pairs [M, ...] at once."""
    context = Context(learner.pipeline, learner.kernel, frozen, cond, {"reference": reference}, False)
    loss, found = learner.algorithm.loss(context, trainable, pairs, samples, KEY)
    return loss.mean(), found


LOSS_AND_GRADIENT = jax.jit(jax.value_and_grad(loss_fn, argnums=1, has_aux=True), static_argnums=0)


def collect(updates=1, microbatch=PAIRS, advantage=ADVANTAGE, mesh=None):
    """(trainable, frozen, batch) of one rollout."""
    trainable, frozen = placed(TOY, mesh)
    cond = TOY.cond(PROMPTS)
    trajectory = rollout(TOY, TOY.kernel, trainable, frozen, cond, jax.random.key(0), SCHEDULE, group_size=GROUP)
    return trainable, frozen, batch_of(trajectory, cond, advantage, updates=updates, microbatch=microbatch)


@jax.jit(static_argnames=("algorithm", "updates", "microbatch"))
def batch_of(trajectory, cond, advantage, algorithm=PLAIN.algorithm, schedule=SCHEDULE, *, updates, microbatch):
    examples = algorithm.examples(KEY, trajectory, schedule, advantage)
    return lay_out(examples, cond, len(advantage), updates=updates, microbatch=microbatch)


def flat(batch, update=None):
    """(pairs, samples, cond) as numpy arrays [M, ...]: all pairs of one device, or those of one update, in their order."""
    pairs, samples, cond = jax.device_get(batch)
    total = np.prod(pairs.time.shape)
    place = np.arange(total) // (total // len(samples["advantage"]))
    size = total // len(pairs.time)
    chosen = slice(None) if update is None else slice(update * size, (update + 1) * size)
    every = jax.tree.map(lambda a: a.reshape(total, *a.shape[3:])[chosen], pairs)
    return every, *jax.tree.map(lambda a: a[place[chosen]], (samples, cond))


def step(learner, state, frozen, batch, index=0, reference=None, on_policy=False):
    """`update`, as the trainer calls it."""
    return update(learner, state, frozen, reference or {}, batch, index, KEY, on_policy)


def gradient_of(trainable, frozen, examples, learner=PLAIN):
    """The loss's gradient from (pairs, samples, cond) of [M, ...] at once."""
    return LOSS_AND_GRADIENT(learner, trainable, frozen, {}, *examples)[1]


def fresh(trainable, learner=PLAIN):
    return init_state(learner, trainable, {})


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name in expected:
        if isinstance(expected[name], dict):
            assert_close(found[name], expected[name], atol)
        else:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


def moved(weights, by):
    """Weights less `by` of another tree's, on the host."""
    return jax.tree.map(lambda p, g: np.asarray(p - by * g), weights[0], weights[1])


# ------------------------------------------------------------------------------------------------ the gradient
def random_batch(toy, schedule, clip_range):
    """(trainable, frozen, reference, (pairs, samples, cond) [M, ...]), float64, with ratios on both sides of the clip range."""
    rng, m = np.random.default_rng(1), 24
    trainable, frozen = toy.init(0, np.float64)
    other, _ = toy.init(1, np.float64)
    reference = jax.tree.map(lambda value, other: value + 0.3 * (other - value), trainable, other)
    index = rng.integers(0, STEPS - 1, m)
    x, noise = rng.standard_normal((2, m, *toy.latent_shape))
    cond = Cond({"text": rng.standard_normal((m, toy.text))})
    column = (m, 1, 1, 1)
    sigma, sigma_next = (schedule.sigmas[i].astype(np.float64) for i in (index, index + 1))
    time = schedule.times[index].astype(np.float64)
    output = toy.predict(joined(trainable, frozen), x, time, cond.positive)
    mean, std = oracle.transition(toy.kernel.name, toy.prediction, toy.kernel.eta, output, x, sigma.reshape(column),
                                  sigma_next.reshape(column))
    x_next = mean + std * noise
    offset = np.tile([-3 * clip_range, -clip_range / 2, clip_range / 2, 3 * clip_range], m // 4)
    old = oracle.log_prob(x_next, mean, std) + offset
    advantage = np.repeat([1.0, -2.0, 0.5, -0.25, 3.0, 0.0], 4)
    return trainable, frozen, reference, (Pairs(x, x_next, time, sigma, sigma_next, old), {"advantage": advantage}, cond)


def numpy_loss(learner, trainable, frozen, reference, examples):
    """(mean loss, kl per pair) in float64."""
    toy, algorithm, (pairs, samples, cond), column = learner.pipeline, learner.algorithm, examples, (-1, 1, 1, 1)

    def moments(weights):
        output = toy.predict(joined(weights, frozen), pairs.x, pairs.time, cond.positive)
        return oracle.transition(toy.kernel.name, toy.prediction, toy.kernel.eta, output, pairs.x,
                                 pairs.sigma.reshape(column), pairs.sigma_next.reshape(column))
    (mean, std), (mean_ref, _) = moments(trainable), moments(reference)
    ratio, advantage = np.exp(oracle.log_prob(pairs.x_next, mean, std) - pairs.log_prob), samples["advantage"]
    clipped = np.clip(ratio, 1 - algorithm.clip_range, 1 + algorithm.clip_range)
    loss = np.maximum(-advantage * ratio, -advantage * clipped)
    kl = ((mean - mean_ref)**2 / (2 * std**2)).mean((1, 2, 3))
    return (loss + algorithm.kl_beta * kl).mean(), kl


@pytest.mark.parametrize("toy, schedule, kl_beta", [
    (TOY, SCHEDULE, 0.0), (TOY, SCHEDULE, 0.5),
    (MLPPipeline("ddim", "epsilon", 1.0), sde.ddim_schedule(STEPS), 0.5)])
def test_gradient_equals_finite_differences(toy, schedule, kl_beta):
    """Reverse mode in float32 against central differences of an independent float64 loss."""
    learner = learner_of(toy=toy, clip_range=0.1, kl_beta=kl_beta)
    trainable, frozen, reference, examples = random_batch(toy, schedule, 0.1)
    single = jax.tree.map(jnp.float32, (trainable, frozen, reference, *examples))
    (loss, aux), gradient = LOSS_AND_GRADIENT(learner, *single)
    expected, kl = numpy_loss(learner, trainable, frozen, reference, examples)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    if kl_beta:
        np.testing.assert_allclose(aux["kl_base"], kl, rtol=1e-4)
    norm = float(optax.global_norm(gradient))
    rng, h = np.random.default_rng(2), 1e-6
    for _ in range(4):
        direction = jax.tree.map(lambda value: rng.standard_normal(value.shape), trainable)
        size = float(optax.global_norm(direction))
        moved = [numpy_loss(learner, jax.tree.map(lambda value, d, sign=sign, size=size: value + sign * h / size * d, trainable,
                                                  direction), frozen, reference, examples)[0] for sign in (1, -1)]
        along = jax.tree.map(lambda g, d: (np.asarray(g, np.float64) * d).sum(), gradient, direction)
        slope = sum(jax.tree.leaves(along)) / size
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / (2 * h), rtol=0, atol=2e-5 * norm)


def test_update_applies_the_mean_gradient_of_all_pairs():
    trainable, frozen, batch = collect()
    gradient = gradient_of(trainable, frozen, flat(batch))
    state, metrics = step(PLAIN, fresh(trainable), frozen, batch)
    assert_close(state.trainable, moved((trainable, gradient), 0.1), 1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], -np.repeat(ADVANTAGE, TRAINED).mean(), atol=1e-6)  # ratio 1
    assert state.step == 1 and metrics["grad_norm"] > 0.01


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_over_micro_batches_is_one_big_batch(n):
    found = []
    for micro_batches in (1, n):
        trainable, frozen, batch = collect(microbatch=PAIRS // micro_batches)
        assert batch.pairs.time.shape == (1, micro_batches, PAIRS // micro_batches)
        state, metrics = step(PLAIN, fresh(trainable), frozen, batch)
        found.append((state.trainable, metrics))
    assert_close(found[1][0], found[0][0], 1e-6)
    assert_close(found[1][1], found[0][1], 1e-6)


def test_several_updates_train_each_pair_once():
    """Two updates of half the pairs: the second starts where the first ended, with its own pairs."""
    trainable, frozen, batch = collect(updates=2, microbatch=PAIRS // 4)
    assert batch.pairs.x.shape[:3] == (2, 2, PAIRS // 4)
    every = np.asarray(collect()[2].pairs.x).reshape(PAIRS, -1)
    np.testing.assert_array_equal(np.sort(np.asarray(batch.pairs.x).reshape(PAIRS, -1), axis=0), np.sort(every, axis=0))
    state, expected = fresh(trainable), trainable
    for i in range(2):
        gradient = gradient_of(expected, frozen, flat(batch, i))
        expected = moved((expected, gradient), 0.1)
        state, _ = step(PLAIN, state, frozen, batch, i)
        assert_close(state.trainable, expected, 2e-6)
    assert state.step == 2


def test_a_group_of_equal_rewards_contributes_exactly_nothing():
    rewards = np.random.default_rng(3).random((PROMPTS, GROUP), dtype=np.float32)
    rewards[1] = 0.28
    advantage = group_advantages(rewards, np.ones(rewards.shape, bool))
    trainable, frozen, batch = collect(advantage=advantage)
    off = jax.tree.map(lambda p: p + 0.01, trainable)  # off-policy, so that ratios differ from 1
    for p in range(PROMPTS):
        group = jax.tree.map(lambda a, p=p: a.reshape(PROMPTS, -1, *a.shape[1:])[p], flat(batch))
        for value in gradient_of(off, frozen, group, learner_of(clip_range=10.0))["net"].values():
            assert (np.asarray(value) == 0).all() if p == 1 else np.abs(value).max() > 1e-3


# ------------------------------------------------------------------------------------------------ ratio, KL, EMA, state
def test_ratio_is_one_before_the_first_update_and_then_moves():
    trainable, frozen, batch = collect(microbatch=PAIRS // 4)
    state, metrics = step(PLAIN, fresh(trainable), frozen, batch)
    for key in ("min", "max"):  # over every pair
        np.testing.assert_allclose(metrics[f"ratio/{key}"], 1, rtol=0, atol=1e-6)
    assert metrics["clip_fraction/low"] == metrics["clip_fraction/high"] == 0
    _, metrics = step(PLAIN, state, frozen, batch)
    assert metrics["ratio/max"] - metrics["ratio/min"] > 1e-3
    assert metrics["clip_fraction/high"] > 0.1 and metrics["approx_kl"] > 0


def offset(batch, by):
    """A rollout that rounded differently."""
    return batch._replace(pairs=batch.pairs._replace(log_prob=batch.pairs.log_prob + by))


def test_on_policy_the_old_log_probability_is_the_updates_own():
    """A rollout that rounded differently changes neither ratio nor gradient, and is reported."""
    trainable, frozen, batch = collect()
    plain, _ = step(PLAIN, fresh(trainable), frozen, batch)
    state, metrics = step(PLAIN, fresh(trainable), frozen, offset(batch, 0.01), on_policy=True)
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1 and metrics["clip_fraction/low"] == 0
    np.testing.assert_allclose(metrics["ratio_first/mean"], np.exp(-0.01), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.trainable, plain.trainable)


def test_rescoring_gives_the_later_updates_their_own_log_probabilities():
    trainable, frozen, batch = collect(updates=2, microbatch=PAIRS // 4)
    again, change = rescore(PLAIN, trainable, frozen, offset(batch, 0.01))
    np.testing.assert_allclose(again.pairs.log_prob[1], batch.pairs.log_prob[1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(again.pairs.log_prob[0], batch.pairs.log_prob[0] + np.float32(0.01))  # left to the update
    np.testing.assert_allclose(change, 1 - np.exp(-0.01), rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, again.pairs._replace(log_prob=0), batch.pairs._replace(log_prob=0))


def test_a_deviation_at_the_first_update_clips_nothing():
    """The same ratios, forced apart: at the first update on policy nothing is clipped; taken as they come, most is."""
    trainable, frozen, batch = collect()
    wrong = batch._replace(pairs=batch.pairs._replace(
        log_prob=batch.pairs.log_prob + 5e-4 * np.resize([1, -1], batch.pairs.log_prob.shape).astype(np.float32)))
    for on_policy in (True, False):
        _, metrics = step(PLAIN, fresh(trainable), frozen, wrong, on_policy=on_policy)
        clipped = metrics["clip_fraction/low"] + metrics["clip_fraction/high"]
        assert clipped == 0 if on_policy else clipped > 0.3
        assert max(abs(metrics[f"ratio_first/{end}"] - 1) for end in ("min", "max")) == pytest.approx(5e-4, rel=0.01)


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
        change, state = tx.update({"w": jnp.ones(())}, state, params)
        found.append(-float(change["w"]))
    np.testing.assert_allclose(found, rates, atol=1e-5)


def test_kl_is_zero_at_the_reference_and_positive_after():
    trainable, frozen, batch = collect(microbatch=PAIRS // 2)
    state, metrics = step(WITH_KL, fresh(trainable, WITH_KL), frozen, batch, reference=trainable)
    assert 0 <= metrics["kl_base"] < 1e-9
    after = jax.device_get(state.trainable)
    _, metrics = step(WITH_KL, state, frozen, batch, reference=trainable)
    examples = jax.tree.map(lambda a: np.asarray(a, np.float64), flat(batch))
    _, kl = numpy_loss(WITH_KL, after, frozen, trainable, examples)
    assert kl.mean() > 1e-5
    np.testing.assert_allclose(metrics["kl_base"], kl.mean(), rtol=1e-3)


def test_kl_pulls_back_to_the_reference():
    """With zero advantages only the KL term acts."""
    trainable, frozen, batch = collect(microbatch=PAIRS // 2, advantage=np.zeros_like(ADVANTAGE))
    state = fresh(jax.tree.map(lambda p: p + 0.03, trainable), WITH_KL)
    values = []
    for _ in range(4):
        state, metrics = step(WITH_KL, state, frozen, batch, reference=trainable)
        values.append(float(metrics["kl_base"]))
    assert (np.diff(values) < 0).all()


def test_ema_is_the_moving_average_and_is_what_is_evaluated():
    trainable, frozen, batch = collect()
    learner = learner_of(clip_range=1.0, ema_decay=0.9)
    state, expected = fresh(trainable, learner), trainable
    for _ in range(3):
        state, _ = step(learner, state, frozen, batch)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * np.asarray(p), expected, state.trainable)
        assert_close(state.ema, expected, 1e-6)
    assert state.eval_params is state.ema
    assert not np.allclose(state.ema["net"]["fc1.kernel"], state.trainable["net"]["fc1.kernel"], atol=1e-4)
    without = fresh(trainable)
    assert without.ema is None and without.eval_params is without.trainable


@pytest.mark.parametrize("with_ema", [False, True])
def test_the_old_state_is_donated(with_ema):
    trainable, frozen, batch = collect()
    trainable = jax.device_put(trainable)
    learner = learner_of(clip_range=1.0, ema_decay=0.9) if with_ema else learner_of(optax.adamw(1e-3))
    old = fresh(trainable, learner)
    state, _ = step(learner, old, frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    state, _ = step(learner, state, frozen, batch)
    assert state.step == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))  # the caller's weights (the reference) survive


# ------------------------------------------------------------------------------------------------ layout of the pairs
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("updates, microbatch", [(1, 8), (2, 16)])
def test_a_batch_holds_exactly_the_chosen_pairs(mesh, updates, microbatch):
    """Every number of the trajectory is unique, so each pair tells where it came from."""
    prompts, group, k, trained, devices = 8, 6, 4, 3, int(np.prod(mesh or 1))
    rng, schedule = np.random.default_rng(0), sde.flow_schedule(STEPS, 3.0)
    latents = np.arange((STEPS + 1) * prompts * group * 3, dtype=np.float32).reshape(STEPS + 1, prompts * group, 3)
    log_probs = rng.standard_normal((STEPS, prompts * group), dtype=np.float32)
    cond = Cond({"a": rng.standard_normal((prompts, 2), dtype=np.float32), "b": {"c": np.arange(prompts)}},
                {"a": rng.standard_normal((1, 2), dtype=np.float32)})
    scores = {"r": (rng.standard_normal((prompts, group), dtype=np.float32), np.ones((prompts, group), bool))}
    advantage = np.asarray(group_advantages(*scores["r"]))
    chosen = np.asarray(best_of(advantage, k))
    algorithm = GRPO(timestep_fraction=trained / (STEPS - 1), best_of=k)
    with on_mesh(mesh):
        trajectory = Trajectory(jnp.asarray(latents), jnp.asarray(log_probs))
        found, _, scalars = make_batch(algorithm, KEY, trajectory, schedule, scores, np.arange(prompts), {}, cond,
                                       weights=(("r", 1.0),), updates=updates, microbatch=microbatch)
        assert len(found.pairs.x.sharding.device_set) == devices
        of = jax.jit(micro_batches)(found)
    assert scalars["reward/r/valid_ratio"] == 1
    n = prompts * k * trained // updates // microbatch
    assert found.pairs.time.shape == (updates, n, microbatch) and found.pairs.x.shape == (updates, n, microbatch, 3)
    assert len(found.samples["advantage"]) == len(found.cond.positive["a"]) == prompts * k  # not one for every pair
    pairs, samples, conds = jax.device_get(of)
    np.testing.assert_array_equal(conds.negative["a"], np.broadcast_to(cond.negative["a"], conds.negative["a"].shape))

    times = {row: [] for row in range(prompts * k)}
    for u in range(updates):
        for i in range(n):
            for m in range(microbatch):
                pair, sample, pair_cond = jax.tree.map(lambda a, u=u, i=i, m=m: a[u, i, m], (pairs, samples, conds.positive))
                t, b = divmod(int(pair.x[0]) // 3, prompts * group)
                p, g = divmod(b, group)
                row = p * k + chosen[p].tolist().index(g)
                times[row].append(t)
                np.testing.assert_array_equal(pair.x, latents[t, b])
                np.testing.assert_array_equal(pair.x_next, latents[t + 1, b])
                assert pair.time == schedule.times[t] and pair.log_prob == log_probs[t, b]
                assert (pair.sigma, pair.sigma_next) == (schedule.sigmas[t], schedule.sigmas[t + 1])
                assert sample["advantage"] == advantage[p, g]
                np.testing.assert_array_equal(pair_cond["a"], cond.positive["a"][p])
                assert pair_cond["b"]["c"] == p
                assert row // (prompts * k // devices) == m // (microbatch // devices)  # no pair changes its device
    for steps in times.values():  # each sample's own, none twice, and never the last step
        assert len(set(steps)) == trained and max(steps) < STEPS - 1
    assert len({tuple(sorted(steps)) for steps in times.values()}) > 3


def micro_batches(batch):
    """All micro-batches as the update takes them, of [U, n, M, ...]; a shared negative is repeated."""
    updates, count = batch.pairs.time.shape[:2]

    def of(u, i):
        pairs, samples, cond = micro_batch(batch, u, i)
        shared = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(pairs.time), *a.shape[1:])), cond.negative)
        return pairs, samples, cond._replace(negative=shared)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(of(u, i) for i in range(count))) for u in range(updates)))


# ------------------------------------------------------------------------------------------------ devices, compilation
@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_update_on_eight_devices_equals_one(mesh):
    """Two updates of all pairs in micro-batches; which pairs share a micro-batch depends on the mesh, their sum not."""
    trained, learner = [], learner_of(clip_range=0.2, ema_decay=0.9)
    for shape in (None, mesh):
        with on_mesh(shape):
            trainable, frozen, batch = collect(microbatch=PAIRS // 4, mesh=shape)
            state = fresh(trainable, learner)
            layout = jax.tree.map(lambda p: p.sharding, state.trainable)
            for _ in range(2):
                state, metrics = step(learner, state, frozen, batch)
            assert jax.tree.map(lambda p: p.sharding, state.trainable) == layout
            trained.append((state, metrics))
    (one, one_metrics), (many, many_metrics) = trained
    assert_close(many.trainable, one.trainable, 1e-5)
    assert_close(many.ema, one.ema, 1e-5)
    assert_close(many_metrics, one_metrics, 1e-5)
    for p in many.trainable["net"].values():  # every replica is the same
        assert len(p.sharding.device_set) == 8
        for shard in p.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(p)[shard.index])
    if mesh[1] > 1:
        assert many.trainable["net"]["fc1.kernel"].sharding.shard_shape((20, 32))[0] == 20 // mesh[1]


@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[2]], ids=str)
def test_rollout_and_update_compile_once(mesh):
    """Three iterations with a moving window of stochastic steps and two updates each, on policy and not."""
    toy = MLPPipeline()  # new static arguments: the caches know nothing of them
    learner = Learner(toy, toy.kernel, GRPO(timestep_fraction=0.8, window=3, window_interval=1), optax.adamw(1e-3))
    before = [f._cache_size() for f in (rollout, make_batch, update)]
    scores = {"r": (ADVANTAGE, np.ones(ADVANTAGE.shape, bool))}
    with on_mesh(mesh):
        trainable, frozen = placed(toy, mesh)
        state = fresh(trainable, learner)
        for i in range(3):
            schedule = learner.algorithm.plan(SCHEDULE, i)
            assert schedule.stochastic.nonzero()[0].tolist() == [j for j in range(i, i + 3) if j < STEPS - 1]
            trajectory = rollout(toy, toy.kernel, state.trainable, frozen, toy.cond(PROMPTS), jax.random.key(i), schedule,
                                 group_size=GROUP)
            batch, _, _ = make_batch(learner.algorithm, KEY, trajectory, schedule, scores, np.arange(PROMPTS), {},
                                     toy.cond(PROMPTS), weights=(("r", 1.0),), updates=2, microbatch=8)
            for u in range(2):
                state, metrics = step(learner, state, frozen, batch, u, on_policy=u == 0)
                assert np.isfinite(metrics["loss"])
    after = [f._cache_size() for f in (rollout, make_batch, update)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
