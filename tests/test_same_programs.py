"""The compile check compiles what a run dispatches: the same programs, and call by call the same names, shapes, dtypes,
placement and static arguments.

The run finds all its programs in jax's persistent compilation cache, where the check has put them.
"""

import contextlib
from collections import Counter

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dancegrpo_jax import config as c
from dancegrpo_jax import embeddings, iteration, rollout, sharding
from dancegrpo_jax.aot import phases
from dancegrpo_jax.learner import Learner
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.session import Session, configured_pipeline
from tests.pipelines import write_pipeline

PROMPTS = [f"a number {i}" for i in range(11)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny pipeline of each paradigm, `flow` and `diffusion`, and prompts with repetitions."""
    folder = tmp_path_factory.mktemp("files")
    for paradigm in ("flow", "diffusion"):
        (folder / paradigm).mkdir()
        write_pipeline(folder / paradigm, paradigm)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS + PROMPTS[:2]))
    (folder / "negatives.csv").write_text("prompt,negative_prompt\none,bad\n" + "".join(f"{prompt},\n" for prompt in PROMPTS))
    return folder


def tiny(files, paradigm="flow", **changes):
    """An iteration of two chunks and two updates on 8 devices, a reward on the devices and one on the host."""
    config = c.default()
    config.model.folder, config.model.height, config.model.width = str(files / paradigm), 32, 32
    config.sampler.kernel = "flow" if paradigm == "flow" else "ddim"
    config.sampler.steps, config.sampler.eval_steps = 5, 2
    config.data.train = str(files / "prompts.txt")
    config.data.prompts_per_step, config.data.group_size, config.data.chunks = 8, 4, 2
    config.rewards = {"color": {}, "jpeg": {"weight": 0.01}}
    config.optim.updates_per_rollout, config.optim.microbatch = 2, 16
    config.mesh.data, config.mesh.fsdp = 2, 4
    if "data__train" in changes:
        changes["data__train"] = files / changes["data__train"]
    for key, value in changes.items():
        c.override(config, key.replace("__", "."), str(value))
    c.validate(config, jax.device_count())
    return config


def placed(leaf):
    """Which part of an array lies on which device, or None where its program may choose."""
    where = getattr(leaf, "sharding", None)
    if where is None or not getattr(leaf, "committed", True):
        return None
    return tuple(sorted((device.id, str(index)) for device, index in where.devices_indices_map(leaf.shape).items()))


def static(value):
    """What matters of an argument that is no array, comparable between two sessions."""
    if isinstance(value, Pipeline):
        plain = {name: each for name, each in vars(value).items() if isinstance(each, (str, int, float, tuple, np.dtype))}
        return type(value).__name__, tuple(sorted(plain.items()))
    if isinstance(value, Learner):
        return static(value.pipeline), value.kernel, value.algorithm, value.ema_decay
    return value.spec if isinstance(value, jax.NamedSharding) else value


def described(name, function, args, kwargs, result) -> tuple:
    def one(leaf):
        return (leaf.shape, leaf.dtype, placed(leaf)) if hasattr(leaf, "shape") else static(leaf)

    def each(tree):
        return tuple((jax.tree_util.keystr(path), one(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
    return name, function.__name__, each((args, kwargs)), each(result)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Counter of programs that were compiled and found, {"compile_requests_use_cache": n, "cache_hits": n}."""
    settings = {"jax_compilation_cache_dir": str(tmp_path / "cache"), "jax_persistent_cache_min_compile_time_secs": 0.0,
                "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()
    monkeypatch.setattr(phases, "low_effort", contextlib.nullcontext)  # an option of the compiler, by which the cache goes
    events = Counter()

    def count(event, **_):
        events[event.rpartition("/")[2]] += 1
    jax.monitoring.register_event_listener(count)
    yield events
    jax.monitoring.unregister_event_listener(count)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def dispatched(config, cache) -> tuple[list[tuple], list[str]]:
    """What one iteration of a real session runs; and the names of what it had to compile."""
    found, fresh = [], []

    def call(name, function, *args, **kwargs):
        given = described(name, function, args, kwargs, ())  # before the buffers are donated
        before = cache["compile_requests_use_cache"] - cache["cache_hits"]
        result = function(*args, **kwargs)
        if cache["compile_requests_use_cache"] - cache["cache_hits"] > before:
            fresh.append(name)
        found.append((*given[:3], described(name, function, (), {}, result)[3]))
        return result

    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        session = Session(config, mesh)
        state, rows, key = session.load(), session.rows[0], session.key(0)
        plan = session.replicated(session.algorithm.plan(session.schedule, 0))
        collected = iteration.collect(session, state, rows, plan, key, call)
        iteration.learn(session, state, collected, plan, key, 0, call)
        session.close()
    return found, fresh


def compiled(config, monkeypatch) -> tuple[list[tuple], phases.Run]:
    """What the compile check compiles for the same mesh, call by call, and its run."""
    found = []

    class Recorder(phases.Compiler):
        def __call__(self, name, function, *args, **kwargs):
            result = super().__call__(name, function, *args, **kwargs)
            found.append(described(name, function, args, kwargs, result))
            return result
    monkeypatch.setattr(phases, "Compiler", Recorder)
    return found, phases.compile_on(config, sharding.make_mesh(**config.mesh), None)


@pytest.mark.parametrize("paradigm, changes", [
    ("flow", {}),
    pytest.param("flow", {"algorithm": "ddpo"}, marks=pytest.mark.slow),
    pytest.param("flow", {"algorithm": "nft", "sampler__shared_noise": "false", "model__lora__rank": 2,
                          "optim__ema_decay": 0.5}, marks=pytest.mark.slow),
    pytest.param("diffusion", {"model__guidance_scale": 3.0, "data__train": "negatives.csv", "data__chunks": 1,
                               "optim__microbatch": 8, "algorithm__grpo__best_of": 2, "algorithm__grpo__kl_beta": 0.1},
                 marks=pytest.mark.slow)])
def test_the_check_compiles_what_a_run_dispatches(paradigm, changes, files, monkeypatch, cache):
    config = tiny(files, paradigm, **changes)
    ours, run = compiled(config, monkeypatch)
    theirs, fresh = dispatched(config, cache)
    assert [call[:2] for call in ours] == [call[:2] for call in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for kind in (2, 3):
            assert mine[kind] == other[kind], mine[0]
    assert not fresh
    calls = Counter(name for name, *_ in theirs)
    assert calls["rollout"] == calls["quantise"] == config.data.chunks and calls["update"] == 2
    assert calls["rescore"] == (changes.get("algorithm") != "nft")
    assert {phase.name: phase.calls for phase in run.phases} == {name: count for name, count in calls.items()
                                                                if name.split()[0] in phases.PHASES
                                                                and not name.startswith("join ")}


def test_embeddings_as_from_a_file(files):
    """Conditioning from an embedding set: bfloat16, placed as a run places it; the check has no text encoders then."""
    config = tiny(files, "diffusion", model__guidance_scale=3.0)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        pipeline = configured_pipeline(config)
        frozen = pipeline.load_text(mesh)

        def embed(prompts):
            return rollout.encode(pipeline, frozen, {"positive": pipeline.tokenize(prompts)}, jax.random.key(0)).positive
        source = embeddings.fingerprint(pipeline)
        assert list(embeddings.write(files / "embedded", PROMPTS, embed, source))
        config.data.embeddings = str(files / "embedded")
        found = []
        for abstract in (True, False):
            session = Session(config, mesh, abstract=abstract)
            session.load()
            cond = session.condition(session.rows[0], session.key(0), rollout.run)
            found.append(described("", rollout.run, (cond,), {}, session.frozen))
            session.close()
    assert found[0] == found[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(cond)} == {np.dtype(jax.numpy.bfloat16)}
    assert "text_encoder" not in session.frozen
