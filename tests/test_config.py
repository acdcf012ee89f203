"""Config: defaults, overrides, and one-line errors that say what is wrong and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax import config as c
from dancegrpo_jax import registry
from dancegrpo_jax.options import options_of

GOOD = """
from dancegrpo_jax.config import default

def get_config():
    config = default()
    config.model.folder = "base"
    config.data.train = "prompts.txt"
    config.rewards = {"verifier": {"weight": 1.0}}
    config.sampler.steps = 11   # 6 of 10 steps are trained
    config.data.prompts_per_step = 4
    config.data.group_size = 8  # 4 * 8 * 6 = 192 pairs
"""


@pytest.fixture
def write(tmp_path):
    def write(line: str = "", name: str = "run.py") -> str:
        path = tmp_path / name
        path.write_text(GOOD + (f"    {line}\n" if line else "") + "    return config\n")
        return str(path)
    return write


def load(path, *overrides):
    config = c.load(["launch/train.py", f"--config={path}", *(f"--config.{override}" for override in overrides)])
    c.validate(config)
    return config


def test_defaults_are_complete_locked_and_documented():
    config = c.default()
    assert config.is_locked and list(c.flatten(config)) and c.flatten(config).keys() == c.KEYS.keys()
    assert all(key.help for key in c.KEYS.values())
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0
    for name, key in c.KEYS.items():  # a default that breaks its own rule would make every run fail
        assert key.rule.holds(key.default) or name in ("model.folder", "data.train", "rewards"), name
    for kind in registered(registry.ALGORITHMS, registry.EVALUATORS):
        for each in options_of(kind):
            assert each.help and (each.rule.holds(each.default) or each.name == "rows"), (kind, each.name)


def registered(*tables):
    return [registry.resolve(table, name, "x") for table in tables for name in table]


def test_what_can_be_named_exists():
    from dancegrpo_jax.algorithms.base import Algorithm
    from dancegrpo_jax.evaluators.base import Evaluator
    from dancegrpo_jax.pipelines.base import Pipeline
    from dancegrpo_jax.rewards import Reward
    for table, base in ((registry.PIPELINES, Pipeline), (registry.ALGORITHMS, Algorithm), (registry.EVALUATORS, Evaluator),
                        (registry.REWARDS, Reward)):
        assert all(issubclass(kind, base) for kind in registered(table))
    kernels = {kernel for kind in registered(registry.PIPELINES) for kernel in kind.kernels}
    assert kernels == {*registry.FLOW_KERNELS, *registry.DIFFUSION_KERNELS}


def test_each_choice_does_something_of_its_own():
    from dancegrpo_jax import learner, sde
    from dancegrpo_jax.algorithms.advantages import combine_advantages
    from dancegrpo_jax.models import layers
    assert tuple(layers.REMAT) == registry.REMAT
    rng = np.random.default_rng(0)
    rewards = {name: (rng.standard_normal((3, 4)), np.ones((3, 4), bool)) for name in "ab"}
    combined = [combine_advantages(rewards, {"a": 1.0, "b": 2.0}, how) for how in registry.COMBINE]
    times = [sde.flow_schedule(7, 3.0, rounding).times for rounding in registry.TIME_ROUNDING]
    config = c.default().optim
    rates = []
    for config.schedule in registry.SCHEDULES:
        tx, grads = learner.make_optimizer(config, 4), {"w": jnp.ones(1)}
        state = tx.init(grads)
        for _ in range(3):
            update, state = tx.update(grads, state, grads)
        rates.append(update["w"])
    for found in (combined, times, rates):
        assert all(not np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_overrides(write):
    config = load(write(), "optim.learning_rate=3e-4", "steps=7", "model.remat=none", "sampler.eta=1",
                  "model.lora.targets=.*to_q,.*to_k", "run_dir=runs/a=b", "optim.microbatch=6", "steps=9",
                  'rewards={"clip": {"weight": 2, "batch": 4}}', "rewards.clip.weight=0.5",
                  "evals={'eval': {'rows': 'a.txt', 'every': 3}}", "evals.eval.rewards={'jpeg': {}}", "evals.eval.count=8",
                  "algorithm.grpo.clip_range=1e-3", "algorithm.grpo.combine=gdpo")
    assert (config.optim.learning_rate, config.steps, config.model.remat) == (3e-4, 9, "none")
    assert config.model.lora.targets == (".*to_q", ".*to_k") and config.run_dir == "runs/a=b"
    assert isinstance(config.sampler.eta, float)
    assert config.rewards.to_dict() == {"clip": {"weight": 0.5, "batch": 4}}  # replaces the file's, then one option
    assert config.evals.to_dict() == {"eval": {"rows": "a.txt", "every": 3, "rewards": {"jpeg": {}}, "count": 8}}
    assert c.evaluators_of(config)["eval"].batch == 16  # what is not given has its default
    assert config.algorithm.to_dict() == {"grpo": {"clip_range": 1e-3, "combine": "gdpo"}}
    assert config.is_locked
    assert c.load(["--config", write(), "--config.seed", "5"]).seed == 5
    for text in ("ddpo", '{"mine": {"type": "dancegrpo_jax.algorithms.ddpo:DDPO", "buffer": 32}}'):
        algorithm = c.algorithm_of(load(write(), f"algorithm={text}", "data.group_size=1", "optim.microbatch=10"))
        assert (type(algorithm).__name__, algorithm.buffer) == ("DDPO", 32)


def test_options_of_algorithms_and_evaluations_in_a_file(write):
    """They need not be assigned whole: `default` leaves these places open, and `validate` checks the names."""
    config = load(write("config.algorithm.grpo.window = 4; config.evals.eval = {'rows': 'a.txt'}; config.evals.eval.every = 2"))
    assert c.algorithm_of(config).window == 4 and c.evaluators_of(config)["eval"].every == 2


def test_examples_per_sample(write):
    def count(*overrides):
        config = load(write(), *overrides)
        return c.algorithm_of(config).examples_per_sample(config.sampler.steps)
    assert count() == 6
    assert count("algorithm.grpo.window=4") == 2
    assert count("algorithm.grpo.timestep_fraction=0.01") == 1
    assert count('algorithm={"nft": {"levels": 3}}', "sampler.shared_noise=false") == 3


WRONG = [  # (override, words the message must have)
    ("optim.microbatc=2", ["config.optim.microbatc", "config.optim.microbatch?"]),
    ("grpo.microbatch=2", ["config.grpo.microbatch", "config.optim.microbatch?"]),  # where it was in version 0.1
    ("learning_rate=2", ["config.learning_rate", "config.optim.learning_rate?"]),
    ("algorithm.grpo.windows=2", ["config.algorithm.grpo.windows", "did you mean 'window'?"]),
    ("sampler.stepps=2", ["did you mean config.sampler.steps?"]),
    ("optim=2", ["config.optim", "section"]),
    ("algorithm=grppo", ["config.algorithm='grppo'", "did you mean 'grpo'?", "grpo, ddpo, nft"]),
    ("algorithm={}", ["config.algorithm={}", "one entry"]),
    ("algorithm.nft.levels=2", ["config.algorithm=", "one entry"]),  # beside grpo
    ("algorithm={'grpo': 3}", ["config.algorithm.grpo=3", "a dict of options"]),
    ("algorithm.grpo.type=3", ["config.algorithm.grpo.type=3", "a string"]),
    ("algorithm.grpo.type=nowhere:Mine", ["config.algorithm='nowhere:Mine'", "cannot be imported"]),
    ("algorithm.grpo.clip_range=wide", ["config.algorithm.grpo.clip_range='wide'", "a number"]),
    ("algorithm.grpo.clip_range=0", ["config.algorithm.grpo.clip_range=0", "> 0"]),
    ("algorithm=nft", ["config.sampler.shared_noise=True", "the same picture", "shared_noise=false"]),
    ("algorithm={'nft': {'levels': 11}}", ["config.algorithm.nft.levels=11", "10 levels"]),
    ("steps=ten", ["config.steps='ten'", "an integer"]),
    ("steps=1.5", ["config.steps='1.5'", "an integer"]),
    ("steps=0", ["config.steps=0", ">= 1"]),
    ("seed=-1", ["config.seed=-1", ">= 0"]),
    ("optim.learning_rate=fast", ["config.optim.learning_rate='fast'", "a number"]),
    ("optim.learning_rate=0", ["config.optim.learning_rate=0.0", "> 0"]),
    ("optim.learning_rate=nan", ["config.optim.learning_rate=nan", "finite"]),
    ("optim.b2=1", ["config.optim.b2=1.0", "[0, 1)"]),
    ("model.remat=maybe", ["config.model.remat='maybe'", "must be one of"]),
    ("model.pipeline=fluxx", ["config.model.pipeline='fluxx'", "FluxPipeline, StableDiffusionPipeline"]),
    ("model.dtype=float16", ["config.model.dtype='float16'", "'float32', 'bfloat16'"]),
    ("model.folder=", ["config.model.folder=''", "not empty"]),
    ("model.height=-8", ["config.model.height=-8", ">= 0"]),
    ("model.decode_tile=100", ["config.model.decode_tile=100", "multiple of 8"]),
    ("model.lora.targets=(", ["config.model.lora.targets='('", "regular expression"]),
    ("model.lora.targets=[1]", ["config.model.lora.targets=(1,)", "a tuple of strings"]),
    ("sampler.kernel=dpm", ["config.sampler.kernel='dpm'", "'dance', 'flow', 'cps', 'ddim', 'sde'"]),
    ("sampler.eta=0", ["config.sampler.eta=0.0", "> 0"]),
    ("sampler.eta=1.5", ["config.sampler.eta=1.5", "(0, 1]", "'ddim'"]),
    ("sampler.steps=1", ["config.sampler.steps=1", "[2, 1000]"]),
    ("algorithm.grpo.window=11", ["config.algorithm.grpo.window=11", "0..10"]),
    ("data.group_size=1", ["config.data.group_size=1", ">= 2"]),
    ("data.chunks=3", ["config.data.chunks=3", "prompts_per_step=4", "near are 1, 2, 4"]),
    ("algorithm.grpo.timestep_fraction=0", ["config.algorithm.grpo.timestep_fraction=0:", "(0, 1]"]),
    ("algorithm.grpo.best_of=3", ["config.algorithm.grpo.best_of=3", "multiple of 2"]),
    ("algorithm.grpo.best_of=10", ["config.algorithm.grpo.best_of=10", "group_size=8"]),
    ("optim.updates_per_rollout=5", ["config.optim.updates_per_rollout=5", "32 trained samples", "near are 1, 2, 4, 8"]),
    ("optim.microbatch=7", ["config.optim.microbatch=7", "192", "32 samples x 6 timesteps", "are 3, 4, 6, 8, 12, 16"]),
    ("algorithm.grpo.combine=sum", ["config.algorithm.grpo.combine='sum'", "'advantages'"]),
    ("rewards={}", ["config.rewards={}", "not empty"]),
    ("rewards=verifier", ["config.rewards='verifier'", "a dict"]),
    ("rewards={'verifier': 1}", ["config.rewards.verifier=1", "a dict"]),
    ("rewards.verifier.weight=heavy", ["config.rewards.verifier.weight='heavy'", "finite number"]),
    ("rewards.verifier.weight=0", ["config.rewards=", "differ from 0"]),
    ("rewards={'a.b': {}}", ["config.rewards=", "dots"]),
    ("mesh.data=0", ["config.mesh.data=0", "-1"]),
    ("mesh.fsdp=-1", ["config.mesh.fsdp=-1", "only one axis"]),
    ("evals={'eval': {'rows': 'a.txt', 'num_prompts': 3}}", ["config.evals.eval.num_prompts", "known: rows, count, batch"]),
    ("evals={'eval': {'count': 3}}", ["config.evals.eval.rows=''"]),
    ("evals={'eval': {'rows': 'a.txt', 'rewards': {'jpeg': 1}}}", ["config.evals.eval.rewards.jpeg=1", "a dict"]),
    ("evals={'eval': {'rows': 'a.txt', 'type': 'heldoud'}}", ["config.evals.eval.type='heldoud'", "'heldout'"]),
    ("evals={'train': {'rows': 'a.txt'}}", ["config.evals.train", "choose another name"]),
    ("evals={'eval': 3}", ["config.evals.eval=3", "a dict of options"]),
    ("checkpoint.every=0", ["config.checkpoint.every=0", ">= 1"]),
]


@pytest.mark.parametrize(("override", "words"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_override_is_one_clear_line(write, override, words):
    with pytest.raises(c.ConfigError) as caught:
        load(write(), override)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(("line", "words"), [
    ("config.optim.micro_batch = 4", ["run.py:12", "config.optim.micro_batch", "config.optim.microbatch?"]),
    ("config.optimm.microbatch = 4", ["run.py:12", "config.optimm", "config.optim?"]),
    ("config.optim.microbatch = 'four'", ["run.py:12", "microbatch", "int"]),
    ("config.algorithm.grpo.clip_rnge = 1e-4", ["config.algorithm.grpo.clip_rnge", "'clip_range'?"]),
    ("config.optim.microbatch = None", ["config.optim.microbatch=None", "an integer"]),
    ("config.steps = True", ["config.steps=True", "an integer"]),
    ("config.optim = dict(microbatch=8)", ["config.optim.learning_rate: missing"]),
    ("config = {}", ["get_config()", "default()"]),
    ("1 / 0", ["run.py:12", "ZeroDivisionError"]),
    ("config.steps = (", ["SyntaxError", "run.py"]),
])
def test_wrong_config_file(write, line, words):
    with pytest.raises(c.ConfigError) as caught:
        load(write(line))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_wrong_arguments(write, tmp_path):
    write()
    empty = tmp_path / "empty.py"
    empty.write_text("")
    for arguments, word in [([], "--config=path.py is missing"), ([f"--config={tmp_path}/runn.py"], "run.py?"),
                            (["--steps=3"], "unknown argument"), (["--config"], "a value is missing"),
                            ([f"--config={empty}"], "get_config()")]:
        with pytest.raises(c.ConfigError, match="^[^\n]*$") as caught:
            c.load(arguments)
        assert word in str(caught.value)


def test_devices(write):
    path = write()
    c.validate(load(path), devices=8)
    c.validate(load(path, "mesh.data=2", "mesh.fsdp=-1", "mesh.tensor=2"), devices=8)
    for overrides, word in [(["mesh.fsdp=3"], "8 devices"), (["mesh.data=4"], "8 devices"),
                            (["optim.microbatch=4"], "multiple of the 8 devices"),
                            (["data.prompts_per_step=1", "data.group_size=12", "optim.microbatch=24"], "over 8 dev")]:
        with pytest.raises(c.ConfigError, match=word):
            c.validate(load(path, *overrides), devices=8)


def python(code: str) -> str:
    """What it prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(c.__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_every_key_and_option():
    out = python("from dancegrpo_jax.config import load\nload(['/bin/dancegrpo-train', '--help'])")
    assert out.startswith("usage: dancegrpo-train --config=")
    for name, key in c.KEYS.items():
        assert f"--config.{name}=" in out and key.help in out
    for section, table in (("algorithm", registry.ALGORITHMS), ("evals", registry.EVALUATORS)):
        for name in table:
            for each in options_of(registry.resolve(table, name, section)):
                place = f"algorithm.{name}" if section == "algorithm" else "evals.NAME"
                assert f"--config.{place}.{each.name}=" in out and each.help in out


def test_a_config_is_read_without_jax(write):
    """Errors in the file and on the command line come at once; only the options of algorithms need it."""
    python("import sys\nfrom dancegrpo_jax.config import ConfigError, load\n"
           f"load(['train.py', '--config={write()}', '--config.algorithm=nft'])\n"
           f"try: load(['train.py', '--config={write()}', '--config.stepz=3'])\nexcept ConfigError: print('caught')\n"
           "assert 'jax' not in sys.modules")


def test_programs_are_named_as_they_were_called():
    assert c.program("launch/train.py") == "python launch/train.py"
    assert c.program("/usr/bin/dancegrpo-train") == "dancegrpo-train"


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert c.load_file("configs/shapes_flow.py").run_dir == "runs/shapes_flow"
    with pytest.raises(c.ConfigError, match="did you mean configs/shapes_flow.py?"):
        c.load_file("configs/shape_flow.py")
    (tmp_path / "configs").mkdir()
    Path(config := tmp_path / "configs" / "shapes_flow.py").write_text(GOOD + "    return config\n")
    assert c.load_file("configs/shapes_flow.py").model.folder == "base", config  # one's own comes first


def test_own_files_are_importable_in_every_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert c.exit_status(lambda: None) == 0 and sys.path[-1] == str(tmp_path)
    assert c.exit_status(lambda: None) == 0 and sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(("overrides", "words"), [
    (["sampler.kernel=dance"], ["config.sampler.kernel='dance'", "StableDiffusion takes ddim or sde"]),
    (["model.height=100"], ["config.model.height=100", "multiple of 8", "96 and 104"]),
    (["model.pipeline=nowhere:Mine"], ["config.model.pipeline='nowhere:Mine'", "cannot be imported"]),
    (["model.parts={'vaee': 'x'}"], ["vaee"]),
])
def test_settings_that_do_not_suit_the_pipeline(write, overrides, words):
    from dancegrpo_jax.session import configured_pipeline
    config = load(write(), "model.folder=dancegrpo_jax/worlds/weights/diffusion", *overrides)
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        configured_pipeline(config)
    for word in words:
        assert word in str(caught.value)


PODS = [(f"pods/{path.stem}", int(path.stem.rpartition("_")[2]))
        for path in sorted((Path(__file__).parents[1] / "configs/pods").glob("*.py"))]


@pytest.mark.parametrize(("name", "devices"), [("shapes_flow", 1), ("shapes_diffusion", 1), ("sd_hps", 8), ("flux_hps", 16),
                                               ("flux_hps_lora", 8), ("flux_hps_clip", 16), *PODS])
def test_shipped_configs_fit_the_devices_they_name(name, devices):
    config = c.load([f"--config={Path(__file__).parents[1]}/configs/{name}.py"])
    c.validate(config, devices)
    pairs = config.data.prompts_per_step // config.data.chunks * config.data.group_size
    if config.model.dtype == "bfloat16":  # rollout and update of equal batches round alike
        assert pairs == config.optim.microbatch
