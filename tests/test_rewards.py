"""The reward contract: shapes, masks, failures, threads, configs; and what each built-in reward measures."""

import json
import logging
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax import registry, sharding
from dancegrpo_jax.data import Row, read_rows, rows_of
from dancegrpo_jax.media import Media, from_images
from dancegrpo_jax.models.encoders.clip import IMAGE_MEAN, IMAGE_STD, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from dancegrpo_jax.models.files.convert import save_model
from dancegrpo_jax.rewards import DeviceReward, HostReward, RewardSet, build
from dancegrpo_jax.rewards.batch import BusyClock
from dancegrpo_jax.rewards.clip import preprocess
from dancegrpo_jax.rewards.set import resolve
from dancegrpo_jax.worlds import shapes
from dancegrpo_jax.worlds.tokenizer import MAX_LENGTH, write_tokenizer
from tests.pipelines import random_params

P, G = 3, 4
PROMPTS = ["a", "bb", "ccc"]
LEVELS = (np.arange(P * G, dtype=np.float32) * 20).reshape(P, G)  # the grey level of each image, 0 to 220
IMAGES = np.broadcast_to(LEVELS[..., None, None, None] / 255, (P, G, 8, 6, 3))
MEDIA, ROWS = from_images(IMAGES), rows_of(PROMPTS)


# ------------------------------------------------------------------------------- user rewards, found by import path


def level(images, prompts, factor=1.0):
    """Grey level plus 1000 for each letter of the prompt: says which image met which prompt."""
    assert images.dtype == np.uint8 and images.shape[1:] == (8, 6, 3) and len(images) == len(prompts)
    return [factor * image[0, 0, 0] + 1000 * len(prompt) for image, prompt in zip(images, prompts)]


def tagged(images, prompts, metadata=None):
    return [entry["tag"] for entry in metadata]


def fails_for_bb(images, prompts):
    if prompts[0] == "bb":
        raise ConnectionError("judge is away")
    return images[:, 0, 0, 0]


def bad_numbers(images, prompts):
    return [np.nan if image[0, 0, 0] == 20 else np.inf if image[0, 0, 0] == 100 else 7 for image in images]


def too_few(images, prompts):
    return [1.0]


def two_components(images, prompts):
    count = [float("nan") if len(prompt) == 3 else 2.0 * (len(prompt) - 1) for prompt in prompts]
    return {"level": images[:, 0, 0, 0], "count": count}


class TwoComponents(DeviceReward):
    def apply(self, params, images, text):
        return {"half": images.mean((2, 3, 4)) / 2, "unused": images[..., 0, 0, 0]}


class Brightness(DeviceReward):
    def apply(self, params, images, text):
        return images.mean((2, 3, 4))


class Scaled(DeviceReward):
    """Has parameters, and sees each prompt once."""

    def __init__(self, factor: float = 2.0):
        self.params = {"factor": jnp.float32(factor)}

    def prepare(self, rows):
        self.seen = [row.prompt for row in rows]
        return np.array([len(row.prompt) for row in rows], np.float32)

    def apply(self, params, images, text):
        return params["factor"] * images[..., 0, 0, 0] + text[:, None]


class Logarithm(DeviceReward):
    def apply(self, params, images, text):
        return jnp.log(images[..., 0, 0, 0])  # -inf for the black image


def path(name):
    return f"{__name__}:{name}"


def score(config, images=IMAGES, prompts=PROMPTS, metadata=None):
    rewards = RewardSet(config)
    rows = [row._replace(fields=fields) for row, fields in zip(rows_of(prompts), metadata or [{}] * len(prompts))]
    try:
        return rewards, rewards(from_images(images), rows)
    finally:
        rewards.close()


# ------------------------------------------------------------------------------------------------- contract and masks


def test_every_image_meets_its_prompt():
    _, scores = score({path("level"): {"factor": 2.0}, path("Scaled"): {"factor": 3.0}})
    assert list(scores) == [path("level"), path("Scaled")]
    for values, ok in scores.values():
        assert values.shape == ok.shape == (P, G) and values.dtype == np.float32 and ok.dtype == bool and ok.all()
    np.testing.assert_allclose(scores[path("level")][0], 2 * LEVELS + 1000 * np.array([[1], [2], [3]]))
    np.testing.assert_allclose(scores[path("Scaled")][0], 3 * LEVELS / 255 + np.array([[1], [2], [3]]), rtol=1e-6)


def test_a_reward_alone_keeps_the_contract():
    for name in ("jpeg", "color"):
        reward = build(name)
        scores = reward(MEDIA, ROWS)
        assert list(scores) == ["reward"]
        values, ok = scores["reward"]
        assert values.shape == ok.shape == (P, G) and values.dtype == np.float32 and ok.all()


def test_prompts_are_prepared_once_each():
    rewards = RewardSet({"scaled": {"reward": path("Scaled")}})
    rewards(MEDIA, ROWS)
    assert rewards.rewards["scaled"].seen == PROMPTS


def test_metadata_reaches_the_reward():
    _, scores = score({"tag": {"reward": path("tagged")}}, metadata=[{"tag": 5}, {"tag": 6}, {"tag": 7}])
    np.testing.assert_array_equal(scores["tag"][0], np.repeat([[5], [6], [7]], G, 1))


def test_an_exception_masks_its_samples_and_is_logged_once(caplog):
    rewards = RewardSet({"judge": {"reward": path("fails_for_bb")}, "b": {"reward": path("Brightness")}})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            scores = rewards(MEDIA, ROWS)
    values, ok = scores["judge"]
    np.testing.assert_array_equal(ok, [[True] * G, [False] * G, [True] * G])
    np.testing.assert_array_equal(values, LEVELS * ok)
    assert scores["b"][1].all()
    assert dict(rewards.failures) == {"judge": 3 * G}
    assert [record.getMessage() for record in caplog.records if "ConnectionError: judge is away" in record.getMessage()
            ] == [record.getMessage() for record in caplog.records]
    assert len(caplog.records) == 1


def test_non_finite_scores_and_images_are_masked(caplog):
    images = IMAGES.copy()
    images[2, 3, 1, 1, 0] = np.nan
    rewards, scores = score({"host": {"reward": path("bad_numbers")}, "log": {"reward": path("Logarithm")}}, images)
    expected = np.ones((P, G), bool)
    expected[0, 1] = expected[1, 1] = expected[2, 3] = False
    np.testing.assert_array_equal(scores["host"][1], expected)
    np.testing.assert_array_equal(scores["host"][0], 7 * expected)
    assert rewards.failures["host"] == 3
    values, ok = scores["log"]
    np.testing.assert_array_equal(ok, LEVELS > 0)
    assert np.isfinite(values).all() and values[0, 0] == 0


def test_a_wrong_number_of_scores_is_a_failure():
    rewards, scores = score({"few": {"reward": path("too_few")}})
    assert not scores["few"][1].any() and rewards.failures["few"] == P * G


def test_a_call_that_does_not_return_is_masked():
    release = threading.Event()

    class Stuck(HostReward):
        name = "stuck"

        def score(self, images, prompts, metadata):
            if prompts[0] == "ccc":
                release.wait()
            return np.ones(len(images))

    rewards = RewardSet({}, timeout=0.3)
    rewards.add("stuck", Stuck())
    start = time.monotonic()
    try:
        _, ok = rewards(MEDIA, ROWS)["stuck"]
        assert time.monotonic() - start < 20
        np.testing.assert_array_equal(ok, [[True] * G, [True] * G, [False] * G])
    finally:
        release.set()


def test_wrong_shapes_raise():
    rewards = RewardSet({"jpeg": {}})
    with pytest.raises(ValueError, match="3 prompts, but 2 rows"):
        rewards.submit(MEDIA, ROWS[:2])
    with pytest.raises(ValueError, match="3 prompts, but 1 rows"):
        rewards.submit(MEDIA, [ROWS[0]])
    with pytest.raises(ValueError, match=r"\(4, 8, 6, 3\)"):
        rewards.submit(Media(IMAGES[0]), ROWS)
    with pytest.raises(TypeError, match="Media, got ndarray; see media.from_images"):
        rewards.submit(IMAGES, ROWS)


def test_a_device_reward_of_the_wrong_shape_raises():
    class Total(DeviceReward):
        def apply(self, params, images, text):
            return images.sum()

    with pytest.raises(ValueError, match=r"shape \(\), expected \(3, 4\)"):
        Total()(MEDIA, ROWS)


# --------------------------------------------------------------------------------------------------- threads


def test_host_rewards_run_at_the_same_time_and_batches_overlap():
    """Six calls (two batches of three prompts) meet at a barrier: they pass only if all run at once."""
    barrier = threading.Barrier(2 * P)

    class Meeting(HostReward):
        name = "meeting"

        def score(self, images, prompts, metadata):
            barrier.wait(timeout=30)
            return images[:, 0, 0, 0]

    rewards = RewardSet({}, threads=2 * P)
    rewards.add("meeting", Meeting())
    first, second = rewards.submit(MEDIA, ROWS), rewards.submit(from_images(IMAGES[:, ::-1]), ROWS)
    np.testing.assert_array_equal(second.result()["meeting"][0], LEVELS[:, ::-1])  # in any order
    np.testing.assert_array_equal(first.result()["meeting"][0], LEVELS)


def test_busy_seconds_count_parallel_calls_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dancegrpo_jax.rewards.batch.time.monotonic", lambda: now[0])
    clock = BusyClock()
    with clock:
        now[0] = 2.0
        with clock:
            now[0] = 3.0
    now[0] = 10.0
    with clock:
        now[0] = 11.0
    assert clock.take() == 4.0 and clock.take() == 0.0


def test_submit_does_not_wait_for_host_rewards():
    release = threading.Event()

    class Slow(HostReward):
        def score(self, images, prompts, metadata):
            assert release.wait(timeout=15)
            return np.ones(len(images))

    rewards = RewardSet({"b": {"reward": path("Brightness")}})
    rewards.add("slow", Slow())
    handle = rewards.submit(MEDIA, ROWS)  # would fail in `release.wait` if it waited
    release.set()
    assert all(ok.all() for _, ok in handle.result().values())


def test_sharded_images_give_the_same_scores():
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    images = np.tile(IMAGES[:2], (4, 1, 1, 1, 1))
    prompts = ["a", "bb"] * 4
    spread = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
    config = {"level": {"reward": path("level")}, "scaled": {"reward": path("Scaled")}}
    (_, whole), (_, parts) = score(config, images, prompts), score(config, spread, prompts)
    for name in config:
        np.testing.assert_array_equal(whole[name][0], parts[name][0])
        np.testing.assert_array_equal(whole[name][1], parts[name][1])


# --------------------------------------------------------------------------------------------------- configs


def test_weights():
    rewards = RewardSet({"jpeg": {}, "color": {"weight": -2}, "blue": {"reward": "color", "weight": 0}})
    assert rewards.weights == {"jpeg": 1.0, "color": -2.0, "blue": 0.0}
    for bad in ("1", None, True, np.nan):
        with pytest.raises(ValueError, match="'jpeg': weight must be a finite number"):
            RewardSet({"jpeg": {"weight": bad}})


@pytest.mark.parametrize("name", ["Brightness", "level"])
def test_binary(name):
    """On device and host: 1 above the threshold, 0 at it and below; masks stay."""
    config = {"plain": {"reward": path(name)}}
    threshold = float(score(config)[1]["plain"][0][1, 1])
    values, ok = score({"plain": config["plain"] | {"binary": {"threshold": threshold}}})[1]["plain"]
    assert values.dtype == np.float32 and ok.all()
    order = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(values, order)


def test_components_become_rewards():
    rewards = RewardSet({"two": {"reward": path("two_components"), "weight": {"level": 1.0, "count": -0.5}},
                         "device": {"reward": path("TwoComponents"), "weight": {"half": 2}}})
    scores = rewards(MEDIA, ROWS)
    assert rewards.weights == {"two.level": 1.0, "two.count": -0.5, "device.half": 2.0}
    assert list(scores) == ["two.level", "two.count", "device.half"]
    np.testing.assert_array_equal(scores["two.level"][0], LEVELS)
    np.testing.assert_array_equal(scores["two.count"][0], np.repeat([[0.0], [2.0], [0.0]], G, axis=1))
    np.testing.assert_array_equal(scores["two.count"][1], np.repeat([[True], [True], [False]], G, axis=1))
    np.testing.assert_allclose(scores["device.half"][0], LEVELS / 510, rtol=1e-5)


def test_a_component_that_is_missing_masks_and_says_so(caplog):
    rewards = RewardSet({"two": {"reward": path("two_components"), "weight": {"VQ": 1.0}}})
    assert not rewards(MEDIA, ROWS)["two.VQ"][1].any()
    assert "no component VQ; there are level, count" in caplog.text


def test_binary_does_not_reward_failures():
    _, scores = score({"judge": {"reward": path("fails_for_bb"), "binary": {"threshold": -1}}})
    np.testing.assert_array_equal(scores["judge"][0], [[1] * G, [0] * G, [1] * G])


@pytest.mark.parametrize(("config", "message"), [
    ({"jepg": {}}, "unknown reward 'jepg'; nearest: 'jpeg'"),
    ({"no.such.module:f": {}}, "no.such.module:f.*cannot be imported"),
    ({path("absent"): {}}, "absent.*cannot be imported"),
    ({path("P"): {}}, "neither a function nor a Reward class"),
    ({"jpeg": {"qualty": 3}}, "unknown option 'qualty'; nearest: 'quality'"),
    ({"jpeg": {"wieght": 3}}, "unknown option 'wieght'; nearest: 'weight'"),
    ({path("level"): {"images": 3}}, "unknown option 'images'"),
    ({"clip_score": {}}, "option 'model' is missing"),
    ({"jpeg": {"quality": 101}}, "quality is 101"),
    ({"color": {"channel": "pink"}}, "channel is 'pink'"),
    ({"verifier": {"mode": "hard"}}, "mode is 'hard'"),
    ({"jpeg": {"binary": 0.5}}, "binary must be"),
    ({"jpeg": {"binary": {"treshold": 1}}}, "binary must be"),
    ({"jpeg": {"binary": {"threshold": "1"}}}, "binary threshold must be a finite number"),
    ({"jpeg": 1.0}, "expected a dict of options"),
    ({"clip_score": {"model": "/nowhere"}}, "/nowhere"),
])
def test_bad_configs_raise(config, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(config)


def white(images, prompts):
    return images.min((1, 2, 3)) == 255


def test_register(monkeypatch):
    monkeypatch.setitem(registry.REWARDS, "white", path("white"))
    _, scores = score({"white": {}}, np.ones_like(IMAGES))
    np.testing.assert_array_equal(scores["white"][0], np.ones((P, G)))


def test_registered_names():
    """All can be imported, and reading them imports nothing: a config is checked before jax is loaded."""
    assert all(resolve(name) for name in registry.REWARDS)
    program = "import sys, dancegrpo_jax.registry; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_mesh_places_parameters():
    mesh = sharding.make_mesh(fsdp=2, data=4)
    rewards = RewardSet({path("Scaled"): {}, path("Brightness"): {}, "jpeg": {}}, mesh)
    assert [list(params) for params in rewards.params.values()] == [["factor"], []]
    assert rewards.params[path("Scaled")]["factor"].sharding.mesh == mesh


# --------------------------------------------------------------------------------------------- built-in rewards


def test_jpeg():
    """Noise costs more than a ramp, a ramp more than one colour; the sizes are those of real files."""
    rng = np.random.default_rng(0)
    flat = np.full((64, 64, 3), 0.5)
    ramp = np.broadcast_to(np.linspace(0, 1, 64)[:, None, None], (64, 64, 3)) * [1.0, 0.5, 0.2]
    images = np.stack([flat, ramp, rng.random((64, 64, 3))])[None].astype(np.float32)
    _, scores = score({"jpeg": {}, "low": {"reward": "jpeg", "quality": 10}, "incompressibility": {}}, images, ["x"])
    size = -scores["jpeg"][0][0]
    assert 0.5 < size[0] < size[1] < size[2] < 64 * 64 * 3 / 1000 and size[2] > 4
    assert -scores["low"][0][0, 2] < size[2] / 2
    np.testing.assert_array_equal(scores["incompressibility"][0][0], size)


def test_color():
    images = np.zeros((1, 3, 4, 4, 3), np.float32)
    images[0, 0, :2] = [1, 0, 0]      # half red, half black
    images[0, 1] = [0.5, 0.25, 0.75]
    images[0, 2] = [1, 1, 1]
    _, scores = score({"color": {}, "blue": {"reward": "color", "channel": "blue"}}, images, ["x"])
    np.testing.assert_allclose(scores["color"][0], [[0.5, -0.25, 0]], atol=1e-7)
    np.testing.assert_allclose(scores["blue"][0], [[-0.5, 0.25, 0]], atol=1e-7)


def test_verifier():
    images, index = shapes.pretraining_batch(np.random.default_rng(0), 6)
    captions = [shapes.caption(shapes.all_specs()[i]) for i in index]
    grey = np.full_like(images, 40)
    pairs = np.stack([images, grey], 1) / np.float32(255)
    config = {"soft": {"reward": "verifier"}, "strict": {"reward": "verifier", "mode": "strict"}}
    rewards, scores = score(config, pairs, captions)
    assert scores["strict"][0][:, 0].mean() > 0.8 and not scores["strict"][0][:, 1].any()
    assert set(np.unique(scores["strict"][0])) <= {0, 1}
    assert (scores["soft"][0] >= scores["strict"][0]).all() and not rewards.failures
    others = score(config, pairs, captions[1:] + captions[:1])[1]  # partly right, hardly ever entirely
    assert others["strict"][0][:, 0].mean() + 0.05 < others["soft"][0][:, 0].mean() < 0.8
    _, ok = score(config, pairs[:2], [captions[0], "not a caption"])[1]["soft"]
    np.testing.assert_array_equal(ok, [[True, True], [False, False]])


# ------------------------------------------------------------------------------------------------- CLIP score


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    tower = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    config = CLIPConfig(
        CLIPTextConfig(**tower, num_hidden_layers=1, vocab_size=vocabulary, max_position_embeddings=MAX_LENGTH,
                       eos_token_id=vocabulary - 1),
        CLIPVisionConfig(**tower, num_hidden_layers=1, image_size=16, patch_size=8), projection_dim=8)
    save_model(folder, CLIPModel, config, random_params(CLIPModel, config), dtype=jnp.float32)
    return folder


def test_clip_score(clip_folder):
    """Against features taken one by one, through torch's tower of the same folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    prompts = ["a red circle", "two crosses", "a blue square above a green circle"]
    images = np.random.default_rng(0).random((P, 2, 16, 16, 3), dtype=np.float32)
    rewards, scores = score({"clip_score": {"model": clip_folder}}, images, prompts)
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    pixels = (images.reshape(-1, 16, 16, 3) - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    with torch.no_grad():
        ids = tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"]
        out = model(ids, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    cosines = (out.image_embeds @ out.text_embeds.T).numpy().reshape(P, 2, P)
    values, ok = scores["clip_score"]
    assert ok.all()
    np.testing.assert_allclose(values, np.stack([cosines[i, :, i] for i in range(P)]), atol=1e-6)
    low = build("clip_score", {"model": clip_folder, "dtype": "bfloat16"})
    program = str(jax.make_jaxpr(low.apply)(low.params, images, low.prepare(rows_of(prompts)))).splitlines()
    towers = [line for line in program if "= scan[" in line]
    assert len(towers) == 2 and all("bf16" in line for line in towers)
    low = low(from_images(images), rows_of(prompts))["reward"][0]
    assert low.dtype == jnp.float32 and 1e-5 < np.abs(low - values).max() < 0.02


@pytest.mark.parametrize("shape", [(40, 40), (37, 56), (12, 10)], ids=["down", "wide", "up"])
def test_preprocess_is_what_pil_does(shape):
    """Shortest side bicubic, centre crop, normalise; PIL in float mode, channel by channel."""
    from PIL import Image

    size = 16
    image = np.random.default_rng(1).random((*shape, 3), dtype=np.float32)
    height, width = (side * size // min(shape) for side in shape)
    channels = [np.asarray(Image.fromarray(image[..., c]).resize((width, height), Image.BICUBIC)) for c in range(3)]
    top, left = (height - size) // 2, (width - size) // 2
    expected = np.clip(np.stack(channels, -1)[top:top + size, left:left + size], 0, 1)
    ours = jax.jit(preprocess, static_argnums=1)(image[None], size)[0]
    np.testing.assert_allclose(ours, (expected - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD), atol=2e-5)


def test_preprocess_leaves_the_right_size_alone():
    image = np.random.default_rng(1).random((1, 16, 16, 3), dtype=np.float32)
    np.testing.assert_allclose(preprocess(image, 16) * np.array(IMAGE_STD) + np.array(IMAGE_MEAN), image, atol=1e-6)
