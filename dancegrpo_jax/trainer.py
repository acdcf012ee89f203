"""The loop, read top to bottom: prompts -> rollout -> decode -> rewards -> advantages -> update -> log, checkpoint."""

import logging
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from dancegrpo_jax import data, grpo, multihost, sharding
from dancegrpo_jax.checkpoint import Checkpointer, PreemptionGuard
from dancegrpo_jax.config import trained_steps, validate
from dancegrpo_jax.embeddings import EmbeddingSet, fingerprint
from dancegrpo_jax.evaluate import decode, encode_prompts, evaluate, generate, score_images, to_uint8
from dancegrpo_jax.metrics import MetricWriter, Progress, StepTimer, image_grid, start_run_dir
from dancegrpo_jax.pipelines.base import configured_policy, lora_settings
from dancegrpo_jax.report import write_report
from dancegrpo_jax.rewards.base import RewardSet
from dancegrpo_jax.rollout import Trajectory, rollout
from dancegrpo_jax.sde import window
from dancegrpo_jax.update import Objective, init_state, make_examples, make_optimizer, rescore, update

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
    # ---------------------------------------------------------------- prompts, rewards, model, optimizer
    def place(params, rules):
        return sharding.place_params(params, mesh, rules)

    train_prompts = data.read_prompts(config.data.train)
    prompt_batches = data.prompt_batches(train_prompts, config.data.prompts_per_step, config.seed)
    heldout = data.read_prompts(config.data.heldout)[:config.eval.num_prompts]
    rewards = RewardSet(config.rewards.to_dict(), place=place)
    eval_rewards = RewardSet(config.eval.rewards.to_dict(), place=place) if config.eval.rewards else rewards
    policy = configured_policy(config)
    embedded = EmbeddingSet(config.data.embeddings, fingerprint(policy)) if config.data.embeddings else None
    if embedded:
        embedded.check(train_prompts), embedded.check(heldout)
    for name, prompts in (("train", train_prompts), ("heldout", heldout)):
        if cut := policy.truncated(prompts):
            log.warning("config.data.%s: %d of %d prompts are too long for the text encoder, which will not see their ends",
                        name, cut, len(prompts))
    lora = lora_settings(config)
    run_dir = start_run_dir(config.run_dir, config)
    trainable, frozen = policy.load(lora, config.seed, mesh, text=not embedded)
    if embedded and config.model.guidance_scale != 1:
        frozen["negative"] = sharding.replicate(embedded([""]), mesh)

    def embed(prompts: list[str]):
        if embedded:
            return sharding.shard_batch(embedded(prompts), mesh)
        return encode_prompts(policy, frozen, mesh, prompts)

    schedule = policy.schedule(config.sampler.steps, config.sampler.shift)
    eval_schedule = policy.schedule(config.sampler.eval_steps, config.sampler.shift)
    tx = make_optimizer(config.optim, config.steps * config.grpo.updates_per_rollout)
    objective = Objective(config.grpo.clip_range, config.grpo.kl_beta, config.optim.ema_decay,
                          on_policy=config.grpo.updates_per_rollout == 1)
    state = init_state(trainable, tx=tx, with_ema=bool(config.optim.ema_decay), rules=policy.sharding)
    reference = {}
    if config.grpo.kl_beta:  # LoRA: adapters off; full fine-tuning: the base weights
        reference = jax.tree.map(jnp.zeros_like, trainable) if lora else trainable
    del trainable

    # ---------------------------------------------------------------- resume
    checkpoints = Checkpointer(run_dir / "checkpoints", keep=config.checkpoint.keep)
    start, restored = 0, checkpoints.restore_latest(jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state))
    if restored:
        start, state, _ = restored
        log.info("resuming %s after iteration %d", run_dir, start)
    writer = MetricWriter(run_dir, config.log.tensorboard, config.log.wandb, resume_step=start if restored else None)
    progress = Progress(config.steps, start)
    key = jax.random.key(config.seed)
    chunk = config.data.prompts_per_step // config.data.chunks
    group = config.data.group_size
    trained_group = config.grpo.best_of or group

    def evaluate_and_show(step: int, name: str | None = None) -> dict:
        generate_now = partial(generate, policy, state.eval_params, frozen, embed=embed, schedule=eval_schedule,
                               batch=config.eval.batch, seed=config.seed)
        scalars = evaluate(generate_now(heldout), heldout, eval_rewards, mesh)
        writer.scalars(step, {f"eval/{key}": value for key, value in scalars.items()})
        progress.note(step, "held-out  " + "  ".join(f"{key} {value:.4f}" for key, value in scalars.items()))
        if name:  # the same prompts and noise, before and after
            shown, columns = heldout[:config.log.prompts_in_grid], 6
            images = generate_now([prompt for prompt in shown for _ in range(columns)])
            images = images.reshape(len(shown), columns, *images.shape[1:])
            grid = image_grid(images, shown, combined_score(eval_rewards, score_images(images, shown, eval_rewards, mesh)))
            if jax.process_index() == 0:
                grid.save(run_dir / f"{name}.png")
            writer.images(step, f"eval/{name}", grid)
        return scalars

    counts = [parameter_overview.count_parameters(tree) for tree in (state.trainable, frozen)]
    progress.note(start, "{:,} trainable and {:,} frozen parameters on {} device(s)".format(*counts, mesh.size))
    if start == 0:
        evaluate_and_show(0, "before")

    # ---------------------------------------------------------------- the loop
    warned = stop = False
    for iteration in range(start, config.steps):
        profiled = iteration + 1 == config.log.profile
        if profiled:
            jax.profiler.start_trace(run_dir / "profile")
        timer, _ = StepTimer(), rewards.clock.take()
        key_step = jax.random.fold_in(key, iteration)
        prompts = prompt_batches[iteration]
        plan = schedule
        if config.sampler.window:
            moves = iteration // config.sampler.window_interval * config.sampler.window_stride
            plan = window(schedule, moves % (config.sampler.steps - config.sampler.window), config.sampler.window)
        plan = sharding.replicate(plan, mesh)

        # Chunks are dispatched without waiting: host rewards of one are computed while the device samples the next.
        conds, trajectories, images, pending = [], [], [], []
        for i in range(config.data.chunks):
            part = prompts[i * chunk:(i + 1) * chunk]
            cond = embed(part)
            trajectory = rollout(policy, state.trainable, frozen, cond, jax.random.fold_in(key_step, i), plan,
                                 group_size=group, shared_noise=config.sampler.shared_noise)
            pixels = decode(policy, frozen, trajectory.latents[-1])
            pixels = pixels.reshape(chunk, group, *pixels.shape[1:])
            pending.append(rewards.submit(pixels, part))
            conds.append(cond), trajectories.append(trajectory), images.append(pixels)
        timer.wait("rollout", trajectories)
        timer.wait("decode", images)
        scores = merge_chunks([handle.result() for handle in pending])
        timer.lap("reward")
        hidden = max(rewards.clock.take() - timer.phases["reward"], 0.0)  # host rewards computed behind the devices' work

        trajectory = concatenate(trajectories, axis=1)
        advantage, chosen, time_index, scalars = select(
            jax.random.fold_in(key_step, config.data.chunks), scores, plan.stochastic,
            weights=tuple(rewards.weights.items()), combine=config.combine, clip=config.grpo.advantage_clip,
            k=trained_group, steps=trained_steps(config))
        examples = make_examples(trajectory, plan, concatenate(conds), advantage, chosen, time_index,
                                 updates=config.grpo.updates_per_rollout, microbatch=config.grpo.microbatch)
        if config.grpo.rescore and not objective.on_policy:
            examples = rescore(policy, state.trainable, frozen, examples)
        per_update = []
        for i in range(config.grpo.updates_per_rollout):
            state, diagnostics = update(policy, tx, objective, state, frozen, reference, examples, i)
            per_update.append(diagnostics)
        timer.wait("update", state.trainable)
        if profiled:
            jax.profiler.stop_trace()

        # ------------------------------------------------------------ log, evaluate, checkpoint
        step = iteration + 1
        scalars = {key: float(value) for key, value in jax.device_get(scalars).items()}
        scalars |= summarize(jax.device_get(per_update))
        scalars["compiles/rollout"], scalars["compiles/update"] = rollout._cache_size(), update._cache_size()
        record = {f"train/{key}": value for key, value in scalars.items()} | timer.scalars()
        record["time/reward_hidden"] = hidden
        record["perf/samples_per_second"] = config.data.prompts_per_step * group / record["time/total"]
        writer.scalars(step, record)
        progress.update(step, record)
        gap = max(abs(scalars[f"ratio_first/{end}"] - 1) for end in ("min", "max"))
        if gap > config.grpo.clip_range and not objective.on_policy and not warned:
            warned = True
            log.warning("before any update the ratio deviates from 1 by %.1e, more than config.grpo.clip_range: rollout and "
                        "update round differently; set config.grpo.rescore=true, or equal batches in both", gap)
        if not math.isfinite(scalars["loss"]) or not math.isfinite(scalars["grad_norm"]):
            raise FloatingPointError(f"iteration {step}: loss {scalars['loss']}, grad norm {scalars['grad_norm']}; lower "
                                     "optim.learning_rate or set optim.grad_clip, and run again to resume before it")
        if config.log.images_every and step % config.log.images_every == 0:
            shown = slice(0, min(chunk, config.log.prompts_in_grid))
            shown_scores = multihost.fetch({name: (values[shown, :8], ok) for name, (values, ok) in scores.items()})
            grid = image_grid(to_uint8(images[0][shown, :8]), prompts[shown], combined_score(rewards, shown_scores))
            writer.images(step, "train/samples", grid)
        if config.eval.every and step % config.eval.every == 0 and step < config.steps:
            evaluate_and_show(step)
        stop = preemption.reached(step)
        if stop or step == config.steps or step % config.checkpoint.every == 0:
            checkpoints.save(step, state, {"seed": config.seed})
        if stop:
            progress.note(step, "stop requested: checkpoint written; run the same command to resume")
            break
    else:
        if start < config.steps or not multihost.on_primary(lambda: (run_dir / "after.png").exists()):
            evaluate_and_show(config.steps, "after")
    checkpoints.close()
    writer.close()
    if jax.process_index() == 0:
        progress.note(config.steps, f"report: {write_report(run_dir)}")
    return writer.last | {"stopped": stop}


@partial(jax.jit, static_argnames=("weights", "combine", "clip", "k", "steps"))
def select(key, scores, eligible, *, weights, combine, clip, k, steps):
    """From rewards to what is trained: (advantage [P, G], chosen [P, k], time_index [P * k, K], scalars)."""
    advantage = grpo.combine_advantages(scores, dict(weights), combine)
    advantage = jnp.clip(advantage, -clip, clip)
    chosen = grpo.best_of(advantage, k) if k < advantage.shape[1] else jnp.tile(jnp.arange(k), (len(advantage), 1))
    # The last transition is never trained (DanceGRPO section 3; for flow models it is deterministic anyway).
    eligible = jnp.asarray(eligible).at[-1].set(False)
    time_index = grpo.choose_timesteps(key, chosen.size, eligible, steps)
    scalars = grpo.reward_diagnostics(scores) | {
        "advantage/mean": advantage.mean(), "advantage/std": advantage.std(), "advantage/abs_max": jnp.abs(advantage).max()}
    return advantage, chosen, time_index, scalars


@partial(jax.jit, static_argnames=("axis",))
def concatenate(trees, axis: int = 0):
    """Joins the chunks of a rollout along one axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *trees)


def merge_chunks(chunks: list[dict]) -> dict:
    """Joins the scores of rollout chunks: {name: (values [P, G], ok [P, G])}, each where it is, on devices or host."""
    def join(*parts):
        return concatenate(parts) if isinstance(parts[0], jax.Array) else np.concatenate(parts)
    return jax.tree.map(join, *chunks)


def combined_score(rewards: RewardSet, scores: dict) -> np.ndarray:
    """The weighted sum of rewards [P, G], for display only."""
    return sum(rewards.weights.get(name, 1.0) * values for name, (values, _) in scores.items())


def summarize(per_update: list[dict]) -> dict[str, float]:
    """Scalars of an iteration: means over its updates, extreme ratios, and of update to rollout before any update."""
    mean = {key: float(np.mean([metrics[key] for metrics in per_update])) for key in per_update[0]}
    mean["ratio/min"] = float(min(metrics["ratio/min"] for metrics in per_update))
    mean["ratio/max"] = float(max(metrics["ratio/max"] for metrics in per_update))
    first = {f"ratio_first/{key}": float(per_update[0][f"rollout_ratio/{key}"]) for key in ("mean", "min", "max")}
    return {key: value for key, value in mean.items() if not key.startswith("rollout_ratio/")} | first
