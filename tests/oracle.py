"""Independent float64 numpy versions of the equations, to test the package against. Imports nothing of it."""

import numpy as np


def transition(kernel, prediction, eta, output, x, sigma, sigma_next, stochastic=True):
    """(mean, std) of p(x_next | x), each formula as its source writes it; all arguments broadcast."""
    output, x, sigma, sigma_next = (np.asarray(a, np.float64) for a in (output, x, sigma, sigma_next))
    if prediction == "velocity":
        dt = sigma_next - sigma
        x0_hat, score = x - sigma * output, -(x + (1 - sigma) * output) / sigma
        if kernel == "cps":
            std = stochastic * sigma_next * np.sin(eta * np.pi / 2)
            return (1 - sigma_next) * x0_hat - np.sqrt(sigma_next**2 - std**2) * sigma * score, std
        shape = np.sqrt(sigma / (1 - np.where(sigma == 1, sigma_next, sigma))) if kernel == "flow" else 1
        g = stochastic * eta * shape
        return x + output * dt - g**2 / 2 * score * dt, g * np.sqrt(-dt)

    a_t, a_prev = 1 - sigma**2, 1 - sigma_next**2  # alphas_cumprod
    if prediction == "epsilon":
        x0_hat, eps_hat = (x - np.sqrt(1 - a_t) * output) / np.sqrt(a_t), output
    elif prediction == "v_prediction":
        x0_hat, eps_hat = np.sqrt(a_t) * x - sigma * output, np.sqrt(a_t) * output + sigma * x
    else:
        x0_hat, eps_hat = output, (x - np.sqrt(a_t) * output) / np.sqrt(1 - a_t)
    std = eta * stochastic * np.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
    ddim = np.sqrt(a_prev) * x0_hat + np.sqrt(1 - a_prev - std**2) * eps_hat
    if kernel == "ddim":
        return ddim, std
    # beta(t) with f = -beta / 2, g^2 = beta and alphas_cumprod = exp(-integral of beta); dt < 0
    beta_dt = -np.log(a_prev / a_t)
    mean = x + (-beta_dt / 2 * x + (1 + eta**2) / 2 * beta_dt * eps_hat / sigma)
    return np.where(stochastic, mean, ddim), stochastic * eta * np.sqrt(-beta_dt)


def log_prob(x_next, mean, std):
    """Gaussian log-density averaged over all but the first dimension; std [B, 1, ...]."""
    x_next, mean, std = (np.asarray(a, np.float64) for a in (x_next, mean, std))
    density = -(x_next - mean)**2 / (2 * std**2) - np.log(std) - np.log(2 * np.pi) / 2
    return density.reshape(len(density), -1).mean(1)


def signal(prediction, sigma):
    """The coefficient alpha of x0 in the noisy x."""
    return 1 - sigma if prediction == "velocity" else np.sqrt(1 - sigma**2)


def gaussian_output(prediction, x, sigma, alpha, mean, std):
    """The exact network output if x0 ~ N(mean, std^2); works on numpy and on jax arrays."""
    eps = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    x0 = mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    return {"velocity": eps - x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction]


def gaussian_marginals(kernel, prediction, eta, sigmas, stochastic, mean, std, start=None):
    """Mean and variance after every step of the sampler for x0 ~ N(mean, std^2), exactly: each step is affine in x.

    Args: mean, std [D]; start: (mean, variance) of the first x, default the exact marginal at sigmas[0].
    Returns: (means [T+1, D], variances [T+1, D]).
    """
    alpha = signal(prediction, sigmas)
    m, v = start or (alpha[0] * mean, alpha[0]**2 * std**2 + sigmas[0]**2)
    means, variances = [m], [v]

    def step(x):
        before, after, noisy = (np.asarray(a)[:, None] for a in (sigmas[:-1], sigmas[1:], stochastic))
        output = gaussian_output(prediction, x, before, signal(prediction, before), mean, std)
        return transition(kernel, prediction, eta, output, x, before, after, noisy)
    x = np.zeros((len(sigmas) - 1, len(mean)))
    (offset, noise), (one, _) = step(x), step(x + 1)
    for b, k, s in zip(offset, one - offset, noise, strict=True):
        m, v = b + k * m, k * k * v + s * s
        means.append(m), variances.append(v)
    return np.array(means), np.array(variances)
