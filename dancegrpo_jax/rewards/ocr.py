"""Rendered text: how far what is written in the picture is from the text in the prompt's double quotes."""

import re
import threading

import numpy as np

from dancegrpo_jax.rewards.base import HostReward


def quoted(prompt: str) -> str:
    """The text between the first pair of double quotes (straight or curly), without spaces, lower case.

    Raises: ValueError if there is none.
    """
    match = re.search(r'["\u201c\u201d]([^"\u201c\u201d]+)["\u201c\u201d]', prompt)
    text = _bare(match[1]) if match else ""
    if not text:
        raise ValueError(f"prompt {prompt!r} has no text in double quotes")
    return text


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements that turn `a` into `b`."""
    row = np.arange(len(b) + 1)
    letters = np.array(list(b))
    for i, letter in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))  # delete, replace
        best = np.concatenate([[i], best])
        row = np.minimum.accumulate(best - np.arange(len(best))) + np.arange(len(best))  # insert
    return int(row[-1])


def similarity(read: str, target: str) -> float:
    """1 if `target` is written somewhere in `read`, else 1 - distance / length, at least 0. Both as `quoted` gives them."""
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


class OCR(HostReward):
    """1 where the quoted text of the prompt is in the picture, less by the share of wrong letters; other prompts are masked.

    The engine is rapidocr, whose wheel carries its models: `pip install rapidocr onnxruntime`.
    """

    def __init__(self):
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ValueError(f"reward 'ocr' needs `pip install rapidocr onnxruntime` ({error})") from error
        self.engine, self.lock = RapidOCR(), threading.Lock()

    def read(self, image: np.ndarray) -> str:
        """All lines of a uint8 RGB image [H, W, 3], top to bottom, without spaces, lower case."""
        # The flags persist between calls unless given; the engine expects BGR.
        with self.lock:
            found = self.engine(image[..., ::-1], use_det=True, use_cls=True, use_rec=True)
        return _bare("".join(found.txts or ()))

    def score(self, images, prompts, metadata):
        target = quoted(prompts[0])  # one prompt a call
        return [similarity(self.read(image), target) for image in images]
