"""The Evaluator contract: what is measured on samples of held-out rows, how often, and by which rewards.

An evaluator is a frozen dataclass; its fields are its options in `config.evals`, {name: {"type": ..., options}}. Its numbers
are logged as "<name>/<what>". A new one is one file with `run`, and a line in `registry.EVALUATORS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dancegrpo_jax.data import Row
from dancegrpo_jax.media import Media
from dancegrpo_jax.options import ANY, NOT_EMPTY, at_least, option


@dataclass(frozen=True)
class Evaluator:
    """Base class, with the options that all have."""

    rows: str = option("", NOT_EMPTY, "prompts, in a file as data.train")
    count: int = option(64, at_least(1), "rows of that file, from its start")
    batch: int = option(16, at_least(1), "rows sampled at a time; the last batch is padded")
    every: int = option(0, at_least(0), "iterations between two evaluations; 0 = only at the start and the end")
    rewards: dict = option({}, ANY, "as config.rewards; {} = the training rewards, whose networks are shared either way")

    def due(self, step: int) -> bool:
        """Whether it is its turn after iteration `step`, between the start and the end."""
        return bool(self.every) and step % self.every == 0

    def run(self, batches: Iterator[tuple[list[Row], Media, int]], rewards) -> dict[str, float]:
        """Numbers by name.

        Args:
          batches: (rows, their samples [P, 1, F, H, W, 3] on the devices, how many of them count), one at a time; hold none.
          rewards: a `rewards.RewardSet`.
        """
        raise NotImplementedError
