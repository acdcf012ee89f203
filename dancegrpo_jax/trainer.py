"""The loop, read top to bottom: resume, iterate (sample, score, update), log, evaluate, save."""

import logging
import math
from functools import partial
from pathlib import Path

import jax
from clu import parameter_overview

from dancegrpo_jax import multihost, sharding
from dancegrpo_jax.checkpoint import Checkpointer, PreemptionGuard
from dancegrpo_jax.config import validate
from dancegrpo_jax.evaluate import evaluate, write_grid
from dancegrpo_jax.iteration import collect, learn, summarize
from dancegrpo_jax.learner import TrainState, update
from dancegrpo_jax.metrics import MetricWriter, Progress, StepTimer, start_run_dir
from dancegrpo_jax.report import write_report
from dancegrpo_jax.rollout import rollout
from dancegrpo_jax.session import Session

log = logging.getLogger(__name__)


def train(config) -> dict:
    """Runs, or resumes, the training run in `config.run_dir`. Of several processes each calls `multihost.initialize` first.

    Returns: its last metrics, and `stopped`: whether a signal ended it before its last evaluation.

    Raises: ConfigError, CheckpointError or ValueError for bad input, before any compute is spent.
    """
    validate(config, jax.device_count())
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), PreemptionGuard() as preemption:
        try:
            return _train(config, mesh, preemption)
        except BaseException as error:
            multihost.leave(error)
            raise


def _train(config, mesh, preemption) -> dict:
    session = Session(config, mesh)
    run_dir = start_run_dir(config.run_dir, config)
    state = session.load()
    checkpoints = Checkpointer(run_dir / "checkpoints", keep=config.checkpoint.keep)
    start, state = resume(checkpoints, state, session)
    writer = MetricWriter(run_dir, config.log.tensorboard, config.log.wandb, resume_step=start or None)
    progress = Progress(config.steps, start, session.algorithm.headline)
    counts = [parameter_overview.count_parameters(tree) for tree in (state.trainable, session.frozen)]
    progress.note(start, "{:,} trainable and {:,} frozen parameters on {} device(s)".format(*counts, mesh.size))
    show = partial(evaluate, session, writer=writer, progress=progress)
    if start == 0:
        show(state, 0, grid="before")

    stop = False
    for step in range(start + 1, config.steps + 1):
        with profiled(run_dir, step == config.log.profile):
            state, record = iterate(session, state, step, writer)
        writer.scalars(step, record)
        progress.update(step, record)
        check_finite(step, record)
        stop = preemption.reached(step)
        if step < config.steps:
            show(state, step)
        if stop or step == config.steps or step % config.checkpoint.every == 0:
            checkpoints.save(step, state, {"seed": config.seed, "rescoring": session.rescoring.record()})
        if stop:
            progress.note(step, "stop requested: checkpoint written; run the same command to resume")
            break
    else:
        if start < config.steps or not multihost.on_primary(lambda: (run_dir / "after.png").exists()):
            show(state, config.steps, grid="after")
    checkpoints.close()
    writer.close()
    session.close()
    if jax.process_index() == 0:
        progress.note(config.steps, f"report: {write_report(run_dir)}")
    return writer.last | {"stopped": stop}


def resume(checkpoints: Checkpointer, state: TrainState, session: Session) -> tuple[int, TrainState]:
    """(iterations done, their state): of the newest usable checkpoint, or 0 and the state given."""
    restored = checkpoints.restore_latest(jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state))
    if not restored:
        return 0, state
    step, state, meta = restored
    session.rescoring.restore(meta.get("rescoring"))
    log.info("resuming %s after iteration %d", checkpoints.directory.parent, step)
    return step, state


def iterate(session: Session, state: TrainState, step: int, writer: MetricWriter) -> tuple[TrainState, dict]:
    """One iteration, the `step`-th from 1: (new state, its record). Nothing else of it outlives the call."""
    config, timer, _ = session.config, StepTimer(), session.rewards.clock.take()
    key, rows = session.key(step - 1), session.rows[step - 1]
    plan = session.replicated(session.algorithm.plan(session.schedule, step - 1))
    collected = collect(session, state, rows, plan, key, timer=timer)
    hidden = max(session.rewards.clock.take() - timer.phases["reward"], 0.0)  # host rewards computed behind the devices' work
    state, found = learn(session, state, collected, plan, key, step - 1, timer=timer)

    scalars = summarize(jax.device_get(found))
    if "ratio_first/min" in scalars:
        session.rescoring.judge(max(abs(scalars["ratio_first/min"] - 1), abs(scalars["ratio_first/max"] - 1),
                                    scalars.get("rescore/change", 0.0)))
    scalars |= {"compiles/rollout": rollout._cache_size(), "compiles/update": update._cache_size()}
    record = {f"train/{key}": value for key, value in scalars.items()} | timer.scalars() | {"time/reward_hidden": hidden}
    record["perf/samples_per_second"] = len(rows) * session.group / record["time/total"]
    if config.log.images_every and step % config.log.images_every == 0:
        count = min(len(collected.shown.pixels), config.log.prompts_in_grid)
        write_grid(session, writer, step, "train/samples", collected.shown, rows[:count], collected.scores, 8)
    return state, record


def check_finite(step: int, record: dict) -> None:
    """Raises: FloatingPointError if training has broken down; it resumes from before that."""
    loss, norm = record["train/loss"], record["train/grad_norm"]
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"iteration {step}: loss {loss}, grad norm {norm}; lower optim.learning_rate or set "
                                 "optim.grad_clip, and run again to resume before it")


class profiled:
    """While entered, a trace for xprof is written into `run_dir`/profile, if `wanted`."""

    def __init__(self, run_dir: Path, wanted: bool):
        self.folder, self.wanted = run_dir / "profile", wanted

    def __enter__(self):
        if self.wanted:
            jax.profiler.start_trace(self.folder)

    def __exit__(self, *exception):
        if self.wanted:
            jax.profiler.stop_trace()
