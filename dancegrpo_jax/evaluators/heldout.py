"""Held-out evaluation: the mean of every reward, with its standard error."""

from dataclasses import dataclass

import numpy as np

from dancegrpo_jax.evaluators.base import Evaluator
from dancegrpo_jax.multihost import fetch


@dataclass(frozen=True)
class HeldOut(Evaluator):
    """{"<reward>/mean", "<reward>/stderr"} over the samples that could be scored. Scores what training scores."""

    def run(self, batches, rewards):
        found = {name: [] for name in rewards.weights}
        for rows, media, count in batches:
            scores = rewards.submit(media, rows).result()
            del media
            for name, (values, ok) in fetch(scores).items():
                found[name].append(values[:count][ok[:count]])
        metrics = {}
        for name, parts in found.items():
            valid = np.concatenate(parts)
            metrics[f"{name}/mean"] = float(valid.mean()) if valid.size else float("nan")
            metrics[f"{name}/stderr"] = float(valid.std(ddof=1) / valid.size**0.5) if valid.size > 1 else float("nan")
        return metrics
