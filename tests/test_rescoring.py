"""Rollout against update where they round differently: whose log-probabilities are the old ones, and who decides."""

import logging

import jax
import numpy as np
import pytest

from dancegrpo_jax import config as c
from dancegrpo_jax import sharding
from dancegrpo_jax.iteration import collect, learn, run, summarize
from dancegrpo_jax.session import Rescoring, Session
from tests.pipelines import write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("flow"), "flow")


def make_session(folder, mesh, updates=2, **grpo):
    config = c.default()
    config.model.folder, config.model.height, config.model.width = str(folder), 32, 32
    config.sampler.kernel, config.sampler.eta, config.sampler.steps, config.sampler.eval_steps = "flow", 0.7, 4, 4
    config.data.train = "dancegrpo_jax/worlds/prompts/train.txt"
    config.data.prompts_per_step, config.data.group_size, config.data.chunks = 4, 4, 2
    config.optim.updates_per_rollout, config.optim.microbatch, config.optim.learning_rate = updates, 8, 1e-3
    config.rewards = {"color": {}}
    config.algorithm = {"grpo": {"timestep_fraction": 0.7} | grpo}
    c.validate(config)
    return Session(config, mesh)


def iterations(session, state, count, deviation=0.0):
    """The scalars of some iterations and which functions they called; rollouts' log-probabilities are off by `deviation`."""
    found = []
    for i in range(count):
        names = []

        def call(name, function, *args, names=names, **kwargs):
            names.append(name)
            result = run(name, function, *args, **kwargs)
            return result._replace(log_probs=result.log_probs + deviation) if name == "rollout" else result
        key, plan = session.key(i), session.replicated(session.algorithm.plan(session.schedule, i))
        collected = collect(session, state, session.rows[i], plan, key, call)
        state, scalars = learn(session, state, collected, plan, key, i, call)
        scalars = summarize(jax.device_get(scalars))
        session.rescoring.judge(max(abs(scalars["ratio_first/min"] - 1), abs(scalars["ratio_first/max"] - 1),
                                    scalars.get("rescore/change", 0.0)))
        found.append((scalars, names))
    return found


@pytest.mark.parametrize("deviation, rescored", [(0.0, [True, False, False]), (3e-4, [True, True, True])])
def test_auto_keeps_the_rollouts_only_where_they_agree(folder, caplog, deviation, rescored):
    """Two updates a rollout. A forced deviation of three clip ranges leaves the first update's ratio at 1."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), caplog.at_level(logging.INFO, "dancegrpo_jax.session"):
        session = make_session(folder, mesh)
        found = iterations(session, session.load(), 3, deviation)
    assert ["rescore" in names for _, names in found] == rescored
    said = [record for record in caplog.records if record.name == "dancegrpo_jax.session"]
    assert len(said) == 1 and ("computed anew" in said[0].getMessage()) == bool(deviation)
    for scalars, _ in found:
        assert abs(scalars["ratio_first/mean"] - np.exp(-deviation)) < 2e-6
        if deviation:
            assert scalars["rescore/change"] == pytest.approx(deviation, rel=0.02)


def test_what_is_always_or_never_rescored(folder):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        for mode, wanted in (("always", True), ("never", False)):
            session = make_session(folder, mesh, rescore=mode)
            (scalars, names), = iterations(session, session.load(), 1, 3e-4)
            assert ("rescore" in names) == wanted
            # Ratios of the first update: at 1, or as far as the rollout was off, where most are clipped.
            assert (scalars["clip_fraction/low"] + scalars["clip_fraction/high"] > 0.2) or wanted


def rescoring(mode="auto", updates=2):
    return Rescoring(mode, 1e-5, updates, sharding.make_mesh(devices=jax.devices()[:1]))


def test_it_is_careful_until_it_knows_and_looks_again():
    found = rescoring()
    assert found.active and found.on_policy
    found.judge(2e-6)
    assert not found.active and not found.on_policy
    found.judge(2e-5)  # a later iteration
    assert found.active
    found.judge(1e-7)  # once is enough
    assert found.active


def test_with_one_update_there_is_nothing_to_decide():
    found = rescoring(updates=1)
    assert found.on_policy and not found.active
    found.judge(1.0)
    assert found.on_policy and not found.active and found.kept is None


def test_the_decision_is_resumed_on_the_same_devices_only():
    found, same, other = rescoring(), rescoring(), rescoring()
    found.judge(0.0)
    same.restore(found.record())
    assert not same.active
    other.restore(found.record() | {"where": "another chip"})
    assert other.active
    other.restore(None)
    assert other.active
