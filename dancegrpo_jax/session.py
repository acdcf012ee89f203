"""From a config to everything that lives as long as a run. The only room that takes the config apart."""

import logging
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dancegrpo_jax import registry, sharding
from dancegrpo_jax.algorithms.base import Algorithm
from dancegrpo_jax.checkpoint import Checkpointer
from dancegrpo_jax.config import algorithm_of, evaluators_of, run_config
from dancegrpo_jax.data import Row, find_rows, read_rows, row_batches
from dancegrpo_jax.embeddings import EmbeddingSet, fingerprint
from dancegrpo_jax.evaluators.base import Evaluator
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.learner import Learner, TrainState, init_state, make_optimizer
from dancegrpo_jax.options import ConfigError
from dancegrpo_jax.pipelines.base import Pipeline, make_pipeline
from dancegrpo_jax.rewards.set import RewardSet
from dancegrpo_jax.rollout import encode
from dancegrpo_jax.sde import Kernel

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """One of `config.evals`: what is done, with which rows, scored by which rewards."""

    evaluator: Evaluator
    rows: list[Row]
    rewards: RewardSet


class Session:
    """A run's pipeline, weights, rewards, data, algorithm and placement on the mesh.

    Constructing it checks everything and loads the rewards; `load` streams the weights and gives the first state. With
    `abstract` nothing is read but configs and, if they are here, the training rows; arrays are `jax.ShapeDtypeStruct`s: the
    ahead-of-time check runs the same iteration with it.

    Attributes besides those of the constructor: pipeline, kernel, algorithm, learner, schedule (of rollouts), eval_schedule,
    rewards, evals {name: Evaluation}, frozen, reference (arrays, from `load` on), rescoring.
    """

    def __init__(self, config, mesh, *, abstract: bool = False):
        self.config, self.mesh, self.is_abstract = config, mesh, abstract
        self.chunks, self.group = config.data.chunks, config.data.group_size
        self.updates, self.microbatch = config.optim.updates_per_rollout, config.optim.microbatch
        self.shared_noise, self.seed = config.sampler.shared_noise, config.seed
        self.algorithm: Algorithm = algorithm_of(config)
        evaluators = evaluators_of(config)
        self.pipeline = configured_pipeline(config)
        self.kernel = Kernel(config.sampler.kernel, config.sampler.eta)
        self.schedule = self.pipeline.schedule(config.sampler.steps, config.sampler.shift)
        self.eval_schedule = self.pipeline.schedule(config.sampler.eval_steps, config.sampler.shift)
        self.learner = Learner(self.pipeline, self.kernel, self.algorithm,
                               make_optimizer(config.optim, config.steps * self.updates), config.optim.ema_decay)
        if abstract:
            rows = [Row(i, str(i), {}) for i in range(config.data.prompts_per_step)]
            if find_rows(config.data.train).exists():
                rows = with_negatives(read_rows(config.data.train), self.pipeline)
            self.rewards, self.evals, self.embedded = RewardSet.abstract(config.rewards.to_dict(), mesh), {}, None
        else:
            rows = with_negatives(read_rows(config.data.train), self.pipeline)
            self.rewards = RewardSet(config.rewards.to_dict(), mesh)
            self.evals = {name: self._evaluation(evaluator) for name, evaluator in evaluators.items()}
            self.embedded = self._embeddings(config, rows)
            self._warn_of_long_prompts({"data.train": rows} | {f"evals.{name}": each.rows for name, each in self.evals.items()})
        self.rows = row_batches(rows, config.data.prompts_per_step, config.seed)
        self._prompt_numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
        self.embeddings = bool(config.data.embeddings)
        self.frozen, self.reference, self.weights = {}, {}, tuple(self.rewards.weights.items())
        self.rescoring = Rescoring(self.algorithm.rescore, getattr(self.algorithm, "clip_range", 0.0) / 10, self.updates, mesh)

    def _evaluation(self, evaluator: Evaluator) -> Evaluation:
        rows = with_negatives(read_rows(evaluator.rows)[:evaluator.count], self.pipeline)
        rewards = RewardSet(evaluator.rewards, self.mesh, shared=self.rewards) if evaluator.rewards else self.rewards
        return Evaluation(evaluator, rows, rewards)

    def _embeddings(self, config, rows) -> EmbeddingSet | None:
        if not config.data.embeddings:
            return None
        embedded = EmbeddingSet(config.data.embeddings, fingerprint(self.pipeline))
        for part in (rows, *(each.rows for each in self.evals.values())):
            negatives = self.pipeline.negatives(part) if self.pipeline.guidance_scale != 1 else []
            embedded.check([row.prompt for row in part] + negatives)
        return embedded

    def _warn_of_long_prompts(self, sets: dict[str, list[Row]]) -> None:
        for name, rows in sets.items():
            if cut := self.pipeline.truncated([row.prompt for row in rows]):
                log.warning("config.%s: %d of %d prompts are too long for the text encoder, which will not see their ends",
                            name, cut, len(rows))

    # ---------------------------------------------------------------- arrays

    def load(self) -> TrainState:
        """Streams the weights to the devices; returns the state of iteration 0."""
        text = not self.embeddings
        if self.is_abstract:
            trainable, self.frozen = self.pipeline.abstract(self.mesh, text=text)
        else:
            trainable, self.frozen = self.pipeline.load(self.seed, self.mesh, text=text)
        if self.algorithm.reference:  # LoRA: adapters off; full fine-tuning: the base weights
            zeros = self.pipeline.lora_scale and not self.is_abstract
            self.reference = jax.tree.map(jax.numpy.zeros_like, trainable) if zeros else trainable
        memory = self.algorithm.memory(len(self._prompt_numbers), tuple(self.rewards.weights))
        if not self.is_abstract:
            return init_state(self.learner, trainable, self.replicated(memory))
        state = jax.eval_shape(lambda trainable: init_state(self.learner, trainable, memory), trainable)
        return jax.tree.map(sharding.abstract, state, jax.tree.map(as_returned, sharding.param_shardings(
            state, self.mesh, self.pipeline.sharding)))

    def replicated(self, tree):
        """Host arrays, the same on every process, on all devices."""
        if self.is_abstract:
            return jax.tree.map(lambda leaf: sharding.abstract(leaf, NamedSharding(self.mesh, PartitionSpec())), tree)
        return sharding.replicate(tree, self.mesh)

    def split(self, tree):
        """Host arrays, the same on every process, with the first dimension over the mesh where it divides."""
        if not self.is_abstract:
            return sharding.shard_batch(tree, self.mesh)
        parts = sharding.batch_devices(self.mesh)
        return jax.tree.map(lambda leaf: sharding.abstract(leaf, NamedSharding(self.mesh, PartitionSpec(
            sharding.BATCH if leaf.shape[0] % parts == 0 else None))), tree)

    def key(self, iteration: int):
        """All randomness of an iteration derives from it. Within a mesh (`jax.set_mesh`) jax puts it on all devices."""
        key = jax.random.fold_in(jax.random.key(self.seed), iteration)
        return self.replicated(jax.ShapeDtypeStruct(key.shape, key.dtype)) if self.is_abstract else key

    def fold(self, key, number: int):
        """The key of one purpose."""
        return key if self.is_abstract else jax.random.fold_in(key, self.replicated(np.uint32(number)))

    # ---------------------------------------------------------------- rows

    def condition(self, rows: list[Row], key, call) -> Cond:
        """The conditioning of some rows, encoded by the pipeline or read from the embedding set."""
        if self.embedded:
            negative = self.pipeline.negatives(rows) if self.pipeline.guidance_scale != 1 else None
            return Cond(*self.split((self.embedded([row.prompt for row in rows]), negative and self.embedded(negative))))
        inputs = self.pipeline.abstract_inputs(rows) if self.is_abstract else self.pipeline.inputs(rows)
        if self.embeddings:  # abstract: as the encoders would give it, but from a file, which has bfloat16
            cond = encode.eval_shape(self.pipeline, self.pipeline.abstract()[1], inputs, key)
            return self.split(jax.tree.map(lambda leaf: leaf.update(dtype=jax.numpy.bfloat16), cond))
        return call("encode", encode, self.pipeline, self.frozen, self.split(inputs), key)

    def prompt_numbers(self, rows: list[Row]):
        """int32 [P]: which of the different prompts of the data set these are."""
        return self.replicated(np.array([self._prompt_numbers[row.prompt] for row in rows], np.int32))

    def close(self) -> None:
        """Ends the threads of the rewards and lets go of their networks."""
        for rewards in (self.rewards, *(evaluation.rewards for evaluation in self.evals.values())):
            rewards.close()


class Rescoring:
    """Whose log-probabilities are the old ones, where a rollout serves several updates.

    Rollout and update are two compiled programs; in bfloat16 they may round differently, by more than the clip range. With
    one update the ratio is 1 by definition, and the update's own log-probability is the old one. With several, "auto" takes the
    update's own too (one more forward pass for the later updates) until the first iteration has shown that the rollout's
    differ by less than `limit`; it looks again in every iteration, and a run that is resumed elsewhere starts anew.
    """

    def __init__(self, mode: str, limit: float, updates: int, mesh):
        self.mode, self.limit, self.single = mode, limit, updates == 1
        self.where = f"{jax.__version__} {mesh.devices.flat[0].device_kind} {dict(mesh.shape)}"
        self.kept: bool | None = None  # whether the rollout's are good enough; None: not known

    @property
    def active(self) -> bool:
        """Whether old log-probabilities of the later updates are computed anew."""
        return not self.single and (self.mode == "always" or (self.mode == "auto" and not self.kept))

    @property
    def on_policy(self) -> bool:
        """Whether the first update of a rollout takes its own log-probabilities for the old ones."""
        return self.single or self.active

    def judge(self, change: float) -> None:
        """Decides after an iteration in which the update's log-probabilities changed a ratio by at most `change`."""
        if self.single or self.mode != "auto":
            return
        kept = self.kept is not False and change < self.limit
        if kept != self.kept:
            log.log(logging.INFO if kept else logging.WARNING,
                    "rollout and update round differently by %.1e of a ratio, %s a tenth of the clip range: old "
                    "log-probabilities are %s", change, "less than" if kept else "not less than",
                    "the rollout's" if kept else "computed anew before the first update (one more forward pass)")
        self.kept = kept

    def record(self) -> dict:
        """For the checkpoint, so that a resumed run repeats an uninterrupted one."""
        return {"kept": self.kept, "where": self.where}

    def restore(self, record: dict | None) -> None:
        if record and record["where"] == self.where:
            self.kept = record["kept"]


def as_returned(where: NamedSharding) -> NamedSharding:
    """A sharding as jax spells it where a compiled function returns it: without mesh axes of one device."""
    named = [(names,) if isinstance(names, str) else names or () for names in where.spec]
    split = [tuple(name for name in names if where.mesh.shape[name] > 1) for names in named]
    return NamedSharding(where.mesh, PartitionSpec(*(names or None for names in split)))


def with_negatives(rows: list[Row], pipeline: Pipeline) -> list[Row]:
    """If some rows have a field `negative_prompt`, all get one, so that every batch has the same shapes."""
    if not any(row.fields.get("negative_prompt") for row in rows):
        return rows
    return [row._replace(fields={"negative_prompt": pipeline.negative_prompt} | dict(row.fields)) for row in rows]


def configured_pipeline(config) -> Pipeline:
    """The pipeline that a run's config describes.

    Raises: ConfigError if a registered kernel does not suit it, or one of your own cannot be imported.
    """
    model, lora = config.model, config.model.lora
    settings = ("height", "width", "dtype", "remat", "guidance_scale", "embedded_guidance", "negative_prompt", "text_length",
                "decode_batch", "decode_tile")
    pipeline = make_pipeline(
        model.folder, model.pipeline, **{name: model[name] for name in settings}, time_rounding=config.sampler.time_rounding,
        parts=model.parts.to_dict(),
        lora={"rank": lora.rank, "alpha": lora.alpha or 2 * lora.rank, "targets": lora.targets} if lora.rank else None)
    if ":" in config.sampler.kernel:
        registry.resolve({}, config.sampler.kernel, "sampler.kernel")
    elif config.sampler.kernel not in pipeline.kernels:
        raise ConfigError(f"config.sampler.kernel={config.sampler.kernel!r}: a {type(pipeline).__name__} takes "
                          f"{' or '.join(pipeline.kernels)}")
    return pipeline


def open_run(run_dir, mesh=None, *, text: bool = True):
    """What a training run has made of its base model: (config, pipeline, trainable, frozen, step).

    Args:
      mesh: where the weights go, by each part's rules; None: the default device.
      text: False leaves the text encoders out.
    Raises: ConfigError or CheckpointError if the folder holds no run or no checkpoint.
    """
    config = run_config(run_dir)
    pipeline = configured_pipeline(config)
    trainable, frozen = pipeline.load(config.seed, mesh, text=text)
    step, trainable = Checkpointer(Path(run_dir) / "checkpoints").restore_weights(trainable)
    return config, pipeline, trainable, frozen, step
