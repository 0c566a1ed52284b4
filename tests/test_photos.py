"""Box arithmetic, decoding of every kind of image, and views."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import photos
from photos import clip_box, load_photo, view_pixels

relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@relaxed
@given(box=st.tuples(*[st.integers(-500, 500)] * 4), width=st.integers(1, 300), height=st.integers(1, 300))
def test_a_clipped_box_is_the_part_inside(box, width, height):
    if any(box[0] <= x < box[2] for x in range(width)) and any(box[1] <= y < box[3] for y in range(height)):
        clipped = clip_box(box, width, height)
        for low, high, side in ((0, 2, width), (1, 3, height)):
            assert list(range(clipped[low], clipped[high])) == [x for x in range(side) if box[low] <= x < box[high]]
    else:
        with pytest.raises(ValueError, match="outside"):
            clip_box(box, width, height)


def checker() -> Image.Image:
    """48 x 32, red left, blue right."""
    image = Image.new("RGB", (48, 32), (200, 30, 40))
    image.paste((20, 40, 220), (24, 0, 48, 32))
    return image


def test_every_kind_of_image_comes_out_as_upright_rgb(tmp_path):
    source = checker()
    grey16 = np.asarray(source.convert("L")).astype(np.uint16) * 257
    files = {
        "rgb.png": source, "palette.png": source.convert("P"), "grey.png": source.convert("L"),
        "bilevel.png": source.convert("1"), "cmyk.jpg": source.convert("CMYK"), "grey16.png": Image.fromarray(grey16),
        "grey16.tif": Image.fromarray(grey16), "rgba.png": source.convert("RGBA"), "la.png": source.convert("LA"),
        "a.webp": source, "a.bmp": source, "a.gif": source,
    }  # fmt: skip
    for name, image in files.items():
        image.save(tmp_path / name)
        photo = load_photo(tmp_path / name)
        assert photo.mode == "RGB" and photo.size == (48, 32), name
        left, right = (np.asarray(photo)[8:24, a:b].mean((0, 1)) for a, b in ((4, 20), (28, 44)))
        if "grey" in name or "la." in name:
            assert abs(left - 83).max() < 3 and abs(right - 54).max() < 3, (name, left, right)
        elif "bilevel" not in name:
            assert abs(left - (200, 30, 40)).max() < 12 and abs(right - (20, 40, 220)).max() < 12, (name, left, right)


TURNS = dict(
    zip(
        range(2, 9),
        ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"),
    )
)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    checker().save(tmp_path / "a.png", exif=exif)
    expected = checker() if orientation == 1 else checker().transpose(Image.Transpose[TURNS[orientation]])
    photo = load_photo(tmp_path / "a.png")
    assert photo.size == expected.size and np.array_equal(np.asarray(photo), np.asarray(expected))
    with photos.open_image(tmp_path / "a.png") as image:
        assert photos.upright_size(image) == expected.size


def test_an_orientation_behind_the_pixels_is_left_out_alike(tmp_path):
    """A PNG's eXIf block may stand there. The header's size, which boxes are clipped to, is that of the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    checker().save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start, end = content.index(b"eXIf") - 4, content.index(b"IEND") - 4
    length = 12 + int.from_bytes(content[start : start + 4])
    block = content[start : start + length]
    (tmp_path / "b.png").write_bytes(content[:start] + content[start + length : end] + block + content[end:])
    with photos.open_image(tmp_path / "b.png") as image:
        assert photos.upright_size(image) == load_photo(tmp_path / "b.png").size


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it skips
def test_an_odd_exif_block_does_not_spoil_a_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    checker().save(tmp_path / "a.jpg", exif=exif)
    good = (tmp_path / "a.jpg").read_bytes()
    start = good.index(b"Exif")
    for at in range(start + 6, start + 50):
        (tmp_path / "b.jpg").write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        assert load_photo(tmp_path / "b.jpg").mode == "RGB"


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="floating-point"):
        load_photo(tmp_path / "f.tif")


def test_transparency_goes_onto_the_background(tmp_path):
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[..., 0], rgba[:, :5, 3] = 200, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = np.asarray(load_photo(tmp_path / "a.png", (0, 0, 99)))
    assert (pixels[:, :5] == (200, 0, 0)).all() and (pixels[:, 5:] == (0, 0, 99)).all()
    Image.fromarray(np.array([[257, 9 * 257]], np.uint16)).save(tmp_path / "g.png", transparency=257)
    assert np.asarray(load_photo(tmp_path / "g.png", (0, 0, 99)))[0].tolist() == [[0, 0, 99], [9, 9, 9]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(load_photo(tmp_path / "p.png"))[0].tolist() == [[0, 0, 0], [50, 60, 70]]


def test_a_view_is_the_crop_squashed_to_size():
    pixels = view_pixels(checker(), (24, 0, 48, 32), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    colour = torch.tensor([20.0, 40, 220])
    assert (pixels.float().mean((1, 2)) - colour).abs().max() < 1  # nothing of the other half leaks in
    assert view_pixels(checker(), None, 16).float().mean((1, 2))[0] == pytest.approx(110, abs=3)


@relaxed
@given(width=st.integers(1, 300), height=st.integers(1, 300), box=st.tuples(*[st.floats(0, 1)] * 4))
def test_a_letterboxed_view_keeps_its_shape_and_its_boxes(width, height, box):
    left, top, inner_width, inner_height = photos.letterbox(width, height, 64)
    assert max(inner_width, inner_height) == 64 and left >= 0 and top >= 0
    assert abs(inner_width - 64 * width / max(width, height)) <= 1
    assert abs(inner_height - 64 * height / max(width, height)) <= 1
    white = view_pixels(Image.new("RGB", (width, height), "white"), None, 64, "letterbox")
    assert (white[:, top : top + inner_height, left : left + inner_width] == 255).all()
    assert (white == 255).sum() == 3 * inner_width * inner_height
    place = photos.placement([(width, height)], 64, "letterbox")
    boxes = torch.tensor([box])
    torch.testing.assert_close(photos.to_photo(photos.to_image(boxes, place), place), boxes, atol=1e-4, rtol=0)
