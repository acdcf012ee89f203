"""One iteration, written once: collect (sample, decode, score) and learn (examples, updates).

The trainer runs it, the ahead-of-time check compiles it with abstract arrays, the benchmark times it: they differ in the
session and in `call`, through which every jitted function goes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax.data import Row
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.learner import TrainState, make_batch, move_copies, rescore, update
from dancegrpo_jax.media import Media
from dancegrpo_jax.rollout import Trajectory, decode, rollout, run
from dancegrpo_jax.sde import Schedule
from dancegrpo_jax.session import Session


class Collected(NamedTuple):
    """What an iteration learns from.

    trajectory: of B = P * G samples. cond: of [P, ...]. scores: {reward: (values [P, G], ok [P, G])}. shown: the pictures or
    clips of the first chunk, to look at.
    """

    rows: list[Row]
    trajectory: Trajectory
    cond: Cond
    scores: dict
    shown: Media


class Untimed:
    """What `timer` is where nobody asks for the time."""

    def wait(self, phase: str, arrays) -> None:
        """`phase` has been dispatched, and ends when its arrays are computed."""


def collect(session: Session, state: TrainState, rows: list[Row], plan: Schedule, key, call: Callable = run,
            timer=None) -> Collected:
    """Samples a group for every row, decodes and scores it.

    Chunks are dispatched without waiting: host rewards of one are computed while the devices sample the next.
    """
    timer = timer or Untimed()
    behaviour = state.copies[session.algorithm.behaviour] if session.algorithm.behaviour else state.trainable
    conds, trajectories, media, pending = [], [], [], []
    size = len(rows) // session.chunks
    for i in range(session.chunks):
        part, chunk_key = rows[i * size:(i + 1) * size], session.fold(key, i)
        cond = session.condition(part, chunk_key, call)
        trajectory = call("rollout", rollout, session.pipeline, session.kernel, behaviour, session.frozen, cond, chunk_key,
                          plan, group_size=session.group, shared_noise=session.shared_noise,
                          keep=session.algorithm.keeps_trajectory)
        pixels = call("decode", decode, session.pipeline, session.frozen, trajectory.latents, group_size=session.group)
        media.append(Media(pixels, session.pipeline.fps))
        pending.append(session.rewards.submit(media[-1], part, call))
        conds.append(cond)
        trajectories.append(trajectory)
    timer.wait("rollout", trajectories)
    timer.wait("decode", media)
    scores = merge_scores([handle.result() for handle in pending], session, call)
    timer.wait("reward", scores)
    trajectory = call("join", join, trajectories, axis=1) if session.chunks > 1 else trajectories[0]
    cond = call("join conditioning", join_conds, conds) if session.chunks > 1 else conds[0]
    return Collected(rows, trajectory, cond, scores, media[0])


def learn(session: Session, state: TrainState, collected: Collected, plan: Schedule, key, iteration: int = 0,
          call: Callable = run, timer=None) -> tuple[TrainState, list[dict]]:
    """Makes examples of what was collected and updates the weights: (state, [scalars of the iteration, of each update ...]).

    The state's buffers are donated. The scalars are on the devices, see `summarize`.
    """
    timer, key = timer or Untimed(), session.fold(key, session.chunks)
    batch, memory, scalars = call(
        "examples", make_batch, session.algorithm, key, collected.trajectory, plan, collected.scores,
        session.prompt_numbers(collected.rows), state.memory, collected.cond, weights=session.weights, updates=session.updates,
        microbatch=session.microbatch)
    state, found = state._replace(memory=memory), [scalars]
    if session.rescoring.active:
        batch, change = call("rescore", rescore, session.learner, state.trainable, session.frozen, batch)
        scalars["rescore/change"] = change
    for i in range(session.updates):
        index, on_policy = session.replicated((np.int32(i), np.bool_(session.rescoring.on_policy and i == 0)))
        state, metrics = call("update", update, session.learner, state, session.frozen, session.reference, batch, index,
                              session.fold(key, i), on_policy)
        found.append(metrics)
    if session.algorithm.copies:
        copies = call("copies", move_copies, session.learner, state.copies, state.trainable,
                      session.replicated(np.int32(iteration)))
        state = state._replace(copies=copies)
    timer.wait("update", state)
    return state, found


@partial(jax.jit, static_argnames=("axis",))
def join(trees, axis: int = 0):
    """Joins the chunks of a rollout along one axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *trees)


@jax.jit
def join_conds(conds: list[Cond]) -> Cond:
    """Joins the conditioning of chunks; a negative prompt that all rows share stays one."""
    prompts = len(jax.tree.leaves(conds[0].positive)[0])

    def one(*leaves):
        return jnp.concatenate(leaves) if len(leaves[0]) == prompts else leaves[0]
    return jax.tree.map(one, *conds)


def merge_scores(chunks: list[dict], session: Session, call: Callable) -> dict:
    """Joins the scores of chunks: {reward: (values [P, G], ok [P, G])} on the devices."""
    host = {name: isinstance(values, np.ndarray) for name, (values, _) in chunks[0].items()}
    merged = {name: jax.tree.map(lambda *parts: np.concatenate(parts), *(chunk[name] for chunk in chunks))
              for name in chunks[0] if host[name]}
    merged = session.replicated(merged)
    device = [{name: scores for name, scores in chunk.items() if not host[name]} for chunk in chunks]
    if device[0]:
        merged |= call("join scores", join, device) if len(chunks) > 1 else device[0]
    return {name: merged[name] for name in chunks[0]}


def summarize(found: list[dict]) -> dict[str, float]:
    """The scalars of an iteration from `learn`'s, on the host: see `Algorithm.summary` for how those of updates are joined."""
    scalars, *updates = found

    def joined(name):
        values = [float(metrics[name]) for metrics in updates]
        if "_first/" in name:
            return values[0]
        return min(values) if name.endswith("/min") else max(values) if name.endswith("/max") else float(np.mean(values))
    return {name: float(value) for name, value in scalars.items()} | {name: joined(name) for name in updates[0]}
