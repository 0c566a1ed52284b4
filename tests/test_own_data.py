"""Datasets and folders as people have them: spreadsheets' CSVs, words, class folders, odd names, no validation."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image

from data import find_dataset, find_doubts, image_samples, read_split, read_splits, read_table, shared_photos
from preprocess import read_photos

HEADER = "image_name,BBox_xmin,BBox_ymin,BBox_xmax,BBox_ymax,Daily,Gender,Embellishment"
NAMES = ("1209/BO00001-1.jpg", "1209/BO00001-2.jpg", "2COAT 2019/co0001-1.jpg", "KNIT 2020/kn00004-1.png")
ROWS = [f"{name},10,12,200,240,{row}" for name, row in zip(NAMES, ("1,2,0", "1,2,0", "2,0,1", "0,4,2"))]


def photo(path: Path, shade: int = 0, size: tuple[int, int] = (300, 300)) -> Path:
    """A photo whose bytes differ by shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, shade // 256, 99)).save(path)
    return path


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Four photos; write() gives the train CSV."""
    for split in ("train", "val", "test"):
        for i, name in enumerate(NAMES):
            photo(tmp_path / split / name, i + 10 * len(split))
    write(tmp_path, [HEADER, *ROWS])
    write(tmp_path, [HEADER, *ROWS], "val")
    return tmp_path


def write(root: Path, lines: list[str] | str, split: str = "train", encoding: str = "utf-8") -> None:
    text = lines if isinstance(lines, str) else "\n".join(lines) + "\n"
    (root / f"Fashion-How24_sub1_{split}.csv").write_bytes(text.encode(encoding))


def labels_of(split, label: str = "Daily") -> list[int]:
    return [sample.labels[label] for sample in split.samples]


def class_folders(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    for c, (word, n) in enumerate(counts.items()):
        for i in range(n):
            photo(root / word / f"{i}{suffix}", 100 * c + i)
    return root


# ---------------------------------------------------------------- CSVs of spreadsheets

SPREADSHEETS = {
    "semicolons and a BOM": ("\r\n".join(line.replace(",", ";") for line in [HEADER, *ROWS]), "utf-8-sig"),
    "tabs in UTF-16": ("\r\n".join(line.replace(",", "\t") for line in [HEADER, *ROWS]), "utf-16"),
    "a first line sep=;": ("\r\n".join(["sep=;", *(line.replace(",", ";") for line in [HEADER, *ROWS])]), "utf-8"),
    "decimal commas": (
        "\n".join([HEADER.replace(",", ";"), *(r.replace(",", ";").replace(";12;", ";12,5;") for r in ROWS)]),
        "utf-8",
    ),
    "nameless trailing cells": ("\n".join([HEADER + ",,", ROWS[0] + ",,", *ROWS[1:]]), "utf-8"),
    "more cells than the header": ("\n".join([HEADER, ROWS[0] + ",,,", *ROWS[1:]]), "utf-8"),
    "classes with decimal commas": (
        "\n".join([HEADER, *(f'{row[:-5]}"{row[-5]},0"{row[-4:]}' for row in ROWS)]),
        "utf-8",
    ),
    "bars": ("\n".join(line.replace(",", "|") for line in [HEADER, *ROWS]), "utf-8"),
    "quoted cells": ("\n".join(",".join(f'"{c}"' for c in line.split(",")) for line in [HEADER, *ROWS]), "cp949"),
    "blank lines": ("\n".join(["", HEADER, "", *ROWS, ",,,,,,,", ""]), "utf-8"),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_csvs_of_spreadsheets(dataset, kind, capfd):
    text, encoding = SPREADSHEETS[kind]
    write(dataset, text, encoding=encoding)
    split = read_split(dataset, "train")
    assert [sample.name for sample in split.samples] == list(NAMES) and labels_of(split) == [1, 1, 2, 0]
    assert split.samples[2].boxes["bbox"] == (10, 12, 200, 240) and list(split.classes) == HEADER.split(",")[5:]
    assert read_table(dataset, "train", {})[0] == HEADER.split(",")
    assert "note" not in capfd.readouterr().out


def test_a_decimal_comma_rounds_outwards_and_thousands_are_refused(dataset):
    write(dataset, [HEADER, ROWS[0].replace("10,12,200", '"10,5",12,"199,5"'), *ROWS[1:]])
    assert read_split(dataset, "train").samples[0].boxes["bbox"] == (10, 12, 200, 240)
    write(dataset, [HEADER, ROWS[0].replace("200", '"1,200"'), *ROWS[1:]])
    with pytest.raises(ValueError, match="not four numbers"):
        read_split(dataset, "train")


@pytest.mark.parametrize("name", ["Unnamed: 0", ""])
def test_a_nameless_column_is_left_out(dataset, name):
    write(dataset, [f"{name},{HEADER}", *(f"{i},{row}" for i, row in enumerate(ROWS))])
    assert list(read_split(dataset, "train").classes) == ["Daily", "Gender", "Embellishment"]


def test_a_column_of_row_numbers_is_refused(dataset):
    write(dataset, [HEADER + ",id", *(f"{row},{7000 + i}" for i, row in enumerate(ROWS))])
    with pytest.raises(ValueError, match=r"id is 7000, .*take the column out if it is no label"):
        read_split(dataset, "train")
    for first in ("", "n"):
        write(dataset, [HEADER + ",id", *(f"{ROWS[0]},{first}{i}" for i in range(60))])
        with pytest.raises(ValueError, match=r"column id has 60 values in 60 rows; is it a row number\? take it out"):
            read_split(dataset, "train")


def test_remarks_are_left_out_and_an_empty_label_is_refused(dataset, capfd):
    write(dataset, [HEADER + ",memo", ROWS[0] + ",", ROWS[1] + ",second photo", ROWS[2] + ",", ROWS[3] + ","])
    assert "memo" not in read_split(dataset, "train").classes
    assert "left out, as over half of the cells are empty: memo" in capfd.readouterr().out
    write(dataset, [HEADER, *(row.rsplit(",", 3)[0] + ",,1,1" for row in ROWS)])
    with pytest.raises(ValueError, match="the label Daily is empty in every row; remove the column"):
        read_split(dataset, "train")


def test_an_empty_label_cell_is_not_known(dataset):
    write(dataset, [HEADER, *ROWS[:3], ROWS[3].replace(",0,4,2", ",,4,2")])
    split = read_split(dataset, "train")
    assert labels_of(split) == [1, 1, 2, -1] and labels_of(split, "Gender") == [2, 2, 0, 4]
    write(dataset, [HEADER, *ROWS[:3], ROWS[3].replace(",0,4,2", ",nan,4,2")])
    with pytest.raises(ValueError, match=r"line 5: Daily is nan.*leave the cell empty where the class is not known"):
        read_split(dataset, "train")


def test_boxes_that_are_not_there(dataset):
    write(dataset, [HEADER, ROWS[0], ROWS[1].replace("10,12,200,240", ",,,"), *ROWS[2:]])
    split = read_split(dataset, "train")
    assert split.samples[1].boxes == {} and split.samples[0].boxes and split.has("bbox")
    for box in ("0,0,0,0", "5,,,"):
        write(dataset, [HEADER, ROWS[0], ROWS[1].replace("10,12,200,240", box), *ROWS[2:]])
        with pytest.raises(ValueError, match=r"line 3: the box .*"):
            read_split(dataset, "train")
    write(dataset, [HEADER, ROWS[0], ROWS[1].replace("10,12,200,240", "0,0,0,0"), *ROWS[2:]])
    with pytest.raises(ValueError, match="leave the four cells empty where there is no box"):
        read_split(dataset, "train")


def test_one_row_of_a_test_csv_says_something(dataset):
    write(dataset, [HEADER, ROWS[0]], "test")
    split = read_split(dataset, "test", read_split(dataset, "train").classes)
    assert split.has("bbox") and split.labelled == ("Daily", "Gender", "Embellishment")
    write(dataset, [HEADER, ROWS[0].replace("1,2,0", "-1,-1,")], "test")
    assert read_split(dataset, "test", read_split(dataset, "train").classes).labelled == ()


# ---------------------------------------------------------------- words


def test_the_organisers_words_are_their_numbers(dataset):
    words = ("light outing,girlish,none", "Light Outing,girlish,none", "office,mannish,point", "loungewear,sexy,lots")
    write(dataset, [HEADER, *(row.rsplit(",", 3)[0] + f",{word}" for row, word in zip(ROWS, words))])
    split = read_split(dataset, "train")
    assert labels_of(split) == [1, 1, 2, 0] and labels_of(split, "Embellishment") == [0, 0, 1, 2]
    assert split.classes["Daily"] == tuple("012345")


def kinds(dataset: Path, words: list[str], split: str = "train") -> None:
    write(dataset, ["image_name,Kind", *(f"{name},{word}" for name, word in zip(NAMES, words))], split)


def test_words_are_classes_in_sorted_order(dataset):
    kinds(dataset, ["top", "dress", "07", "top"])
    kinds(dataset, ["dress", "top", "", "top"], "val")
    train, val = read_splits([dataset])
    assert train.classes == {"Kind": ("07", "dress", "top")} and labels_of(train, "Kind") == [2, 1, 0, 2]
    assert val.classes == train.classes and labels_of(val, "Kind") == [1, 2, -1, 2]


def test_numbers_that_may_be_thousands_are_words(dataset):
    write(dataset, [HEADER + ",Price", *(f'{row},"{1 + i % 2},000"' for i, row in enumerate(ROWS))])
    assert read_split(dataset, "train").classes["Price"] == ("1,000", "2,000")


def test_words_of_several_datasets_are_joined(dataset, tmp_path):
    other = tmp_path / "other"
    for name in NAMES:
        photo(other / "train" / name)
    kinds(other, ["apron", "top", "top", "top"])
    kinds(dataset, ["top", "dress", "dress", "top"])
    kinds(dataset, ["top", "dress", "dress", "top"], "val")
    train, val = read_splits([other, dataset])
    assert train.classes == val.classes == {"Kind": ("apron", "dress", "top")}
    assert labels_of(val, "Kind") == [2, 1, 1, 2] and len({sample.csv for sample in train.samples}) == 2
    assert [train.classes["Kind"][c] for c in labels_of(train, "Kind")][-4:] == ["top", "dress", "dress", "top"]


def test_classes_that_training_does_not_have(dataset, capfd):
    kinds(dataset, ["top", "dress", "dress", "top"])
    for split in ("val", "test"):
        kinds(dataset, ["hat", "cap", "dress", "hat"], split)
    with pytest.raises(
        ValueError, match=r"classes of Kind that training does not have: cap, hat; .*--fit-all"
    ) as error:
        read_splits([dataset])
    assert len(str(error.value).splitlines()) == 1
    train, _ = read_splits([dataset], fit_all=True)
    assert train.classes == {"Kind": ("cap", "dress", "hat", "top")} and len(train.samples) == 8
    test = read_split(dataset, "test", read_split(dataset, "train").classes)
    assert labels_of(test, "Kind") == [-1, -1, 0, -1]
    assert "their 3 rows are predicted and not scored" in capfd.readouterr().out


@pytest.mark.parametrize("split", ["train", "val"])
def test_words_that_differ_by_case_or_white_space_are_refused(dataset, split):
    kinds(dataset, ["rain coat", "dress", "dress", "rain coat"])
    kinds(dataset, ["Rain  coat", "dress", "rain coat", "dress"], split)
    with pytest.raises(ValueError, match="'Rain  coat'.*'rain coat'" if split == "train" else "Rain  coat"):
        read_splits([dataset])


@pytest.mark.parametrize("label", ["box", "Box", "mean"])
def test_a_label_with_the_name_of_something_else(dataset, label):
    write(dataset, [HEADER.replace("Gender", label), *ROWS])
    with pytest.raises(ValueError, match=f"the label {label} .*rename it"):
        read_split(dataset, "train")


# ---------------------------------------------------------------- names and links


def test_names_that_are_spelt_otherwise(dataset):
    other_form = unicodedata.normalize("NFD", "옷장/가.jpg")
    photo(dataset / "train" / other_form)
    photo(dataset / "train" / "a" / "b.jpeg")
    inside = os.path.abspath(dataset / "train" / NAMES[3])
    names = [
        "1209\\BO00001-1.jpg",
        "2coat 2019/CO0001-1.JPG",
        "a/b.jpg",
        unicodedata.normalize("NFC", other_form),
        inside,
    ]
    write(dataset, ["image_name,Daily", *(f"{name},1" for name in names)])
    split = read_split(dataset, "train")
    found = [str(Path(sample.path).relative_to(dataset / "train")) for sample in split.samples]
    assert found == [NAMES[0], NAMES[2], "a/b.jpeg", other_form, NAMES[3]]
    assert [sample.name for sample in split.samples] == names
    photo(dataset / "train" / "a" / "b.png")  # two files fit
    with pytest.raises(ValueError, match=r"line 4: no image .*a/b.jpg"):
        read_split(dataset, "train")


@pytest.mark.parametrize("name", ["../val/x.jpg", "/etc/passwd", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "\\x.jpg"])
def test_a_name_that_leaves_the_dataset(dataset, name):
    write(dataset, [HEADER, *ROWS, f"{name},10,12,200,240,1,2,0"])
    with pytest.raises(ValueError, match=r"line 6: .*leaves the dataset folder"):
        read_split(dataset, "train")


def test_links_are_followed(dataset, tmp_path):
    photo(tmp_path / "elsewhere" / "x.jpg", size=(30, 40))
    (dataset / "train" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    (dataset / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    write(dataset, ["image_name,Daily", "link.jpg,1", "linked/x.jpg,2"])
    assert [sample.size for sample in read_split(dataset, "train").samples] == [(30, 40)] * 2


# ---------------------------------------------------------------- class folders


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_class_folders(tmp_path, val):
    for split in ("train", val, "test"):
        class_folders(tmp_path / split, {"top": 3, "dress": 2})
    photo(tmp_path / "train" / "dress" / "more" / "a.png")
    photo(tmp_path / "train" / ".cache" / "a.png")
    photo(tmp_path / "train" / "__MACOSX" / "a.png")
    assert find_dataset(str(tmp_path)) == tmp_path
    train, val_split = read_splits([tmp_path])
    assert train.classes == {"class": ("dress", "top")} and labels_of(train, "class") == [0, 0, 0, 1, 1, 1]
    assert train.samples[2].name == "dress/more/a.png" and train.samples[0].csv == tmp_path / "train"
    assert labels_of(val_split, "class") == [0, 0, 1, 1, 1]
    test = read_split(tmp_path, "test", train.classes)
    assert test.labelled == ("class",) and len(test.samples) == 5
    header, rows = read_table(tmp_path, "train", {})
    assert header == ["image_name", "class"]
    assert rows[0][0] == ["dress/0.png", "dress"] and rows[0][1].name == "dress/0.png"


def test_a_flat_test_folder_has_no_labels(tmp_path):
    class_folders(tmp_path / "train", {"top": 3, "dress": 2})
    photo(tmp_path / "test" / "a.png")
    test = read_split(tmp_path, "test", {"class": ("dress", "top")})
    assert test.labelled == () and [sample.name for sample in test.samples] == ["a.png"]
    assert read_table(tmp_path, "test", {})[1][0][0] == ["a.png", ""]


@pytest.mark.parametrize("names", ["Train Val Test", "TRAIN Validation TEST", "training valid testing"])
def test_splits_are_folders_in_any_case(tmp_path, names):
    for name in names.split():
        class_folders(tmp_path / name, {"top": 3, "dress": 2})
    train, val = read_splits([tmp_path])
    assert train.classes == {"class": ("dress", "top")} and (len(train.samples), len(val.samples)) == (5, 5)
    assert len(read_split(tmp_path, "test", train.classes).samples) == 5


def test_other_folders_beside_class_folders_are_no_classes(tmp_path):
    """Those of other splits, and what train.py wrote in the same place."""
    class_folders(tmp_path, {"top": 12, "dress": 12})
    photo(tmp_path / "runs" / "a" / "curves.png")
    photo(tmp_path / "test" / "a.png")
    assert find_dataset(str(tmp_path)) == tmp_path
    train, val = read_splits([tmp_path])
    assert train.classes == {"class": ("dress", "top")} and len(train.samples) + len(val.samples) == 24
    assert [sample.name for sample in read_split(tmp_path, "test", train.classes).samples] == ["a.png"]
    class_folders(tmp_path / "val", {"top": 1, "dress": 1})
    train, val = read_splits([tmp_path])
    assert (len(train.samples), len(val.samples)) == (24, 2)


def test_a_column_called_class_holds_numbers(dataset):
    write(dataset, [HEADER.replace("Daily", "class"), *ROWS, ROWS[0].replace(",1,2,0", ",-1,2,0")])
    with pytest.raises(ValueError, match=r"class is -1, not a whole number in 0\.\.999"):
        read_split(dataset, "train")


@pytest.mark.parametrize("name", ["1001", "1.5", "-1"])
def test_other_numbers_as_class_folders_are_names(tmp_path, name):
    class_folders(tmp_path / "train", {name: 2, "90": 2})
    class_folders(tmp_path / "val", {name: 2})
    train, val = read_splits([tmp_path])
    assert train.classes["class"] == (name, "90") and labels_of(train, "class") == [0, 0, 1, 1]
    assert labels_of(val, "class") == [0, 0]


def test_numbers_as_class_folders(tmp_path):
    class_folders(tmp_path / "train", {"0": 2, "1": 2, "10": 2})
    class_folders(tmp_path / "val", {"01": 2})
    train, val = read_splits([tmp_path])
    assert train.classes["class"] == tuple(map(str, range(11))) and labels_of(train, "class") == [0, 0, 1, 1, 10, 10]
    assert labels_of(val, "class") == [1, 1]


PREPARATION = {"background_color": [0, 0, 0], "keep_background": True, "crop": "bbox", "box_margin": 0.0}
PREPARATION |= {"rembg_model": "u2netp", "checksum": "sha256:0", "weights_bytes": 1}


@pytest.mark.parametrize("names", [("0_1", "23", "2_3"), ("01", "02", "10"), ("1950", "1960", "7")])
def test_class_folders_in_ages_and_years_are_words_after_preprocess_too(tmp_path, names):
    for root in ("Raw", "Kept"):
        class_folders(tmp_path / root / "train", dict.fromkeys(names, 2))
        class_folders(tmp_path / root / "val", dict.fromkeys(names, 1))
    rows = [f"{name}/{i}.png,{name}" for name in names for i in range(2)]
    write(tmp_path / "Kept", ["image_name,class", *rows])
    (tmp_path / "Kept/preprocess.json").write_text(json.dumps({"preparation": PREPARATION, "unfinished": []}))
    for roots in (["Raw"], ["Kept"], ["Raw", "Kept"]):
        train, _ = read_splits([tmp_path / root for root in roots])
        assert train.classes["class"] == names


def test_a_prepared_csv_with_numbers_has_numbers(dataset):
    """preprocess.py writes class folders into a column `class`; one that was there before holds what it held."""
    (dataset / "preprocess.json").write_text(json.dumps({"preparation": PREPARATION, "unfinished": []}))
    header = HEADER.replace("Daily", "class").replace("Gender", "Kind")
    write(dataset, [header, *(row.replace(",1,2,0", ",1.0,2.0,0") for row in ROWS)])
    split = read_split(dataset, "train")
    assert split.classes["class"] == ("0", "1", "2") and split.classes["Kind"] == tuple("01234")


def test_a_box_of_one_pixel_in_the_corner(dataset):
    write(dataset, [HEADER, *(row.replace("10,12,200,240", "0,0,1,1") for row in ROWS)])
    assert read_split(dataset, "train").samples[0].boxes["bbox"] == (0, 0, 1, 1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_photos_that_are_seen_whole_for_want_of_a_box_are_counted(dataset, run, split):
    rows = {name: [HEADER, *ROWS] for name in ("train", "val")}
    for name, lines in rows.items():
        without = [lines[0], lines[1].replace("10,12,200,240", ",,,"), *lines[2:]]
        write(dataset, without if name == split else lines, name)
    done = run("train", "--data", dataset, *TINY, "--epochs", 1, "--name", "a")
    assert done.code == 0, done.err
    kind = {"train": "training", "val": "validation"}[split]
    assert f"1 {kind} photos have no bbox box: they are seen whole" in done.out and done.out.count("seen whole") == 1
    done = run("predict", "runs/a/best.pt", "--split", split)
    assert "1 of these photos have no bbox box: they are seen whole" in done.out


def test_photos_beside_class_folders(tmp_path, capfd):
    class_folders(tmp_path / "train", {"a": 2, "b": 2})
    class_folders(tmp_path / "val", {"a": 1, "b": 1})
    photo(tmp_path / "train/loose.png")
    class_folders(tmp_path / "test", {"originals": 1})
    photo(tmp_path / "test/one.png")
    train = read_split(tmp_path, "train")
    assert len(train.samples) == 4
    assert "train: 1 photos lie in no class folder and are left out, first loose.png" in capfd.readouterr().out
    shutil.rmtree(tmp_path / "val")
    read_splits([tmp_path])
    assert capfd.readouterr().out.count("lie in no class folder") == 1  # training and validation are of one folder
    test = read_split(tmp_path, "test", train.classes)
    assert [(sample.name, sample.labels["class"]) for sample in test.samples] == [
        ("one.png", -1),
        ("originals/0.png", -1),
    ]


def test_a_csv_that_is_not_read_is_named(tmp_path, capfd):
    class_folders(tmp_path / "train", {"1209": 2, "1906": 2})
    (tmp_path / "Train.CSV").write_text("image_name,Daily\n1209/0.png,1\n")
    read_splits([tmp_path])
    out = capfd.readouterr().out
    assert out.count("is not read") == 1 and "Train.CSV is not read" in out and "Fashion-How24_sub1_train.csv" in out
    (tmp_path / "Train.CSV").rename(tmp_path / "Fashion-How24_sub1_train.CSV")
    with pytest.raises(ValueError, match=r"sub1_train\.CSV should be spelt Fashion-How24_sub1_train\.csv"):
        read_splits([tmp_path])


@pytest.mark.parametrize(
    "lines, says",
    [
        ([HEADER, ROWS[0].replace("10,12,200,240", "0.1,0.06,0.9,0.7")], "0.1; 0.06; 0.9; 0.7 is in fractions"),
        ([HEADER.replace("BBox_", ""), *ROWS], "the column xmin should be spelt BBox_xmin"),
        ([HEADER, f"train/{ROWS[0]}"], "no image .*train/train/"),
        ([HEADER], "holds no rows; add some, or delete the file"),
    ],
)
def test_mistakes_in_a_csv(dataset, lines, says):
    write(dataset, lines)
    with pytest.raises(ValueError, match=says):
        read_split(dataset, "train")


def test_an_unfinished_copy_is_not_trained_on(tmp_path, run):
    for root in ("Raw", "Kept"):
        class_folders(tmp_path / root / "train", {"a": 3, "b": 3})
    Path("Kept/preprocess.json").write_text(json.dumps({"preparation": PREPARATION, "unfinished": ["train"]}))
    for args in (("train", "--data", "Kept", "--data", "Raw"), ("data", "Kept")):
        done = run(*args)
        assert done.code == 1 and "Kept is unfinished" in done.err, done


def test_class_folders_that_are_none(tmp_path, capfd):
    class_folders(tmp_path / "train", {"top": 3, "dress": 2})
    class_folders(tmp_path / "val", {"top": 3, "hat": 2})
    with pytest.raises(ValueError, match="classes of class that training does not have: hat"):
        read_splits([tmp_path])
    (tmp_path / "train" / "hat").mkdir()
    with pytest.raises(ValueError, match=r"train/hat holds no photos \(.*\); add some, or take it out"):
        read_split(tmp_path, "train")
    (tmp_path / "train" / "hat" / "a.heic").write_bytes(b"x")
    photo(tmp_path / "train" / "hat" / "b.png")
    photo(tmp_path / "train" / "loose.png")
    assert len(read_split(tmp_path, "train").samples) == 6
    assert "cannot be read are left out; save them as JPEG: a.heic" in capfd.readouterr().out
    class_folders(tmp_path / "train", {"Hat": 1})
    with pytest.raises(ValueError, match="'Hat' and 'hat' differ by case"):
        read_split(tmp_path, "train")


def test_what_is_no_dataset(dataset, tmp_path):
    for data, says in (
        (dataset / "Fashion-How24_sub1_train.csv", f"is a part of a dataset; give its folder, {dataset}"),
        (dataset / "train", f"is a part of a dataset; give its folder, {dataset}"),
        (dataset / "gone", "does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            find_dataset(str(data))
    with pytest.raises(FileNotFoundError, match=r"should hold Fashion-How24_sub2_train.csv \(of --subtask 2\)"):
        find_dataset(str(dataset), 2)
    photo(tmp_path / "flat" / "train" / "a.png")
    photo(tmp_path / "flat" / "test" / "a.png")
    photo(tmp_path / "one" / "shirts" / "a.png")
    for name in ("flat", "one"):
        with pytest.raises(FileNotFoundError, match=r"two class folders or more.*--data demo"):
            find_dataset(str(tmp_path / name))


def test_csvs_win_over_class_folders(dataset):
    photo(dataset / "train" / "dress" / "a.png")
    photo(dataset / "train" / "top" / "a.png")
    assert len(read_split(dataset, "train").samples) == 4


# ---------------------------------------------------------------- validation that is held out


def held_out(root: Path) -> tuple[set[str], set[str]]:
    train, val = read_splits([root])
    return {sample.name for sample in train.samples}, {sample.name for sample in val.samples}


def test_a_tenth_of_each_class_is_held_out(tmp_path, capfd):
    root = class_folders(tmp_path / "plain", {"top": 40, "dress": 20, "hat": 1, "cap": 2})
    assert find_dataset(str(root)) == root
    train, val = held_out(root)
    assert len(train | val) == 63 and not train & val
    assert {word: sum(name.startswith(word) for name in val) for word in ("top", "dress", "hat", "cap")} == {
        "top": 4,
        "dress": 2,
        "hat": 0,
        "cap": 1,
    }
    assert "7 of 63 training photos are held out" in capfd.readouterr().out
    split = read_split(root, "val", read_split(root, "train").classes)
    assert {sample.name for sample in split.samples} == val  # read alone
    assert {cells[0] for cells, _ in read_table(root, "val", {})[1]} == val  # for preprocess.py
    moved = tmp_path / "moved"
    root.rename(moved)
    assert held_out(moved) == (train, val)


def test_photos_that_belong_together_are_held_out_together(tmp_path):
    for garment in range(30):
        for n in (1, 2):
            photo(tmp_path / "train" / "top" / f"BO{garment:05}-{n}.png", garment * 2 + n)
        photo(tmp_path / "train" / "dress" / f"a{garment}.png", 1000 + garment // 3)  # three copies each
    train, val = held_out(tmp_path)
    assert len(val) >= 9
    for garment in range(30):
        pair = {f"top/BO{garment:05}-{n}.png" for n in (1, 2)}
        assert pair <= train or pair <= val
        copies = {f"dress/a{i}.png" for i in range(garment // 3 * 3, garment // 3 * 3 + 3)}
        assert copies <= train or copies <= val


def test_a_csv_without_validation(dataset):
    names = [photo(dataset / "train" / f"n{i}.png", i).name for i in range(60)]
    rows = [f"{name},{i % 3},{'dress' if i % 2 else 'top'},{'rare' if i == 7 else 'x'}" for i, name in enumerate(names)]
    write(dataset, ["image_name,Tone,Kind,Mark", *rows])
    (dataset / "Fashion-How24_sub1_val.csv").unlink()
    train, val = read_splits([dataset])
    assert len(train.samples) + len(val.samples) == 60 and 4 <= len(val.samples) <= 6
    assert "n7.png" in {sample.name for sample in train.samples} and val.csv.name == "Fashion-How24_sub1_val.csv"
    assert train.classes["Mark"] == ("rare", "x")
    both, _ = read_splits([dataset], fit_all=True)
    assert sorted(sample.name for sample in both.samples) == sorted(names)


# ---------------------------------------------------------------- what spoils a result


def test_what_an_earlier_dataset_holds_out_is_said(tmp_path, capfd):
    roots = [class_folders(tmp_path / name, {"top": 20, "dress": 20}) for name in ("A", "B")]
    train, val = read_splits(roots)
    assert len(train.samples) == 72 and len(val.samples) == 4
    assert f"{roots[0]}: no validation; 4 of its photos are held out, and" in capfd.readouterr().out


def test_validation_without_any_class_is_refused(dataset, run):
    write(dataset, [HEADER, *(row.rsplit(",", 3)[0] + ",,," for row in ROWS)], "val")
    with pytest.raises(ValueError, match=r"val\.csv: no row has a known class"):
        read_splits([dataset])
    assert len(read_splits([dataset], fit_all=True)[0].samples) == 8
    done = run("data", dataset)
    assert done.code == 1 and "val.csv: no row has a known class" in done.err
    write(dataset, [HEADER, *(row[:-5] + row[-4:] for row in ROWS)], "val")
    done = run("data", dataset)
    assert done.code == 0 and "no row of val has a known class of Daily: scores are of the other labels" in done.out


def test_rows_that_repeat_a_photo(dataset, run):
    write(dataset, [HEADER, *ROWS, ROWS[0], ROWS[1].replace("10,12", "20,12")])  # the second: another garment in it
    done = run("data", dataset)
    assert "note: 1 of 6 train rows repeat another row's photo" in done.out and "see the notes above" in done.out


def test_a_link_to_nothing_is_a_wrong_row(tmp_path):
    root = class_folders(tmp_path, {"top": 12, "dress": 12})
    (root / "top" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(ValueError, match=r"1 of 21 rows are wrong\n.*no image .*top/gone\.png"):
        read_splits([root])


def test_photos_in_training_and_validation(dataset, run):
    for name in NAMES[:3]:
        (dataset / "val" / name).write_bytes((dataset / "train" / name).read_bytes())
    train, val = read_splits([dataset])
    assert [(a.name, b.name) for a, b in shared_photos(train, val)] == [(name, name) for name in NAMES[:3]]
    done = run("data", dataset)
    assert done.code == 0 and "3 of 4 val photos are training photos too" in done.out
    assert "nothing wrong" not in done.out


def test_two_labels_for_one_photo(dataset, run):
    write(dataset, [HEADER, *ROWS, ROWS[0].replace(",1,2,0", ",3,2,0"), ROWS[1].replace(",1,2,0", ",,2,0")])
    (doubt,) = find_doubts("train", read_split(dataset, "train"))
    assert doubt.startswith("two labels for one photo, 1 times in train") and len(doubt.splitlines()) == 2
    done = run("data", dataset)
    assert done.code == 0 and "line 2 (1209/BO00001-1.jpg) and Fashion-How24_sub1_train.csv, line 6" in done.out
    assert "nothing wrong" not in done.out


def test_describe_class_folders(run, tmp_path):
    class_folders(tmp_path / "own", {"top": 40, "dress": 20})
    done = run("data", tmp_path / "own")
    assert done.code == 0 and "6 of 60 training photos are held out" in done.out
    assert "train: 54 rows" in done.out and "val: 6 rows" in done.out and "no test split" in done.out


# ---------------------------------------------------------------- folders of photos


def test_a_damaged_photo_of_a_class_folder_is_named_once(run, tmp_path):
    class_folders(tmp_path / "train", {"a": 3, "b": 3})
    path = tmp_path / "train" / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:-60])
    done = run("data", tmp_path, "--all")
    assert done.code == 1 and done.err.count(f"{path}") == 1 and "is damaged" in done.err, done.err


def test_a_folder_of_photos_with_other_things(tmp_path):
    photos = tmp_path / "photos"
    good = [photo(photos / "a.JPG"), photo(photos / "b" / "c.png")]
    photo(tmp_path / "elsewhere" / "d.webp")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "linked" / "back").symlink_to(photos)  # without end
    for hidden in ("._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/._a.jpg", "Thumbs.db", "notes.txt"):
        (photos / hidden).parent.mkdir(exist_ok=True)
        (photos / hidden).write_bytes(b"x")
    split, problems = image_samples([str(photos)])
    assert [Path(s.path) for s in split.samples] == [*good, photos / "linked" / "d.webp"] and problems == []
    (photos / "e.heic").write_bytes(b"x")
    (photos / "f.jpg").write_bytes(b"x")
    (photos / "g.jpg").symlink_to(photos / "gone.jpg")
    split, problems = image_samples([str(photos), str(good[0])])
    assert len(split.samples) == 3 and len(problems) == 3
    assert "e.heic" in problems[0] and "save it as JPEG" in problems[0] and "f.jpg" in problems[1]
    assert "g.jpg" in problems[2]


def test_photos_of_which_none_can_be_read(tmp_path):
    (tmp_path / "e.heic").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for inputs, says in (
        (["e.heic"], r"e\.heic is no image that can be read"),
        (["empty"], "no images in this folder"),
    ):
        with pytest.raises(ValueError, match=says):
            image_samples([str(tmp_path / name) for name in inputs])
    with pytest.raises(FileNotFoundError, match=r"gone.jpg: no such image or folder"):
        image_samples([str(tmp_path / "gone.jpg")])


def test_two_photos_that_would_be_one_file_of_a_copy(tmp_path):
    for i, name in enumerate(("a.gif", "a.gif.png")):
        photo(tmp_path / "train" / name, i)
    write(tmp_path, ["image_name,Kind", "a.gif,0", "a.gif.png,1", "a.gif,0"])
    _, photos, problems = read_photos(tmp_path, ["train"], 1)
    assert len(photos) == 1 and len(problems) == 1
    assert "a.gif.png" in problems[0] and "the same file as a.gif; rename one" in problems[0]
