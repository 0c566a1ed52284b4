"""CSV parsing, boxes, decoding of every kind of image, views, augmentation, batches, and `python data.py`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import photos
from augment import augmentation
from data import read_split
from loading import EpochBatches, Photos, batches, make_loader
from photos import clip_box, load_photo, to_pixels

HEADER = "image_name,BBox_xmin,BBox_ymin,BBox_xmax,BBox_ymax,Daily,Gender,Embellishment"
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@pytest.fixture
def one(tmp_path):
    """A dataset of one image of 40 x 60 pixels; one(text) writes its training CSV."""
    (tmp_path / "train" / "2COAT 2019").mkdir(parents=True)
    Image.new("RGB", (40, 60)).save(tmp_path / "train" / "2COAT 2019" / "옷 1.jpg")

    def write(text: str, encoding: str = "utf-8") -> Path:
        (tmp_path / "Fashion-How24_sub1_train.csv").write_bytes(text.encode(encoding))
        return tmp_path

    return write


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_and_line_ends(one, encoding, newline):
    split = read_split(one(newline.join([HEADER, "2COAT 2019/옷 1.jpg,1,2,30,50,5,4,2", "", ""]), encoding), "train")
    (sample,) = split.samples
    assert sample.name == "2COAT 2019/옷 1.jpg" and sample.boxes == {"bbox": (1, 2, 30, 50)}
    assert sample.labels == {"Daily": 5, "Gender": 4, "Embellishment": 2} and split.classes == {
        "Daily": 6,
        "Gender": 5,
        "Embellishment": 3,
    }


def test_columns_are_found_by_name(one):
    split = read_split(
        one('Color,image_name,Mask_x\n3,"2COAT 2019/옷 1.jpg",9\n 1.0 ,2COAT 2019/옷 1.jpg,9\n'), "train"
    )
    assert (
        split.classes == {"Color": 4} and [s.labels["Color"] for s in split.samples] == [3, 1] and not split.has("bbox")
    )


def test_labels_that_say_nothing_in_test_count_as_absent(one):
    root = one(HEADER + "\n" + "2COAT 2019/옷 1.jpg,0,0,0,0,-1,3,0\n" * 2 + "2COAT 2019/옷 1.jpg,0,0,0,0,-1,3,1\n")
    (root / "Fashion-How24_sub1_train.csv").rename(root / "Fashion-How24_sub1_test.csv")
    (root / "train").rename(root / "test")
    split = read_split(root, "test", {"Daily": 6, "Gender": 5, "Embellishment": 3})
    assert split.labelled == ("Embellishment",) and not split.has("bbox")


@relaxed
@given(text=st.binary(max_size=200) | st.text('image_nD,"\n\r 019.-\0/옷', max_size=120).map(str.encode))
def test_no_csv_breaks_the_reader(one, text):
    root = one("")
    for body in (text, HEADER.encode() + b"\n" + text):
        (root / "Fashion-How24_sub1_train.csv").write_bytes(body)
        with pytest.raises(ValueError, match="Fashion-How24_sub1_train"):
            read_split(root, "train")


cell = st.text(st.characters(codec="utf-8"), max_size=8) | st.integers().map(str) | st.floats().map(str)


@relaxed
@given(cells=st.lists(cell, min_size=7, max_size=7))
def test_a_row_is_a_sample_or_a_named_error(one, cells):
    import csv
    import io

    buffer = io.StringIO()
    csv.writer(buffer).writerow(["2COAT 2019/옷 1.jpg", *cells])
    root = one(HEADER + "\n" + buffer.getvalue())
    try:
        (sample,) = read_split(root, "train").samples
    except ValueError as error:
        assert "Fashion-How24_sub1_train.csv" in str(error)
    else:
        x1, y1, x2, y2 = sample.boxes["bbox"]
        assert 0 <= x1 < x2 <= 40 and 0 <= y1 < y2 <= 60 and sample.labels["Daily"] in range(6)


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


def test_boxes_refer_to_the_upright_photo(one):
    root = one(HEADER + "\n2COAT 2019/옷 1.jpg,-5,10,50,90,0,0,0\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(root / "train" / "2COAT 2019" / "옷 1.jpg", exif=exif)
    assert read_split(root, "train").samples[0].boxes["bbox"] == (0, 10, 40, 60)


# ---------------------------------------------------------------- pixels


def checker() -> Image.Image:
    """48 x 32, red left, blue right."""
    image = Image.new("RGB", (48, 32), (200, 30, 40))
    image.paste((20, 40, 220), (24, 0, 48, 32))
    return image


def test_every_kind_of_image_comes_out_as_upright_rgb(tmp_path):
    source = checker()
    grey16 = np.asarray(source.convert("L")).astype(np.uint16) * 257
    files = {
        "rgb.png": source, "palette.png": source.convert("P"), "grey.png": source.convert("L"), "bilevel.png": source.convert("1"),
        "cmyk.jpg": source.convert("CMYK"), "grey16.png": Image.fromarray(grey16), "grey16.tif": Image.fromarray(grey16),
        "rgba.png": source.convert("RGBA"), "la.png": source.convert("LA"), "a.webp": source, "a.bmp": source, "a.gif": source,
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
    pixels = to_pixels(checker(), (24, 0, 48, 32), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert (
        pixels.float().mean((1, 2)) - torch.tensor([20.0, 40, 220])
    ).abs().max() < 1  # nothing of the other half leaks in
    assert to_pixels(checker(), None, 16).float().mean((1, 2))[0] == pytest.approx(110, abs=3)


# ---------------------------------------------------------------- views and batches


def test_crop_probability(drawn):
    samples = read_split(drawn, "train").samples[:1]
    photos = Photos(samples, 16, "bbox", crop_prob=0.7)
    boxed, whole = (
        to_pixels(load_photo(samples[0].path), samples[0].boxes["bbox"], 16),
        to_pixels(load_photo(samples[0].path), None, 16),
    )
    seen = [photos[epoch, 0][0] for epoch in range(2000)]
    n = sum(torch.equal(pixels, boxed) for pixels in seen)
    assert n + sum(torch.equal(pixels, whole) for pixels in seen) == 2000
    assert abs(n - 1400) < 3 * (2000 * 0.7 * 0.3) ** 0.5


def test_a_sample_depends_on_seed_epoch_and_index_alone(drawn):
    samples = read_split(drawn, "train").samples
    photos = Photos(samples, 32, "bbox", 0.5, augmentation("basic"), seed=1)
    state = torch.random.get_rng_state()
    first = photos[3, 5][0]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(photos[3, 5][0], first) and not torch.equal(photos[4, 5][0], first)
    assert not torch.equal(Photos(samples, 32, "bbox", 0.5, augmentation("basic"), seed=2)[3, 5][0], first)


def test_batches_cover_every_image_once_in_an_order_of_their_own(drawn):
    samples = read_split(drawn, "train").samples
    order = EpochBatches(len(samples), 16, seed=3)
    order.epoch = 1
    first = list(order)
    order.epoch = 2
    assert [len(b) for b in first] == [16, 16, 8] == [len(b) for b in order] and len(order) == 3
    assert sorted(i for b in first for _, i in b) == list(range(40)) and [i for b in first for _, i in b] != [
        i for b in order for _, i in b
    ]
    state = torch.random.get_rng_state()
    loaded = [
        list(batches(make_loader(Photos(samples, 24, "bbox", 0.5, augmentation("basic")), 16, workers, order)))
        for workers in (0, 2)
    ]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1]["Daily"], b[1]["Daily"]) for a, b in zip(*loaded))
    assert torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------- python data.py


def test_describe(run, drawn):
    done = run("data", drawn)
    assert done.code == 0, done.err
    for text in (
        "train: 40 rows, with boxes",
        "test: 20 rows, without boxes",
        "loungewear",
        "JPEG RGB",
        "nothing wrong",
    ):
        assert text in done.out


def test_describe_counts_boxes_beyond_their_photos(one, run):
    root = one(
        HEADER
        + "\n"
        + "".join(
            f"2COAT 2019/옷 1.jpg,{box},{label},0,0\n"
            for label, box in enumerate(("5,10,40,60", "5,10,41,60", "-3,10,400,600"))
        )
    )
    done = run("data", root)
    assert (
        "2 boxes reach beyond their photos" in done.out
        and "no row is of the class Daily 3, Daily 4, Daily 5, Gender 1" in done.out
    )
    assert done.code == 1  # there is no val


def test_describe_says_what_is_wrong(run, drawn, tmp_path):
    broken = tmp_path / "Broken"
    shutil.copytree(drawn, broken)
    victim = next((broken / "train").rglob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:2000])
    done = run("data", broken, "--all")
    assert done.code == 1 and victim.name in done.err and "damaged" in done.err
    test_csv, train_csv = (broken / f"Fashion-How24_sub1_{split}.csv" for split in ("test", "train"))
    unlabelled = "\n".join(line.split(",")[0] for line in test_csv.read_text().splitlines())
    test_csv.write_text(unlabelled)
    text = train_csv.read_text()
    train_csv.write_text(text.replace("Daily", "Gender"))
    done = run("data", broken)
    assert (
        done.code == 1
        and "train.csv: the column Gender occurs" in done.err
        and "test.csv" not in done.err
        and "labels: not looked at" in done.out
    )
    train_csv.write_text(text)
    (broken / "Fashion-How24_sub1_val.csv").unlink()
    victim.unlink()
    done = run("data", broken)
    assert (
        done.code == 1
        and "Fashion-How24_sub1_val.csv is missing" in done.err
        and "no image" in done.err
        and "test: 20 rows" in done.out
    )
    assert run("data", tmp_path / "none").code == 2
