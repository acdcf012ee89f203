"""The learner: training pairs from a trajectory, gradient accumulation in one `lax.scan`, optimizer, EMA."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dancegrpo_jax.grpo import clipped_objective, ratio_diagnostics
from dancegrpo_jax.rollout import Trajectory, step
from dancegrpo_jax.sde import Schedule, gaussian_log_prob
from dancegrpo_jax.sharding import Rules, batch_devices, constrain_batch, constrain_params


class TrainState(NamedTuple):
    """Everything that changes while training, and all that a checkpoint holds."""

    step: jax.Array  # int32, optimizer updates done
    trainable: dict  # fp32 master weights
    opt_state: Any
    ema: dict | None  # moving average of `trainable`, None if off

    @property
    def eval_params(self) -> dict:
        """The weights to evaluate and to export."""
        return self.trainable if self.ema is None else self.ema


class Examples(NamedTuple):
    """(sample, timestep) pairs, each leaf [updates, micro-batches, M, ...]."""

    x: jax.Array
    x_next: jax.Array
    time: jax.Array
    sigma: jax.Array
    sigma_next: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    cond: dict


@dataclass(frozen=True)
class Objective:
    """Static settings of the loss. kl_beta > 0 adds a KL penalty to the reference weights.

    on_policy: the weights are those of the rollout (one update per rollout), so the ratio is 1 and the old
    log-probability is the update's own. That of the rollout comes from another compiled program, which in bfloat16 may
    round differently by more than the clip range.
    """

    clip_range: float = 1e-4
    kl_beta: float = 0.0
    ema_decay: float = 0.0
    on_policy: bool = False


def make_optimizer(config, updates: int) -> optax.GradientTransformation:
    """AdamW from `config.optim`: global-norm clipping if grad_clip > 0, linear warm-up, then the schedule over `updates`."""
    rate, decay_steps = config.learning_rate, max(1, updates - config.warmup_steps)
    rate = {"constant": optax.constant_schedule(rate), "linear": optax.linear_schedule(rate, 0, decay_steps),
            "cosine": optax.cosine_decay_schedule(rate, decay_steps)}[config.schedule]
    if config.warmup_steps:
        warmup = optax.linear_schedule(0, config.learning_rate, config.warmup_steps)
        rate = optax.join_schedules((warmup, rate), (config.warmup_steps,))
    adamw = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw) if config.grad_clip else adamw


@partial(jax.jit, static_argnames=("tx", "with_ema", "rules"))
def init_state(trainable: dict, *, tx: optax.GradientTransformation, with_ema: bool, rules: Rules) -> TrainState:
    """A fresh state of copies (the update donates its buffers, which must alias nothing), sharded by the policy's rules."""
    ema = jax.tree.map(jnp.copy, trainable) if with_ema else None
    return constrain_params(TrainState(jnp.int32(0), jax.tree.map(jnp.copy, trainable), tx.init(trainable), ema), rules)


@partial(jax.jit, static_argnames=("updates", "microbatch"))
def make_examples(trajectory: Trajectory, schedule: Schedule, cond: dict, advantage, chosen, time_index, *,
                  updates: int, microbatch: int) -> Examples:
    """Gathers the pairs to train on and lays them out for accumulation.

    Each device keeps the pairs of its own samples: micro-batches take an equal part from every device.

    Args:
      trajectory: of B = P * G samples. cond: pytree of [P, ...]. advantage: [P, G], already clipped.
      chosen: int [P, k], samples of each prompt that are trained. time_index: int [P * k, K], steps trained.
      updates: optimizer updates the pairs are split into. microbatch: pairs per accumulation step (M).
    """
    prompts, k = chosen.shape
    group = advantage.shape[1]
    rows = prompts * k

    def of_chosen(a):  # [P, G, ...] -> [P * k, ...]
        index = chosen.reshape(prompts, k, *(1,) * (a.ndim - 2))
        return jnp.take_along_axis(a, index, axis=1).reshape(rows, *a.shape[2:])

    def at_times(a, offset=0):  # [T(+1), B, ...] -> [P * k, K, ...]
        a = of_chosen(jnp.moveaxis(a, 0, 1).reshape(prompts, group, a.shape[0], *a.shape[2:]))
        return jnp.take_along_axis(a, (time_index + offset).reshape(*time_index.shape, *(1,) * (a.ndim - 2)), axis=1)

    def per_pair(a):  # [P * k, ...] -> [P * k, K, ...]
        return jnp.broadcast_to(a[:, None], (rows, time_index.shape[1], *a.shape[1:]))

    sigmas = jnp.asarray(schedule.sigmas)
    pairs = Examples(
        x=at_times(trajectory.latents), x_next=at_times(trajectory.latents, 1),
        time=jnp.asarray(schedule.times)[time_index], sigma=sigmas[time_index], sigma_next=sigmas[time_index + 1],
        log_prob=at_times(trajectory.log_probs), advantage=per_pair(of_chosen(advantage)),
        cond=jax.tree.map(lambda c: per_pair(jnp.repeat(c, k, axis=0)), cond))
    devices = batch_devices()

    def lay_out(a):  # [P * k, K, ...] -> [U, n, M, ...], without moving data between devices
        a = a.reshape(devices, updates, -1, microbatch // devices, *a.shape[2:])
        return jnp.moveaxis(a, 0, 2).reshape(updates, -1, microbatch, *a.shape[4:])
    return constrain_batch(jax.tree.map(lay_out, pairs), axis=2)


def loss_fn(policy, objective: Objective, trainable, frozen, reference, batch: Examples):
    """The GRPO loss of one micro-batch of M pairs: (mean loss, per-pair diagnostics).

    With kl_beta, adds kl_beta * mean((mean - mean_ref)^2) / (2 std^2), the KL divergence between the two transition
    kernels per latent dimension; `reference` holds base weights in place of `trainable`.
    """
    args = (frozen, batch.cond, batch.x, batch.time, batch.sigma, batch.sigma_next, True)
    mean, std = step(policy, trainable, *args)
    log_prob = gaussian_log_prob(batch.x_next, mean, std)
    old = jax.lax.stop_gradient(log_prob) if objective.on_policy else batch.log_prob
    loss, ratio = clipped_objective(log_prob, old, batch.advantage, objective.clip_range)
    kl = jnp.zeros_like(loss)
    if objective.kl_beta:
        mean_ref, _ = step(policy, reference, *args)
        kl = (jnp.square(mean - jax.lax.stop_gradient(mean_ref)) / (2 * jnp.square(std))).mean(range(1, mean.ndim))
        loss = loss + objective.kl_beta * kl
    rollout_ratio = jnp.exp(log_prob - batch.log_prob)
    return loss.mean(), {"loss": loss, "ratio": ratio, "rollout_ratio": rollout_ratio, "kl_base": kl}


@partial(jax.jit, static_argnames=("policy",))
def rescore(policy, trainable, frozen, examples: Examples) -> Examples:
    """The examples with the log-probabilities that the update's batches give under the rollout's weights."""
    def score(batch):
        batch = constrain_batch(batch)
        mean, std = step(policy, trainable, frozen, batch.cond, batch.x, batch.time, batch.sigma, batch.sigma_next, True)
        return gaussian_log_prob(batch.x_next, mean, std)
    return examples._replace(log_prob=jax.lax.map(lambda updates: jax.lax.map(score, updates), examples))


@partial(jax.jit, static_argnames=("policy", "tx", "objective"), donate_argnames=("state",))
def update(policy, tx, objective: Objective, state: TrainState, frozen, reference, examples: Examples, index):
    """One optimizer update from `examples[index]`, accumulated over its micro-batches.

    Returns: (new state, scalar metrics). The old state's buffers are donated.
    """
    examples = jax.tree.map(lambda a: a[index], examples)
    count = examples.advantage.shape[0]
    gradient = jax.value_and_grad(loss_fn, argnums=2, has_aux=True)

    def accumulate(total, batch):
        (_, aux), grads = gradient(policy, objective, state.trainable, frozen, reference, constrain_batch(batch))
        return constrain_params(jax.tree.map(lambda t, g: t + g / count, total, grads), policy.sharding), aux

    zeros = constrain_params(jax.tree.map(jnp.zeros_like, state.trainable), policy.sharding)
    if count == 1:  # no loop around a single turn: on CPU, gradients of convolutions are three times slower inside one
        grads, pairs = accumulate(zeros, jax.tree.map(lambda a: a[0], examples))
    else:
        grads, pairs = jax.lax.scan(accumulate, zeros, examples)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable, ema = optax.apply_updates(state.trainable, updates), state.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: objective.ema_decay * e + (1 - objective.ema_decay) * p, ema, trainable)
    metrics = ratio_diagnostics(pairs["ratio"], examples.advantage, objective.clip_range)
    metrics |= {f"rollout_ratio/{name}": getattr(pairs["rollout_ratio"], name)() for name in ("mean", "min", "max")}
    metrics |= {"loss": pairs["loss"].mean(), "kl_base": pairs["kl_base"].mean(), "grad_norm": optax.global_norm(grads)}
    return constrain_params(TrainState(state.step + 1, trainable, opt_state, ema), policy.sharding), metrics
