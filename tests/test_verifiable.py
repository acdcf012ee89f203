"""GenEval's rules on invented detections, and text read from pictures."""

import numpy as np
import pytest

from dancegrpo_jax.data import rows_of
from dancegrpo_jax.media import from_images
from dancegrpo_jax.rewards import RewardSet, build, geneval
from dancegrpo_jax.rewards.geneval import Demand, Detection, benchmark, judge, parse_prompt, relations
from dancegrpo_jax.rewards.ocr import edit_distance, quoted, similarity
from launch import score


@pytest.mark.parametrize(("prompt", "task", "demands"), [
    ("a photo of a bench", "single_object", [Demand("bench")]),
    ("a photo of an apple and a computer mouse", "two_object", [Demand("apple"), Demand("computer mouse")]),
    ("a photo of four handbags", "counting", [Demand("handbag", 4)]),
    ("a photo of two wine glasses", "counting", [Demand("wine glass", 2)]),
    ("a photo of three buses", "counting", [Demand("bus", 3)]),
    ("a photo of two vases", "counting", [Demand("vase", 2)]),
    ("a photo of an orange cow", "colors", [Demand("cow", color="orange")]),
    ("a photo of an orange", "single_object", [Demand("orange")]),
    ("a photo of a dog right of a tv remote", "position", [Demand("tv remote"), Demand("dog", relation="right of", other=0)]),
    ("A photo of a purple suitcase and an orange pizza.", "color_attr",
     [Demand("suitcase", color="purple"), Demand("pizza", color="orange")]),
])
def test_prompts(prompt, task, demands):
    assert parse_prompt(prompt) == (task, demands)


@pytest.mark.parametrize("prompt", ["a red circle", "a photo of", "a photo of a dog and a cat and a cow",
                                    "a photo of a red dog and a cat", ""])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="grammar"):
        parse_prompt(prompt)


def box(x, y, size=10):
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@pytest.mark.parametrize(("offset", "expected"), [
    ((-50, 0), {"left of"}), ((50, 0), {"right of"}), ((0, -50), {"above"}), ((0, 50), {"below"}),
    ((-50, 50), {"left of", "below"}), ((50, 20), {"right of"}), ((1, 1), set()), ((2, 0), set()), ((0, 0), set())])
def test_relations(offset, expected):
    """Of boxes of 10 x 10 pixels; centres nearer than a tenth of the sizes have none."""
    assert relations(box(100 + offset[0], 100 + offset[1]), box(100, 100)) == expected


def many(label, n, **fields):
    return [Detection(label, box(20 * i, 50), **fields) for i in range(n)]


@pytest.mark.parametrize(("prompt", "detections", "strict", "soft"), [
    ("a photo of a dog", many("dog", 1), True, 1),
    ("a photo of a dog", many("dog", 2), True, 0),  # one more is right for the benchmark, not for the reward
    ("a photo of a dog", many("cat", 1), False, 0),
    ("a photo of a dog", many("dog", 1, score=0.3), False, 0),
    ("a photo of a dog and a cat", many("dog", 1), False, 0.5),
    ("a photo of four dogs", many("dog", 4), True, 1),
    ("a photo of four dogs", many("dog", 5), False, 0.75),
    ("a photo of four dogs", many("dog", 3), False, 0.75),
    ("a photo of four dogs", many("dog", 9), False, 0),
    ("a photo of two dogs", many("dog", 2, score=0.8), False, 0),  # counting asks for 0.9
    ("a photo of a red dog", many("dog", 1, color="red"), True, 1),
    ("a photo of a red dog", many("dog", 1, color="blue"), False, 0.5),
    ("a photo of a red dog", many("cat", 1, color="red"), False, 0),
    ("a photo of a red dog and a blue cat", many("dog", 1, color="red") + many("cat", 1, color="red"), False, 0.75),
    ("a photo of a dog left of a cat", [Detection("dog", box(0, 0)), Detection("cat", box(60, 0))], True, 1),
    ("a photo of a dog left of a cat", [Detection("dog", box(60, 0)), Detection("cat", box(0, 0))], False, 2 / 3),
    ("a photo of a dog left of a cat", [Detection("dog", box(0, 0))], False, 1 / 3),
    ("a photo of a dog", [Detection("dog", box(0, 0), 0.9, "red"), Detection("dog", box(0, 0), 0.31)], True, 0),
])
def test_verdicts(prompt, detections, strict, soft):
    found = judge(*parse_prompt(prompt), detections)
    assert found[0] is strict or found[0] == strict
    np.testing.assert_allclose(found[1], soft, atol=1e-9)


def test_the_most_confident_detections_count():
    """The benchmark looks at the best `count` ones: a surer blue dog hides the red one."""
    dogs = [Detection("dog", box(0, 0), 0.5, "red"), Detection("dog", box(50, 0), 0.9, "blue")]
    assert not judge(*parse_prompt("a photo of a red dog"), dogs)[0]
    assert judge(*parse_prompt("a photo of a blue dog"), dogs)[0]


def test_table_is_the_mean_of_tasks():
    prompts = ["a photo of a dog"] * 4 + ["a photo of two dogs"] * 2
    assert benchmark(prompts, [1, 1, 1, 0, 0, 0]) == {"single_object": 0.75, "counting": 0.0, "overall": 0.375}


def detector(image):
    """A picture of even grey g is g // 50 dogs."""
    return [{"label": "dog", "box": box(20 * i, 50)} for i in range(int(image.mean()) // 50)]


def test_reward():
    images = np.array([0, 50, 100, 150], np.float32)[None, :, None, None, None] / 255 * np.ones((2, 4, 8, 8, 3), np.float32)
    config = {"soft": {"reward": "geneval", "detector": f"{__name__}:detector"},
              "strict": {"reward": "geneval", "detector": f"{__name__}:detector", "mode": "strict"}}
    scores = RewardSet(config)(from_images(images), rows_of(["a photo of two dogs", "no such prompt"]))
    np.testing.assert_array_equal(scores["strict"][0][0], [0, 0, 1, 0])
    np.testing.assert_array_equal(scores["soft"][0][0], [0, 0.5, 1, 0.5])
    np.testing.assert_array_equal(scores["soft"][1], [[True] * 4, [False] * 4])
    for options, message in (({"detector": "nowhere:x"}, "cannot be imported"),
                             ({"detector": "os:path", "mode": "x"}, "mode is 'x'")):
        with pytest.raises(ValueError, match=message):
            build("geneval", options)
    assert geneval.TASKS[0] == "single_object"


# ------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(("a", "b", "distance"), [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3),
                                                  ("flaw", "lawn", 2), ("abc", "abc", 0), ("abcdef", "azced", 3)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_equals_the_textbook_recursion():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
        assert edit_distance(a, b) == table[-1, -1]


def test_similarity_and_quotes():
    assert quoted('a sign that says "Hello World"') == quoted("a sign, \u201cHello  World\u201d") == "helloworld"
    assert similarity("xxhelloworldxx", "helloworld") == 1
    assert similarity("hellowurld", "helloworld") == 0.9
    assert similarity("", "hello") == similarity("something else entirely", "hello") == 0
    for prompt in ("no text here", 'an empty ""', 'only " "'):
        with pytest.raises(ValueError, match="double quotes"):
            quoted(prompt)


def test_ocr_reads_rendered_text(tmp_path):
    """The real engine on a picture of words: right text 1, other text less, no text 0, no quotes masked; and the command."""
    pytest.importorskip("rapidocr")
    from PIL import Image, ImageDraw, ImageFont

    def draw(text):
        image = Image.new("RGB", (384, 128), "white")
        ImageDraw.Draw(image).text((24, 36), text, "black", font=ImageFont.load_default(48))
        return np.asarray(image, np.float32) / 255

    images = np.stack([draw("HELLO 42"), draw("HELLO 47"), draw("")])
    rows = rows_of(['a sign that says "Hello 42"', "a sign"])
    values, ok = RewardSet({"ocr": {}})(from_images(np.stack([images, images])), rows)["ocr"]
    assert ok[0].all() and not ok[1].any()
    assert values[0, 0] == 1 and 0.7 < values[0, 1] < 1 and values[0, 2] == 0

    for i, image in enumerate(images):
        Image.fromarray(np.uint8(255 * image)).save(tmp_path / f"{i}.png")
    argv = ["score.py", f"--index={tmp_path}", '--prompt=a sign that says "Hello 42"', '--rewards={"ocr": {}}',
            f"--out={tmp_path / 'out.csv'}"]
    assert score.main(argv) == 0
    scored = [float(line.rpartition(",")[2]) for line in (tmp_path / "out.csv").read_text().splitlines()[1:]]
    np.testing.assert_allclose(scored, values[0], atol=1e-6)
