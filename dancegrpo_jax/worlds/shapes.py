"""A world of coloured shapes: a closed caption grammar, scenes, a renderer and prompts.

Pictures are 32x32 RGB with one to three flat objects on a dark neutral ground. Captions follow the six
tasks of GenEval, and a caption describes its scene completely, so that pixels alone decide whether a
picture is right (see `verifier`).
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path

import numpy as np

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {  # about 60 degrees of hue apart, so that a colour off by a tenth still names itself
    "red": (230, 45, 45),
    "green": (45, 205, 60),
    "blue": (55, 80, 240),
    "yellow": (240, 220, 50),
    "magenta": (225, 60, 220),
    "cyan": (50, 215, 225),
}
COLOUR_NAMES = tuple(COLOURS)
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # (axis, sign); y down
TASKS = ("single_object", "colors", "two_object", "counting", "position", "color_attr")
COUNTS = {1: "a", 2: "two", 3: "three"}
GRAMMAR = f"""\
single_object  a SHAPE
colors         a COLOUR SHAPE
two_object     a SHAPE and a SHAPE                   (different shapes)
counting       two|three [COLOUR] SHAPES
position       a COLOUR SHAPE RELATION a COLOUR SHAPE  (different shapes)
color_attr     a COLOUR SHAPE and a COLOUR SHAPE     (different shapes, different colours)
SHAPE: {", ".join(SHAPES)}; plural with -s, crosses
COLOUR: {", ".join(COLOUR_NAMES)}
RELATION: {", ".join(RELATIONS)}"""

# ------------------------------------------------------------------------------------------ captions


@dataclass(frozen=True)
class Spec:
    """The meaning of a caption.

    task: one of TASKS. objects: (count, colour or None, shape) for every noun phrase, in caption order;
    the shapes of one caption differ. relation: a key of RELATIONS, of the first object to the second.
    """

    task: str
    objects: tuple[tuple[int, str | None, str], ...]
    relation: str | None = None


def plural(shape: str) -> str:
    """The plural of a shape word."""
    return shape + ("es" if shape.endswith("s") else "s")


def caption(spec: Spec) -> str:
    """The caption of a spec; the inverse of `parse`."""
    phrases = [
        " ".join(filter(None, (COUNTS[count], colour, shape if count == 1 else plural(shape))))
        for count, colour, shape in spec.objects
    ]
    return f" {spec.relation or 'and'} ".join(phrases)


@lru_cache(maxsize=1)
def all_specs() -> tuple[Spec, ...]:
    """Every spec of the grammar once, grouped by task in the order of TASKS."""
    pairs, hues = list(permutations(SHAPES, 2)), COLOUR_NAMES
    specs = [Spec("single_object", ((1, None, s),)) for s in SHAPES]
    specs += [Spec("colors", ((1, c, s),)) for c, s in product(hues, SHAPES)]
    specs += [Spec("two_object", ((1, None, a), (1, None, b))) for a, b in pairs]
    specs += [Spec("counting", ((n, c, s),)) for n, c, s in product((2, 3), (None, *hues), SHAPES)]
    specs += [
        Spec("position", ((1, c, a), (1, d, b)), relation)
        for (a, b), c, d, relation in product(pairs, hues, hues, RELATIONS)
    ]
    specs += [
        Spec("color_attr", ((1, c, a), (1, d, b))) for (a, b), (c, d) in product(pairs, permutations(hues, 2))
    ]
    return tuple(specs)


@lru_cache(maxsize=1)
def _by_caption() -> dict[str, Spec]:
    return {caption(spec): spec for spec in all_specs()}


@lru_cache(maxsize=1)
def _by_task() -> dict[str, tuple[Spec, ...]]:
    return {task: tuple(s for s in all_specs() if s.task == task) for task in TASKS}


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Every word of the grammar, sorted."""
    return tuple(sorted({word for text in _by_caption() for word in text.split()}))


@lru_cache(maxsize=8192)
def parse(text: str) -> Spec:
    """The spec of a caption. Case and spacing do not matter.

    Raises ValueError, naming the unknown words and showing the grammar, for any other text.
    """
    tokens = text.lower().split()
    spec = _by_caption().get(" ".join(tokens))
    if spec is None:
        unknown = [word for word in tokens if word not in words()]
        why = f"unknown word{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}" if unknown else "word order"
        raise ValueError(f"caption {text!r} is outside of the grammar ({why}). The grammar:\n{GRAMMAR}")
    return spec


def corrupt(spec: Spec, rng: np.random.Generator, p: float) -> Spec:
    """The spec with every attribute word replaced, with probability p each, by a uniform other value.

    Attribute words are colours, shapes, counts of two and three, and relations. The result stays inside the
    grammar: values that would make two shapes (or the two colours of color_attr) equal are left out.
    """

    def swap(value, values, taken=()):
        if value is None or rng.random() >= p:
            return value
        others = [v for v in values if v != value and v not in taken]
        return others[rng.integers(len(others))]

    objects = list(spec.objects)
    for i, (count, colour, shape) in enumerate(objects):
        rest = [other for j, other in enumerate(objects) if j != i]
        hues = [c for _, c, _ in rest] if spec.task == "color_attr" else ()
        objects[i] = (
            swap(count, (2, 3)) if spec.task == "counting" else count,
            swap(colour, COLOUR_NAMES, hues),
            swap(shape, SHAPES, [s for _, _, s in rest]),
        )
    return replace(spec, objects=tuple(objects), relation=swap(spec.relation, tuple(RELATIONS)))


# -------------------------------------------------------------------------------------------- scenes

SQUARE, TRIANGLE, ARM = 0.88, 0.9, 0.36  # half side, half height and half arm width, in radii
EXTENT = np.array([(1, 1), (SQUARE, SQUARE), (1, TRIANGLE), (1, 1)], np.float32)  # half width and height, in radii
AREA = np.array([np.pi, 4 * SQUARE**2, 2 * TRIANGLE, 4 * ARM * (2 - ARM)], np.float32)  # in squared radii
CENTROID = np.array([0, 0, TRIANGLE / 3, 0], np.float32)  # below the centre of the box, in radii
GAP, BORDER, DOMINANCE = 2.0, 1.0, 1.6  # px between boxes, px to the edge, offset along a relation over across
_CANDIDATES = 48
_PAIRS = {n: np.triu_indices(n, 1) for n in COUNTS}  # of n objects


@dataclass(frozen=True)
class Object:
    """One drawn object: shape, colour, the centre of its box and its radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Objects in the order of their caption, and the grey level of the ground (0..255)."""

    objects: tuple[Object, ...]
    background: float


def sample_scene(spec: Spec, rng: np.random.Generator) -> Scene:
    """A random scene of which the spec's caption is true and complete.

    Unspecified colours are uniform. Boxes keep GAP pixels from each other and BORDER from the edges; with a
    relation, the centres' offset along its axis is at least DOMINANCE times that along the other one.
    """
    kinds = [(colour, shape) for count, colour, shape in spec.objects for _ in range(count)]
    colours = [colour or COLOUR_NAMES[rng.integers(len(COLOURS))] for colour, _ in kinds]
    extent = EXTENT[[SHAPES.index(shape) for _, shape in kinds]]
    i, j = _PAIRS[len(kinds)]
    radii_high = 7.5 if len(kinds) == 1 else 6.5
    while True:  # many layouts at once: three objects fit in few of them
        radius = rng.uniform(4.5, radii_high, (_CANDIDATES, len(kinds)))
        half = radius[..., None] * extent
        centre = half + BORDER + rng.random(half.shape) * (SIZE - 2 * (half + BORDER))
        offset = centre[:, i] - centre[:, j]
        fits = ((np.abs(offset) - half[:, i] - half[:, j]).max(-1) >= GAP).all(-1)
        if spec.relation:
            axis, sign = RELATIONS[spec.relation]
            fits &= sign * offset[:, 0, axis] >= DOMINANCE * np.abs(offset[:, 0, 1 - axis])
        if fits.any():
            break
    k = int(fits.argmax())
    objects = tuple(
        Object(shape, colour, float(x), float(y), float(r))
        for (_, shape), colour, (x, y), r in zip(kinds, colours, centre[k], radius[k], strict=True)
    )
    return Scene(objects, float(rng.uniform(16, 48)))


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray, window: int, lines: int = 8):
    """Anti-aliased coverage of single shapes, float32 [K, window, window] in 0..1.

    shape: int [K], index into SHAPES. x, y, radius: float [K], pixels from the window's corner. All four shapes
    are symmetric spans on every horizontal line, so the horizontal integral is exact and only the vertical one
    is sampled, on `lines` lines a pixel.
    """
    x, y, radius = (np.asarray(a, np.float32) for a in (x, y, radius))
    v = ((np.arange(window * lines, dtype=np.float32) + 0.5) / lines - y[:, None]) / radius[:, None]
    up, kind = np.abs(v), np.asarray(shape)[:, None]
    half = np.select(
        [kind == 0, kind == 1, kind == 2],
        [
            np.sqrt(np.maximum(1 - v * v, 0)),
            SQUARE * (up <= SQUARE),
            (v + TRIANGLE) / (2 * TRIANGLE) * (up <= TRIANGLE),
        ],
        np.where(up <= ARM, 1, ARM) * (up <= 1),
    ).astype(np.float32)
    half = (half * radius[:, None])[..., None]
    left = np.arange(window, dtype=np.float32) - x[:, None, None]  # pixel edges, seen from the centre
    span = np.minimum(left + 1, half)
    span -= np.maximum(left, -half)
    return np.clip(span, 0, 1, out=span).reshape(len(v), window, lines, window).mean(2)


def render(scenes: list[Scene]) -> np.ndarray:
    """Draws scenes: uint8 [B, 32, 32, 3]. Deterministic; all randomness is in the scenes."""
    window, pad = 18, 9  # holds the largest object wherever its centre falls within a pixel
    flat = [(b, o) for b, scene in enumerate(scenes) for o in scene.objects]
    ground = np.array([scene.background for scene in scenes], np.float32)
    canvas = np.repeat(ground, (SIZE + 2 * pad) ** 2 * 3).reshape(len(scenes), SIZE + 2 * pad, SIZE + 2 * pad, 3)
    if flat:
        xyr = np.array([(o.x, o.y, o.radius) for _, o in flat], np.float32)
        corner = np.floor(xyr[:, :2]).astype(int) - pad
        alpha = coverage(
            np.array([SHAPES.index(o.shape) for _, o in flat]), *(xyr[:, :2] - corner).T, xyr[:, 2], window
        )[..., None]
        for (b, o), (cx, cy), a in zip(flat, corner + pad, alpha, strict=True):
            patch = canvas[b, cy : cy + window, cx : cx + window]
            patch += a * (np.array(COLOURS[o.colour], np.float32) - patch)
    return np.rint(canvas[:, pad:-pad, pad:-pad]).astype(np.uint8)


def pretraining_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 32, 32, 3] and the indices in `all_specs()` of the specs they follow, int [n].

    Tasks come in the shares of the prompt sets: those with more to tell apart are seen more often.
    """
    shares = np.array([_SHARES[task] for task in TASKS])
    counts = np.array([len(_by_task()[task]) for task in TASKS])
    task = rng.choice(len(TASKS), n, p=shares / shares.sum())
    index = np.concatenate([[0], counts.cumsum()])[task] + rng.integers(counts[task])
    return render([sample_scene(all_specs()[i], rng) for i in index]), index


# ------------------------------------------------------------------------------------------- prompts

# Held-out captions a task; twice as many train. More where there is more to tell apart, none above 30%.
_SHARES = {"single_object": 32, "colors": 72, "two_object": 64, "counting": 104, "position": 144, "color_attr": 96}
_PROMPTS = Path(__file__).with_name("prompts")


def reserved_pairs(seed: int = 0) -> frozenset[tuple[str, str]]:
    """Six (colour, shape) pairs kept for held-out captions: every colour once, every shape once or twice."""
    rng = np.random.default_rng([seed, 1])
    partners = [*rng.permutation(SHAPES), *rng.permutation(SHAPES)[: len(COLOURS) - len(SHAPES)]]
    return frozenset(zip(COLOUR_NAMES, map(str, rng.permutation(partners)), strict=True))


def split_prompts(seed: int = 0) -> tuple[list[str], list[str]]:
    """1024 train and 512 held-out captions, in the same mix of tasks (at most 28% each).

    Captions with colours are held out if and only if they hold a reserved pair. Of those without, whole meanings
    are held out ("a circle and a square" together with "a square and a circle"). A task with fewer captions than
    its share repeats them evenly; captions of the others are distinct.
    """
    rng, reserved = np.random.default_rng([seed, 2]), reserved_pairs(seed)
    meanings = sorted({_meaning(s) for s in all_specs() if not any(c for _, c, _ in s.objects)})
    hidden = set()
    for task, number in (("single_object", 1), ("two_object", 2), ("counting", 2)):
        mine = [m for m in meanings if m[0] == task]
        hidden |= {mine[i] for i in rng.choice(len(mine), number, replace=False)}

    def held_out(spec: Spec) -> bool:
        return _meaning(spec) in hidden or any((c, s) in reserved for _, c, s in spec.objects)

    splits = []
    for held, factor in ((False, 2), (True, 1)):
        lines = []
        for task, specs in _by_task().items():
            pool = [caption(s) for s in specs if held_out(s) is held]
            rounds = -(-factor * _SHARES[task] // len(pool))
            lines += [pool[i] for _ in range(rounds) for i in rng.permutation(len(pool))][: factor * _SHARES[task]]
        splits.append([lines[i] for i in rng.permutation(len(lines))])
    return splits[0], splits[1]


def _meaning(spec: Spec) -> tuple:
    return spec.task, tuple(sorted((n, c or "", s) for n, c, s in spec.objects))  # for tasks without relation


def train_prompts() -> list[str]:
    """The shipped train captions, `split_prompts()[0]`."""
    return (_PROMPTS / "train.txt").read_text().splitlines()


def heldout_prompts() -> list[str]:
    """The shipped held-out captions, `split_prompts()[1]`."""
    return (_PROMPTS / "heldout.txt").read_text().splitlines()
