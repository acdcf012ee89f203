"""The diffusion core against float64 numpy, closed-form Gaussian marginals and the diffusers schedulers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax import registry, sde
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.rollout import rollout
from tests import oracle
from tests.toy import GaussianPipeline

KERNELS = ([(kernel, eta, "velocity") for kernel, eta in (("dance", 0.3), ("flow", 0.7), ("cps", 0.7))]
           + [(kernel, 0.8, prediction) for kernel in ("ddim", "sde") for prediction in registry.PREDICTIONS[1:]])
MEAN, STD = np.array([1.5, -0.5, 0.3, 0.0]), np.array([0.5, 1.3, 0.1, 0.8])


# ------------------------------------------------------------------------------------------------ the transition kernel
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("kernel, eta, prediction", KERNELS)
def test_transition_equals_the_equations(kernel, eta, prediction, stochastic):
    rng = np.random.default_rng(0)
    levels = [(0.97, 0.95), (0.5, 0.3), (0.06, 0.05), (0.04, 0.0)]
    if prediction == "velocity":
        levels = [(1.0, 0.97), *levels]
    x, output = rng.standard_normal((2, len(levels), 3, 2), dtype=np.float32)
    sigma, sigma_next = np.array(levels, np.float32).T
    mean, std = sde.transition(kernel, prediction, eta, output, x, sigma, sigma_next, stochastic)
    assert mean.dtype == std.dtype == jnp.float32
    assert std.shape == (len(levels), 1, 1)
    for i in range(len(levels)):
        expected = oracle.transition(kernel, prediction, eta, output[i], x[i], sigma[i], sigma_next[i], stochastic)
        np.testing.assert_allclose(mean[i], expected[0], rtol=0, atol=5e-6, err_msg=f"mean at {levels[i]}")
        np.testing.assert_allclose(std[i, 0, 0], expected[1], rtol=3e-6, atol=0, err_msg=f"std at {levels[i]}")


def test_transition_takes_noise_levels_per_sample_or_for_all():
    x, output = np.random.default_rng(0).standard_normal((2, 3, 4), dtype=np.float32)
    for one, many in ((True, [True] * 3), (False, [False] * 3)):
        a = sde.transition("dance", "velocity", 0.3, output, x, 0.6, 0.5, one)
        b = sde.transition("dance", "velocity", 0.3, output, x, jnp.full(3, 0.6), jnp.full(3, 0.5), jnp.array(many))
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        assert a[1].shape == b[1].shape == (3, 1)


def test_prediction_types_agree():
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 2, 5), dtype=np.float32)
    sigma, alpha = np.float32(0.6), np.float32(0.8)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
    for kernel in registry.DIFFUSION_KERNELS:
        found = [sde.transition(kernel, p, 1.0, output, alpha * x0 + sigma * eps, sigma, 0.4, True)
                 for p, output in outputs.items()]
        for mean, std in found[1:]:
            np.testing.assert_allclose(mean, found[0][0], atol=1e-6)
            np.testing.assert_array_equal(std, found[0][1])
    for prediction, output in outputs.items():
        for found, expected in zip(sde.denoise(prediction, output, alpha * x0 + sigma * eps, sigma), (x0, eps), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    velocity = sde.denoise("velocity", eps - x0, (1 - sigma) * x0 + sigma * eps, sigma)
    for found, expected in zip(velocity, (x0, eps), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_unknown_names_raise():
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="euler"):
        sde.transition("euler", "velocity", 0.3, x, x, 0.5, 0.4, True)
    with pytest.raises(ValueError, match="noise"):
        sde.transition("ddim", "noise", 0.3, x, x, 0.5, 0.4, True)


# ------------------------------------------------------------------------------------------------ marginals
# The data are Gaussian, so the exact denoiser is linear, every step is affine in x, and the oracle propagates mean and
# variance exactly. That the oracle's equations are the package's is tested above.
def flow_levels(steps, start=1.0, shift=1.0):
    s = np.linspace(start, 0, steps + 1)
    return shift * s / (1 + (shift - 1) * s)


def diffusion_levels(steps):
    return np.sin(np.linspace(1.5, 0.05, steps + 1))


def error(kernel, prediction, eta, sigmas, noisy=None):
    """Largest error of the final standard deviation, with the exact marginal at the start."""
    noisy = np.arange(len(sigmas) - 1) < len(sigmas) - 2 if noisy is None else noisy
    mean, variance = oracle.gaussian_marginals(kernel, prediction, eta, sigmas, noisy, MEAN, STD)
    alpha, sigma = oracle.signal(prediction, sigmas[-1]), sigmas[-1]
    return max(np.abs(mean[-1] - alpha * MEAN).max(), np.abs(variance[-1]**0.5 - np.hypot(alpha * STD, sigma)).max())


def orders(errors):
    """Observed order of convergence from errors at T, 2 T, 4 T, ..."""
    return np.log2(np.divide(errors[:-1], errors[1:]))


@pytest.mark.parametrize("kernel, eta, prediction, levels", [
    ("dance", 0.0, "velocity", flow_levels),  # ODE
    ("dance", 0.3, "velocity", flow_levels),
    ("dance", 0.3, "velocity", lambda steps: flow_levels(steps, shift=3)),
    ("flow", 0.7, "velocity", lambda steps: flow_levels(steps, start=0.9)),
    ("cps", 0.0, "velocity", flow_levels),
    *[(kernel, eta, prediction, diffusion_levels)
      for kernel in ("ddim", "sde") for eta in (0.0, 0.5, 1.0) for prediction in registry.PREDICTIONS[1:]]])
def test_samplers_converge_to_the_marginal_with_first_order(kernel, eta, prediction, levels):
    errors = [error(kernel, prediction, eta, levels(steps)) for steps in (64, 128, 256, 512)]
    np.testing.assert_allclose(orders(errors), 1, atol=0.1)
    assert errors[-1] < 0.01


def test_mixed_window_keeps_the_marginal():
    errors = [error("dance", "velocity", 0.3, flow_levels(n), (np.arange(n) >= n // 4) & (np.arange(n) < n // 2))
              for n in (64, 128, 256, 512)]
    np.testing.assert_allclose(orders(errors), 1, atol=0.1)


def test_ode_maps_each_point_to_its_closed_form():
    """The Gaussian flow scales deviations from alpha * mean by the ratio of the marginal standard deviations."""
    for kernel, prediction, levels in (("dance", "velocity", flow_levels), ("ddim", "epsilon", diffusion_levels)):
        errors = []
        for steps in (64, 128, 256, 512):
            sigmas = levels(steps)
            alpha = oracle.signal(prediction, sigmas)
            spread = np.hypot(alpha[:, None] * STD, sigmas[:, None])
            x = 0.7 + np.zeros(4)
            found, _ = oracle.gaussian_marginals(kernel, prediction, 0.0, sigmas, np.zeros(steps, bool), MEAN, STD,
                                                 start=(x, np.zeros(4)))
            expected = alpha[-1] * MEAN + spread[-1] / spread[0] * (x - alpha[0] * MEAN)
            errors.append(np.abs(found[-1] - expected).max())
        np.testing.assert_allclose(orders(errors), 1, atol=0.1)


@pytest.mark.parametrize("eta", [0.5, 0.7])
def test_flow_kernel_from_pure_noise_converges_with_order_eta_squared(eta):
    """g diverges at sigma = 1: the first step multiplies the variance by 1 + eta^4 / 4 however small it is, and what
    follows only contracts this error by T^(-eta^2)."""
    sigmas = flow_levels(512)
    _, variance = oracle.gaussian_marginals("flow", "velocity", eta, sigmas, np.ones(512, bool), MEAN, STD)
    np.testing.assert_allclose(variance[1], 1 + eta**4 / 4, rtol=0.01)
    errors = [error("flow", "velocity", eta, flow_levels(steps)) for steps in (8192, 16384, 32768)]
    np.testing.assert_allclose(orders(errors), eta**2, atol=0.06)


def test_cps_keeps_the_noise_level_exactly_only_where_the_denoiser_is_certain():
    """Its noise does not shrink with the step. Point data (one possible x0) are exact at any T; for data with a spread
    the final variance tends to (1 + cos(eta pi / 2)) / 2 of the data's, and to all of it if eta ~ 1 / sqrt(T)."""
    sigmas, noisy = flow_levels(8), np.ones(8, bool)
    mean, variance = oracle.gaussian_marginals("cps", "velocity", 0.7, sigmas, noisy, MEAN, 0 * STD)
    np.testing.assert_allclose(mean, (1 - sigmas[:, None]) * MEAN, atol=1e-12)
    np.testing.assert_allclose(variance, np.tile(sigmas[:, None]**2, 4), atol=1e-12)

    steps = 16384
    _, variance = oracle.gaussian_marginals("cps", "velocity", 0.7, flow_levels(steps), np.ones(steps, bool), MEAN, STD)
    np.testing.assert_allclose(variance[-1] / STD**2, (1 + np.cos(0.35 * np.pi)) / 2, rtol=0.01)

    errors = [error("cps", "velocity", 2 / steps**0.5, flow_levels(steps)) for steps in (64, 128, 256, 512)]
    np.testing.assert_allclose(orders(errors), 1, atol=0.1)


@pytest.mark.parametrize("kernel, eta, prediction", [("dance", 0.3, "velocity"), ("ddim", 1.0, "epsilon")])
def test_rollout_samples_have_the_exact_moments(kernel, eta, prediction):
    """Monte Carlo through the real sampler: mean and covariance at every step, within 5 standard errors."""
    schedule = sde.flow_schedule(12, 3.0) if prediction == "velocity" else sde.ddim_schedule(10)
    toy, samples = GaussianPipeline(kernel, prediction, eta, schedule, (4,)), 8192
    cond = {"mean": np.tile(MEAN, (2, 1)).astype(np.float32), "std": np.tile(STD, (2, 1)).astype(np.float32)}
    latents = rollout(toy, toy.kernel, {}, {}, Cond(cond), jax.random.key(0), schedule, group_size=samples // 2,
                      shared_noise=False).latents
    means, variances = oracle.gaussian_marginals(kernel, prediction, eta, schedule.sigmas.astype(np.float64),
                                                 schedule.stochastic, MEAN, STD, start=(np.zeros(4), np.ones(4)))
    for x, mean, variance in zip(np.asarray(latents, np.float64), means, variances, strict=True):
        np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * np.sqrt(variance / samples))
        scale = np.sqrt(np.outer(variance, variance))
        np.testing.assert_array_less(np.abs(np.cov(x.T) - np.diag(variance)), 5 * scale * (2 / samples)**0.5)


# ------------------------------------------------------------------------------------------------ log-probability
def test_log_prob_is_the_mean_gaussian_log_density():
    rng = np.random.default_rng(0)
    x, mean = rng.standard_normal((2, 3, 4, 5), dtype=np.float32)
    std = np.array([0.02, 0.3, 1.7], np.float32).reshape(3, 1, 1)
    found = sde.gaussian_log_prob(x, mean, std)
    assert found.shape == (3,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, oracle.log_prob(x, mean, std), rtol=2e-6)


def test_log_prob_of_a_deterministic_step_is_zero_with_finite_gradient():
    x, std = jnp.ones((2, 3)), jnp.array([[0.0], [0.4]])
    np.testing.assert_array_equal(sde.gaussian_log_prob(x, 0.5 * x, std)[0], 0)
    total = jax.value_and_grad(lambda *args: sde.gaussian_log_prob(*args).sum(), argnums=(0, 1, 2))
    value, gradients = total(x, 0.5 * x, std)
    assert np.isfinite(value)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.abs(gradient[1]).min() > 0


@pytest.mark.parametrize("kernel, eta, prediction", KERNELS)
def test_gradients_are_finite_at_the_ends_of_the_schedule(kernel, eta, prediction):
    sigma = jnp.array([1.0 if prediction == "velocity" else 0.999, 0.1, 0.5])
    sigma_next, stochastic = jnp.array([0.98, 0.0, 0.4]), jnp.array([True, True, False])

    def score(output):
        mean, std = sde.transition(kernel, prediction, eta, output, jnp.ones((3, 4)), sigma, sigma_next, stochastic)
        return sde.gaussian_log_prob(jnp.zeros((3, 4)), mean, std).sum()
    assert np.isfinite(jax.grad(score)(jnp.full((3, 4), 0.3))).all()


# ------------------------------------------------------------------------------------------------ schedules
@pytest.mark.parametrize("steps, shift, expected", [
    (16, 3, "1000 978 954 928 900 868 833 794 750 700 642 576 500 409 300 166"),  # FLUX
    (20, 3, "1000 982 964 944 923 900 874 847 818 785 750 710 666 617 562 500 428 346 250 136"),  # Qwen-Image, Wan
    (16, 5, "1000 986 972 955 937 916 892 865 833 795 750 694 625 535 416 250"),  # HunyuanVideo
    (16, 7, "1000 990 980 968 954 939 921 900 875 844 807 760 700 617 500 318")])  # SkyReels
def test_flow_schedule(steps, shift, expected):
    schedule = sde.flow_schedule(steps, shift)
    assert (1000 * schedule.sigmas[:-1]).astype(int).tolist() == [int(t) for t in expected.split()]
    np.testing.assert_array_equal(schedule.times, 1000 * schedule.sigmas[:-1])
    assert schedule.times.dtype == schedule.sigmas.dtype == np.float32
    assert schedule.sigmas[0] == 1 and schedule.sigmas[-1] == 0 and (np.diff(schedule.sigmas) < 0).all()
    assert schedule.stochastic.tolist() == [True] * (steps - 1) + [False]


@pytest.mark.parametrize(("rounding", "expected"), [
    ("int", [1000, 978, 954, 928, 900, 868, 833, 794, 750, 700, 642, 576, 500, 409, 300, 166]),
    ("bf16_ref", [1000, 976, 952, 928, 900, 868, 832, 792, 752, 700, 640, 576, 500, 408, 300, 166]),
])
def test_rounded_times_are_those_of_the_reference(rounding, expected):
    """DanceGRPO's FLUX loop; only the times change, not the noise levels."""
    schedule, exact = sde.flow_schedule(16, 3.0, rounding), sde.flow_schedule(16, 3.0)
    np.testing.assert_array_equal(schedule.times, expected)
    np.testing.assert_array_equal(schedule.sigmas, exact.sigmas)
    assert schedule.times.dtype == np.float32
    np.testing.assert_allclose(exact.times, 1000 * exact.sigmas[:-1])


SHIFTS = [*np.linspace(0.1, 20, 1991), *(math.exp(0.5 + (1.15 - 0.5) * ((side // 16)**2 - 256) / (4096 - 256))
                                         for side in range(256, 1441, 16))]  # FLUX's own, by the number of tokens


@pytest.mark.parametrize("steps", [2, 16, 1000])
def test_flow_schedules_of_any_shift_begin_at_one_and_end_at_zero(steps):
    exact = flow_levels(steps, shift=np.array(SHIFTS)[:, None])
    schedules = [sde.flow_schedule(steps, shift) for shift in SHIFTS]
    sigmas = np.stack([schedule.sigmas for schedule in schedules])
    assert (sigmas[:, 0] == 1).all() and (sigmas[:, -1] == 0).all() and (np.diff(sigmas) < 0).all()
    assert (sigmas[:, 1] < sde.PURE_NOISE).all()
    np.testing.assert_allclose(sigmas, exact, rtol=2e-6, atol=0)
    np.testing.assert_array_equal([schedule.times for schedule in schedules], 1000 * sigmas[:, :-1])


@pytest.mark.parametrize("rounding", registry.TIME_ROUNDING)
def test_the_first_time_is_1000_for_any_shift(rounding):
    assert {float(sde.flow_schedule(4, shift, rounding).times[0]) for shift in SHIFTS} == {1000}


@pytest.mark.parametrize("kernel, eta", [(kernel, eta) for kernel, eta, prediction in KERNELS if prediction == "velocity"])
def test_flow_kernels_on_schedules_of_any_shift(kernel, eta):
    sigmas = np.stack([sde.flow_schedule(steps, shift).sigmas[[0, 1, 2, -3, -2, -1]]
                       for shift in SHIFTS for steps in (5, 16, 1000)])
    x, output = np.random.default_rng(0).standard_normal((2, sigmas[:, 1:].size, 2), dtype=np.float32)
    noisy = np.tile([True, True, False, True, True], len(sigmas))  # the third step is none of a schedule, but a legal pair
    check_steps(kernel, "velocity", eta, output, x, sigmas[:, :-1].ravel(), sigmas[:, 1:].ravel(), noisy, 1e-6)
    if kernel == "flow":  # eta sqrt(sigma / (1 - sigma_next) * (sigma - sigma_next)) at sigma = 1
        _, std = sde.transition(kernel, "velocity", eta, output[::5], x[::5], sigmas[:, 0], sigmas[:, 1], True)
        np.testing.assert_allclose(std, eta, rtol=1e-6)


@pytest.mark.parametrize("kernel, eta, prediction", [case for case in KERNELS if case[2] != "velocity"])
def test_diffusion_kernels_on_schedules_of_any_length(kernel, eta, prediction):
    for beta_schedule, beta_start, beta_end in (("scaled_linear", 0.00085, 0.012), ("linear", 0.0001, 0.02)):
        sigmas = [sde.ddim_schedule(steps, beta_schedule=beta_schedule, beta_start=beta_start, beta_end=beta_end,
                                    set_alpha_to_one=one, steps_offset=offset).sigmas
                  for steps in (2, 3, 16, 50, 499, 999) for one in (False, True) for offset in (0, 1)]
        before, after = (np.concatenate([levels[part] for levels in sigmas]) for part in (slice(-1), slice(1, None)))
        x, output = np.random.default_rng(0).standard_normal((2, len(before), 2), dtype=np.float32)
        check_steps(kernel, prediction, eta, output, x, before, after, np.arange(len(before)) % 7 < 5, 2e-6)


def check_steps(kernel, prediction, eta, output, x, sigma, sigma_next, noisy, rtol):
    """Mean and std are those of the oracle, and the gradient of the log-probability is finite, at each of many steps."""
    def score(output):
        mean, std = sde.transition(kernel, prediction, eta, output, x, sigma, sigma_next, noisy)
        return sde.gaussian_log_prob(x, mean, std).sum(), (mean, std)
    gradient, (mean, std) = jax.grad(score, has_aux=True)(output)
    assert np.isfinite(gradient).all()
    columns = (a[:, None] for a in (sigma, sigma_next, noisy))
    expected_mean, expected_std = oracle.transition(kernel, prediction, eta, output, x, *columns)
    np.testing.assert_allclose(std, expected_std, rtol=rtol, atol=1e-9)
    np.testing.assert_allclose(mean, expected_mean, rtol=rtol, atol=5 * rtol)


@pytest.mark.parametrize("sigma", [1 + 2.0**-23, 1.0, 1 - 2.0**-24, 1 - 2.0**-22])
def test_the_flow_kernel_takes_pure_noise_from_no_equality_of_floats(sigma):
    x = jnp.ones((1, 2))
    _, std = sde.transition("flow", "velocity", 0.7, x, x, sigma, 0.98, True)
    np.testing.assert_allclose(std, 0.7, rtol=1e-5)


def test_schedules_whose_levels_float32_cannot_tell_apart_are_refused():
    for steps, shift in ((1000, 1e4), (2, 1e9), (16, float("inf"))):
        with pytest.raises(ValueError, match="shift"), np.errstate(invalid="ignore"):
            sde.flow_schedule(steps, shift)
    assert sde.flow_schedule(1000, 500.0).sigmas[1] < sde.PURE_NOISE


def test_ddim_schedules_without_signal_or_with_too_many_steps_are_refused():
    for steps, offset in ((1000, 1), (1001, 0), (2000, 0)):
        with pytest.raises(ValueError, match="steps"):
            sde.ddim_schedule(steps, steps_offset=offset)
    with pytest.raises(ValueError, match="beta_end=0.5"):
        sde.ddim_schedule(50, beta_schedule="linear", beta_end=0.5)
    with pytest.raises(ValueError, match="beta_start=0.0"):
        sde.ddim_schedule(50, beta_schedule="linear", beta_start=0.0, steps_offset=0)


@pytest.mark.parametrize("steps", [50, 20])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_ddim_schedule(steps, beta_schedule):
    root = 0.5 if beta_schedule == "scaled_linear" else 1
    betas = np.linspace(0.00085**root, 0.012**root, 1000)**(1 / root)
    alphas_cumprod = np.cumprod(1 - betas)
    for set_alpha_to_one in (False, True):
        schedule = sde.ddim_schedule(steps, beta_schedule=beta_schedule, set_alpha_to_one=set_alpha_to_one)
        times = list(range(1000 - 1000 // steps + 1, 0, -1000 // steps))
        assert schedule.times.tolist() == times
        after = [*alphas_cumprod[[t - 1000 // steps for t in times[:-1]]], 1 if set_alpha_to_one else alphas_cumprod[0]]
        np.testing.assert_allclose(1 - schedule.sigmas.astype(np.float64)**2, [alphas_cumprod[times[0]], *after],
                                   atol=2e-6)
        assert schedule.sigmas.dtype == np.float32 and schedule.stochastic.all()
    assert sde.ddim_schedule(50).times[[0, 1, -1]].tolist() == [981, 961, 1]


def test_ddim_schedule_rejects_unknown_betas():
    with pytest.raises(ValueError, match="cosine"):
        sde.ddim_schedule(50, beta_schedule="cosine")


def test_window_and_deterministic_only_change_the_noise():
    schedule = sde.flow_schedule(8)
    moved = sde.window(schedule, 3, 2)
    assert moved.stochastic.tolist() == [i in (3, 4) for i in range(8)]
    assert sde.window(schedule, 6, 4).stochastic.tolist() == [i == 6 for i in range(8)]  # the last step stays ODE
    assert not sde.deterministic(schedule).stochastic.any()
    for changed in (moved, sde.deterministic(schedule)):
        assert changed.sigmas is schedule.sigmas and changed.times is schedule.times
        assert changed.stochastic.dtype == bool


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_diffusers(prediction):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    reference = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False, prediction_type=prediction, timestep_spacing="leading")
    reference.set_timesteps(50)
    schedule = sde.ddim_schedule(50)
    assert reference.timesteps.tolist() == schedule.times.tolist()
    x, output, noise = np.random.default_rng(0).standard_normal((3, 50, 4, 2), dtype=np.float32)
    for eta in (1.0, 0.0):
        mean, std = sde.transition("ddim", prediction, eta, output, x, schedule.sigmas[:-1], schedule.sigmas[1:], True)
        for i, t in enumerate(reference.timesteps):
            args = (torch.tensor(a[i]) for a in (output, x))
            expected = reference.step(next(args), t, next(args), eta=eta, variance_noise=torch.tensor(noise[i]))
            # sigma is the fp32 number here, alphas_cumprod there: rounding sigma moves alphas_cumprod by 6e-8
            atol = 1e-5 + 1.5e-7 / float(reference.alphas_cumprod[int(t)])
            np.testing.assert_allclose(mean[i] + std[i] * noise[i], expected.prev_sample, atol=atol, err_msg=f"t={t}")


def test_flow_ode_equals_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = sde.flow_schedule(16, 3.0)
    x, output = np.random.default_rng(0).standard_normal((2, 16, 4, 2), dtype=np.float32)
    for kernel in registry.FLOW_KERNELS:
        mean, std = sde.transition(kernel, "velocity", 0.3, output, x, schedule.sigmas[:-1], schedule.sigmas[1:], False)
        assert not std.any()
        reference.set_timesteps(sigmas=np.linspace(1, 1 / 16, 16))  # it counts its own steps
        np.testing.assert_allclose(reference.sigmas, schedule.sigmas, atol=1e-6)
        np.testing.assert_allclose(reference.timesteps, schedule.times, atol=1e-3)
        for i, t in enumerate(reference.timesteps):
            expected = reference.step(torch.tensor(output[i]), t, torch.tensor(x[i])).prev_sample
            np.testing.assert_allclose(mean[i], expected, atol=2e-6, err_msg=f"t={t}")
