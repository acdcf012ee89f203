"""From rewards to advantages: normalising within groups, combining several rewards, choosing samples.

Pure functions on arrays. P prompts, G samples a prompt; `ok` marks the rewards that could be computed.
"""

import jax.numpy as jnp


def group_advantages(rewards, ok):
    """(r - mean) / (std + 1e-8) within each prompt's group, over its valid samples (DanceGRPO eq. 9), std with ddof 1.

    A group whose valid rewards are all equal, or with fewer than two valid ones, gets exactly 0 (the noise of a
    zero-variance group is not amplified), and so do invalid samples.

    Args: rewards [P, G] fp32, ok [P, G] bool. Returns: [P, G] fp32.
    """
    count = ok.sum(1, keepdims=True)
    mean = jnp.where(ok, rewards, 0).sum(1, keepdims=True) / jnp.maximum(count, 1)
    deviation = jnp.where(ok, rewards - mean, 0)
    std = jnp.sqrt(jnp.square(deviation).sum(1, keepdims=True) / jnp.maximum(count - 1, 1))
    spread = jnp.where(ok, rewards, -jnp.inf).max(1, keepdims=True) > jnp.where(ok, rewards, jnp.inf).min(1, keepdims=True)
    return jnp.where(spread & (count > 1), deviation / (std + 1e-8), 0.0)


def combine_advantages(rewards: dict, weights: dict, how: str = "advantages"):
    """One advantage from several rewards.

    how = "advantages": normalise each reward within the group, then sum with weights (DanceGRPO's choice: scales
    do not matter); "rewards": sum the rewards, then normalise; "gdpo": as "advantages", then normalise once more
    over the whole batch.

    Args: rewards {name: (values [P, G], ok [P, G])}, weights {name: float}. Returns: [P, G] fp32.
    """
    if how == "rewards":
        total = sum(weights[name] * jnp.where(ok, values, 0) for name, (values, ok) in rewards.items() if weights[name])
        every = jnp.stack([ok for name, (_, ok) in rewards.items() if weights[name]]).all(0)
        return group_advantages(total, every)
    advantage = sum(weights[name] * group_advantages(values, ok) for name, (values, ok) in rewards.items())
    if how == "gdpo":
        advantage = advantage / (advantage.std() + 1e-8)  # its mean is 0, and samples at exactly 0 stay there
    return advantage


def best_of(advantage, k: int):
    """Indices [P, k] of the k/2 best and the k/2 worst samples of each prompt (k even), in order of the sample index."""
    order = jnp.argsort(advantage, axis=1)
    chosen = jnp.concatenate([order[:, :k // 2], order[:, order.shape[1] - k // 2:]], axis=1)
    return jnp.sort(chosen, axis=1)


def reward_diagnostics(rewards: dict) -> dict:
    """Per reward: mean, std, p10, p90 over valid samples, share of valid samples and of zero-variance groups."""
    scalars = {}
    for name, (values, ok) in rewards.items():
        valid = jnp.where(ok, values, jnp.nan)
        low = jnp.where(ok, values, jnp.inf).min(1)
        high = jnp.where(ok, values, -jnp.inf).max(1)
        p10, p90 = jnp.nanpercentile(valid, jnp.array([10.0, 90.0]))
        scalars |= {f"reward/{name}/{key}": value for key, value in {
            "mean": jnp.nanmean(valid), "std": jnp.nanstd(valid), "p10": p10, "p90": p90,
            "valid_ratio": ok.mean(), "zero_std_ratio": (high <= low).mean()}.items()}
    return scalars
