"""The learner: examples laid out for accumulation, any algorithm's loss in one `lax.scan`, optimizer, EMA, slow copies."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dancegrpo_jax import guidance
from dancegrpo_jax.algorithms.base import Algorithm, Context, Examples
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.rollout import Trajectory
from dancegrpo_jax.sde import Kernel, Schedule
from dancegrpo_jax.sharding import batch_devices, constrain_batch, constrain_params


class TrainState(NamedTuple):
    """Everything that changes while training, and all that a checkpoint holds."""

    step: jax.Array  # int32, optimizer updates done
    trainable: dict  # {part: fp32 master weights}
    opt_state: Any
    ema: dict | None  # moving average of `trainable`, None if off
    copies: dict  # {name: weights}, of the algorithm
    memory: Any  # the algorithm's running statistics

    @property
    def eval_params(self) -> dict:
        """The weights to evaluate and to export."""
        return self.trainable if self.ema is None else self.ema


class Batch(NamedTuple):
    """Examples as they are trained on. Each device keeps the examples of its own samples, in their order.

    pairs: leaves [updates, micro-batches, M, ...]; every micro-batch takes an equal part from every device.
    samples: leaves [R, ...], what the pairs of a sample share; cond: likewise (a shared negative prompt: [1, ...]).
    """

    pairs: Any
    samples: Any
    cond: Cond


@dataclass(frozen=True)
class Learner:
    """The static half of an update."""

    pipeline: Any
    kernel: Kernel
    algorithm: Algorithm
    tx: optax.GradientTransformation
    ema_decay: float = 0.0


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


@partial(jax.jit, static_argnames=("learner",))
def init_state(learner: Learner, trainable: dict, memory) -> TrainState:
    """A fresh state of copies (the update donates its buffers, which must alias nothing), sharded by the rules."""
    def copy():
        return jax.tree.map(jnp.copy, trainable)
    state = TrainState(jnp.int32(0), copy(), learner.tx.init(trainable), copy() if learner.ema_decay else None,
                       {name: copy() for name in learner.algorithm.copies}, memory)
    return constrain_params(state, learner.pipeline.sharding)


@partial(jax.jit, static_argnames=("algorithm", "weights", "updates", "microbatch"))
def make_batch(algorithm: Algorithm, key, trajectory: Trajectory, plan: Schedule, scores: dict, prompts, memory, cond: Cond, *,
               weights: tuple, updates: int, microbatch: int) -> tuple[Batch, Any, dict]:
    """From a rollout and its scores to what is trained: (batch, memory, scalars). Moves nothing between devices.

    Args:
      trajectory: of B = P * G samples. scores: {reward: (values [P, G], ok [P, G])}. cond: of [P, ...].
      prompts: int32 [P], which of the different prompts these are. weights: ((reward, weight), ...).
      updates: optimizer updates that the examples are split into. microbatch: examples per accumulation step (M).
    """
    examples, memory, scalars = algorithm.make(key, trajectory, plan, scores, dict(weights), prompts, memory)
    return lay_out(examples, cond, len(prompts), updates=updates, microbatch=microbatch), memory, scalars


def lay_out(examples: Examples, cond: Cond, prompts: int, *, updates: int, microbatch: int) -> Batch:
    """Examples [R, K, ...] of R samples, `R // prompts` of each prompt, for `updates` of micro-batches of M."""
    devices = batch_devices()

    def split(a):  # [R, K, ...] -> [U, n, M, ...]
        a = a.reshape(devices, updates, -1, microbatch // devices, *a.shape[2:])
        return jnp.moveaxis(a, 0, 2).reshape(updates, -1, microbatch, *a.shape[4:])
    rows = jax.tree.leaves(examples.pairs)[0].shape[0]
    pairs = constrain_batch(jax.tree.map(split, examples.pairs), axis=2)
    return Batch(pairs, *constrain_batch((examples.samples, guidance.repeat(cond, rows // prompts))))


def micro_batch(batch: Batch, update, index) -> tuple[Any, Any, Cond]:
    """(pairs, samples, cond), of [M, ...] each, of one micro-batch of one update.

    Pairs lie in the order of their samples on each device, so that which samples these are is the same there and on all.
    """
    devices = batch_devices()
    updates, count, size = jax.tree.leaves(batch.pairs)[0].shape[:3]
    rows = jax.tree.leaves(batch.samples)[0].shape[0]
    per_sample = updates * count * size // rows
    place = ((update * count + index) * (size // devices) + jnp.arange(size // devices)) // per_sample

    def of_pairs(a):  # [R, ...] -> [M, ...]
        if len(a) != rows:
            return a  # a negative prompt that all share
        a = a.reshape(devices, rows // devices, *a.shape[1:])
        return jnp.take(a, place, axis=1).reshape(size, *a.shape[2:])
    pairs = jax.tree.map(lambda a: a[update, index], batch.pairs)
    return constrain_batch((pairs, *jax.tree.map(of_pairs, (batch.samples, batch.cond))))


@partial(jax.jit, static_argnames=("learner",))
def rescore(learner: Learner, trainable, frozen, batch: Batch) -> tuple[Batch, jax.Array]:
    """The batch with old log-probabilities of all updates but the first by the update's batches, and the largest change of a
    ratio by it. The first update takes its own (`Context.on_policy`)."""
    updates, count = jax.tree.leaves(batch.pairs)[0].shape[:2]

    def score(place):
        pairs, samples, cond = micro_batch(batch, *place)
        context = Context(learner.pipeline, learner.kernel, frozen, cond, {}, False)
        return learner.algorithm.rescored(context, trainable, pairs, samples)
    places = jnp.stack(jnp.meshgrid(jnp.arange(1, updates), jnp.arange(count), indexing="ij"), -1).reshape(-1, 2)
    pairs, change = jax.lax.map(score, (places[:, 0], places[:, 1]))
    later = jax.tree.map(lambda a: a.reshape(updates - 1, count, *a.shape[1:]), pairs)
    return batch._replace(pairs=jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b]), batch.pairs, later)), change.max()


@partial(jax.jit, static_argnames=("learner",), donate_argnames=("state",))
def update(learner: Learner, state: TrainState, frozen, reference, batch: Batch, index, key, on_policy):
    """Optimizer update number `index` of a rollout, accumulated over its micro-batches.

    Args:
      reference: base weights in place of the trained ones, {} if the algorithm needs none.
      key: for what the loss draws. on_policy: bool, see `Context`.
    Returns: (new state, scalar metrics). The old state's buffers are donated.
    """
    algorithm, count = learner.algorithm, jax.tree.leaves(batch.pairs)[0].shape[1]
    copies = state.copies | ({"reference": reference} if algorithm.reference else {})

    def loss_fn(trainable, i):
        pairs, samples, cond = micro_batch(batch, index, i)
        context = Context(learner.pipeline, learner.kernel, frozen, cond, copies, on_policy)
        loss, found = algorithm.loss(context, trainable, pairs, samples, jax.random.fold_in(key, i))
        return loss.mean(), {"loss": loss} | found

    def accumulate(total, i):
        grads, found = jax.grad(loss_fn, has_aux=True)(state.trainable, i)
        total = jax.tree.map(lambda t, g: t + g / count, total, grads)
        return constrain_params(total, learner.pipeline.sharding), found

    zeros = constrain_params(jax.tree.map(jnp.zeros_like, state.trainable), learner.pipeline.sharding)
    if count == 1:  # no loop around a single turn: on CPU, gradients of convolutions are three times slower inside one
        grads, found = accumulate(zeros, 0)
    else:
        grads, found = jax.lax.scan(accumulate, zeros, jnp.arange(count))
    updates, opt_state = learner.tx.update(grads, state.opt_state, state.trainable)
    trainable, ema = optax.apply_updates(state.trainable, updates), state.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: learner.ema_decay * e + (1 - learner.ema_decay) * p, ema, trainable)
    metrics = algorithm.summary(found) | {"grad_norm": optax.global_norm(grads)}
    state = state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=ema)
    return constrain_params(state, learner.pipeline.sharding), metrics


@partial(jax.jit, static_argnames=("learner",), donate_argnames=("copies",))
def move_copies(learner: Learner, copies: dict, trainable: dict, iteration) -> dict:
    """The algorithm's slow copies after an iteration."""
    return constrain_params(learner.algorithm.after(copies, trainable, iteration), learner.pipeline.sharding)
