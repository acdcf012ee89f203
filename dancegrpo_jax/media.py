"""The one shape law of pictures and clips, their files and their grids: a picture is a clip of one frame.

Shapes: P prompts, G samples of each, F frames, H x W pixels.
"""

import functools
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dancegrpo_jax.multihost import fetch


class Media(NamedTuple):
    """Pictures (F = 1) or clips: `pixels` fp32 [P, G, F, H, W, 3] in [0, 1], a jax or numpy array; `fps` frames a second."""

    pixels: jax.Array | np.ndarray
    fps: float = 1.0


def from_images(images, fps: float = 1.0) -> Media:
    """Pictures [P, G, H, W, 3], in [0, 1] or uint8, as Media of one frame. Raises: ValueError for another shape."""
    if np.ndim(images) != 5 or np.shape(images)[-1] != 3:
        raise ValueError(f"images have shape {np.shape(images)}, expected [P, G, H, W, 3]")
    if images.dtype == np.uint8:
        images = images / np.float32(255)
    return Media(images[:, :, None], fps)


def read_images(files: Sequence) -> Media:
    """Picture files of one size as Media [N, 1, 1, H, W, 3] in host memory. Raises: ValueError naming one of another size."""
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(np.asarray(image.convert("RGB")))
        if pictures[-1].shape != pictures[0].shape:
            raise ValueError(f"{file}: {pictures[-1].shape[1]} x {pictures[-1].shape[0]} pixels, but {files[0]} has "
                             f"{pictures[0].shape[1]} x {pictures[0].shape[0]}")
    return from_images(np.stack(pictures)[:, None])


@partial(jax.jit, static_argnames=("frames", "where"))
def quantise(pixels, frames: tuple[int, ...] | None = None, where=None):
    """(uint8 [P, G, F, H, W, 3], rounded; bool [P, G], False where a pixel is NaN or infinite, which uint8 would hide).

    frames: those to keep, None all. where: the sharding of both results, None what the compiler makes of the input's.
    """
    if frames is not None and frames != tuple(range(pixels.shape[2])):
        pixels = pixels[:, :, np.array(frames)]
    found = jnp.round(255 * jnp.clip(pixels, 0, 1)).astype(jnp.uint8), jnp.isfinite(pixels).all((2, 3, 4, 5))
    return found if where is None else jax.lax.with_sharding_constraint(found, where)


def to_uint8(media: Media) -> np.ndarray:
    """uint8 [P, G, F, H, W, 3], rounded on the device; on every process, and all must call it alike."""
    return fetch(quantise(media.pixels)[0])


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's: Pillow's own has letters for English only, and prompts need more."""
    import matplotlib
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def image_grid(images, captions: Sequence[str], scores=None, scale: int | None = None) -> Image.Image:
    """One row per prompt: its caption, then its samples with their rewards underneath.

    Args:
      images: uint8 [P, n, H, W, 3], or Media, of whose clips the first frames are shown (then all processes must call this).
      captions: P strings. scores: [P, n] numbers, NaN where there is none.
      scale: integer enlargement without smoothing; None makes the longer side at least 128 pixels.
    Raises: ValueError for other shapes or dtypes.
    """
    if isinstance(images, Media):
        images = fetch(quantise(images.pixels, frames=(0,))[0])[:, :, 0]
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3 or len(captions) != len(images):
        raise ValueError(f"image_grid: images must be uint8 [P, n, H, W, 3] with P captions, got {images.dtype} "
                         f"{images.shape} and {len(captions)} captions")
    rows, columns, height, width, _ = images.shape
    if scores is not None and np.shape(scores) != (rows, columns):
        raise ValueError(f"image_grid: scores must be [{rows}, {columns}], got {np.shape(scores)}")
    scale = scale or max(1, math.ceil(128 / max(height, width)))
    height, width, gap, font = height * scale, width * scale, 8, _font(13)
    line, label = 18, 18 if scores is not None else 0
    letters = max(10, int(columns * (width + gap) / font.getlength("n")))
    wrapped = [textwrap.wrap(" ".join(str(text).split()), letters, max_lines=2, placeholder=" ...") or [""]
               for text in captions]
    total_height = sum(len(text) * line + height + label + 2 * gap for text in wrapped) + gap
    canvas = Image.new("RGB", (columns * (width + gap) + gap, total_height), "white")
    draw, y = ImageDraw.Draw(canvas), gap
    for row, text in enumerate(wrapped):
        for part in text:
            draw.text((gap, y), part, "black", font)
            y += line
        for column in range(columns):
            x = gap + column * (width + gap)
            picture = Image.fromarray(images[row, column]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (x, y))
            if scores is not None:
                score = float(scores[row][column])
                draw.text((x + width // 2, y + height + label // 2), f"{score:.3f}" if math.isfinite(score) else "-",
                          "black", font, anchor="mm")
        y += height + label + 2 * gap
    return canvas
