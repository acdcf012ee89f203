"""Config: defaults, overrides, and one-line errors that say what is wrong and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dancegrpo_jax import config as c

GOOD = """
from dancegrpo_jax.config import default

def get_config():
    config = default()
    config.model.folder = "base"
    config.data.train = config.data.heldout = "prompts.txt"
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
        assert key.rule.holds(key.default) or name in ("model.folder", "data.train", "data.heldout", "rewards"), name


def test_choices_are_those_of_the_algorithm():
    from dancegrpo_jax import grpo, sde
    from dancegrpo_jax.models import layers
    assert (c.FLOW_KERNELS, c.DIFFUSION_KERNELS, c.COMBINE, c.TIME_ROUNDING, c.REMAT) == (
        sde.FLOW_KERNELS, sde.DIFFUSION_KERNELS, grpo.COMBINE, sde.TIME_ROUNDING, tuple(layers.REMAT))


def test_overrides(write):
    config = load(write(), "optim.learning_rate=3e-4", "steps=7", "model.remat=none", "sampler.eta=1",
                  "model.lora.targets=.*to_q,.*to_k", "run_dir=runs/a=b", "grpo.microbatch=6", "steps=9",
                  'rewards={"clip": {"weight": 2, "batch": 4}}', "rewards.clip.weight=0.5", "eval.rewards={'jpeg': {}}")
    assert (config.optim.learning_rate, config.steps, config.model.remat) == (3e-4, 9, "none")
    assert config.model.lora.targets == (".*to_q", ".*to_k") and config.run_dir == "runs/a=b"
    assert isinstance(config.sampler.eta, float)
    assert config.rewards.to_dict() == {"clip": {"weight": 0.5, "batch": 4}}  # replaces the file's, then one option
    assert config.eval.rewards.to_dict() == {"jpeg": {}}
    assert config.is_locked
    assert c.load(["--config", write(), "--config.seed", "5"]).seed == 5


def test_trained_steps(write):
    assert c.trained_steps(load(write())) == 6
    assert c.trained_steps(load(write(), "sampler.window=4")) == 2
    assert c.trained_steps(load(write(), "grpo.timestep_fraction=0.01")) == 1


WRONG = [  # (override, words the message must have)
    ("grpo.microbatc=2", ["config.grpo.microbatc", "config.grpo.microbatch?"]),
    ("learning_rate=2", ["config.learning_rate", "config.optim.learning_rate?"]),
    ("sampler.windows=2", ["did you mean config.sampler.window?"]),
    ("grpo=2", ["config.grpo", "section"]),
    ("steps=ten", ["config.steps='ten'", "an integer"]),
    ("steps=1.5", ["config.steps='1.5'", "an integer"]),
    ("steps=0", ["config.steps=0", ">= 1"]),
    ("seed=-1", ["config.seed=-1", ">= 0"]),
    ("optim.learning_rate=fast", ["config.optim.learning_rate='fast'", "a number"]),
    ("optim.learning_rate=0", ["config.optim.learning_rate=0.0", "> 0"]),
    ("optim.learning_rate=nan", ["config.optim.learning_rate=nan", "finite"]),
    ("optim.b2=1", ["config.optim.b2=1.0", "[0, 1)"]),
    ("model.remat=maybe", ["config.model.remat='maybe'", "must be one of"]),
    ("model.policy=fluxx", ["config.model.policy='fluxx'", "flux, stable_diffusion"]),
    ("model.dtype=float16", ["config.model.dtype='float16'", "'float32', 'bfloat16'"]),
    ("model.folder=", ["config.model.folder=''", "not empty"]),
    ("model.height=100", ["config.model.height=100", "multiple of 8"]),
    ("model.lora.targets=(", ["config.model.lora.targets='('", "regular expression"]),
    ("model.lora.targets=[1]", ["config.model.lora.targets=(1,)", "a tuple of strings"]),
    ("sampler.kernel=dpm", ["config.sampler.kernel='dpm'", "'dance', 'flow', 'cps', 'ddim', 'sde'"]),
    ("sampler.kernel=dance", ["config.sampler.kernel='dance'", "'stable_diffusion' takes ddim or sde"]),
    ("sampler.eta=0", ["config.sampler.eta=0.0", "> 0"]),
    ("sampler.eta=1.5", ["config.sampler.eta=1.5", "(0, 1]", "'ddim'"]),
    ("sampler.steps=1", ["config.sampler.steps=1", "[2, 1000]"]),
    ("sampler.window=11", ["config.sampler.window=11", "0..10"]),
    ("data.group_size=1", ["config.data.group_size=1", ">= 2"]),
    ("data.chunks=3", ["config.data.chunks=3", "prompts_per_step=4", "near are 1, 2, 4"]),
    ("grpo.timestep_fraction=0", ["config.grpo.timestep_fraction=0.0", "(0, 1]"]),
    ("grpo.best_of=3", ["config.grpo.best_of=3", "multiple of 2"]),
    ("grpo.best_of=10", ["config.grpo.best_of=10", "group_size=8"]),
    ("grpo.updates_per_rollout=5", ["config.grpo.updates_per_rollout=5", "32 trained samples", "near are 1, 2, 4, 8"]),
    ("grpo.microbatch=7", ["config.grpo.microbatch=7", "192", "32 samples x 6 timesteps", "are 3, 4, 6, 8, 12, 16"]),
    ("combine=sum", ["config.combine='sum'", "'advantages'"]),
    ("rewards={}", ["config.rewards={}", "not empty"]),
    ("rewards=verifier", ["config.rewards='verifier'", "a dict"]),
    ("rewards={'verifier': 1}", ["config.rewards=", "a dict"]),
    ("rewards.verifier.weight=heavy", ["config.rewards.verifier.weight='heavy'", "finite number"]),
    ("rewards.verifier.weight=0", ["config.rewards=", "differ from 0"]),
    ("rewards={'a.b': {}}", ["config.rewards=", "dots"]),
    ("mesh.data=0", ["config.mesh.data=0", "-1"]),
    ("mesh.fsdp=-1", ["config.mesh.fsdp=-1", "only one axis"]),
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
    ("config.grpo.micro_batch = 4", ["run.py:12", "config.grpo.micro_batch", "config.grpo.microbatch?"]),
    ("config.grpoo.microbatch = 4", ["run.py:12", "config.grpoo", "config.grpo?"]),
    ("config.grpo.microbatch = 'four'", ["run.py:12", "microbatch", "int"]),
    ("config.grpo.microbatch = None", ["config.grpo.microbatch=None", "an integer"]),
    ("config.steps = True", ["config.steps=True", "an integer"]),
    ("config.grpo = dict(microbatch=8)", ["config.grpo.clip_range: missing"]),
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
                            (["grpo.microbatch=4"], "multiple of the 8 devices"),
                            (["data.prompts_per_step=1", "data.group_size=12", "grpo.microbatch=24"], "over 8 dev")]:
        with pytest.raises(c.ConfigError, match=word):
            c.validate(load(path, *overrides), devices=8)


def test_help_lists_every_key_without_jax(write):
    root = Path(c.__file__).parents[1]
    code = ("import sys\nfrom dancegrpo_jax.config import load\n"
            "try: load(['train.py', '--help'])\nfinally: assert 'jax' not in sys.modules")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(root)})
    assert out.returncode == 0, out.stderr
    for name, key in c.KEYS.items():
        assert f"--config.{name}=" in out.stdout and key.help in out.stdout


PODS = [(f"pods/{path.stem}", int(path.stem.rpartition("_")[2]))
        for path in sorted((Path(__file__).parents[1] / "configs/pods").glob("*.py"))]


@pytest.mark.parametrize(("name", "devices"), [("shapes_flow", 1), ("shapes_diffusion", 1), ("sd_hps", 8), ("flux_hps", 16),
                                               ("flux_hps_lora", 8), ("flux_hps_clip", 16), *PODS])
def test_shipped_configs_fit_the_devices_they_name(name, devices):
    config = c.load([f"--config={Path(__file__).parents[1]}/configs/{name}.py"])
    c.validate(config, devices)
    pairs = config.data.prompts_per_step // config.data.chunks * config.data.group_size
    if config.model.dtype == "bfloat16":  # rollout and update of equal batches round alike
        assert pairs == config.grpo.microbatch
