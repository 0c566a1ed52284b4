"""Reading a dataset's CSVs, and `python data.py`. tests/test_own_data.py: datasets as people have them."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from data import read_split

HEADER = "image_name,BBox_xmin,BBox_ymin,BBox_xmax,BBox_ymax,Daily,Gender,Embellishment"
TRAIN_CSV, VAL_CSV = "Fashion-How24_sub1_train.csv", "Fashion-How24_sub1_val.csv"
ORGANISERS = {"Daily": tuple("012345"), "Gender": tuple("01234"), "Embellishment": tuple("012")}
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
    assert sample.labels == {"Daily": 5, "Gender": 4, "Embellishment": 2} and split.classes == ORGANISERS


def test_columns_are_found_by_name(one):
    split = read_split(
        one('Color,image_name,Mask_x\n3,"2COAT 2019/옷 1.jpg",9\n 1.0 ,2COAT 2019/옷 1.jpg,9\n'), "train"
    )
    assert split.classes == {"Color": ("0", "1", "2", "3")} and not split.has("bbox")
    assert [sample.labels["Color"] for sample in split.samples] == [3, 1]


def test_labels_that_say_nothing_in_test_count_as_absent(one):
    root = one(HEADER + "\n" + "2COAT 2019/옷 1.jpg,0,0,0,0,-1,3,0\n" * 2 + "2COAT 2019/옷 1.jpg,0,0,0,0,-1,3,1\n")
    (root / "Fashion-How24_sub1_train.csv").rename(root / "Fashion-How24_sub1_test.csv")
    (root / "train").rename(root / "test")
    split = read_split(root, "test", ORGANISERS)
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
        x1, y1, x2, y2 = sample.boxes["bbox"] if any(cell.strip() for cell in cells[:4]) else (0, 0, 40, 60)
        assert 0 <= x1 < x2 <= 40 and 0 <= y1 < y2 <= 60 and sample.labels["Daily"] in range(-1, 6)


def test_boxes_refer_to_the_upright_photo(one):
    root = one(HEADER + "\n2COAT 2019/옷 1.jpg,-5,10,50,90,0,0,0\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(root / "train" / "2COAT 2019" / "옷 1.jpg", exif=exif)
    assert read_split(root, "train").samples[0].boxes["bbox"] == (0, 10, 40, 60)


# ---------------------------------------------------------------- bad CSVs


@pytest.fixture
def dataset(drawn, tmp_path) -> Path:
    folder = tmp_path / "Data set"
    shutil.copytree(drawn, folder)
    return folder


def edit(dataset: Path, line: int, change) -> None:
    """Change the cells of a line of the train CSV (the header is line 1)."""
    lines = (dataset / TRAIN_CSV).read_text().splitlines()
    cells = lines[line - 1].split(",")
    change(cells)
    lines[line - 1] = ",".join(cells)
    (dataset / TRAIN_CSV).write_text("\n".join(lines) + "\n")


def setter(i, value):
    return lambda cells: cells.__setitem__(i, value)


def refused(run, dataset, says=()):
    """The check ends with exit code 1 and one `error:`, which holds every word of `says`."""
    done = run("data", dataset)
    assert done.code == 1, done.err
    assert done.err.count("error:") == 1 and "Traceback" not in done.err, done.err
    for word in says:
        assert str(word) in done.err, done.err
    return done


@pytest.mark.parametrize("column", ["image_name", "BBox_xmax"])
def test_a_column_is_missing(run, dataset, column):
    path = dataset / TRAIN_CSV
    path.write_text(path.read_text().replace(column, "x", 1))
    refused(run, dataset, says=[TRAIN_CSV, column])


@pytest.mark.parametrize("name", [TRAIN_CSV, VAL_CSV])
def test_a_column_of_other_case(run, dataset, name):
    path = dataset / name
    path.write_text(path.read_text().replace("BBox_", "Bbox_"))
    refused(run, dataset, says=[name, "Bbox_xmin should be spelt BBox_xmin"])


def test_a_label_is_missing_in_val(run, dataset):
    path = dataset / VAL_CSV
    path.write_text(path.read_text().replace("Gender", "Mask_gender", 1))
    refused(run, dataset, says=[VAL_CSV, "Gender"])


@pytest.mark.parametrize("text", ["", "image_name,Daily\n", "image_name,Daily\n\n , \n"])
def test_an_empty_split(run, dataset, text):
    (dataset / TRAIN_CSV).write_text(text)
    refused(run, dataset, says=[TRAIN_CSV, "no rows"])


@pytest.mark.parametrize("cell", ["1.5", "abc", "nan", "inf", "-1", "6", "99999999999999999999", "1e400"])
def test_a_label_that_is_none(run, dataset, cell):
    edit(dataset, 3, setter(5, cell))
    refused(run, dataset, says=[TRAIN_CSV, "line 3", "Daily"])


def test_a_label_of_ones_own_is_bounded(run, dataset):
    edit(dataset, 1, setter(5, "Color"))
    edit(dataset, 3, setter(5, "1000000000"))
    refused(run, dataset, says=["line 3", "Color"])


@pytest.mark.parametrize("label", ["mean", "Gender ", "daily", "Embel", "IMAGE_NAME"])
def test_a_label_whose_results_would_collide(run, dataset, label):
    path = dataset / TRAIN_CSV
    path.write_text(path.read_text().replace("Gender", label, 1))
    if label == "Gender ":  # spaces round a name mean nothing
        assert run("data", dataset).code == 0
    else:
        refused(run, dataset, says=[TRAIN_CSV, "rename"])


def test_only_the_first_twenty_bad_rows_are_listed(run, dataset):
    for line in range(2, 32):
        edit(dataset, line, setter(5, "x"))
    done = refused(run, dataset, says=["30 of 40 rows", "and 10 more"])
    assert done.err.count("not a whole number") == 20


BOXES = {
    "9,9,9,20": "empty",
    "30,9,9,20": "inverted",
    "a,9,9,20": "not four numbers",
    "nan,1,2,3": "not four numbers",
    "5000,1,6000,20": "outside the photo",
}


@pytest.mark.parametrize(("box", "says"), BOXES.items())
def test_a_box_that_is_none(run, dataset, box, says):
    edit(dataset, 2, lambda cells: cells.__setitem__(slice(1, 5), box.split(",")))
    refused(run, dataset, says=["line 2", says])


def test_rows_that_are_no_rows(run, dataset):
    edit(dataset, 4, lambda cells: cells.pop())
    refused(run, dataset, says=["line 4", "7 cells for 8 columns"])
    (dataset / TRAIN_CSV).write_bytes(b"image_name,Daily\n\x81\xff\xfe,1\n")
    refused(run, dataset, says=[TRAIN_CSV, "UTF-8"])
    (dataset / TRAIN_CSV).write_text('image_name,Daily\n"a"b,1\n')
    refused(run, dataset, says=[TRAIN_CSV, "line 2"])
    (dataset / TRAIN_CSV).write_text("image_name,Daily,Daily\na,1,1\n")
    refused(run, dataset, says=["Daily occurs more than once"])


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
    assert done.code == 1 and "no validation, and too few photos to hold some out" in done.err


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
    assert done.code == 1 and "no image" in done.err and "test: 20 rows" in done.out
    assert re.search(r"no validation; \d of 40 training photos are held out", done.out)
    train_csv.unlink()
    done = run("data", broken)
    assert done.code == 1 and "Fashion-How24_sub1_train.csv is missing" in done.err
    assert run("data", tmp_path / "none").code == 2
