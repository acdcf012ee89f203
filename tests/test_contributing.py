"""The recipes of CONTRIBUTING.md, done as they are written; and a pipeline of two denoisers and a video codec that trains."""

import ast
import importlib
import inspect
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dancegrpo_jax
from dancegrpo_jax import config as c
from dancegrpo_jax import registry, sde
from dancegrpo_jax.data import rows_of
from dancegrpo_jax.media import from_images
from dancegrpo_jax.metrics import read_metrics
from dancegrpo_jax.models.files.convert import save_model
from dancegrpo_jax.models.layers import Conv, Linear, merge
from dancegrpo_jax.pipelines import base
from dancegrpo_jax.pipelines.base import Defaults, Part, Pipeline
from dancegrpo_jax.registry import FLOW_KERNELS
from dancegrpo_jax.rewards import RewardSet
from dancegrpo_jax.sde import flow_schedule
from dancegrpo_jax.session import configured_pipeline, open_run
from dancegrpo_jax.sharding import row_parallel
from dancegrpo_jax.trainer import train
from tests.pipelines import random_params

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# {first line without its "# ": the rest} of every Python block: files, and lines for the registry's tables.
BLOCKS = dict(re.findall(r"```python\n# (.*?)\n(.*?)```", PAGE, re.DOTALL))
TESTS = [name for name in BLOCKS if name.startswith("tests/")]
LINES = [name for name in BLOCKS if "registry.py: " in name]


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """The files of CONTRIBUTING.md as if they were part of the package; the registry knows nothing of them yet."""
    for name in BLOCKS.keys() - LINES:
        assert not (ROOT / name).exists(), f"{name} is there already: CONTRIBUTING.md needs another example"
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(BLOCKS[name], encoding="utf-8")
    for folder in ("", *(path.name for path in (tmp_path / "dancegrpo_jax").iterdir() if path.is_dir())):
        package = importlib.import_module(f"dancegrpo_jax.{folder}".rstrip("."))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "dancegrpo_jax" / folder)])
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield
    for name in sys.modules.keys() - before:
        if name.startswith("dancegrpo_jax.") and str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def register(monkeypatch):
    for name in LINES:
        table = getattr(registry, name.rpartition(" ")[2])
        for key, path in ast.literal_eval("{" + BLOCKS[name] + "}").items():
            assert key not in table, f"{key} is there already: CONTRIBUTING.md needs another example"
            monkeypatch.setitem(table, key, path)


def test_every_recipe_is_a_file_a_test_and_a_line():
    assert len(TESTS) == len(LINES) == len(BLOCKS) / 3 == 5
    assert all(hasattr(registry, name.rpartition(" ")[2]) for name in LINES)
    assert re.findall(r"^python -m pytest -q (tests/\S+)$", PAGE, re.MULTILINE) == TESTS


@pytest.mark.parametrize("name", TESTS)
def test_the_test_of_a_recipe_passes(name, recipes, monkeypatch, tmp_path):
    register(monkeypatch)
    namespace: dict = {"__name__": "recipe"}
    exec(compile(BLOCKS[name], name, "exec"), namespace)
    tests = [value for key, value in namespace.items() if key.startswith("test_")]
    assert tests
    for test in tests:
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        for given in ([{mark.args[0]: value} for mark in marks for value in mark.args[1]] or [{}]):
            wanted = {"tmp_path": tmp_path / "pipeline"} if "tmp_path" in inspect.signature(test).parameters else {}
            for folder in wanted.values():
                folder.mkdir()
            test(**wanted, **given)


# ------------------------------------------------------------------------------------------------ by import path, unregistered
def valid(**settings):
    config = c.default()
    config.model.folder, config.data.train = "somewhere", "some.txt"
    config.rewards = {"color": {}}
    for name, value in settings.items():
        c.override(config, name.replace("__", "."), value if isinstance(value, str) else json.dumps(value))
    c.validate(config, 1)
    return config


def test_a_reward_by_import_path(recipes):
    images = np.full((2, 3, 4, 4, 3), 51, np.uint8)
    own = {"bright": {"reward": "dancegrpo_jax.rewards.brightness:brightness", "target": 0.2}}
    values, ok = RewardSet(own)(from_images(images), rows_of(["a", "b"]))["bright"]
    np.testing.assert_allclose(values, 1, rtol=1e-6)
    assert ok.all()
    with pytest.raises(ValueError, match="'taget'; nearest: 'target'"):
        RewardSet({"bright": own["bright"] | {"taget": 1}})


def test_an_algorithm_by_import_path(recipes):
    path = "dancegrpo_jax.algorithms.imitation:Imitation"
    own = {"type": path, "temperature": 0.5}
    algorithm = c.algorithm_of(valid(algorithm={"mine": own}, sampler__shared_noise=False))
    assert (type(algorithm).__name__, algorithm.temperature, algorithm.levels) == ("Imitation", 0.5, 2)
    with pytest.raises(c.ConfigError, match=r"algorithm\.mine\.temperature=-1.*> 0"):
        valid(algorithm={"mine": {"type": path, "temperature": -1}})
    with pytest.raises(c.ConfigError, match=r"algorithm\.mine\.level: .*'levels'"):
        valid(algorithm={"mine": {"type": path, "level": 1}})
    with pytest.raises(c.ConfigError, match="shared_noise"):
        valid(algorithm={"mine": own})
    with pytest.raises(c.ConfigError, match="imitations"):
        valid(algorithm={"mine": {"type": "dancegrpo_jax.algorithms.imitations:Imitation"}})


def test_a_kernel_by_import_path(recipes, monkeypatch):
    x = np.ones((2, 3), np.float32)
    mean, std = sde.transition("dancegrpo_jax.fading:fading", "velocity", 0.5, 0 * x, x, 0.6, 0.5, np.array([True, False]))
    np.testing.assert_allclose(std[:, 0], [0.5 * math.sqrt(0.6 * 0.1), 0], rtol=1e-6)
    np.testing.assert_allclose(mean[:, 0], [1 - 0.5 * 0.25 * 0.1, 1], rtol=1e-6)
    config = valid(sampler__kernel="dancegrpo_jax.fading:fading", model__folder=str(ROOT / "dancegrpo_jax/worlds/weights/flow"))
    configured_pipeline(config)
    config.sampler.kernel = "dancegrpo_jax.fading:faded"
    with pytest.raises(c.ConfigError, match="faded"):
        configured_pipeline(config)
    with pytest.raises(c.ConfigError, match="import path"):
        valid(sampler__kernel="fade")


def test_an_evaluator_by_import_path(recipes):
    options = {"type": "dancegrpo_jax.evaluators.share:Share", "rows": "held.txt", "threshold": 0.25}
    (evaluator,) = c.evaluators_of(valid(evals={"good": options})).values()
    assert (type(evaluator).__name__, evaluator.threshold, evaluator.rows) == ("Share", 0.25, "held.txt")


# ------------------------------------------------------------------------------------------------ a pipeline of another shape
class Denoiser(nnx.Module):  # 3-D convolutions, modulated by time and text
    SHARDING = row_parallel("out")

    @dataclass(frozen=True)
    class Config:
        channels: int = 4
        hidden: int = 8

    def __init__(self, config, *, rngs):
        self.config, half = config, ((1, 1),) * 3
        self.embed = Linear(18, config.hidden, rngs=rngs)
        self.inner = Conv(config.channels, config.hidden, (3, 3, 3), padding=half, rngs=rngs)
        self.out = Conv(config.hidden, config.channels, (3, 3, 3), padding=half, rngs=rngs)

    def __call__(self, x, time, text):
        given = self.embed(jnp.concatenate([text, jnp.stack([jnp.sin(time / 300), jnp.cos(time / 300)], 1)], 1))
        return self.out(jax.nn.silu(self.inner(x) + given[:, None, None, None]))


class VideoCodec(nnx.Module):  # 2 frames and 4 x 4 pixels to a position
    SHARDING = ()
    Config = Denoiser.Config

    def __init__(self, config, *, rngs):
        self.config, self.out = config, Conv(config.channels, 2 * 4 * 4 * 3, (1, 1, 1), rngs=rngs)

    def denormalize_latents(self, latents):
        return latents

    def decode(self, latents, tile):
        b, f, h, w, _ = latents.shape
        pixels = self.out(latents).reshape(b, f, h, w, 2, 4, 4, 3).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return pixels.reshape(b, 2 * f, 4 * h, 4 * w, 3)


class Video(Pipeline):
    """Clips of four frames; one denoiser for the noisy half of the levels, another for the rest. Text is its first 16 bytes."""

    prediction, kernels, defaults, fps = "velocity", FLOW_KERNELS, Defaults(steps=4, height=16, width=16), 8.0

    def declare(self):
        return {"high": Part(Denoiser, "denoiser"), "low": Part(Denoiser, "denoiser"), "vae": Part(VideoCodec, "codec")}

    def geometry(self):
        return (2, self.height // 4, self.width // 4, self.configs["vae"].channels), 4

    def tokenize(self, prompts):
        return {"bytes": np.array([list(prompt.encode()[:16].ljust(16)) for prompt in prompts], np.int32)}

    def encode_text(self, frozen, tokens):
        return tokens["bytes"].astype(self.dtype) / 128

    def denoise(self, params, x, time, cond):
        high, low = (merge(self.graphs[name], params[name])(x, time, cond) for name in ("high", "low"))
        return jnp.where((time > 500).reshape(-1, 1, 1, 1, 1), high, low)

    def schedule(self, steps, shift):
        return flow_schedule(steps, shift or 1.0)


def test_the_pipeline_is_short():
    assert sum(len(inspect.getsource(kind).splitlines()) for kind in (Denoiser, VideoCodec, Video)) <= 60


def motion(videos, prompts):
    """The mean change from frame to frame of clips uint8 [B, F, H, W, 3]."""
    assert videos.ndim == 5 and videos.shape[1] == 4 and videos.dtype == np.uint8
    return np.abs(np.diff(videos.astype(np.float32), axis=1)).mean((1, 2, 3, 4)) / 255


def as_bright_as_wanted(images, prompts, metadata):
    """Of frames uint8 [B, H, W, 3]; the row's field `wanted` says how bright."""
    assert images.ndim == 4 and len(metadata) == len(images) == len(prompts)
    return [-abs(image.mean() / 255 - fields["wanted"]["mean"]) for image, fields in zip(images, metadata, strict=True)]


def the_field(images, prompts, metadata):
    return [fields["wanted"]["mean"] for fields in metadata]


def test_a_pipeline_of_two_denoisers_and_a_video_codec_trains(tmp_path):
    for seed, (name, kind) in enumerate({"high": Denoiser, "low": Denoiser, "vae": VideoCodec}.items()):
        save_model(tmp_path / "model" / name, kind, kind.Config(), random_params(kind, kind.Config(), seed), dtype=jnp.float32)
    rows = [{"prompt": f"scene {i}", "wanted": {"mean": i / 4}} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    module = "tests.test_contributing"
    config = c.default()
    config.run_dir, config.steps, config.checkpoint.every = str(tmp_path / "run"), 2, 1
    config.model.folder, config.model.pipeline = str(tmp_path / "model"), f"{module}:Video"
    config.sampler.kernel, config.sampler.eta, config.sampler.steps, config.sampler.eval_steps = "dance", 0.5, 4, 3
    config.data.train, config.data.prompts_per_step, config.data.group_size = str(tmp_path / "rows.jsonl"), 4, 4
    config.data.chunks = 2
    config.rewards = {"motion": {"reward": f"{module}:motion"}, "bright": {"reward": f"{module}:as_bright_as_wanted"},
                      "red": {"reward": "color", "frames": 2}, "field": {"reward": f"{module}:the_field", "weight": 0}}
    config.algorithm = {"grpo": {"timestep_fraction": 1.0}}
    config.optim.microbatch, config.optim.updates_per_rollout, config.optim.learning_rate = 8, 2, 1e-3
    config.evals = {"eval": {"rows": config.data.train, "count": 3, "batch": 2}}
    config.log.images_every, config.log.prompts_in_grid = 1, 2
    assert not train(config)["stopped"]

    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in record]
    assert len(records) == 2
    for record in records:
        assert record["train/ratio_first/min"] == pytest.approx(1, abs=1e-5)
        assert record["train/ratio_first/max"] == pytest.approx(1, abs=1e-5)
        assert record["train/grad_norm"] > 0
        assert all(record[f"train/reward/{name}/valid_ratio"] == 1 for name in ("motion", "bright", "red", "field"))
        assert record["train/reward/field/mean"] == pytest.approx(np.mean([row["wanted"]["mean"] for row in rows]))
        assert record["train/reward/motion/std"] > 0 > record["train/reward/bright/mean"]
        assert record["train/compiles/rollout"] == records[0]["train/compiles/rollout"]
    assert records[0]["train/compiles/update"] == records[1]["train/compiles/update"]
    assert (tmp_path / "run" / "before.png").exists() and (tmp_path / "run" / "after.png").exists()
    _, pipeline, trained, _, step = open_run(config.run_dir)
    assert step == 2 and set(trained) == {"high", "low"}
    first = pipeline.load()[0]
    for name in first:  # both have learned
        assert max(np.abs(trained[name][key] - first[name][key]).max() for key in first[name]) > 0


def test_the_base_class_names_no_component():
    source = inspect.getsource(base)
    imported = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if re.match(r"transformers|dancegrpo_jax\.models\.(denoisers|codecs|encoders)", name)]
    models = Path(dancegrpo_jax.__file__).parent / "models"
    classes = {node.name for folder in ("denoisers", "codecs", "encoders") for file in (models / folder).glob("*.py")
               for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)} - {"Config"}
    assert "AutoencoderKL" in classes
    assert not [name for name in classes if re.search(rf"\b{name}\b", source)]
