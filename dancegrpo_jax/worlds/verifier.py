"""Reads scenes of coloured shapes back from pixels and scores them against captions by GenEval's rules.

Two separate steps: `detect` turns an image into detections, `judge` turns detections into a verdict. A picture
comes from a decoder, so edges may be soft and colours off by a tenth; blobs that are no clear shape or no
clear colour are reported as "unknown", satisfy nothing, and break the clause that nothing else is there.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dancegrpo_jax.worlds import shapes
from dancegrpo_jax.worlds.shapes import COLOUR_NAMES, RELATIONS, SHAPES, Spec

UNKNOWN = "unknown"
BRIGHT = 128  # mean level from which a colourless pixel counts as an object, far above any ground
SPECK, SMALLEST = 8, 24  # px: fainter blobs are noise; below the second (the least object has 36) no shape is clear
PURITY = 0.7  # share of an object's pixels that must agree on its colour
LIKENESS = 0.88  # overlap with the best template; true shapes keep 0.91 under heavy blur, half a disc has 0.74
MARGIN, DIRECTION = 0.1, 0.5  # GenEval's: share of both sizes that an offset must exceed; least component
_WINDOW = 22
_PLANE = np.exp(2j * np.pi / 3 * np.arange(3))  # RGB to a complex number: its angle is hue, its length chroma
_PURE = np.array(list(shapes.COLOURS.values())) @ _PLANE
_IN_PLANE = np.zeros((3, 3, 3), bool)  # connects neighbours within an image of a batch, never across images
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Detection:
    """One object. box: (x0, y0, x1, y1), upper ends exclusive; centre: of the box; area: in soft pixels."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]
    centre: tuple[float, float]
    area: float


@dataclass(frozen=True)
class Verdict:
    """strict: every clause holds; soft: the share that does; clauses: (name, holds) in caption order."""

    strict: bool
    soft: float
    clauses: tuple[tuple[str, bool], ...]


def _pixels(images) -> np.ndarray:
    """Float32 0..255 of uint8 or of floats in 0..1; raises ValueError for other layouts or dtypes."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected RGB images, last axis 3, got shape {images.shape}")
    if images.dtype == np.uint8:
        return images.astype(np.float32)
    if np.issubdtype(images.dtype, np.floating):
        return np.clip(np.nan_to_num(images.astype(np.float32)), 0, 1) * 255
    raise ValueError(f"expected uint8, or floats in 0..1, got {images.dtype}")


def detect_batch(images: np.ndarray) -> list[list[Detection]]:
    """`detect` for images [B, H, W, 3]: one list an image, in reading order of the blobs' first pixels."""
    rgb = _pixels(images)
    batch, height, width, _ = rgb.shape
    found: list[list[Detection]] = [[] for _ in range(batch)]
    chroma = rgb @ _PLANE.astype(np.complex64)
    along = (chroma[..., None] * (_PURE.conj() / np.abs(_PURE)).astype(np.complex64)).real
    hue = along.argmax(-1)
    alpha = along.max(-1) / np.abs(_PURE).astype(np.float32)[hue]  # how much of the pure colour covers the pixel
    coloured = alpha > 0.5  # half covered: keeps areas unbiased under blur
    bright = ~coloured & (rgb.mean(-1) > BRIGHT)
    hue[bright], alpha[bright] = len(COLOUR_NAMES), 1
    labels, count = ndimage.label(coloured | bright, _IN_PLANE)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    blobs = [k for k in range(1, count + 1) if sizes[k] >= SPECK]
    if not blobs:
        return found

    slices = ndimage.find_objects(labels)
    where = np.array([[s.start for s in slices[k - 1]] + [s.stop for s in slices[k - 1][1:]] for k in blobs])
    image, y0, x0, y1, x1 = where.T
    votes = np.zeros((count + 1, len(COLOUR_NAMES) + 1), int)
    np.add.at(votes, (labels, hue), 1)
    votes = votes[blobs]
    colour = np.where(votes.max(1) >= PURITY * votes.sum(1), votes.argmax(1), len(COLOUR_NAMES))

    # A window around each blob, with its own soft edge (one pixel more than its box) but no neighbour.
    corner_y, corner_x = (y0 + y1 - _WINDOW) // 2, (x0 + x1 - _WINDOW) // 2
    ys, xs = corner_y[:, None] + np.arange(_WINDOW), corner_x[:, None] + np.arange(_WINDOW)
    rows = (ys >= np.maximum(y0 - 1, 0)[:, None]) & (ys < np.minimum(y1 + 1, height)[:, None])
    columns = (xs >= np.maximum(x0 - 1, 0)[:, None]) & (xs < np.minimum(x1 + 1, width)[:, None])
    index = image[:, None, None], ys.clip(0, height - 1)[:, :, None], xs.clip(0, width - 1)[:, None, :]
    own = labels[index] == np.array(blobs)[:, None, None]
    soft = np.where(rows[:, :, None] & columns[:, None, :] & (own | (labels[index] == 0)), alpha[index], 0)
    soft[soft < 0.1] = 0  # the ground's noise
    level = (soft**2 * own).sum((1, 2)) / np.maximum((soft * own).sum((1, 2)), 1e-6)  # a washed-out colour is no
    soft = np.clip(soft / np.maximum(level, 0.1)[:, None, None], 0, 1)  # smaller shape

    # Every shape with the blob's area and centroid, drawn at sub-pixel precision and laid over it.
    area = soft.sum((1, 2)).clip(1)
    middle = np.arange(_WINDOW) + 0.5
    cx, cy = soft.sum(1) @ middle / area, soft.sum(2) @ middle / area
    kinds, n = np.arange(len(SHAPES)), len(blobs)
    radius = np.sqrt(area[:, None] / shapes.AREA)
    template = shapes.coverage(
        np.tile(kinds, n),
        np.repeat(cx, len(kinds)),
        (cy[:, None] - radius * shapes.CENTROID).ravel(),
        radius.ravel(),
        _WINDOW,
        lines=4,
    ).reshape(n, len(kinds), _WINDOW, _WINDOW)
    overlap = np.einsum("ksyx,kyx->ks", template, soft)
    squares = (template**2).sum((2, 3)) + (soft**2).sum((1, 2))[:, None]
    iou = overlap / (squares - overlap)  # IoU with products for minima: forgives noise and soft edges
    fits = np.maximum(y1 - y0, x1 - x0) <= _WINDOW - 2
    clear = (iou.max(1) >= LIKENESS) & (area >= SMALLEST) & fits
    shape = np.where(clear, iou.argmax(1), len(SHAPES))

    for k in range(n):
        box = (float(x0[k]), float(y0[k]), float(x1[k]), float(y1[k]))
        found[image[k]].append(
            Detection(
                (*SHAPES, UNKNOWN)[shape[k]],
                (*COLOUR_NAMES, UNKNOWN)[colour[k]],
                box,
                ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
                float(area[k]) if fits[k] else float(sizes[blobs[k]]),
            )
        )
    return found


def detect(image: np.ndarray) -> list[Detection]:
    """The objects in one image, from pixels alone.

    image: uint8, or float in 0..1, [H, W, 3]. Raises ValueError for another layout or dtype.
    """
    return detect_batch(np.asarray(image)[None])[0]


def relations(a: Detection, b: Detection) -> set[str]:
    """The relations of a to b by GenEval's rule: none, one, or two when b lies diagonally."""
    size = [d.box[2 + axis] - d.box[axis] for d in (a, b) for axis in (0, 1)]
    offset = np.subtract(a.centre, b.centre)
    beyond = np.maximum(np.abs(offset) - MARGIN * np.array([size[0] + size[2], size[1] + size[3]]), 0)
    share = np.sign(offset) * beyond / max(np.hypot(*offset), 1e-6)
    return {name for name, (axis, sign) in RELATIONS.items() if sign * share[axis] > DIRECTION}


def judge(detections: list[Detection], spec: Spec) -> Verdict:
    """Scores detections against a spec.

    Clauses, so that a nearly right picture earns most of them and an empty one none: for each noun phrase, the
    shape is there; if it names a colour, all of that shape have it; when counting, their number is exact; every
    first object has the relation to every second one; and nothing else is in the picture.
    """
    clauses, groups, needed = [], [], True
    for number, colour, shape in spec.objects:
        group = [d for d in detections if d.shape == shape]
        groups.append(group)
        clauses.append((shape, bool(group)))
        if colour:
            clauses.append((f"{colour} {shape}", bool(group) and all(d.colour == colour for d in group)))
        if spec.task == "counting":
            clauses.append((f"{number} of {shape}", len(group) == number))
        else:
            needed &= len(group) <= number
    if spec.relation:
        pairs = [(a, b) for a in groups[0] for b in groups[1]]
        clauses.append((spec.relation, bool(pairs) and all(spec.relation in relations(a, b) for a, b in pairs)))
    wanted = sum(map(len, groups))
    clauses.append(("nothing else", needed and 0 < wanted == len(detections)))
    held = [holds for _, holds in clauses]
    return Verdict(all(held), sum(held) / len(held), tuple(clauses))


def score(image: np.ndarray, caption: str) -> Verdict:
    """`judge` of what `detect` sees. ValueError for a caption outside of the grammar or an odd image."""
    return judge(detect(image), shapes.parse(caption))


def score_batch(images: np.ndarray, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Strict and soft scores, float32 [B] each, of images [B, H, W, 3] (uint8, or float in 0..1).

    Raises ValueError if the numbers of images and captions differ, and as `score` does.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images, but {len(captions)} captions")
    specs = [shapes.parse(text) for text in captions]
    verdicts = [judge(found, spec) for found, spec in zip(detect_batch(images), specs, strict=True)]
    strict = np.array([v.strict for v in verdicts], np.float32)
    return strict, np.array([v.soft for v in verdicts], np.float32)
