"""The sampler: noise, recorded log-probabilities, deterministic steps, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax import sde
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.rollout import rollout, sample, step
from tests import oracle
from tests.toy import GROUP, MESHES, PROMPTS, SCHEDULE, STEPS, TOY, MLPPipeline, joined, on_mesh, placed

TOYS = {"flow": TOY, "diffusion": MLPPipeline("ddim", "epsilon", 1.0)}
SCHEDULES = {"flow": SCHEDULE, "diffusion": sde.ddim_schedule(STEPS)}


def sampled(toy=TOY, schedule=SCHEDULE, seed=0, **options):
    """The trajectory as numpy arrays."""
    args = (*toy.init(), toy.cond(PROMPTS), jax.random.key(seed), schedule)
    return jax.device_get(rollout(toy, toy.kernel, *args, group_size=GROUP, **options))


def numpy_steps(toy, schedule, latents):
    """Float64 (mean, std) of every recorded transition."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), joined(*toy.init()))
    text = np.repeat(toy.cond(PROMPTS).positive["text"], GROUP, axis=0).astype(np.float64)
    for i, (time, noisy) in enumerate(zip(schedule.times, schedule.stochastic, strict=True)):
        x = np.asarray(latents[i], np.float64)
        output = toy.predict(params, x, np.full(len(x), time, np.float64), {"text": text})
        mean, std = oracle.transition(toy.kernel.name, toy.prediction, toy.kernel.eta, output, x,
                                      schedule.sigmas[i], schedule.sigmas[i + 1], noisy)
        yield mean, np.full((len(x), 1, 1, 1), std)


# ------------------------------------------------------------------------------------------------ noise
def test_initial_noise_is_shared_within_a_prompt_only():
    latents = sampled().latents
    assert latents.shape == (STEPS + 1, PROMPTS * GROUP, *MLPPipeline.latent_shape)
    first = latents[0].reshape(PROMPTS, GROUP, -1)
    np.testing.assert_array_equal(first, np.broadcast_to(first[:, :1], first.shape))
    assert len(np.unique(first[:, 0], axis=0)) == PROMPTS
    assert len(np.unique(latents[1].reshape(PROMPTS * GROUP, -1), axis=0)) == PROMPTS * GROUP  # the SDE's noise is not
    assert not np.isin(first, sampled(seed=1).latents[0]).any()


def test_initial_noise_can_be_independent():
    first = sampled(shared_noise=False).latents[0]
    assert len(np.unique(first)) == first.size


def test_noise_is_standard_normal_and_fresh_at_every_step():
    latents = sampled().latents
    moments = numpy_steps(TOY, SCHEDULE, latents)
    noise = np.array([(x - mean) / std for x, (mean, std) in zip(latents[1:-1], moments, strict=False)])
    flat = noise.reshape(STEPS - 1, -1)
    n = flat.shape[1]
    np.testing.assert_allclose(flat.mean(1), 0, atol=5 / n**0.5)
    np.testing.assert_allclose(np.cov(flat), np.eye(STEPS - 1), atol=5 * (2 / n)**0.5)


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_the_same_key_gives_the_same_trajectories_on_any_mesh(mesh):
    expected = sampled()
    with on_mesh(mesh):
        args = (*placed(TOY, mesh), TOY.cond(PROMPTS), jax.random.key(0), SCHEDULE)
        found = rollout(TOY, TOY.kernel, *args, group_size=GROUP)
        assert len(found.latents.sharding.device_set) == 8
    np.testing.assert_array_equal(found.latents[0], expected.latents[0])
    np.testing.assert_allclose(found.latents, expected.latents, atol=1e-5)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


# ------------------------------------------------------------------------------------------------ log-probabilities
@pytest.mark.parametrize("paradigm", TOYS)
def test_log_probs_are_those_of_the_recorded_latents(paradigm):
    toy, schedule = TOYS[paradigm], SCHEDULES[paradigm]
    latents, log_probs = sampled(toy, schedule)
    assert log_probs.shape == (STEPS, PROMPTS * GROUP)
    assert latents.dtype == log_probs.dtype == jnp.float32
    for i, (mean, std) in enumerate(numpy_steps(toy, schedule, latents)):
        if schedule.stochastic[i]:
            np.testing.assert_allclose(log_probs[i], oracle.log_prob(latents[i + 1], mean, std), atol=2e-5)
        else:
            np.testing.assert_array_equal(log_probs[i], 0)
            np.testing.assert_allclose(latents[i + 1], mean, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_part_of_the_batch_scores_the_same(dtype):
    """What is stored is exactly what was scored: rows scored again, in chunks of any size, have ratio 1."""
    class Rounded(MLPPipeline):
        def predict(self, *args):
            return super().predict(*args).astype(dtype)  # a network that computes in half precision
    toy = TOY if dtype == jnp.float32 else Rounded()
    latents, log_probs = sampled(toy)
    assert latents.dtype == log_probs.dtype == jnp.float32
    text, (times, sigmas, _) = np.repeat(toy.cond(PROMPTS).positive["text"], GROUP, axis=0), SCHEDULE
    score = jax.jit(lambda text, x, x_next, *args: sde.gaussian_log_prob(
        x_next, *step(toy, toy.kernel, *toy.init(), Cond({"text": text}), x, *args, True)))
    for rows in (slice(1), slice(5, 12)):
        for i in range(STEPS - 1):
            found = score(text[rows], latents[i, rows], latents[i + 1, rows], times[i], sigmas[i], sigmas[i + 1])
            np.testing.assert_allclose(np.exp(found - log_probs[i, rows]), 1, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ deterministic steps
@pytest.mark.parametrize("paradigm", TOYS)
def test_deterministic_schedule_is_the_ode(paradigm):
    toy, schedule = TOYS[paradigm], sde.deterministic(SCHEDULES[paradigm])
    latents, log_probs = sampled(toy, schedule)
    np.testing.assert_array_equal(log_probs, 0)
    means = [mean for mean, _ in numpy_steps(toy, schedule, latents)]
    np.testing.assert_allclose(latents[1:], means, atol=5e-6)
    last = latents[-1].reshape(PROMPTS, GROUP, -1)  # one noise, no other randomness: one sample per prompt
    np.testing.assert_allclose(last, np.broadcast_to(last[:, :1], last.shape), atol=1e-6)


def test_window_has_noise_and_log_probs_inside_only():
    schedule = sde.window(SCHEDULE, 1, 2)
    latents, log_probs = sampled(schedule=schedule)
    assert (log_probs != 0).all(1).tolist() == [False, True, True, False, False, False]
    assert (log_probs == 0).all(1).tolist() == [True, False, False, True, True, True]
    for i, (mean, _) in enumerate(numpy_steps(TOY, schedule, latents)):
        away = np.abs(latents[i + 1] - mean).max()
        assert away > 0.1 if schedule.stochastic[i] else away < 5e-6
    # Steps before the window do not depend on it, and noise depends on the step alone.
    np.testing.assert_array_equal(latents[:2], sampled(schedule=sde.deterministic(SCHEDULE)).latents[:2])


def test_sample_is_the_end_of_one_rollout_per_prompt():
    schedule = sde.deterministic(SCHEDULE)
    found = sample(TOY, *TOY.init(), TOY.cond(PROMPTS), jax.random.key(0), SCHEDULE)
    assert found.shape == (1, PROMPTS, *TOY.latent_shape)
    np.testing.assert_allclose(found[0], sampled(schedule=schedule).latents[-1, ::GROUP], atol=1e-6)


def test_only_the_final_sample_is_kept_if_no_more_is_wanted():
    whole, final = sampled(), sampled(keep=False)
    assert final.log_probs is None and final.latents.shape[0] == 1
    np.testing.assert_allclose(final.latents[0], whole.latents[-1], atol=1e-6)


# ------------------------------------------------------------------------------------------------ one program
def test_rollout_stays_on_the_device():
    args = jax.device_put((*TOY.init(), TOY.cond(PROMPTS), jax.random.key(0), SCHEDULE))
    assert "callback" not in rollout.lower(TOY, TOY.kernel, *args, group_size=GROUP).as_text()
    expected = rollout(TOY, TOY.kernel, *args, group_size=GROUP).latents
    with jax.transfer_guard("disallow"):
        found = jax.block_until_ready(rollout(TOY, TOY.kernel, *args, group_size=GROUP).latents)
        with pytest.raises(Exception, match="Disallowed"):
            rollout(TOY, TOY.kernel, *args[:-1], SCHEDULE, group_size=GROUP)  # the guard works: a host schedule is a transfer
    np.testing.assert_array_equal(found, expected)
