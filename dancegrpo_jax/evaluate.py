"""When the evaluations of a run are made, on which samples, and the pictures they leave."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dancegrpo_jax import multihost
from dancegrpo_jax.data import Row
from dancegrpo_jax.learner import TrainState
from dancegrpo_jax.media import Media, image_grid, to_uint8
from dancegrpo_jax.metrics import MetricWriter, Progress
from dancegrpo_jax.rollout import generate
from dancegrpo_jax.session import Evaluation, Session

COLUMNS = 6  # samples of each prompt in the grids before and after


def evaluate(session: Session, state: TrainState, step: int, grid: str = "", *, writer: MetricWriter,
             progress: Progress) -> None:
    """Those of `config.evals` whose turn it is after iteration `step`.

    Args: grid: "before" or "after": then it is the turn of all, and the first leaves `<run_dir>/<grid>.png`, the same rows and
    noise each time. Otherwise the pictures are the evaluation's own first samples.
    """
    for name, evaluation in session.evals.items():
        if not grid and not evaluation.evaluator.due(step):
            continue
        scalars, rows, pictures = measure(session, state, evaluation)
        writer.scalars(step, {f"{name}/{key}": value for key, value in scalars.items()})
        progress.note(step, f"{name}  " + "  ".join(f"{key} {value:.4f}" for key, value in scalars.items()))
        if grid and name == next(iter(session.evals)):
            picture = draw_grid(session, state, evaluation, step, f"{name}/{grid}", writer)
            if jax.process_index() == 0:
                picture.save(Path(session.config.run_dir) / f"{grid}.png")
        else:
            writer.images(step, f"{name}/samples", image_grid(pictures, [row.prompt for row in rows]))


def samples(session: Session, state: TrainState, rows: list[Row], batch: int) -> Iterator[tuple[list[Row], Media, int]]:
    """ODE samples of the weights to evaluate, see `rollout.generate`."""
    return generate(session.pipeline, state.eval_params, session.frozen, rows, session.eval_schedule,
                    condition=session.condition, batch=batch, seed=session.seed)


def measure(session: Session, state: TrainState, evaluation: Evaluation) -> tuple[dict[str, float], list[Row], np.ndarray]:
    """(the evaluation's numbers, its first rows, their samples uint8 [n, 1, H, W, 3])."""
    evaluator, shown = evaluation.evaluator, []

    def looked_at():
        for rows, media, count in samples(session, state, evaluation.rows, evaluator.batch):
            if not shown:
                first = rows[:min(count, session.config.log.prompts_in_grid)]
                shown.append((first, to_uint8(Media(media.pixels[:len(first), :, :1], media.fps))[:, :, 0]))
            yield rows, media, count
            del media
    return evaluator.run(looked_at(), evaluation.rewards), *shown[0]


def draw_grid(session: Session, state: TrainState, evaluation: Evaluation, step: int, tag: str,
              writer: MetricWriter) -> Image.Image:
    """Several samples of each of the first rows, scored."""
    rows = evaluation.rows[:session.config.log.prompts_in_grid]
    parts = [multihost.fetch(media.pixels)[:count] for _, media, count in samples(
        session, state, [row for row in rows for _ in range(COLUMNS)], evaluation.evaluator.batch)]
    pixels = np.concatenate(parts)
    media = Media(session.split(pixels.reshape(len(rows), COLUMNS, *pixels.shape[2:])), session.pipeline.fps)
    scores = evaluation.rewards.submit(media, rows).result()
    return write_grid(session, writer, step, tag, media, rows, scores, COLUMNS)


def write_grid(session: Session, writer: MetricWriter, step: int, tag: str, media: Media, rows: list[Row], scores: dict,
               columns: int) -> Image.Image:
    """A picture of the first samples of some rows with the weighted sum of their rewards, which is for display only."""
    place = slice(len(rows)), slice(columns)
    values = multihost.fetch({name: values[place] for name, (values, _) in scores.items()})
    total = sum(session.rewards.weights.get(name, 1.0) * each for name, each in values.items())
    grid = image_grid(Media(media.pixels[place], media.fps), [row.prompt for row in rows], total)
    writer.images(step, tag, grid)
    return grid
