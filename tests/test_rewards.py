"""The reward contract: shapes, masks, failures, threads, configs; and what each built-in reward measures."""

import gc
import json
import logging
import subprocess
import sys
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax import registry, sharding
from dancegrpo_jax.data import read_rows, rows_of
from dancegrpo_jax.media import Media, from_images
from dancegrpo_jax.models.encoders.clip import IMAGE_MEAN, IMAGE_STD, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from dancegrpo_jax.models.files.convert import save_model
from dancegrpo_jax.rewards import DeviceReward, HostReward, RewardSet, build
from dancegrpo_jax.rewards.batch import Batch, BusyClock, owners
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
    return [factor * image[0, 0, 0] + 1000 * len(prompt) for image, prompt in zip(images, prompts, strict=True)]


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
    metadata = metadata or [{}] * len(prompts)
    rows = [row._replace(fields=fields) for row, fields in zip(rows_of(prompts), metadata, strict=True)]
    try:
        return rewards, rewards(images if isinstance(images, Media) else from_images(images), rows)
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


# ------------------------------------------------------------------------------------------ rows, clips, slices


def counted(images, prompts, metadata):
    return [fields["count"] + fields.get("more", 0) for fields in metadata]


class Counted(HostReward):
    def score(self, images, prompts, metadata):
        return [10 * fields["count"] for fields in metadata]


class CountedOnDevice(DeviceReward):
    def prepare(self, rows):
        return np.array([row.fields["count"] for row in rows], np.float32)

    def apply(self, params, images, text):
        return images[..., 0, 0, 0] * 0 + 100 * text[:, None]


def test_a_field_of_a_file_reaches_every_kind_of_reward(tmp_path):
    lines = [{"prompt": prompt, "count": i + 1} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(str(tmp_path / "rows.jsonl"))
    scores = RewardSet({"f": {"reward": path("counted")}, "h": {"reward": path("Counted")},
                        "d": {"reward": path("CountedOnDevice")}})(MEDIA, rows)
    for name, factor in (("f", 1), ("h", 10), ("d", 100)):
        np.testing.assert_array_equal(scores[name][0], factor * np.repeat([[1], [2], [3]], G, 1))
        assert np.asarray(scores[name][1]).all()


F = 5
# Frame f of sample [p, g] has the level 40 p + 10 g + f * f: means over frames differ from the value of any mean frame.
CLIP_LEVELS = 40 * np.arange(P)[:, None, None] + 10 * np.arange(G)[:, None] + np.arange(F) ** 2
CLIPS = Media(np.broadcast_to(CLIP_LEVELS[..., None, None, None].astype(np.float32) / 255, (P, G, F, 8, 6, 3)), fps=8)


def squared(images, prompts):
    assert images.shape == (G, 8, 6, 3) and images.dtype == np.uint8
    return images[:, 0, 0, 0].astype(float) ** 2


def last_minus_first(videos, prompts):
    assert videos.dtype == np.uint8 and videos.shape[0] == G and videos.shape[2:] == (8, 6, 3)
    return [100.0 * len(video) + float(video[-1, 0, 0, 0]) - float(video[0, 0, 0, 0]) for video in videos]


class Squared(DeviceReward):
    def prepare(self, rows):
        return {"length": np.array([len(row.prompt) for row in rows], np.float32)}

    def apply(self, params, images, text):
        return (255 * images[..., 0, 0, 0]) ** 2 + 1000 * text["length"][:, None]


class LastMinusFirst(DeviceReward):
    takes = "videos"

    def apply(self, params, videos, text):
        return 100.0 * videos.shape[2] + 255 * (videos[:, :, -1, 0, 0, 0] - videos[:, :, 0, 0, 0, 0])


@pytest.mark.parametrize(("frames", "chosen"), [
    ("first", [0]), (1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), ("all", range(5)), (9, range(5)),
    (None, range(5))])
def test_frames(frames, chosen):
    """Images rewards score the chosen frames and average, videos rewards get them in one array."""
    common = {} if frames is None else {"frames": frames}
    names = ("squared", "Squared", "last_minus_first", "LastMinusFirst")
    _, scores = score({name: {"reward": path(name), **common} for name in names}, CLIPS)
    levels = CLIP_LEVELS[..., list(chosen)]
    mean = (levels.astype(float) ** 2).mean(-1)
    np.testing.assert_allclose(scores["squared"][0], mean, rtol=1e-6)
    np.testing.assert_allclose(scores["Squared"][0], mean + 1000 * np.array([[1], [2], [3]]), rtol=1e-5)
    for name in names[2:]:
        np.testing.assert_allclose(scores[name][0], 100 * len(chosen) + levels[..., -1] - levels[..., 0], rtol=1e-5)
    assert all(np.asarray(ok).all() for _, ok in scores.values())


def test_only_frames_that_are_looked_at_reach_the_host():
    seen = []

    def call(name, function, *args, **kwargs):
        seen.append(function(*args, **kwargs))
        return seen[-1]

    config = {"a": {"reward": path("squared"), "frames": 2}, "b": {"reward": path("squared"), "frames": "first"}}
    RewardSet(config)(CLIPS, ROWS, call)
    assert [array.shape for array in seen[0]] == [(P, G, 2, 8, 6, 3), (P, G)]


def test_a_frame_that_fails_masks_its_clip_only():
    pixels = CLIPS.pixels.copy()
    pixels[1, 2, 3, 0, 0, 0] = np.nan
    _, scores = score({path("squared"): {}, path("Squared"): {}}, Media(pixels))
    expected = np.ones((P, G), bool)
    expected[1, 2] = False
    for values, ok in scores.values():
        np.testing.assert_array_equal(ok, expected)
        assert np.asarray(values)[1, 2] == 0


def test_a_picture_is_a_video_of_one_frame():
    _, scores = score({path("last_minus_first"): {"frames": 3}})
    np.testing.assert_array_equal(scores[path("last_minus_first")][0], np.full((P, G), 100))


@pytest.mark.parametrize("devices", [0, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_slices_equal_all_at_once(devices, batch):
    """Without a mesh, and on four devices, where a slice is so many samples of each."""
    names = ("Squared", "LastMinusFirst", "TwoComponents")
    config = {name: {"reward": path(name), "weight": {"half": 1.0} if name == "TwoComponents" else 1.0} for name in names}
    sliced = {name: options | {"batch": batch} for name, options in config.items()}
    expected = RewardSet(config)(CLIPS, ROWS)
    if not devices:
        found = RewardSet(sliced)(CLIPS, ROWS)
    else:
        mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
        media = Media(sharding.replicate(CLIPS.pixels, mesh))
        with jax.set_mesh(mesh):
            found = RewardSet(sliced, mesh)(media, ROWS)
    for name, (values, ok) in expected.items():
        np.testing.assert_allclose(found[name][0], values, rtol=1e-5)
        np.testing.assert_array_equal(found[name][1], ok)


class Widest(DeviceReward):
    """The most samples that it was ever traced with."""

    most = 0

    def apply(self, params, images, text):
        Widest.most = max(Widest.most, images.shape[0] * images.shape[1])
        return images.mean((2, 3, 4))


def test_slices_are_small():
    RewardSet({path("Widest"): {"batch": 5}})(CLIPS, ROWS)
    assert Widest.most == 5


def wrong_first(pictures, prompts):
    return [0.0] * len(pictures)


def no_prompts(images):
    return [0.0] * len(images)


class TakesAudio(HostReward):
    takes = "audio"


@pytest.mark.parametrize(("config", "message"), [
    ({path("wrong_first"): {}}, "first parameter of wrong_first is 'pictures'; call it `images`.* or `videos`"),
    ({path("no_prompts"): {}}, "no_prompts must take the prompts as its second parameter"),
    ({path("TakesAudio"): {}}, "takes is 'audio', expected one of 'images', 'videos'"),
    ({"jpeg": {"frames": "last"}}, "frames must be 'first', 'all' or a number from 1, got 'last'"),
    ({"jpeg": {"frames": 0}}, "frames must be"),
    ({"jpeg": {"frames": True}}, "frames must be"),
    ({"color": {"batch": -1}}, "batch must be an integer from 0"),
    ({"color": {"batch": 2.0}}, "batch must be an integer from 0"),
    ({"color": {"frame": 2}}, "unknown option 'frame'; nearest: 'frames'"),
])
def test_wrong_functions_and_common_options(config, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(config)


# ------------------------------------------------------------------------------------------ sharing, calls, abstract sets


class Loaded(DeviceReward):
    loads = 0

    def __init__(self, size: int = 4):
        Loaded.loads += 1
        self.params = {"w": jnp.full((size,), 2.0)}

    def signature(self):
        return type(self)  # its compiled function outlives it

    def apply(self, params, images, text):
        return {"mean": images.mean((2, 3, 4)) * params["w"][0], "zero": images[..., 0, 0, 0] * 0}


def test_a_network_is_loaded_once_and_freed():
    """Common options do not count; other own options do. The first set to close leaves it to the other, the last drops it."""
    Loaded.loads = 0
    mean = {"reward": path("Loaded"), "weight": {"mean": 1.0}}
    train = RewardSet({"a": mean, "again": mean | {"frames": "first"}, "big": mean | {"size": 8}})
    both = mean | {"weight": {"zero": 1.0, "mean": 2.0}, "binary": {"threshold": 1.0}}
    other = RewardSet({"b": both, "big": mean | {"size": 16}}, shared=train)
    assert Loaded.loads == 3 and other.rewards["b"] is train.rewards["a"] is train.rewards["again"]
    assert other.rewards["big"] is not train.rewards["big"]
    assert list(train.params) == ["a", "big"] and list(other.params) == ["b", "big"]
    first, second = train(MEDIA, ROWS), other(MEDIA, ROWS)
    np.testing.assert_allclose(first["a.mean"][0], 2 * LEVELS / 255, rtol=1e-5)
    np.testing.assert_array_equal(second["b.mean"][0], 2 * LEVELS / 255 > 1)
    assert list(second) == ["b.zero", "b.mean", "big.mean"]

    weights = {name: weakref.ref(reward.params["w"]) for name, reward in
               (("shared", train.rewards["a"]), ("train", train.rewards["big"]), ("other", other.rewards["big"]))}
    train.close()
    gc.collect()
    assert [name for name, weight in weights.items() if weight() is not None] == ["shared", "other"]
    assert (np.asarray(other(MEDIA, ROWS)["b.zero"][0]) == 0).all()
    other.close()
    other.close()
    gc.collect()
    assert not any(weight() is not None for weight in weights.values())
    with pytest.raises(RuntimeError, match="closed"):
        other.submit(MEDIA, ROWS)


def test_another_mesh_shares_nothing():
    mesh = sharding.make_mesh()
    train = RewardSet({path("Scaled"): {}})
    assert RewardSet({path("Scaled"): {}}, mesh, shared=train).rewards[path("Scaled")] is not train.rewards[path("Scaled")]


EVERYTHING = {"d": {"reward": path("Scaled")}, "two": {"reward": path("TwoComponents"), "weight": {"half": 1.0, "unused": 0.0}},
              "binary": {"reward": path("Brightness"), "binary": {"threshold": 0.5}}, "h": {"reward": path("level")},
              "jpeg": {}, "clips": {"reward": path("LastMinusFirst"), "batch": 2}}


def test_call_sees_every_jitted_function():
    names = []

    def call(name, function, *args, **kwargs):
        assert hasattr(function, "lower"), name
        names.append(name)
        return function(*args, **kwargs)

    plain = RewardSet(EVERYTHING)(MEDIA, ROWS)
    seen = RewardSet(EVERYTHING).submit(MEDIA, ROWS, call).result()
    assert sorted(names) == ["quantise", "reward binary", "reward clips", "reward d", "reward two"]
    for name, (values, ok) in plain.items():
        np.testing.assert_array_equal(values, seen[name][0])
        np.testing.assert_array_equal(ok, seen[name][1])
    without_host = RewardSet({"d": EVERYTHING["d"]})
    names.clear()
    without_host(MEDIA, ROWS, call)
    assert names == ["reward d"]


def test_nothing_is_dispatched_outside_of_call():
    """`call` gives arrays that no jax function could take: the set hands them on as they are."""
    class Opaque:
        pass

    def call(name, function, *args, **kwargs):
        count = {"reward two": 2}.get(name, 1)
        return [(Opaque(), Opaque()) for _ in range(count)]

    config = {name: EVERYTHING[name] for name in ("d", "two", "binary", "clips")}
    scores = RewardSet(config)(MEDIA, ROWS, call)
    assert list(scores) == ["d", "two.half", "two.unused", "binary", "clips"]
    assert all(isinstance(part, Opaque) for pair in scores.values() for part in pair)


class ByHand(DeviceReward):
    """A network of the user's with an abstract form."""

    def __init__(self, file: str):
        raise AssertionError("reads a file")

    @classmethod
    def abstract(cls, options, mesh):
        reward = cls.__new__(cls)
        reward.params = {"layer.kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
        return reward

    def apply(self, params, images, text):
        return images.mean((2, 3, 4)) + params["layer.kernel"].sum()


def test_an_abstract_set_compiles_without_files():
    """Known networks at full size, the user's own, stand-ins for the rest; every result is abstract or zero."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    config = {"hps": {"dtype": "bfloat16"}, "aesthetic": {"head": "x"}, "image_reward": {},
              "color": {"binary": {"threshold": 0.1}}, "mine": {"reward": path("ByHand"), "file": "/nowhere"}, "jpeg": {},
              "two": {"reward": path("two_components"), "weight": {"level": 1.0, "count": 1.0}},
              "unknown": {"reward": "clip_score", "model": "some/where"}, "no form": {"reward": path("Scaled")}}
    found = RewardSet.abstract(config, mesh)
    left_out = ("jpeg", "two", "unknown", "no form")
    assert [note.split("'")[1] for note in found.notes] == list(left_out) and "on the host" in found.notes[0]
    assert sum(leaf.size for leaf in found.params["hps"].values()) == 986_109_441  # CLIP ViT-H/14
    assert found.rewards["hps"].prepare(rows_of("ab")).shape == (2, 77)
    assert found.params["mine"]["layer.kernel"].sharding.spec == jax.P("fsdp", "tensor")
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(found.params))

    names, small = [], {"quantise", "reward color", "reward mine"}

    def call(name, function, *args, **kwargs):
        names.append(name)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args))  # nothing is on devices
        traced = function.trace(*args, **kwargs)
        if name not in small:  # of the big ones only the shapes
            return traced.out_info
        shardings = traced.lower().compile().output_shardings
        return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                            traced.out_info, shardings)

    pixels = jax.ShapeDtypeStruct((4, 2, 1, 32, 32, 3), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        scores = found.submit(Media(pixels), rows_of("abcd"), call).result()
    compiled = ["hps", "aesthetic", "image_reward", "color", "mine"]
    assert sorted(names) == sorted(["quantise", *(f"reward {name}" for name in compiled)])
    assert list(scores) == [*compiled, "jpeg", "two.level", "two.count", "unknown", "no form"]
    for name, (values, ok) in scores.items():
        assert values.shape == ok.shape == (4, 2) and values.dtype == jnp.float32 and ok.dtype == bool
        if name.split(".")[0] in left_out:
            assert not values.any() and ok.all() and isinstance(values, np.ndarray)
    assert isinstance(scores["color"][0].sharding, jax.NamedSharding)
    with pytest.raises(ValueError, match="unknown option 'dtypo'"):
        RewardSet.abstract({"hps": {"dtypo": 1}}, mesh)


# ------------------------------------------------------------------------------------------ several processes


SPLITS = {"by prompt": (("data", "fsdp"),), "by half": ("data",), "prompts and samples": ("fsdp", "data"),
          "samples": (None, ("data", "fsdp")), "replicated": (), "tensor": ("tensor",)}


@pytest.mark.parametrize("spec", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("order", [lambda i: i // 4, lambda i: i % 2, lambda i: i // 2], ids=["halves", "alternating", "four"])
def test_every_sample_is_scored_by_one_process_that_holds_it(spec, order):
    """Eight devices dealt out to two or four processes; the samples of each are a partition, shared out evenly."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    where, shape = jax.NamedSharding(mesh, jax.P(*spec)), (8, 4, 1, 2, 2, 3)
    processes = order(7) + 1

    class Spread:  # as if the mesh had devices of other processes
        is_fully_addressable = False
        devices_indices_map = where.devices_indices_map

    owner = owners(Spread(), shape, processes, lambda device: order(device.id))
    holders = np.zeros((processes, *shape[:2]), bool)
    for device, index in where.devices_indices_map(shape).items():
        holders[order(device.id)][index[:2]] = True
    assert owner.shape == (8, 4) and np.take_along_axis(holders, owner[None], 0).all()
    assert np.bincount(owner.ravel(), minlength=processes).tolist() == [32 // processes] * processes
    # Prompts that processes hold as a whole or not at all are not split.
    whole = (holders.all(2) == holders.any(2)).all(0)
    assert all(len(set(samples)) == 1 for samples, kept in zip(owner.tolist(), whole, strict=True) if kept)


def test_pixels_cut_within_a_sample_are_refused():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    class Spread:
        is_fully_addressable = False
        devices_indices_map = jax.NamedSharding(mesh, jax.P(None, None, None, "fsdp")).devices_indices_map

    with pytest.raises(ValueError, match="cut within a sample"):
        owners(Spread(), (2, 2, 1, 4, 4, 3), 2, lambda device: device.id // 4)


@pytest.mark.parametrize("spec", [*SPLITS.values(), (None, None, None, "fsdp")])
def test_samples_come_from_the_devices_that_hold_them(spec):
    """Whatever the split, also within a sample: the uint8 copy is split between samples only."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 4, 3), dtype=np.uint8)
    media = from_images(images)
    media = media._replace(pixels=jax.device_put(media.pixels, jax.NamedSharding(mesh, jax.P(*spec))))
    batch = Batch(media, rows_of("abcd"))
    batch.copy_to_host()
    expected = jax.NamedSharding(mesh, jax.P(*spec[:2]))  # not replicated
    assert all(array.sharding.is_equivalent_to(expected, array.ndim) for array in batch.quantised)
    assert batch.shared_rows() == [] and list(batch.mine()) == [0, 1, 2, 3]
    for row, columns in batch.mine().items():
        pixels, finite = batch.samples(row, columns)
        np.testing.assert_array_equal(pixels[:, 0], images[row])
        assert finite.all() and columns.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(batch.gather(2)[0][:, 0], images[2])


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
    _, scores = score({"clip_score": {"model": clip_folder}}, images, prompts)
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
