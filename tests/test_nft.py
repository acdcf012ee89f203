"""DiffusionNFT: its loss against float64 numpy, what must vanish, the copy that samples, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import sde
from dancegrpo_jax.algorithms.base import Context
from dancegrpo_jax.algorithms.nft import DiffusionNFT, usable
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.learner import Learner, init_state, make_batch, move_copies, update
from dancegrpo_jax.options import ConfigError
from dancegrpo_jax.rollout import rollout
from tests import oracle
from tests.toy import GROUP, PROMPTS, SCHEDULE, TOY, MLPPipeline, joined

KEY = jax.random.key(6)
M = 24
DIFFUSION = MLPPipeline("ddim", "epsilon", 1.0), sde.ddim_schedule(6)
CASES = {"flow": (TOY, SCHEDULE), "diffusion": DIFFUSION}


def problem(toy, schedule, seed=0):
    """(trainable, frozen, old, reference, pairs, samples, cond, noise), float64."""
    rng = np.random.default_rng(seed)
    trainable, frozen = toy.init(0, np.float64)
    other = toy.init(1, np.float64)[0]
    near = [jax.tree.map(lambda a, b, part=part: a + part * (b - a), trainable, other) for part in (0.1, -0.2)]
    index = rng.integers(0, usable(len(schedule.times)), M)
    pairs = {"time": schedule.times[index].astype(np.float64), "sigma": schedule.sigmas[index].astype(np.float64)}
    samples = {"x0": rng.standard_normal((M, *toy.latent_shape)), "q": rng.random(M)}
    noise = np.asarray(jax.random.normal(KEY, samples["x0"].shape), np.float64)  # what the loss draws
    return trainable, frozen, *near, pairs, samples, Cond({"text": rng.standard_normal((M, toy.text))}), noise


def numpy_loss(algorithm, toy, trainable, frozen, old, reference, pairs, samples, cond, noise, sizes=None):
    """(loss [M], the sizes that are no part of the gradient), as the paper writes it, for either paradigm."""
    sigma = pairs["sigma"].reshape(-1, 1, 1, 1)
    a = oracle.signal(toy.prediction, sigma)
    x = a * samples["x0"] + sigma * noise
    v, v_old, v_ref = (toy.predict(joined(weights, frozen), x, pairs["time"], cond.positive)
                       for weights in (trainable, old, reference))

    def error(output):
        z = x - sigma * output if toy.prediction == "velocity" else (x - sigma * output) / a
        return z - samples["x0"]
    b = algorithm.beta
    errors = [error(b * v + (1 - b) * v_old), error((1 + b) * v_old - b * v)]
    sizes = sizes or [np.abs(e).mean((1, 2, 3)) for e in errors]
    towards, away = ((e**2).mean((1, 2, 3)) / size for e, size in zip(errors, sizes, strict=True))
    q = samples["q"]
    loss = algorithm.advantage_clip / b * (q * towards + (1 - q) * away)
    return loss + algorithm.kl_beta * ((v - v_ref)**2).mean((1, 2, 3)), sizes


def loss_fn(trainable, algorithm, toy, frozen, old, reference, pairs, samples, cond):
    context = Context(toy, toy.kernel, frozen, cond, {"old": old, "reference": reference}, False)
    loss, found = algorithm.loss(context, trainable, pairs, samples, KEY)
    return loss.mean(), found


gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=(1, 2))


def single(parts):
    return jax.tree.map(jnp.float32, parts)


@pytest.mark.parametrize("paradigm", CASES)
@pytest.mark.parametrize("beta, kl", [(1.0, 0.0), (0.1, 0.5)])
def test_loss_and_gradient_equal_numpy(paradigm, beta, kl):
    """Values, and reverse mode in float32 against central differences in float64."""
    toy, schedule = CASES[paradigm]
    algorithm = DiffusionNFT(beta=beta, kl_beta=kl)
    trainable, *rest, noise = problem(toy, schedule)
    (loss, _), found = gradient(single(trainable), algorithm, toy, *single(rest))
    expected, sizes = numpy_loss(algorithm, toy, trainable, *rest, noise)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-4)
    rng, h = np.random.default_rng(2), 1e-6
    for _ in range(3):
        direction = jax.tree.map(lambda value: rng.standard_normal(value.shape), trainable)
        moved = [jax.tree.map(lambda p, d, sign=sign: p + sign * h * d, trainable, direction) for sign in (1, -1)]
        ends = [numpy_loss(algorithm, toy, weights, *rest, noise, sizes)[0].mean() for weights in moved]
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (np.asarray(g, np.float64) * d).sum(), found, direction)))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=2e-3, atol=1e-3 * float(optax.tree.norm(found)))


def test_at_the_old_weights_no_advantage_means_no_gradient_and_beta_does_not_matter():
    toy, schedule = CASES["flow"]
    trainable, frozen, _, reference, pairs, samples, cond, _ = problem(toy, schedule)
    here = single((frozen, trainable, reference, pairs))

    def at(q, beta):
        algorithm = DiffusionNFT(beta=beta, kl_beta=0.0)
        return gradient(single(trainable), algorithm, toy, *here, single(samples | {"q": q}), single(cond))[1]
    whole = at(samples["q"], 1.0)
    norm = float(optax.tree.norm(whole))
    assert norm > 1e-2 and float(optax.tree.norm(at(np.full(M, 0.5), 1.0))) < 1e-6 * norm
    # A tenth of the way between the policies: the same gradient, because the loss is divided by beta.
    difference = jax.tree.map(lambda a, b: a - b, at(samples["q"], 0.1), whole)
    assert float(optax.tree.norm(difference)) < 1e-4 * norm


def test_a_good_sample_is_approached_and_a_bad_one_left():
    toy, schedule = CASES["flow"]
    trainable, frozen, _, reference, pairs, samples, cond, noise = problem(toy, schedule)

    def distance(weights):  # of the denoised sample from x0
        sigma = pairs["sigma"].reshape(-1, 1, 1, 1)
        x = (1 - sigma) * samples["x0"] + sigma * noise
        weights = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
        return ((x - sigma * toy.predict(joined(weights, frozen), x, pairs["time"], cond.positive) - samples["x0"])**2).mean()
    for q, sign in ((1.0, -1), (0.0, 1)):
        step = gradient(single(trainable), DiffusionNFT(kl_beta=0.0), toy, *single(
            (frozen, trainable, reference, pairs, samples | {"q": np.full(M, q)}, cond)))[1]
        after = jax.tree.map(lambda p, g: p - 1e-4 * g, trainable, step)
        assert sign * (distance(after) - distance(trainable)) > 0


def test_examples_are_levels_of_the_samplers_grid():
    toy, _ = CASES["flow"]
    algorithm = DiffusionNFT(levels=3, advantage_clip=2.0)
    advantage = np.float32([[0.5, -9.0], [9.0, 0.0]])
    plan = algorithm.plan(SCHEDULE, 7)
    assert not np.asarray(plan.stochastic).any()
    trajectory = rollout(toy, toy.kernel, *toy.init(), toy.cond(2), KEY, plan, group_size=2, keep=False)
    pairs, samples = algorithm.examples(KEY, trajectory, plan, advantage)
    np.testing.assert_allclose(samples["q"], [0.625, 0, 1, 0.5])
    np.testing.assert_array_equal(samples["x0"], trajectory.latents[-1])
    for times, sigmas in zip(np.asarray(pairs["time"]), np.asarray(pairs["sigma"]), strict=True):
        assert len(set(times)) == 3 and set(times) <= set(SCHEDULE.times[:usable(len(SCHEDULE.times))])
        np.testing.assert_allclose(times, 1000 * sigmas, rtol=1e-6)
    with pytest.raises(ConfigError, match="algorithm.nft.levels=9"):
        DiffusionNFT(levels=9).check(steps=6, group=2, where="algorithm.nft")


@pytest.mark.parametrize("schedule, keeps", [("early", {0: 0, 100: 0.1, 900: 0.5}),
                                             ("late", {0: 0, 75: 0, 95: 0.15, 500: 0.999})])
def test_the_copy_that_samples_follows(schedule, keeps):
    algorithm = DiffusionNFT(old=schedule)
    for iteration, keep in keeps.items():
        found = algorithm.after({"old": {"w": jnp.ones(3)}}, {"w": jnp.zeros(3)}, jnp.int32(iteration))
        np.testing.assert_allclose(found["old"]["w"], keep, rtol=1e-5, atol=1e-7)


def test_it_learns():
    """Twelve iterations on the toy: samples come nearer to what is rewarded, and the copy is what drew them."""
    learner = Learner(TOY, TOY.kernel, DiffusionNFT(kl_beta=0.0, advantage_clip=2.0), optax.adam(3e-3))
    trainable, frozen = TOY.init()
    state, cond = init_state(learner, trainable, {}), TOY.cond(PROMPTS)
    plan, group = learner.algorithm.plan(SCHEDULE, 0), 4 * GROUP
    numbers, rewards = np.arange(PROMPTS), []
    for i in range(12):
        key = jax.random.fold_in(KEY, i)
        trajectory = rollout(TOY, TOY.kernel, state.copies["old"], frozen, cond, key, plan, group_size=group,
                             shared_noise=False, keep=False)
        reward = -jnp.square(trajectory.latents[-1] - 0.5).mean((1, 2, 3)).reshape(PROMPTS, group)
        rewards.append(float(reward.mean()))
        scores = {"r": (reward, jnp.ones(reward.shape, bool))}
        batch, _, _ = make_batch(learner.algorithm, key, trajectory, plan, scores, numbers, {}, cond, weights=(("r", 1.0),),
                                 updates=1, microbatch=PROMPTS * group * 2)
        state, metrics = update(learner, state, frozen, {}, batch, 0, key, False)
        state = state._replace(copies=move_copies(learner, state.copies, state.trainable, jnp.int32(i)))
        assert np.isfinite(metrics["loss"])
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
