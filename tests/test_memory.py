"""What lives on the devices, and how long: of a sampler its last sample, of evaluation one batch, of an iteration nothing."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dancegrpo_jax import config as c
from dancegrpo_jax import evaluate, iteration, rollout, sde, sharding, trainer
from dancegrpo_jax.data import rows_of
from dancegrpo_jax.evaluators.heldout import HeldOut
from dancegrpo_jax.metrics import MetricWriter
from dancegrpo_jax.pipelines.base import make_pipeline
from dancegrpo_jax.rewards.set import RewardSet
from dancegrpo_jax.session import Evaluation, Session
from tests.pipelines import write_pipeline
from tests.toy import MLPPipeline

WORLD = Path(__file__).parents[1] / "dancegrpo_jax" / "worlds" / "weights" / "flow"


def needed(function, steps: int, *kernel) -> tuple[int, int]:
    """Bytes of (temporaries, results) of a compiled sampler of the embedded FLUX world, for 32 samples."""
    pipeline, key = make_pipeline(WORLD, height=32, width=32), jax.random.key(0)
    trainable, frozen = pipeline.abstract()
    cond = rollout.encode.eval_shape(pipeline, frozen, pipeline.abstract_inputs(rows_of("a" * 32)), key)
    args = (pipeline, *kernel, trainable, frozen, cond, key, pipeline.schedule(steps, 2.0))
    found = function.lower(*args).compile().memory_analysis()
    return found.temp_size_in_bytes, found.output_size_in_bytes


def test_a_sampler_keeps_no_trajectory():
    latents = 32 * 8 * 8 * 4 * 4
    (few, one), (some, same), (many, last) = (needed(rollout.sample, steps) for steps in (4, 16, 64))
    assert one == same == last == latents
    assert max(few, some, many) - min(few, some, many) < 1000  # the schedule's numbers
    (few, short), (many, long) = (needed(rollout.rollout, steps, sde.Kernel("flow", 0.7)) for steps in (4, 64))
    assert many > few and long - short >= 60 * latents  # as training's does


# ------------------------------------------------------------------------------------------ evaluation

COUNT, BATCH, SIDE = 2000, 64, 64
PICTURES = BATCH * SIDE * SIDE * 3
found: list[tuple[int, int]] = []  # bytes of pixels alive, as (fp32, uint8), whenever a reward looks


class Painter(MLPPipeline):
    """The toy, whose latents are enlarged to pictures of 64 x 64."""

    def decode(self, frozen, latents):
        return jax.image.resize(jax.nn.sigmoid(latents), (len(latents), SIDE, SIDE, 3), "nearest")[:, None]


def pixels_alive() -> tuple[int, int]:
    pictures = [array for array in jax.live_arrays() if array.shape[-3:] == (SIDE, SIDE, 3)]
    buffers = {array.unsafe_buffer_pointer(): array for array in pictures}.values()  # an array and its only shard are one
    return tuple(sum(array.nbytes for array in buffers if array.dtype == dtype) for dtype in (jnp.float32, jnp.uint8))


def watching(images, prompts):
    """A reward that counts."""
    found.append(pixels_alive())
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("through", ["generate", "measure"])
def test_an_evaluation_holds_one_batch(through):
    pipeline, schedule = Painter(), sde.flow_schedule(2, 3.0)
    trainable, frozen = jax.tree.map(jnp.asarray, pipeline.init())
    rewards = RewardSet({"watching": {"reward": f"{__name__}:watching"}, "color": {}})
    rows, evaluator, between = rows_of(["a"] * COUNT), HeldOut(rows="-", count=COUNT, batch=BATCH), []

    def condition(rows, key, call):
        return pipeline.cond(len(rows))

    def call(name, function, *args, **kwargs):
        between.append(pixels_alive())
        return function(*args, **kwargs)
    found.clear()
    if through == "generate":
        metrics = evaluator.run(rollout.generate(pipeline, trainable, frozen, rows, schedule, condition=condition, batch=BATCH,
                                                 seed=0, call=call), rewards)
    else:
        session = SimpleNamespace(pipeline=pipeline, frozen=frozen, eval_schedule=schedule, condition=condition, seed=0,
                                  config=SimpleNamespace(log=SimpleNamespace(prompts_in_grid=4)))
        state = SimpleNamespace(eval_params=trainable)
        metrics, first, _ = evaluate.measure(session, state, Evaluation(evaluator, rows, rewards))
        assert len(first) == 4
    rewards.close()
    assert metrics.keys() == {"watching/mean", "watching/stderr", "color/mean", "color/stderr"}
    assert len(found) == -(-COUNT // BATCH) * BATCH  # the last batch is filled up
    shown = 4 * SIDE * SIDE * 3 if through == "measure" else 0
    assert set(found) == {(4 * PICTURES, PICTURES + shown)}  # what is scored, its copy for the host, the first four to show
    assert set(between) <= {(0, 0)} and len(between) == (2 * len(found) // BATCH if through == "generate" else 0)


# ------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_pipeline(folder, "flow")
    (folder / "prompts.txt").write_text("\n".join("abcdefghijk"))
    return folder


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_nothing_of_an_iteration_is_alive_in_the_next(algorithm, folder, monkeypatch):
    """At every rollout of the second and third iteration: the session's arrays, the state, and what this iteration has made."""
    config = c.default()
    config.run_dir, config.model.folder, config.data.train = str(folder), str(folder), str(folder / "prompts.txt")
    config.model.height = config.model.width = 32
    config.sampler.kernel, config.sampler.steps = "flow", 3
    config.data.prompts_per_step, config.data.group_size, config.data.chunks = 4, 4, 2
    config.rewards = {"color": {}, "jpeg": {"weight": 0.01}}
    config.algorithm = {algorithm: {"levels": 1} if algorithm == "nft" else {"kl_beta": 0.1}}
    config.optim.updates_per_rollout, config.optim.microbatch, config.optim.ema_decay = 2, 4, 0.5
    config.log.images_every = 1
    config.mesh.data, config.mesh.fsdp = 1, 2
    extra = []  # bytes at every rollout of what is neither kept by the run nor an argument

    def kept():
        return [session.frozen, session.reference, session.rewards.params, state]

    def others(*trees):
        known = {id(leaf) for leaf in jax.tree.leaves((elsewhere, trees))}
        return [(array.shape, array.nbytes) for array in jax.live_arrays() if id(array) not in known]

    def call(name, function, *args, **kwargs):
        if name == "rollout":
            extra.append(sum(size for _, size in others(kept(), args)))
        return function(*args, **kwargs)

    monkeypatch.setattr(trainer, "collect", functools.partial(iteration.collect, call=call))
    elsewhere, mesh = jax.live_arrays(), sharding.make_mesh(**config.mesh, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        session, writer = Session(config, mesh), MetricWriter(folder, tensorboard=False)
        state = session.load()
        for step in (1, 2, 3):
            assert not others(kept()), step
            state, _ = trainer.iterate(session, state, step, writer)
        session.close()
        writer.close()
    assert len(extra) == 6 and max(extra[::2]) <= 2 * 2 * 8  # the iteration's key on two devices, at its first rollout
    assert min(extra[1::2]) > 2 * 4 * 4 * 32 * 32 * 3  # at its second the pictures of the first, among others
