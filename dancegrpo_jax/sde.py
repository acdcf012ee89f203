"""The diffusion: noise schedules and transition kernels p(x_next | x), shared by sampling and by scoring.

Both paradigms are written with one noise level `sigma`, the coefficient of the noise in
`x = alpha(sigma) x0 + sigma eps`:

* rectified flow ("velocity" prediction): alpha = 1 - sigma;
* diffusion, variance preserving ("epsilon", "v_prediction", "sample"): alpha = sqrt(1 - sigma^2), so that
  sigma = sqrt(1 - alphas_cumprod) of a DDPM schedule.

Whatever the network predicts is first turned into (x0, eps); the score is -eps / sigma in both paradigms. All
arithmetic is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax.registry import DIFFUSION_KERNELS, FLOW_KERNELS, PREDICTIONS, resolve

# A level above this is pure noise; no float has to equal another for that. The first level of a flow schedule is 1 (give or
# take roundings of 6e-8), any second one at most 1 - 1 / (shift steps): 1000 steps with a shift of 20 leave 50 times the
# distance that is needed here, and schedules refuse what would come too near.
PURE_NOISE = 1 - 2**-20


class Schedule(NamedTuple):
    """Noise levels of a sampler with T steps; plain arrays, so that changing them never recompiles.

    times: [T] fp32, the network's time input at each step, in 0..1000.
    sigmas: [T+1] fp32, decreasing noise levels; step i goes from sigmas[i] to sigmas[i+1].
    stochastic: [T] bool, True where the step draws noise (SDE), False where it is deterministic (ODE).
    """

    times: np.ndarray
    sigmas: np.ndarray
    stochastic: np.ndarray


class Kernel(NamedTuple):
    """A transition kernel, by name or import path, and its noise strength. Static; the default serves where no step is
    stochastic."""

    name: str = "dance"
    eta: float = 0.0


def flow_schedule(steps: int, shift: float = 1.0, rounding: str = "exact") -> Schedule:
    """Rectified-flow schedule: linspace(1, 0, T+1) warped by shift * s / (1 + (shift - 1) s), time = 1000 sigma.

    The last step is deterministic: it lands on the predicted x0, which is what gets decoded (DanceGRPO, FLUX).

    `rounding` of the times is for comparison with DanceGRPO's PyTorch code, which feeds "int": truncated to whole
    numbers; "bf16_ref": that, and what a bfloat16 FLUX makes of time / 1000 before it multiplies by 1000 again.

    Raises: ValueError if float32 cannot tell the levels apart (a shift of thousands).
    """
    s = np.linspace(1.0, 0.0, steps + 1, dtype=np.float32)
    sigmas = (np.float32(shift) * s / (1 + np.float32(shift - 1) * s)).astype(np.float32)
    sigmas[0], sigmas[-1] = 1, 0  # the quotient rounds to 1 -+ 1e-7 for many shifts
    if not (np.diff(sigmas) < 0).all() or sigmas[1] > PURE_NOISE:
        raise ValueError(f"{steps} steps with a shift of {shift:g}: float32 cannot tell their noise levels apart; use a "
                         "moderate shift (sampler.shift)")
    times = 1000 * sigmas[:-1]
    if rounding != "exact":
        times = np.trunc(times)
    if rounding == "bf16_ref":
        times = ((times / 1000).astype(jnp.bfloat16) * jnp.bfloat16(1000)).astype(np.float32)
    return Schedule(times, sigmas, np.arange(steps) < steps - 1)


def ddim_schedule(steps: int, *, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
                  beta_schedule: str = "scaled_linear", steps_offset: int = 1, set_alpha_to_one: bool = False) -> Schedule:
    """DDIM schedule ("leading" spacing) of a DDPM-trained checkpoint; arguments as in its scheduler_config.json.

    Every step is stochastic: Stable Diffusion decodes the last sample itself.

    Raises: ValueError for more steps than the checkpoint has, and for betas that leave no signal at the first step (the
    kernels divide by it) or no noise before the last.
    """
    if beta_schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float32) ** 2
    elif beta_schedule == "linear":
        betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float32)
    else:
        raise ValueError(f"beta_schedule {beta_schedule!r} is not supported; use 'scaled_linear' or 'linear'")
    alphas_cumprod = np.cumprod(1 - betas, dtype=np.float32)
    stride = num_train_timesteps // steps
    times = (np.arange(steps) * stride)[::-1] + steps_offset
    if stride < 1 or times[0] >= num_train_timesteps:
        raise ValueError(f"{steps} steps: a checkpoint of {num_train_timesteps} timesteps with steps_offset={steps_offset} "
                         "has not as many; use fewer (sampler.steps, sampler.eval_steps)")
    final = np.float32(1.0) if set_alpha_to_one else alphas_cumprod[0]
    previous = times - stride
    after = np.where(previous >= 0, alphas_cumprod[np.maximum(previous, 0)], final)
    sigmas = np.sqrt(1 - np.append(alphas_cumprod[times[:1]], after)).astype(np.float32)
    if not (sigmas[0] < PURE_NOISE and (sigmas[:-1] > 0).all()):
        raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: noise levels from {sigmas[0]} to {sigmas[-2]} are "
                         "not within (0, 1)")
    return Schedule(times.astype(np.float32), sigmas, np.ones(steps, bool))


def window(schedule: Schedule, start: int, size: int) -> Schedule:
    """Keeps noise only in steps [start, start + size): the mixed ODE-SDE sampler of MixGRPO."""
    step = np.arange(len(schedule.times))
    return schedule._replace(stochastic=schedule.stochastic & (step >= start) & (step < start + size))


def deterministic(schedule: Schedule) -> Schedule:
    """The same schedule without noise: the probability-flow ODE (Euler for flow, DDIM with eta 0 for diffusion)."""
    return schedule._replace(stochastic=jnp.zeros_like(schedule.stochastic))


def alpha(prediction: str, sigma):
    """Signal coefficient at noise level sigma; as a product, since 1 - sigma^2 cancels near 1."""
    return 1 - sigma if prediction == "velocity" else jnp.sqrt(jnp.maximum((1 - sigma) * (1 + sigma), 0))


def denoise(prediction: str, output, x, sigma):
    """Turns a network output into (x0, eps).

    Args:
      prediction: one of PREDICTIONS.
      output, x: [B, ...]; sigma: broadcastable to x.
    """
    a = alpha(prediction, sigma)
    if prediction == "velocity":  # v = eps - x0
        return x - sigma * output, x + a * output
    if prediction == "epsilon":
        return (x - sigma * output) / a, output
    if prediction == "v_prediction":  # v = alpha eps - sigma x0
        return a * x - sigma * output, a * output + sigma * x
    if prediction == "sample":
        return output, (x - a * output) / sigma
    raise ValueError(f"prediction {prediction!r} is not one of {PREDICTIONS}")


class Step(NamedTuple):
    """What a transition kernel is given: x [B, ...] fp32, what the network makes of it, and noise levels [B, 1, ...].

    ode: where the deterministic step goes, alpha_next x0 + sigma_next eps.
    """

    x: jax.Array
    x0: jax.Array
    eps: jax.Array
    alpha: jax.Array
    alpha_next: jax.Array
    sigma: jax.Array
    sigma_next: jax.Array
    ode: jax.Array

    @property
    def dt(self):
        """sigma_next - sigma, negative."""
        return self.sigma_next - self.sigma

    @property
    def gain(self):
        """alpha_next^2 - alpha^2 of diffusion, without the cancellation of the difference."""
        return -self.dt * (self.sigma + self.sigma_next)


# A kernel is a function (eta, step) -> (mean, std) of a stochastic step. Those of rectified flow follow
# dz = (v - g^2/2 score) dt + g dw, where score = -eps / sigma.


def dance(eta: float, step: Step):
    """g = eta (DanceGRPO eq. 7; 0.3 for FLUX)."""
    return _euler(eta**2, step)


def flow(eta: float, step: Step):
    """g = eta sqrt(sigma / (1 - sigma)), at sigma = 1 with the next level under the root (Flow-GRPO; 0.7)."""
    return _euler(eta**2 * step.sigma / (1 - jnp.where(step.sigma > PURE_NOISE, step.sigma_next, step.sigma)), step)


def _euler(g2, step: Step):
    return step.ode + 0.5 * g2 * step.dt * step.eps / step.sigma, jnp.sqrt(g2 * -step.dt)


def cps(eta: float, step: Step):
    """std = sigma_next sin(eta pi/2), the noise level is kept exactly (coefficient-preserving sampling)."""
    return _keep_level(step.sigma_next * np.float32(np.sin(0.5 * np.pi * eta)), step)


def ddim(eta: float, step: Step):
    """Diffusion: DDIM with eta (Song et al. 2021, eq. 16; 1.0 for Stable Diffusion)."""
    return _keep_level(eta * step.sigma_next / step.sigma * jnp.sqrt(step.gain) / step.alpha_next, step)


def _keep_level(std, step: Step):
    return step.alpha_next * step.x0 + jnp.sqrt(jnp.maximum(jnp.square(step.sigma_next) - jnp.square(std), 0)) * step.eps, std


def sde(eta: float, step: Step):
    """Diffusion: dz = (f z - (1 + eta^2)/2 g^2 score) dt + eta g dw (DanceGRPO eq. 6), one Euler step in log alpha."""
    h = 0.5 * jnp.log1p(step.gain / jnp.square(step.alpha))  # integral of f dt = log(alpha_next / alpha); here g^2 |dt| = 2 h
    return step.x + h * step.x - (1 + eta**2) * h * step.eps / step.sigma, eta * jnp.sqrt(2 * h)


def transition(kernel: str, prediction: str, eta: float, output, x, sigma, sigma_next, stochastic):
    """Mean and standard deviation of the Gaussian p(x_next | x), given the network's output.

    Where `stochastic` is False the step is the ODE's, with std 0.

    Args:
      kernel: of `registry.FLOW_KERNELS` or `DIFFUSION_KERNELS`, or an import path "package.module:function".
      eta: noise strength, as the kernel takes it.
      output, x: [B, ...] fp32.
      sigma, sigma_next, stochastic: scalars or [B].
    Returns: (mean [B, ...], std [B, 1, ...]), fp32.
    """
    def column(value):
        value = jnp.asarray(value)
        return jnp.broadcast_to(value, x.shape[:1]).reshape(-1, *(1,) * (x.ndim - 1))

    function = resolve(FLOW_KERNELS | DIFFUSION_KERNELS, kernel, "sampler.kernel")
    output, x = output.astype(jnp.float32), x.astype(jnp.float32)
    sigma, sigma_next, stochastic = column(sigma), column(sigma_next), column(stochastic)
    x0, eps = denoise(prediction, output, x, sigma)
    a, a_next = alpha(prediction, sigma), alpha(prediction, sigma_next)
    ode = a_next * x0 + sigma_next * eps
    mean, std = function(eta, Step(x, x0, eps, a, a_next, sigma, sigma_next, ode))
    return jnp.where(stochastic, mean, ode), jnp.where(stochastic, std, 0.0)


def gaussian_log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over the latent dimensions: [B] fp32; 0 where std is 0 (ODE steps).

    The average (not the sum) is what DanceGRPO's clip range of 1e-4 refers to.
    """
    safe = jnp.where(std > 0, std, 1.0)
    log_prob = -0.5 * jnp.square((x_next - mean) / safe) - jnp.log(safe) - 0.5 * np.log(2 * np.pi)
    return jnp.where(std > 0, log_prob, 0.0).mean(axis=tuple(range(1, x_next.ndim)))
