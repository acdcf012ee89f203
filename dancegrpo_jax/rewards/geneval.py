"""GenEval's rules (Ghosh et al. 2023, arXiv:2310.11513): does a picture hold the objects, counts, colours and relations?

The rules are plain numpy over detections; the detector is yours, an import path in the config. What the prompt demands is
read from the prompt itself, whose grammar is GenEval's ("a photo of two red cars" is none of it: counts have no colours).
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dancegrpo_jax.rewards.base import HostReward

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
ENDING_IN_S = ("bus", "wine glass", "skis", "scissors")
THRESHOLD, COUNTING_THRESHOLD, MOST = 0.3, 0.9, 16
NEARER_THAN = 0.1  # of the objects' sizes: closer centres have no relation


class Detection(NamedTuple):
    """One object: its class as the prompt names it, box (x1, y1, x2, y2) in pixels, y downwards, confidence, colour."""

    label: str
    box: tuple[float, float, float, float]
    score: float = 1.0
    color: str | None = None


class Demand(NamedTuple):
    """At least (in `soft`: exactly) `count` objects, all of `color`, each in `relation` to the objects of demand `other`."""

    label: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    other: int | None = None


def parse_prompt(prompt: str) -> tuple[str, list[Demand]]:
    """(task, demands) of a GenEval prompt; for positions the reference object comes first, as in GenEval's metadata.

    Raises: ValueError for any other prompt.
    """
    match = re.fullmatch(r"a photo of (.+)", prompt.strip().rstrip(".").lower())
    text = match[1] if match else ""
    number = re.fullmatch(rf"({'|'.join(NUMBERS)}) (.+)", text)
    if number:
        return "counting", [Demand(_singular(number[2]), NUMBERS[number[1]])]
    for relation in RELATIONS:
        sides = re.fullmatch(rf"an? (.+) {relation} an? (.+)", text)
        if sides:
            return "position", [Demand(sides[2]), Demand(sides[1], relation=relation, other=0)]
    parts = [re.fullmatch(r"an? (.+)", part) for part in re.split(r" and (?=an? )", text)]
    if not text or not all(parts) or len(parts) > 2:
        raise ValueError(f"prompt {prompt!r} is not in GenEval's grammar")
    demands = []
    for part in parts:
        first, _, rest = part[1].partition(" ")
        demands.append(Demand(rest, color=first) if first in COLORS and rest else Demand(part[1]))
    colored = [demand.color is not None for demand in demands]
    if len(demands) == 1:
        return ("colors" if colored[0] else "single_object"), demands
    if any(colored) != all(colored):
        raise ValueError(f"prompt {prompt!r} is not in GenEval's grammar: one object has a colour, the other none")
    return ("color_attr" if all(colored) else "two_object"), demands


def _singular(plural: str) -> str:
    """GenEval's plural is name + "s", or + "es" for the few classes that end in s."""
    return plural[:-2] if plural[:-2] in ENDING_IN_S else plural.removesuffix("s")


def relations(a, b) -> set[str]:
    """In which relations (none, or one or two) box `a` stands to box `b`."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    sizes = np.abs(a[2:] - a[:2]) + np.abs(b[2:] - b[:2])
    revised = np.maximum(np.abs(offset) - NEARER_THAN * sizes, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    x, y = revised / np.linalg.norm(offset)
    return {name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds}


def judge(task: str, demands: Sequence[Demand], detections: Sequence[Detection]) -> tuple[bool, float]:
    """(strict, soft) verdict of one picture.

    strict is the benchmark's: of each class the `count` most confident detections must have the colour and the relation;
    in "counting" there must not be one more. soft is the share of demands met, with partial credit for counts and colours
    near the demand; there all detections count and the number must be exact.
    """
    threshold = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    found = [sorted((d for d in detections if d.label == demand.label and d.score > threshold), key=lambda d: -d.score)[:MOST]
             for demand in demands]
    strict, taken = True, []
    for demand, objects in zip(demands, found, strict=True):
        chosen = objects[:demand.count]
        good = len(chosen) == demand.count and not (task == "counting" and len(objects) > demand.count)
        good &= demand.color is None or sum(d.color == demand.color for d in chosen) >= demand.count
        if good and demand.relation:
            targets = taken[demand.other]
            good = bool(targets) and all(demand.relation in relations(d.box, t.box) for d in chosen for t in targets)
        taken.append(chosen if good else [])
        strict &= good

    credits, exact = [], []
    for demand, objects in zip(demands, found, strict=True):
        n, right = demand.count, len(objects) == demand.count
        credits.append(max(0.0, 1 - abs(n - len(objects)) / n))
        if demand.color is not None:
            colored = sum(d.color == demand.color for d in objects)
            credits.append(max(0.0, 1 - abs(n - colored) / n) if right else 0.0)
            right &= colored == n
        if demand.relation:
            targets = exact[demand.other]
            related = right and bool(targets) and all(demand.relation in relations(d.box, t.box)
                                                      for d in objects for t in targets)
            credits.append(float(related))
            right &= related
        exact.append(objects if right else [])
    return strict, float(np.mean(credits))


def benchmark(prompts: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """The benchmark's table: share of correct pictures of each task, and `overall`, the mean of the tasks."""
    by_task: dict[str, list] = {}
    for prompt, good in zip(prompts, correct, strict=True):
        by_task.setdefault(parse_prompt(prompt)[0], []).append(bool(good))
    table = {task: float(np.mean(by_task[task])) for task in TASKS if task in by_task}
    return table | {"overall": float(np.mean(list(table.values())))}


class GenEval(HostReward):
    """GenEval's verdict with your detector; prompts outside the grammar are masked.

    Args:
      detector: "package.module:function", uint8 [H, W, 3] -> detections (`Detection`, or dicts with its fields).
      mode: "soft" or "strict" (`judge`).
    """

    def __init__(self, detector: str, mode: str = "soft"):
        if mode not in ("soft", "strict"):
            raise ValueError(f"reward 'geneval': mode is {mode!r}, expected 'soft' or 'strict'")
        module, _, name = detector.partition(":")
        try:
            self.detector = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"reward 'geneval': detector {detector!r} cannot be imported: {error}") from error
        self.mode = mode

    def score(self, images, prompts, metadata):
        task, demands = parse_prompt(prompts[0])  # one prompt a call
        verdicts = [judge(task, demands, [d if isinstance(d, Detection) else Detection(**_mapping(d))
                                          for d in self.detector(image)]) for image in images]
        return [verdict[self.mode == "soft"] for verdict in verdicts]


def _mapping(detection) -> Mapping:
    if not isinstance(detection, Mapping):
        raise ValueError(f"a detection is {detection!r}, expected a Detection or a dict of its fields")
    return detection
