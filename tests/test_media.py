"""Pictures and clips: shapes, files, rounding, grids."""

import numpy as np
import pytest
from PIL import Image

from dancegrpo_jax import media as m


def test_image_grid():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 16, 32, 3), dtype=np.uint8)
    captions = ["a red circle above a grün square " * 9, "b"]
    grid = m.image_grid(images, captions, np.array([[0.1, np.nan, 3], [1, 2, 3]]))
    array = np.asarray(grid)
    assert array.shape[1] == 3 * (32 * 4 + 8) + 8  # enlarged 4 times, without smoothing
    enlarged = images.repeat(4, 2).repeat(4, 3)
    places = []
    for row in range(2):
        for column in range(3):
            strip = array[:, 8 + 136 * column:8 + 136 * column + 128]
            places += [(row, y) for y in range(len(strip)) if np.array_equal(strip[y:y + 64], enlarged[row, column])]
    assert len(places) == 6 and len(set(places)) == 2  # every image is there once, rows aligned
    assert (array[8:40] < 128).any() and places[0][1] >= 8 + 2 * 18  # a long caption takes two lines above its row
    assert m.image_grid(images, captions, None, scale=1).width == 3 * 40 + 8
    for wrong in ((images.astype(np.float32), captions, None), (images, ["one"], None),
                  (images, captions, np.zeros((3, 2)))):
        with pytest.raises(ValueError, match="image_grid"):
            m.image_grid(*wrong)


def test_a_grid_of_media_shows_first_frames():
    clip = np.zeros((2, 3, 4, 16, 16, 3), np.float32)
    clip[:, :, 0] = 0.5  # the other frames are black
    grid = m.image_grid(m.Media(clip), ["a", "b"], scale=8)
    expected = m.image_grid(np.full((2, 3, 16, 16, 3), 128, np.uint8), ["a", "b"], scale=8)
    np.testing.assert_array_equal(np.asarray(grid), np.asarray(expected))


def test_pictures_are_clips_of_one_frame():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 6, 3), dtype=np.uint8)
    media = m.from_images(images)
    assert media.pixels.shape == (2, 3, 1, 8, 6, 3) and media.pixels.dtype == np.float32 and media.pixels.max() <= 1
    np.testing.assert_array_equal(m.to_uint8(media), images[:, :, None])
    with pytest.raises(ValueError, match=r"\(3, 8, 6, 3\), expected \[P, G, H, W, 3\]"):
        m.from_images(images[0])


def test_rounding():
    """To the nearest level, clipped; NaN and infinity are told, which uint8 would hide."""
    values = np.array([-0.5, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.5, np.nan, np.inf], np.float32)
    pixels, finite = m.quantise(np.broadcast_to(values[:, None, None, None, None, None], (7, 1, 2, 4, 4, 3)))
    assert np.asarray(pixels)[:5, 0, 1, 0, 0, 0].tolist() == [0, 0, 1, 254, 255]
    assert np.asarray(finite)[:, 0].tolist() == [True] * 5 + [False] * 2


def test_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    media = m.read_images(files)
    assert media.pixels.shape == (3, 1, 1, 8, 6, 3)
    np.testing.assert_array_equal(m.to_uint8(media)[:, 0, 0], pixels)
    Image.fromarray(pixels[0].swapaxes(0, 1)).save(files[2])
    with pytest.raises(ValueError, match="2.png: 8 x 6 pixels, but .*0.png has 6 x 8"):
        m.read_images(files)
