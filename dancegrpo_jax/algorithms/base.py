"""The Algorithm contract: what a method of visual RL decides, from which steps are noisy to what the loss of an example is.

An algorithm is a frozen dataclass: its fields are its options in the config, with range and help, and it is a static argument
of jitted functions. It is one file and a line in `registry.ALGORITHMS`; iteration, accumulation, optimizer, sharding,
checkpoints and reports are the same for all.

Shapes: P prompts, G samples of each, B = P * G; R trained samples, R = P * k, a prompt's adjacent; K examples of each sample;
M examples in a micro-batch; T steps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dancegrpo_jax import guidance
from dancegrpo_jax.algorithms.advantages import combine_advantages, reward_diagnostics
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.options import POSITIVE, ConfigError, one_of, option
from dancegrpo_jax.registry import COMBINE
from dancegrpo_jax.rollout import Trajectory, step
from dancegrpo_jax.sde import Kernel, Schedule


class Examples(NamedTuple):
    """What is trained on in an iteration: pairs are pytrees of [R, K, ...], samples of [R, ...], which all K share."""

    pairs: Any
    samples: Any


class Context(NamedTuple):
    """What a loss may look at besides its examples.

    cond: conditioning of [M, ...]. copies: {name: weights}, see `Algorithm.copies` and `reference`. on_policy: bool scalar,
    True while the weights are those of the rollout and old log-probabilities are to be the update's own.
    """

    pipeline: Any
    kernel: Kernel
    frozen: dict
    cond: Cond
    copies: dict
    on_policy: jax.Array | bool

    def predict(self, weights, x, time):
        """The denoiser's output fp32 [M, ...] with some weights in place of the trained ones."""
        return guidance.predict(self.pipeline, weights, self.frozen, x, time, self.cond)

    def transition(self, weights, x, time, sigma, sigma_next):
        """(mean, std) of the stochastic step from x [M, ...] (`rollout.step`)."""
        return step(self.pipeline, self.kernel, weights, self.frozen, self.cond, x, time, sigma, sigma_next, True)


@dataclass(frozen=True)
class Algorithm:
    """Base class. Only `examples_per_sample`, `examples` and `loss` must be given."""

    combine: str = option("advantages", one_of(*COMBINE), "how several rewards make one advantage")
    advantage_clip: float = option(5.0, POSITIVE, "limit of the absolute advantage")

    smallest_group: ClassVar[int] = 2  # samples of a prompt, so that advantages mean something
    keeps_trajectory: ClassVar[bool] = True  # or only the final samples
    noisy_rollouts: ClassVar[bool] = True  # or an ODE's, where only the initial noise tells samples apart
    copies: ClassVar[tuple[str, ...]] = ()  # slow copies of the trained weights, kept and saved with the run
    behaviour: ClassVar[str | None] = None  # the copy that samples the rollouts; None: the trained weights
    rescore: ClassVar[str] = "never"  # whose log-probabilities are the old ones: `trajectory.TrajectoryAlgorithm`
    headline: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")  # scalars that the progress line shows

    @property
    def reference(self) -> bool:
        """Whether the loss needs `copies["reference"]`, the base weights (of adapters: zeros)."""
        return False

    def examples_per_sample(self, steps: int) -> int:
        """K, for rollouts of `steps` steps."""
        raise NotImplementedError

    def samples_per_prompt(self, group: int) -> int:
        """k: how many of a prompt's `group` samples are trained on."""
        return group

    def check(self, steps: int, group: int, where: str) -> None:
        """Options against the sampler's steps and the group. Raises: ConfigError; `where` is their place in the config."""
        if group < self.smallest_group:
            raise ConfigError(f"config.data.group_size={group}: must be >= {self.smallest_group} for {where}, whose advantages "
                              "compare the samples of a prompt")

    def plan(self, schedule: Schedule, iteration: int) -> Schedule:
        """Which steps of the rollout are noisy in this iteration."""
        return schedule

    def memory(self, prompts: int, rewards: tuple[str, ...]) -> Any:
        """Running statistics at the start, a pytree of numpy arrays; it is saved with the run.

        Args: prompts: number of different prompts; rewards: their names.
        """
        return {}

    def advantages(self, scores: dict, weights: dict, prompts, memory) -> tuple[jax.Array, Any]:
        """(advantages [P, G], memory).

        Args: scores {name: (values [P, G], ok [P, G])}; weights {name: float}; prompts int32 [P], which prompts these are.
        """
        return combine_advantages(scores, weights, self.combine), memory

    def make(self, key, trajectory: Trajectory, plan: Schedule, scores: dict, weights: dict, prompts, memory):
        """(examples, memory, scalars) of an iteration: advantages, clipped, then `examples`."""
        advantage, memory = self.advantages(scores, weights, prompts, memory)
        advantage = jnp.clip(advantage, -self.advantage_clip, self.advantage_clip)
        scalars = reward_diagnostics(scores) | {
            "advantage/mean": advantage.mean(), "advantage/std": advantage.std(), "advantage/abs_max": jnp.abs(advantage).max()}
        return self.examples(key, trajectory, plan, advantage), memory, scalars

    def examples(self, key, trajectory: Trajectory, plan: Schedule, advantage) -> Examples:
        """What to train on, of the samples that were chosen."""
        raise NotImplementedError

    def rescored(self, context: Context, weights, pairs, samples):
        """The pairs [M, ...] with the log-probabilities that these weights give, and the largest change of a ratio by it."""
        raise NotImplementedError

    def loss(self, context: Context, weights, pairs, samples, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss [M], {name: [M]} for `summary`) of a micro-batch: pairs and samples of [M, ...]."""
        raise NotImplementedError

    def summary(self, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Scalars of one update, from what `loss` found in all of its examples.

        Over the updates of an iteration they are averaged; of names that end in /min or /max the extreme is kept, and of
        names that contain "_first/" the value of the first update.
        """
        return {name: values.mean() for name, values in found.items()}

    def after(self, copies: dict, trainable: dict, iteration) -> dict:
        """The copies after an iteration (int32, from 0)."""
        return copies
