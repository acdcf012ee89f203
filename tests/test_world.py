"""The world of shapes: grammar, scenes, prompts, tokenizer, and a verifier that reads scenes from pixels."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dancegrpo_jax.worlds import shapes, verifier
from dancegrpo_jax.worlds.shapes import COLOUR_NAMES, RELATIONS, SHAPES, TASKS, Object, Scene, caption, parse
from dancegrpo_jax.worlds.tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def world():
    """600 specs, tasks in turn, with a scene and an image each."""
    rng = np.random.default_rng(0)
    pools = [[s for s in shapes.all_specs() if s.task == task] for task in TASKS]
    specs = [pools[i % 6][rng.integers(len(pools[i % 6]))] for i in range(600)]
    scenes = [shapes.sample_scene(spec, rng) for spec in specs]
    return specs, scenes, shapes.render(scenes)


def pairs(spec):
    return {(colour, shape) for _, colour, shape in spec.objects}


def true_of(spec, scene):
    """Whether a caption is true and complete, from the scene itself; None where a diagonal leaves it open."""
    kinds = [(c, s) for n, c, s in spec.objects for _ in range(n)]
    if sorted(s for _, s in kinds) != sorted(o.shape for o in scene.objects):
        return False
    of = {o.shape: o for o in scene.objects}  # the shapes of different noun phrases differ
    if not all(c in (None, o.colour) for c, s in kinds for o in scene.objects if o.shape == s):
        return False
    if spec.relation:
        (_, _, a), (_, _, b) = spec.objects
        offset = of[a].x - of[b].x, of[a].y - of[b].y
        axis, sign = RELATIONS[spec.relation]
        if sign * offset[axis] < 0 or abs(offset[axis]) < 0.4 * abs(offset[1 - axis]):
            return False
        return True if abs(offset[axis]) > 1.6 * abs(offset[1 - axis]) else None
    return True


# ------------------------------------------------------------------------------------------ captions


def test_every_spec_has_its_own_caption_and_parses_back():
    specs = shapes.all_specs()
    captions = [caption(spec) for spec in specs]
    assert len(set(captions)) == len(specs) == 4 + 24 + 12 + 56 + 1728 + 360
    assert [parse(text) for text in captions] == list(specs)
    for text, task in {
        "a circle": "single_object", "a red circle": "colors", "a circle and a square": "two_object",
        "three blue crosses": "counting", "a red circle left of a blue square": "position",
        "a red circle and a blue square": "color_attr",
    }.items():  # fmt: skip
        assert parse(f" {text.upper()} ") == parse(text) and parse(text).task == task


def test_parse_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"'purple', 'hexagon'[\s\S]*colors +a COLOUR SHAPE"):
        parse("a purple hexagon")
    for text in ("", "a red", "circle", "a circles", "two circle", "a circle and a circle", "a circle above a square"):
        with pytest.raises(ValueError, match="word order"):
            parse(text)


def test_corrupt_rates_and_closure():
    rng, trials = np.random.default_rng(1), 4000
    spec = parse("a red circle left of a blue square")
    out = [shapes.corrupt(spec, rng, 0.3) for _ in range(trials)]
    fields = [lambda s, i=i, j=j: s.objects[i][j] for i in (0, 1) for j in (1, 2)] + [lambda s: s.relation]
    for i, field in enumerate(fields):
        values, counts = np.unique([field(s) for s in out if field(s) != field(spec)], return_counts=True)
        assert abs(counts.sum() / trials - 0.3) < 0.03  # 4 standard errors
        assert len(values) >= 2
        if i != 3:  # the second shape must avoid the first one's new value
            assert counts.min() / counts.max() > 0.7
    count = [shapes.corrupt(parse("two circles"), rng, 0.3).objects[0] for _ in range(trials)]
    assert abs(np.mean([n == 3 for n, _, _ in count]) - 0.3) < 0.03 and all(c is None for _, c, _ in count)
    legal = set(shapes.all_specs())
    for spec in shapes.all_specs()[::5]:
        assert shapes.corrupt(spec, rng, 0.0) == spec
        assert shapes.corrupt(spec, rng, 0.5) in legal
        full = shapes.corrupt(spec, rng, 1.0)
        assert full in legal and (full.relation != spec.relation or spec.relation is None)
        assert all(a[2] != b[2] for a, b in zip(full.objects, spec.objects, strict=True))


# -------------------------------------------------------------------------------------------- scenes


def test_scenes_obey_their_captions_and_margins(world):
    for spec, scene, _ in zip(*world, strict=True):
        assert true_of(spec, scene) is True
        boxes = []
        for o in scene.objects:
            half = o.radius * shapes.EXTENT[SHAPES.index(o.shape)]
            centre = np.array([o.x, o.y])
            boxes.append(np.stack([centre - half, centre + half]))
            assert (boxes[-1][0] >= 0.99).all() and (boxes[-1][1] <= 31.01).all()
            assert 4.5 <= o.radius <= (7.5 if len(scene.objects) == 1 else 6.5)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert np.maximum(a[0] - b[1], b[0] - a[1]).max() >= 1.99
    free = [o.colour for spec, scene, _ in zip(*world, strict=True) if spec.task == "two_object" for o in scene.objects]
    assert set(free) == set(COLOUR_NAMES)


@pytest.mark.parametrize("kind", range(4))
def test_coverage_matches_a_pixelwise_definition(kind):
    n = 64  # samples a pixel side
    v, u = ((np.mgrid[: 18 * n, : 18 * n] + 0.5) / n - np.array([8.6, 9.3]).reshape(2, 1, 1)) / 5.7
    inside = (
        u**2 + v**2 <= 1,
        np.maximum(abs(u), abs(v)) <= 0.88,
        (v <= 0.9) & (v >= -0.9) & (2 * 0.9 * abs(u) <= v + 0.9),
        (np.minimum(abs(u), abs(v)) <= 0.36) & (np.maximum(abs(u), abs(v)) <= 1),
    )[kind]
    exact = inside.reshape(18, n, 18, n).mean((1, 3))
    drawn = shapes.coverage(np.array([kind]), [9.3], [8.6], [5.7], 18)[0]
    assert abs(drawn - exact).max() < 0.08  # half of one of the eight lines of a pixel
    assert abs(exact.sum() / 5.7**2 - shapes.AREA[kind]) < 0.01
    down = (exact.sum(1) @ (np.arange(18) + 0.5) / exact.sum() - 8.6) / 5.7
    assert abs(down - shapes.CENTROID[kind]) < 0.002


def test_render_puts_colours_on_the_ground():
    scene = Scene((Object("square", "red", 8.0, 20.0, 5.0), Object("cross", "cyan", 23.5, 10.0, 6.0)), 30.0)
    images = shapes.render([Scene((), 20.0), scene])
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    assert (images[0] == 20).all() and tuple(images[1, 0, 0]) == (30, 30, 30)
    assert tuple(images[1, 20, 8]) == shapes.COLOURS["red"] and tuple(images[1, 10, 23]) == shapes.COLOURS["cyan"]


def test_pretraining_batch_is_seeded_and_follows_its_specs():
    def draw(seed):
        return shapes.pretraining_batch(np.random.default_rng(seed), 240)

    (a, index_a), (b, index_b), (other, _) = draw(3), draw(3), draw(4)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(index_a, index_b)
    assert (a != other).any() and a.shape == (240, 32, 32, 3) and a.dtype == np.uint8
    specs = [shapes.all_specs()[i] for i in index_a]
    counts = {task: sum(spec.task == task for spec in specs) for task in TASKS}
    assert min(counts.values()) >= 5 and counts["position"] > 1.5 * counts["colors"] > 1.5 * counts["single_object"]
    assert verifier.score_batch(a, [shapes.caption(spec) for spec in specs])[0].mean() >= 0.97
    rng = np.random.default_rng(0)
    noisy = [shapes.caption(shapes.corrupt(spec, rng, 0.4)) for spec in specs]
    assert verifier.score_batch(a, noisy)[0].mean() < 0.6


# ------------------------------------------------------------------------------------------- prompts


def test_shipped_prompts_are_the_split_and_keep_reserved_pairs_apart():
    train, heldout = shapes.train_prompts(), shapes.heldout_prompts()
    assert (train, heldout) == shapes.split_prompts() and shapes.split_prompts(1) != (train, heldout)
    assert len(train) == 1024 and len(heldout) == 512 and not set(train) & set(heldout)
    reserved = shapes.reserved_pairs()
    assert len(reserved) == 6
    assert {c for c, _ in reserved} == set(COLOUR_NAMES) and {s for _, s in reserved} == set(SHAPES)
    assert not any(pairs(parse(text)) & reserved for text in train)
    for text in heldout:
        assert pairs(parse(text)) & reserved or all(c is None for c, _ in pairs(parse(text)))
    unordered = [{tuple(sorted(s for _, _, s in parse(t).objects)) for t in half if parse(t).task == "two_object"}
                 for half in (train, heldout)]  # fmt: skip
    assert not unordered[0] & unordered[1]


def test_prompts_mix_tasks_and_repeat_only_where_a_task_is_small():
    for half in (shapes.train_prompts(), shapes.heldout_prompts()):
        for task in TASKS:
            mine = [text for text in half if parse(text).task == task]
            assert 0.06 <= len(mine) / len(half) <= 0.30
            _, counts = np.unique(mine, return_counts=True)
            assert counts.max() - counts.min() <= 1
            assert task not in ("position", "color_attr") or counts.max() == 1


# ----------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_has_one_token_a_word_and_clip_conventions(tmp_path):
    CLIPTokenizer = pytest.importorskip("transformers").CLIPTokenizer
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token == "<|startoftext|>" and tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())
    for word in shapes.words():
        assert tokenizer.tokenize(word) == [word + "</w>"]
    texts = [caption(spec) for spec in shapes.all_specs()]
    ids = tokenizer(texts).input_ids
    assert [len(i) for i in ids] == [len(t.split()) + 2 for t in texts]
    assert max(map(len, ids)) <= tokenizer.model_max_length
    assert all(i[0] == tokenizer.bos_token_id and i[-1] == tokenizer.eos_token_id for i in ids[::50])
    assert tokenizer.decode(ids[-1], skip_special_tokens=True).strip() == texts[-1]
    other = tokenizer("zebra!").input_ids[1:-1]
    assert len(other) >= 3 and tokenizer.eos_token_id not in other


# ------------------------------------------------------------------------------------------ verifier


@pytest.mark.parametrize("kind", ["as drawn", "blurred", "tinted", "noisy", "all three"])
def test_verifier_accepts_true_scenes(world, kind):
    specs, _, images = world
    rng, pixels = np.random.default_rng(2), images.astype(np.float32) / 255
    if kind in ("blurred", "all three"):
        pixels = gaussian_filter(pixels, (0, 0.5, 0.5, 0))
    if kind in ("tinted", "all three"):
        pixels = pixels * rng.uniform(0.92, 1.08, (len(specs), 1, 1, 3))
    if kind in ("noisy", "all three"):
        pixels = pixels + rng.uniform(-0.08, 0.08, pixels.shape)
    strict, soft = verifier.score_batch(images if kind == "as drawn" else pixels, [caption(s) for s in specs])
    assert strict.dtype == soft.dtype == np.float32 and strict.shape == soft.shape == (600,)
    for task in TASKS:
        assert strict[[s.task == task for s in specs]].mean() >= 0.97
    assert strict.mean() >= 0.995 and (soft[strict == 1] == 1).all()


def test_verifier_rejects_false_captions(world):
    specs, scenes, images = world
    near, far = [], []  # captions with one or more words off, and captions of other scenes
    rng = np.random.default_rng(3)
    for spec in specs:
        near.append(shapes.corrupt(spec, rng, 0.4))
        far.append(specs[rng.permutation(len(specs))[0]])
    for wrong, floor, ceiling in ((near, 0.2, 0.8), (far, 0.0, 0.35)):
        false = [i for i, spec in enumerate(wrong) if true_of(spec, scenes[i]) is False]
        strict, soft = verifier.score_batch(images[false], [caption(wrong[i]) for i in false])
        assert len(false) > 350 and strict.mean() <= 0.02 and floor < soft.mean() < ceiling


def test_detect_reports_place_size_and_kind():
    objects = (Object("triangle", "magenta", 9.0, 8.0, 5.0), Object("circle", "yellow", 22.0, 21.0, 6.0))
    image = shapes.render([Scene(objects, 40.0)])[0]
    found = verifier.detect(image)
    assert found == verifier.detect(image / np.float32(255))
    assert [(d.shape, d.colour) for d in found] == [("triangle", "magenta"), ("circle", "yellow")]
    for d, o in zip(found, objects, strict=True):
        kind = SHAPES.index(o.shape)
        assert np.abs(np.subtract(d.centre, (o.x, o.y))).max() <= 1
        assert abs(d.area / o.radius**2 / shapes.AREA[kind] - 1) < 0.06
        assert np.abs(np.array(d.box) - [o.x - 5, o.y - 5, o.x + 5, o.y + 5]).max() <= 2


def test_odd_blobs_are_unknown_and_specks_are_nothing():
    y, x = np.mgrid[:32, :32] - 15.5
    blank = np.full((32, 32, 3), 0.12)
    r = np.hypot(x, y)
    for odd in ((r < 6) & (y < 0), (r < 7) & (r > 4), (abs(x) < 8) & (abs(y) < 3), r < 2.5, r < 99):
        image = np.where(odd[..., None], (0.9, 0.2, 0.2), blank)
        assert [d.shape for d in verifier.detect(image)] == ["unknown"]
        assert not verifier.score(image, "a circle").strict
    disc = np.where((r < 6)[..., None], (0.9, 0.2, 0.2), blank)
    halves = np.where((disc > 0.5).any(-1, keepdims=True) & (x > 0)[..., None], (0.2, 0.3, 0.9), disc)
    assert [(d.shape, d.colour) for d in verifier.detect(halves)] == [("circle", "unknown")]
    white = np.where((r < 6)[..., None], 0.95, blank)
    assert [(d.shape, d.colour) for d in verifier.detect(white)] == [("circle", "unknown")]
    speckled = disc.copy()
    speckled[:2, :2] = (0.2, 0.3, 0.9)
    assert verifier.score(speckled, "a red circle").strict and verifier.detect(blank) == []


def test_clauses_grade_near_misses():
    def score(objects, text):
        scene = Scene(tuple(Object(s, c, x, y, 4.5) for s, c, x, y in objects), 30.0)
        verdict = verifier.score(shapes.render([scene])[0], text)
        assert verdict.soft == np.mean([holds for _, holds in verdict.clauses])
        return verdict.strict, dict(verdict.clauses)

    red, blue, spare = ("circle", "red", 8, 8), ("square", "blue", 23, 9), ("cross", "green", 15, 24)
    text = "a red circle left of a blue square"
    right = {"circle": 1, "red circle": 1, "square": 1, "blue square": 1, "left of": 1, "nothing else": 1}
    assert score([red, blue], text) == (True, right)
    assert score([red, ("square", "green", 23, 9)], text) == (False, right | {"blue square": 0})
    assert score([red, blue], text.replace("left", "right")) == (
        False, {k.replace("left", "right"): v for k, v in right.items()} | {"right of": 0})  # fmt: skip
    assert score([red, blue, spare], text) == (False, right | {"nothing else": 0})
    assert score([red], text) == (False, right | {"square": 0, "blue square": 0, "left of": 0})
    assert score([], text) == (False, dict.fromkeys(right, 0))
    # A second circle is one too many even in the right colour, and spoils the colour clause in another.
    again = ("circle", "red", 8, 24)
    assert score([red, blue, again], "a red circle and a blue square")[1]["nothing else"] is False
    three = {"circle": 1, "red circle": 1, "3 of circle": 1, "nothing else": 1}
    assert score([red, again, ("circle", "red", 23, 9)], "three red circles") == (True, three)
    assert score([red, again], "three red circles") == (False, three | {"3 of circle": 0})
    assert score([red, again, ("circle", "blue", 23, 9)], "three red circles") == (False, three | {"red circle": 0})
    two = {"circle": 1, "red circle": 1, "2 of circle": 0, "nothing else": 1}
    assert score([red, again, ("circle", "red", 23, 9)], "two red circles") == (False, two)
    assert score([red, again, blue], "two red circles")[1]["nothing else"] is False


def test_relations_follow_the_box_rule():
    def box(x, y, half=4.0):
        return verifier.Detection("circle", "red", (x - half, y - half, x + half, y + half), (x, y), 50.0)

    centre = box(16, 16)
    for place, name in {(4, 16): "left of", (28, 16): "right of", (16, 4): "above", (16, 28): "below"}.items():
        assert verifier.relations(box(*place), centre) == {name}
    assert verifier.relations(box(4, 4), centre) == {"left of", "above"}
    assert verifier.relations(centre, centre) == verifier.relations(box(17.5, 16), centre) == set()  # within the margin
    # 12 aside less a margin of 0.1 * (8 + 8), over the full distance: 10.4 / 12.65 and 2.4 / 12.65
    assert verifier.relations(box(28, 20), centre) == {"right of"}


def test_scoring_rejects_bad_input(world):
    images = world[2][:2]
    with pytest.raises(ValueError, match="2 images, but 1 captions"):
        verifier.score_batch(images, ["a circle"])
    with pytest.raises(ValueError, match="grammar"):
        verifier.score_batch(images, ["a circle", "a dog"])
    with pytest.raises(ValueError, match="RGB"):
        verifier.detect(images[0, ..., :2])
    with pytest.raises(ValueError, match="uint8"):
        verifier.detect(images[0].astype(np.int64))
    broken = shapes.render([Scene((Object("circle", "red", 15.5, 15.5, 6.0),), 30.0)])[0] / 255
    broken[8:10], broken[22:] = np.nan, np.nan  # reads as black
    assert [d.shape for d in verifier.detect(broken)] == ["circle"]
    strict, soft = verifier.score_batch(images[:0], [])
    assert strict.shape == soft.shape == (0,)
