"""From CSVs or class folders to samples. By itself it describes and checks a dataset:

    python data.py Dataset            # or `demo`; --all decodes every photo

A dataset is a folder of one of two layouts:
- CSVs: Fashion-How24_sub1_{train,val,test}.csv beside train/, val/ and test/ with the photos. The columns image_name,
  BBox_* and Mask_* have their meaning; every other column is a label, in whole numbers or in words.
- Class folders: train/CLASS/photo, with val/ and test/ alike; or plain ROOT/CLASS/photo. The only label is `class`.
Without validation, a tenth of the training photos is held out.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cli import OFF, Debug, command, examples, note, progress, run_app, say, show_table
from photos import SUFFIXES, Box, box_size, clip_box, load_photo, move_into, open_image, photo_region, upright_size

SPLITS = ("train", "val", "test")
# In lower or upper case
FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
CLASS_NAMES = {  # the organisers' labels: in a CSV their classes are numbers or these words
    "Daily": ("loungewear", "light outing", "office", "formal", "event", "sportswear"),
    "Gender": ("mannish", "unisex", "girlish", "elegant", "sexy"),
    "Embellishment": ("none", "point", "lots"),
}
BOX_COLUMNS = {  # the organisers' boxes, and those of the foreground that preprocess.py found
    "bbox": ("BBox_xmin", "BBox_ymin", "BBox_xmax", "BBox_ymax"),
    "mask": ("Mask_xmin", "Mask_ymin", "Mask_xmax", "Mask_ymax"),
}
BOX = "box"  # the box head's name among the heads; no label may have it
NUMBERS = tuple(map(str, range(1000)))  # the classes that a label in numbers can have
PREPARED = "preprocess.json"  # in a dataset that preprocess.py wrote
UNREADABLE = (".heic", ".heif", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg", ".jxl", ".jp2")
NO_CLASSES = ("nan", "n/a", "#n/a", "null")  # what programs write for an empty cell: rows with these are wrong
HIDDEN = (".", "__MACOSX", "@eaDir", "Thumbs.db")  # names that begin so are left out

Classes = dict[str, tuple[str, ...]]  # what the column of a label held for each class: "0", "1", ... or words


@dataclass(frozen=True, slots=True)
class Sample:
    """One photo of a split. Class indices of labels that are not known are -1."""

    name: str  # in predictions: the CSV's image_name, or CLASS/file
    path: str
    where: str  # in error messages
    csv: Path  # the CSV that it comes from, or ROOT/SPLIT for class folders
    boxes: dict[str, Box]  # by view, (xmin, ymin, xmax, ymax) in pixels of the upright photo
    labels: dict[str, int]
    size: tuple[int, int] = (0, 0)  # width and height of the upright photo, once its header was read

    def problem(self, error: ValueError) -> ValueError:
        """The error, which names the photo, with the row that it is of."""
        return error if self.where == self.path else ValueError(f"{self.where}: {error}")


@dataclass(frozen=True)
class Split:
    """The samples of a split, whose photos' headers were read. `labelled`: the labels that the split itself gives."""

    csv: Path
    samples: list[Sample]
    classes: Classes
    labelled: tuple[str, ...]
    fingerprint: str  # a hash of the CSV and of the photos' names and sizes in bytes
    clipped: int = 0  # rows whose boxes reached beyond their photos

    def has(self, view: str) -> bool:
        return view == "full" or any(view in sample.boxes for sample in self.samples)


Rows = list[tuple[list[str], Sample | ValueError]]  # the cells of each row, and its sample or what is wrong with it


@dataclass(frozen=True)
class _Source:
    """A split's cells before its classes are known, each row with the place that errors name."""

    root: Path
    folder: Path
    header: list[str]
    lines: list[tuple[str, list[str]]]
    boxes: dict[str, tuple[str, ...]]
    labels: list[str]
    digest: bytes
    csv: Path = Path()
    split: str = ""
    held_out: bool = False  # train and val are parts of the same rows

    def column(self, name: str) -> list[str]:
        at = self.header.index(name)
        return [cells[at] for _, cells in self.lines]


def find_dataset(data: str, subtask: int = 1, flag: str = "--data") -> Path:
    """The folder of a dataset; draws the built-in one for `demo`. Raises FileNotFoundError with the layout expected."""
    if data == "demo":
        import demo

        root = demo.cached()
    else:
        root = Path(data)
    is_inside = root.name.lower() in chain(*FOLDERS.values()) and any(root.parent.glob("Fashion-How24_sub*.csv"))
    if data and not is_inside and splits_of(root, subtask):
        return root
    problem = "holds no dataset"
    if root.is_file() or is_inside:
        problem = f"is a part of a dataset; give its folder, {root.parent}"
    elif not root.exists():
        problem = f"does not exist (where it was moved, {flag} says its new place)"
    table = f"{csv_name('train', subtask)} (of --subtask {subtask}) beside train/ with its photos"
    layout = f"{table}, or two class folders or more (train/CLASS/photo.jpg)"
    raise FileNotFoundError(f"{flag} {data} {problem}; it should hold {layout}; {flag} demo is the built-in set")


def splits_of(root: Path, subtask: int = 1) -> dict[str, Path]:
    """Each split's CSV or folder of class folders. Validation that will be held out of training has training's."""
    tables = {split: root / csv_name(split, subtask) for split in SPLITS}
    found = {split: path for split, path in tables.items() if path.is_file()}
    if not found and root.is_dir() and not any(root.glob("Fashion-How24_sub*.csv")):
        folders = {split: photo_folder(root, split) for split in SPLITS}
        found = {split: folder for split, folder in folders.items() if folder.is_dir()}
        with_photos = (folder for folder in _class_folders(root, root) if find_photos(folder))
        if "train" not in found and len([*islice(with_photos, 2)]) == 2:  # two tell: each is walked whole
            found["train"] = root
        if not any(_class_folders(folder, root) for folder in found.values()):
            found = {}
    if "train" in found:
        found.setdefault("val", found["train"])
    return found


def photo_folder(root: Path, split: str) -> Path:
    folders = {path.name.lower(): path for path in (_subfolders(root) if root.is_dir() else ())}
    return next((folders[name] for name in FOLDERS[split] if name in folders), root / split)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(HIDDEN))


def _class_folders(folder: Path, root: Path) -> list[Path]:
    """The class folders of a split; beside them in a dataset's own folder lie other splits, and runs of train.py."""
    others = {*chain(*FOLDERS.values()), "runs"} if folder == root else ()
    return [path for path in _subfolders(folder) if path.name.lower() not in others]


def record_of(root: Path) -> dict | None:
    """The content of preprocess.json; None where there is none. Raises ValueError where it is damaged."""
    path = root / PREPARED
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"preparation": dict(record["preparation"]), "unfinished": list(record["unfinished"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged; delete {root} and make it again") from None


def read_preparation(root: Path) -> dict | None:
    """What preprocess.py did to this dataset's photos, or None. Raises ValueError where it is damaged or unfinished."""
    record = record_of(root)
    if record and record["unfinished"]:
        raise ValueError(f"{root} is unfinished; start the same preprocess.py command again to complete it")
    return record["preparation"] if record else None


def needs_remover(preparation: dict | None, view: str) -> bool:
    """Whether a photo without a CSV box must go through rembg to be prepared like this and seen in this view."""
    prepared = preparation is not None and (not preparation["keep_background"] or preparation["crop"] != "none")
    return view == "mask" or prepared


def submission_column(label: str) -> str:
    """The column of a label in the organisers' format."""
    return "embel" if label == "Embellishment" else label.lower()


def class_names(label: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """What people are shown for the classes of a label."""
    return CLASS_NAMES.get(label, classes)


def csv_name(split: str, subtask: int = 1) -> str:
    return f"Fashion-How24_sub{subtask}_{split}.csv"


def list_problems(title: str, problems: Sequence[str]) -> str:
    """One message for all that is wrong: the first 20 problems, the others counted."""
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n  ".join([title, *problems[:20], *more])


def _some(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def read_split(
    root: Path, split: str, classes: Classes | None = None, subtask: int = 1, problems: list[str] | None = None
) -> Split:
    """Read and check one split: every row, and every photo's header.

    `classes` are those of training, for val and test (other labels are ignored); None finds them here. Raises
    FileNotFoundError without the split, ValueError with all that is wrong; `problems` takes wrong rows instead.
    """
    source = _read_source(root, split, subtask)
    return _to_split(source, _find_classes([source]) if classes is None else classes, problems)


def read_splits(roots: Sequence[Path], subtask: int = 1, fit_all: bool = False) -> tuple[Split, Split]:
    """The train splits of all datasets as one, and the last one's val split. `fit_all` trains on all val splits too."""
    train = [_read_source(root, "train", subtask) for root in roots]
    val = [_read_source(root, "val", subtask) for root in (roots if fit_all else roots[-1:])]
    classes = _find_classes(train, val if fit_all else ())
    train_splits = [_to_split(source, classes) for source in train]
    val_splits = [_to_split(source, classes) for source in val]
    for source, split in zip(train[:-1], train_splits):
        if source.held_out and not fit_all:
            n = len(source.lines) - len(split.samples)
            note(f"{source.root}: no validation; {n:,} of its photos are held out, and validation is of {roots[-1]}")
    if not fit_all and (problem := _without_classes(val_splits[-1])):
        raise ValueError(problem)
    return join_splits(train_splits + (val_splits if fit_all else [])), val_splits[-1]


def _without_classes(val: Split) -> str | None:
    """What is wrong where no row of validation has a known class."""
    if any(c >= 0 for sample in val.samples for c in sample.labels.values()):
        return None
    return f"{val.csv}: no row has a known class; without this split, a tenth of training is held out for validation"


def join_splits(splits: Sequence[Split]) -> Split:
    """The samples of several splits, in order, as one; their classes are the same."""
    last = splits[-1]
    if len(splits) == 1:
        return last
    samples = [sample for split in splits for sample in split.samples]
    fingerprint = hashlib.sha256("".join(split.fingerprint for split in splits).encode()).hexdigest()
    return Split(last.csv, samples, last.classes, last.labelled, fingerprint, sum(split.clipped for split in splits))


def read_table(root: Path, split: str, classes: Classes, subtask: int = 1) -> tuple[list[str], Rows]:
    """A split's columns and rows. No photo is opened; {} as `classes` reads no labels.

    Raises FileNotFoundError without the split, ValueError where it is no table.
    """
    source = _read_source(root, split, subtask)
    return source.header, _read_rows(source, classes)


def image_samples(inputs: Sequence[str]) -> tuple[Split, list[str]]:
    """Photos and folders of photos as an unlabelled split, and what is wrong with the others.

    Raises FileNotFoundError where an input does not exist, ValueError where no photo can be read.
    """
    photos, problems, samples = [], [], []
    for given in inputs:
        if not os.path.isfile(given) and not os.path.isdir(given):
            raise FileNotFoundError(f"{given}: no such image or folder")
        found = find_photos(Path(given)) if os.path.isdir(given) else [Path(given)]
        if not found:
            problems.append(f"{given}: no images in this folder ({', '.join(SUFFIXES)})")
        photos += found
    for path in dict.fromkeys(photos):
        checked = check_header(Sample(str(path), str(path), str(path), Path(inputs[0]), {}, {}))
        if isinstance(checked, Sample):
            samples.append(checked)
        else:
            problems.append(f"{checked}; save it as JPEG" if path.suffix.lower() in UNREADABLE else str(checked))
    if not samples:
        raise ValueError(problems[0] if len(problems) == 1 else list_problems("no image can be used", problems))
    return Split(Path(inputs[0]), samples, {}, (), ""), problems


def check_header(sample: Sample) -> Sample | ValueError:
    """The sample with its size and its boxes clipped to the photo, or what is wrong with it. Decodes nothing."""
    try:
        with open_image(sample.path) as image:
            size = upright_size(image)
        region = photo_region(*size)
        boxes = {view: move_into(clip_box(box, *size), region) for view, box in sample.boxes.items()}
    except ValueError as error:
        return sample.problem(error)
    return replace(sample, boxes={view: box for view, box in boxes.items() if box}, size=box_size(region))


def _to_split(source: _Source, classes: Classes, problems: list[str] | None = None) -> Split:
    rows = _read_rows(source, classes)
    samples, wrong, clipped = [], [], 0
    digest = hashlib.sha256(source.digest)
    for _, row in rows:
        checked = check_header(row) if isinstance(row, Sample) else row
        if isinstance(checked, ValueError):
            wrong.append(str(checked))
            continue
        samples.append(checked)
        clipped += checked.boxes != row.boxes
        digest.update(os.fsencode(f"{checked.name}\0{os.path.getsize(checked.path)}\n"))
    if problems is not None:
        problems += wrong
    elif wrong:
        raise ValueError(list_problems(f"{source.csv}: {len(wrong)} of {len(rows)} rows are wrong", wrong))
    labelled = tuple(label for label in classes if label in source.labels)
    return Split(source.csv, samples, classes, labelled, digest.hexdigest(), clipped)


# ---------------------------------------------------------------- reading CSVs and folders


def find_photos(folder: Path) -> list[Path]:
    """The photos in a folder and below it, links followed, with the files and folders that cannot be read."""
    found, visited, errors = [], set(), []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=errors.append):
        real = os.path.realpath(parent)
        if real in visited:  # a link led to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        paths = [Path(parent, name) for name in files if not name.startswith(HIDDEN)]
        found += [path for path in paths if path.suffix.lower() in SUFFIXES + UNREADABLE]
    return sorted([*found, *(Path(error.filename) for error in errors)])


def _read_source(root: Path, split: str, subtask: int) -> _Source:
    """Read a split's CSV or list its class folders; without validation, train and val both get training's rows."""
    read_preparation(root)  # an unfinished one is no dataset
    found, path = splits_of(root, subtask), root / csv_name(split, subtask)
    if split not in found:
        raise FileNotFoundError(f"{path}: no such file ({command('data.py', root)} shows what is there)")
    held_out = split != "test" and found.get("train") == found.get("val")
    if found[split].is_dir():
        train_csv = csv_name("train", subtask)
        tables = sorted(path for path in root.iterdir() if re.search(r"train.*\.csv$", path.name, re.IGNORECASE))
        if misspelt := [table for table in tables if table.name.lower() == train_csv.lower()]:
            raise ValueError(f"{misspelt[0]} should be spelt {train_csv}")
        if split == "train" and tables:
            note(f"{tables[0]} is not read: the folders are the classes; labels are read from {train_csv}")
        path = root / split
        source = _list_class_folders(root, found[split], split == "test", is_again=held_out and split == "val")
    else:
        folder = photo_folder(root, "train" if held_out else split)
        source = _read_csv(root, folder, found[split], split == "test")
    source = replace(source, csv=path, split=split, held_out=held_out)
    return replace(source, labels=_usable_labels(source)) if split == "train" or held_out else source


def _list_class_folders(root: Path, folder: Path, is_test: bool, is_again: bool) -> _Source:
    """The photos of class folders as rows of image_name and class; photos of a flat test folder have no class.

    `is_again`: the same folder was listed for another split, with its notes.
    """
    class_folders = _class_folders(folder, root)
    if not class_folders and not is_test:
        raise ValueError(f"{folder} holds no class folders; put its photos into {folder}/CLASS/")
    lines, unreadable = [], []
    loose = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES] if class_folders else []
    loose = sorted(path for path in loose if path.is_file() and not path.name.startswith(HIDDEN))
    if is_test:
        lines += [(str(path), [path.name, ""]) for path in loose]
    elif loose and not is_again:
        note(f"{folder}: {len(loose):,} photos lie in no class folder and are left out, first {loose[0].name}")
    for class_folder in class_folders or [folder]:
        found = find_photos(class_folder)
        photos = [path for path in found if path.suffix.lower() not in UNREADABLE]
        unreadable += [path for path in found if path.suffix.lower() in UNREADABLE]
        if not photos:
            raise ValueError(f"{class_folder} holds no photos ({', '.join(SUFFIXES)}); add some, or take it out")
        word = unicodedata.normalize("NFC", class_folder.name) if class_folders else ""
        lines += [(str(path), [path.relative_to(folder).as_posix(), word]) for path in photos]
    if unreadable and not is_again:
        names = _some([path.name for path in unreadable])
        note(f"{folder}: photos of kinds that cannot be read are left out; save them as JPEG: {names}")
    return _Source(root, folder, ["image_name", "class"], lines, {}, ["class"] if class_folders else [], b"")


def _read_csv(root: Path, folder: Path, path: Path, is_test: bool) -> _Source:
    """Read a CSV as spreadsheets write them. Raises ValueError where it is none, or where its columns are wrong."""
    raw = path.read_bytes()
    encodings = ("utf-16",) if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig", "cp949")
    for encoding in encodings:
        with suppress(UnicodeDecodeError):
            text = raw.decode(encoding)
            break
    else:
        raise ValueError(f"{path}: neither UTF-8, UTF-16 nor CP949 (EUC-KR); export it as CSV in UTF-8")
    sep_line = re.match(r'"?sep=(.)', text, re.IGNORECASE)  # written for Excel
    first_line = text.lstrip().partition("\n")[0]
    delimiter = sep_line[1] if sep_line else max(",;\t|", key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a CSV row ({error})") from None
    rows = [(line, cells) for line, cells in rows[1 if sep_line else 0 :] if any(cells)]
    if len(rows) < 2:
        raise ValueError(f"{path}: holds no rows; add some, or delete the file")
    header = rows[0][1]
    named = [i for i, name in enumerate(header) if name and not name.startswith("Unnamed:")]
    lines = []
    for line, cells in rows[1:]:
        if any(header[len(cells) :]) or any(cells[len(header) :]):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells for {len(header)} columns")
        lines.append((f"{path.name}, line {line}", [cells[i] for i in named]))
    header = [header[i] for i in named]
    boxes, labels = _check_columns(path, header, lines, is_test)
    return _Source(root, folder, header, lines, boxes, labels, hashlib.sha256(raw).digest())


def _check_columns(path: Path, header: list[str], lines: list, is_test: bool) -> tuple[dict, list[str]]:
    """The box columns by view, and the label columns."""
    dummy = set()  # columns of a test CSV that tell nothing: all of several cells are alike, or the only one unknown
    for name, *column in zip(header, *(cells for _, cells in lines)):
        is_dummy = len(set(column)) == 1 and (len(column) > 1 or column[0] in ("", "-1"))
        if is_test and is_dummy and not name.startswith("Mask_"):
            dummy.add(name)
    ours = {name.lower(): name for name in ("image_name", *chain(*BOX_COLUMNS.values()))}
    ours |= {name.lower().removeprefix("bbox_"): name for name in BOX_COLUMNS["bbox"]}
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path}: the column {name} occurs more than once")
        if ours.get(name.lower(), name) not in header:
            raise ValueError(f"{path}: the column {name} should be spelt {ours[name.lower()]}")
    if "image_name" not in header:
        raise ValueError(f"{path}: no column image_name (columns: {', '.join(header)})")
    boxes = {}
    for view, names in BOX_COLUMNS.items():
        missing = [name for name in names if name not in header]
        if 0 < len(missing) < len(names):
            raise ValueError(f"{path}: no column {missing[0]}, though others of that box are there")
        if not missing and not dummy.issuperset(names):
            boxes[view] = names
    labels = [name for name in header if not name.startswith(("BBox_", "Mask_")) and name not in {"image_name", *dummy}]
    columns = Counter(["image_name", "mean", BOX, *map(submission_column, labels)])  # mean: a table's row
    for label in labels:
        if columns[submission_column(label)] > 1:
            raise ValueError(f"{path}: the label {label} has a name that the results need; rename it")
    return boxes, labels


def _number(cell: str) -> float:
    return float(cell.replace(",", ".")) if re.fullmatch(r"[+-]?\d+(\.\d*|,0{0,2})?([eE][+-]?\d+)?", cell) else math.nan


def _usable_labels(source: _Source) -> list[str]:
    """Training's label columns; sparse ones, taken for remarks, are left out. Raises ValueError for row numbers."""
    sparse, rows = [], len(source.lines)
    for label in source.labels:
        filled = [cell for cell in source.column(label) if cell]
        distinct = len(set(filled))
        if label != "class" and distinct > 50 and 2 * distinct > rows:
            problem = f"the column {label} has {distinct:,} values in {rows:,} rows"
            raise ValueError(f"{source.csv}: {problem}; is it a row number? take it out")
        if label not in CLASS_NAMES and 0 < 2 * len(filled) < rows:
            sparse.append(label)
    if sparse and source.split == "train":
        note(f"{source.csv}: left out, as over half of the cells are empty: {', '.join(sparse)}")
    return [label for label in source.labels if label not in sparse]


def _find_classes(train: Sequence[_Source], val: Sequence[_Source] = ()) -> Classes:
    """The classes of training's labels over several splits. Raises ValueError where a label is of no use."""
    path, labels = train[0].csv, train[0].labels
    if not labels:
        raise ValueError(f"{path}: no label column (any column but image_name, BBox_* and Mask_*)")
    for source in train:
        if set(source.labels) != set(labels):
            raise ValueError(f"{source.csv} has the labels {', '.join(source.labels)}; {path} has {', '.join(labels)}")
    are_folders = all(_is_of_folders(source) for source in train)
    classes = {}
    for label in labels:
        words = {cell for source in [*train, *val] for cell in source.column(label) if cell}
        if not words or (len(words) == 1 and label not in CLASS_NAMES):
            problem = f"the label {label} {'has the same class' if words else 'is empty'} in every row"
            raise ValueError(f"{path}: {problem}; remove the column, or add photos of other classes")
        words = {word for word in words if word.lower() not in NO_CLASSES}
        classes[label] = _classes_of(label, words, are_folders)
    return classes


def _is_of_folders(source: _Source) -> bool:
    """Whether the rows are of class folders: listed, or written by preprocess.py into a column `class`."""
    if not source.csv.is_file():
        return True
    if "class" not in source.labels or not (source.root / PREPARED).exists():
        return False
    folders = [unicodedata.normalize("NFC", name.partition("/")[0]) for name in source.column("image_name")]
    return folders == source.column("class")


def _classes_of(label: str, words: set[str], are_folders: bool) -> tuple[str, ...]:
    """Numbers up to the largest one, or the words in sorted order; folders are words where one is called 1950 or 01."""
    if label in CLASS_NAMES:
        return NUMBERS[: len(CLASS_NAMES[label])]
    numbers = [_number(word) for word in words]
    are_names = are_folders and label == "class" and not words <= set(NUMBERS)
    if not any(map(math.isnan, numbers)) and not are_names:
        possible = [number for number in numbers if 0 <= number < len(NUMBERS)]  # rows with others are wrong
        return NUMBERS[: int(max(possible, default=0)) + 1]
    _check_spelling(label, words)
    return tuple(sorted(words))


def _check_spelling(label: str, words: Iterable[str]) -> None:
    first: dict[str, str] = {}
    for word in sorted(words):
        other = first.setdefault("".join(_fold(word).split()), word)
        if other != word:
            raise ValueError(f"{label}: {other!r} and {word!r} differ by case or white space alone; spell them alike")


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _class_indices(source: _Source, label: str, classes: tuple[str, ...]) -> dict[str, int | ValueError]:
    """The class index of each text in a label's column, or what is wrong with it; -1 where it is not known."""
    column, are_numbers = source.column(label), classes == NUMBERS[: len(classes)]
    words = {word: c for c, word in enumerate(CLASS_NAMES.get(label, ()))}
    indices: dict[str, int | ValueError] = {"": -1} | words | {text: c for c, text in enumerate(classes)}
    for cell in set(column).difference(indices):  # 1.0 is 1, Office is office
        number = _number(cell)
        text = str(int(number)) if number.is_integer() else cell.lower()
        if are_numbers and text in indices:
            indices[cell] = indices[text]
    unknown = sorted(set(column).difference(indices))
    if unknown and source.split != "train":
        _check_spelling(label, {*classes, *unknown})
        problem = f"{source.csv}: classes of {label} that training does not have: {_some(unknown, 20)}"
        if source.split == "test":
            rows = sum(cell in unknown for cell in column)
            note(f"{problem}; their {rows:,} rows are predicted and not scored; add such photos to training")
            return indices | dict.fromkeys(unknown, -1)
        if label not in CLASS_NAMES:
            raise ValueError(f"{problem}; add such photos to training, take these rows out, or train with --fit-all")
    n = len(CLASS_NAMES.get(label, NUMBERS))
    expected = f"not a whole number in 0..{n - 1}" if are_numbers else "no class"
    remedy = "leave the cell empty where the class is not known, or take the column out if it is no label"
    return indices | {cell: ValueError(f"{label} is {cell}, {expected}; {remedy}") for cell in unknown}


def _read_rows(source: _Source, classes: Classes) -> Rows:
    """The rows of a split with their samples; of held-out validation, the part that is this split's."""
    for label in classes:
        if label not in source.labels and source.split != "test":
            raise ValueError(f"{source.csv}: no column {label}, a label of training; are both spelt alike?")
    indices = {label: _class_indices(source, label, classes[label]) for label in classes if label in source.labels}
    spellings: dict[str, list[str]] = {}
    rows: Rows = []
    for where, cells in source.lines:
        try:
            rows.append((cells, _parse_row(source, where, cells, indices, spellings)))
        except ValueError as error:
            rows.append((cells, ValueError(f"{where}: {error}")))
    if source.held_out:
        held_out = _choose_validation(source, rows)
        rows = [row for i, row in enumerate(rows) if (i in held_out) == (source.split == "val")]
    return rows


def _parse_row(source: _Source, where: str, cells: list[str], indices: dict, spellings: dict) -> Sample:
    row = dict(zip(source.header, cells))
    box_cells = {view: [row[column] for column in columns] for view, columns in source.boxes.items()}
    boxes = {view: _parse_box(cells) for view, cells in box_cells.items() if any(cells)}
    labels = {label: by_cell[row[label]] for label, by_cell in indices.items()}
    for error in labels.values():
        if isinstance(error, ValueError):
            raise error
    name = row["image_name"]
    path = _find_photo(source.folder, name, spellings)
    return Sample(name, path, where if where == path else f"{where} ({name})", source.csv, boxes, labels)


def _parse_box(cells: list[str]) -> Box:
    try:  # a decimal comma becomes a point; one before three digits may group thousands: such a cell is no number
        xmin, ymin, xmax, ymax = (float(re.sub(r",(\d{1,2}|\d{4,})$", r".\1", cell)) for cell in cells)
        box = (math.floor(xmin), math.floor(ymin), math.ceil(xmax), math.ceil(ymax))
    except (ValueError, OverflowError):
        raise ValueError(f"the box {'; '.join(cell or '(empty)' for cell in cells)} is not four numbers") from None
    if xmin >= xmax or ymin >= ymax:
        raise ValueError(f"the box {box} is empty or inverted; leave the four cells empty where there is no box")
    if max(xmax, ymax) <= 1 and box != (xmin, ymin, xmax, ymax):
        raise ValueError(f"the box {'; '.join(cells)} is in fractions of the photo; boxes are in pixels")
    return box


def _find_photo(folder: Path, name: str, spellings: dict[str, list[str]]) -> str:
    """The path of a photo, else of the one file that differs by case, Unicode form or image extension alone.

    `spellings`, filled at the first missing photo: all photos by their folded paths, with and without extension.
    """
    below = os.path.relpath(name, folder) if os.path.isabs(name) else name
    if ".." in re.split(r"[\\/]", below) or re.match(r"[\\/]|[A-Za-z]:[\\/]", below):
        raise ValueError(f"image_name {name!r} leaves the dataset folder")
    path = f"{folder}/{below}"
    if os.path.isfile(path):
        return path
    if not spellings:
        for photo in find_photos(folder):
            spelling = _fold(photo.relative_to(folder).as_posix())
            for key in (spelling, os.path.splitext(spelling)[0]):
                spellings.setdefault(key, []).append(str(photo))
    stem, suffix = os.path.splitext(_fold(below.replace("\\", "/")))
    of_other_type = spellings.get(stem, []) if suffix in SUFFIXES else []
    similar = spellings.get(stem + suffix, of_other_type)
    if len(similar) != 1 or not os.path.isfile(similar[0]):  # a link to nothing
        raise ValueError(f"no image {path}" if name else "image_name is empty")
    return similar[0]


# ---------------------------------------------------------------- the same photo twice


def garment(image: str) -> str:
    """`1209/BO00001` of `1209/BO00001-2.jpg`: photos of one garment share it. Another name stands for itself."""
    return re.sub(r"([A-Za-z]\d+)-\d{1,2}(\.\w+)?$", r"\1", image)


@cache
def _hash(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _contents(samples: Iterable[Sample]) -> dict[str, tuple[int, bytes]]:
    """For each path a key that files of the same bytes share; only files of equal size are read."""
    sizes = {path: os.path.getsize(path) for path in {sample.path for sample in samples}}
    count = Counter(sizes.values())
    return {path: (size, _hash(path) if count[size] > 1 else b"") for path, size in sizes.items()}


def shared_photos(train: Split, val: Split) -> list[tuple[Sample, Sample]]:
    """The samples of `val` whose photos are in `train` too, each after the first sample there of the same bytes."""
    contents = _contents(train.samples + val.samples)
    first = {contents[sample.path]: sample for sample in reversed(train.samples)}
    return [(first[contents[s.path]], s) for s in val.samples if contents[s.path] in first]


def find_doubts(name: str, split: Split, train: Split | None = None) -> list[str]:
    """What spoils a result, with the rows: photos of one split that `train` has too, photos with two labels."""
    doubts = []
    if train and (shared := shared_photos(train, split)):
        title = f"{len(shared):,} of {len(split.samples):,} {name} photos are training photos too; take them out of one"
        doubts.append(list_problems(title, [f"{b.where} is {a.where}" for a, b in shared]))
    pairs = shared_photos(split, split)
    if repeated := [(a, b) for a, b in pairs if a is not b and (a.boxes, a.labels) == (b.boxes, b.labels)]:
        title = f"{len(repeated):,} of {len(split.samples):,} {name} rows repeat another row's photo"
        doubts.append(list_problems(title, [f"{b.where} is {a.where}" for a, b in repeated]))
    unknown = [label for label in split.labelled if all(sample.labels[label] < 0 for sample in split.samples)]
    if name == "val" and 0 < len(unknown) < len(split.labelled):
        doubts.append(f"no row of val has a known class of {', '.join(unknown)}: scores are of the other labels")
    conflicts = []
    for a, b in pairs:
        if any(len({a.labels[label], b.labels[label]} - {-1}) == 2 for label in split.labelled):  # two known classes
            conflicts.append(f"{a.where} and {b.where}")
    if conflicts:
        title = f"two labels for one photo, {len(conflicts):,} times in {name}"
        doubts.append(list_problems(title, conflicts))
    return doubts


def note_doubts(train: Split, val: Split) -> None:
    """Say in a line each what spoils the result of a run."""
    for doubt in find_doubts("train", train) + find_doubts("val", val, train):
        first, *rows = doubt.splitlines()
        note(f"{first} (data.py names them)" if rows else first)


def _choose_validation(source: _Source, rows: Rows) -> set[int]:
    """The indices of the rows to hold out: a tenth of each class, by a hash of the path below the dataset.

    Photos of the same bytes and of one garment stay together, and half of each class or more stays in training.
    """
    samples = {i: sample for i, (_, sample) in enumerate(rows) if isinstance(sample, Sample)}
    columns = {label: source.column(label) for label in source.labels}
    classes = {i: [(label, column[i]) for label, column in columns.items() if column[i]] for i in samples}
    total, chosen = Counter(chain(*classes.values())), Counter()
    held_out: set[int] = set()
    for group in _groups(source.root, samples):
        counts = Counter(chain(*(classes[i] for i in group)))
        if counts and all(chosen[c] < total[c] / 10 and chosen[c] + n <= total[c] / 2 for c, n in counts.items()):
            held_out.update(group)
            chosen += counts
    if source.split == "val":
        if not held_out:
            raise ValueError(f"{source.root}: no validation, and too few photos to hold some out; add a val split")
        note(f"{source.root}: no validation; {len(held_out):,} of {len(rows):,} training photos are held out for it")
    return held_out


def _groups(root: Path, samples: dict[int, Sample]) -> list[list[int]]:
    """Indices of samples that belong together, in the order of a hash of their first path below `root`."""
    contents = _contents(samples.values())
    groups: dict[object, list[int]] = {}  # by garment and by content
    for i, sample in samples.items():
        group = groups.setdefault(contents[sample.path], [])
        other = groups.setdefault(garment(sample.path), group)
        group.append(i)
        if other is not group:  # this photo joins both
            group += other
            for member in other:
                path = samples[member].path
                groups[contents[path]] = groups[garment(path)] = group

    def path_hash(group: list[int]) -> bytes:
        first = min(Path(samples[i].path).relative_to(root).as_posix() for i in group)
        return hashlib.sha256(os.fsencode(first)).digest()

    return sorted({id(group): group for group in groups.values()}.values(), key=path_hash)


# ---------------------------------------------------------------- python data.py DATASET

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=examples(__doc__))
def describe(
    data: Annotated[str, typer.Argument(help="A dataset folder, or `demo`.")] = "Dataset",
    subtask: Annotated[int, typer.Option(min=1, max=2, help="Which sub-task's CSVs to read.")] = 1,
    all_images: Annotated[bool, typer.Option("--all", help="Decode every photo, not 200 a split.", **OFF)] = False,
    debug: Debug = False,
) -> None:
    """Describe and check a dataset: splits, rows, classes, photos, boxes. Exit code 1 where it cannot be used."""
    root = find_dataset(data, subtask, "DATA")
    say(f"{data}: {root}")
    splits: dict[str, Split] = {}
    problems, doubts = [], []
    for name in SPLITS:
        if name not in splits_of(root, subtask):
            note(f"no {name} split")
            continue
        unknown = {} if name == "test" else None  # the labels of a test split may be dummies
        classes = splits["train"].classes if "train" in splits else unknown
        try:
            splits[name] = split = read_split(root, name, classes, subtask)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        _describe_labels(name, split)
        if name == "val" and (problem := _without_classes(split)):
            problems.append(problem)
        problems += _describe_photos(name, split.samples, 1 if all_images else max(1, len(split.samples) // 200))
        doubts += find_doubts(name, split, splits.get("train") if name != "train" else None)
    for doubt in doubts:
        note(doubt)
    if "train" not in splits_of(root, subtask):
        problems.append(f"{csv_name('train', subtask)} is missing, or train/ with class folders")
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    say("it can be used, but see the notes above" if doubts else "nothing wrong found")


def _describe_labels(name: str, split: Split) -> None:
    labels = ", ".join(split.labelled) or ("none" if split.classes else "not looked at, as the training CSV gave none")
    n = len(split.samples)
    say(f"\n{name}: {n:,} rows, {'with' if split.has('bbox') else 'without'} boxes, labels: {labels}")
    rows, empty = [], []
    for label in split.labelled:
        counts = Counter(sample.labels[label] for sample in split.samples)
        texts = split.classes[label]
        words = [text if text == word else f"{text} {word}" for text, word in zip(texts, class_names(label, texts))]
        for c, word in [*enumerate(words), (-1, "(not known)")]:
            if counts[c] or c >= 0:
                rows.append([label, word, str(counts[c]), f"{counts[c] / n:.1%}"])
        empty += [f"{label} {text}" for c, text in enumerate(texts) if not counts[c]]
    if rows:
        show_table("classes", ["label", "class", "rows", "share"], rows)
    if empty:
        note(f"no row is of the class {_some(empty, 20)}")
    if split.clipped:
        note(f"{split.clipped:,} boxes reach beyond their photos and are cut to them; were the photos scaled since?")
    if split.has("bbox") and (without := sum("bbox" not in sample.boxes for sample in split.samples)):
        note(f"rows without a box: {without:,}")


def _describe_photos(name: str, samples: list[Sample], step: int) -> list[str]:
    """Print the photos' kinds and sizes, and decode one of `step`; returns what is wrong."""
    kinds, problems, chosen = Counter(), [], samples[::step]
    with progress(len(chosen), f"decoding {name}") as bar:
        for sample in chosen:
            try:
                with open_image(sample.path) as image:
                    kinds[f"{image.format} {image.mode}"] += 1
                load_photo(sample.path)
            except ValueError as error:
                problems.append(str(sample.problem(error)))
            bar.advance(1)
    decoded = f"{len(chosen):,} decoded" + (" (--all decodes every one)" if step > 1 else "")
    say(f"images: {decoded}; {', '.join(f'{kind} {n}' for kind, n in kinds.most_common())}")
    sizes = {"image": [sample.size for sample in samples]}
    for view in BOX_COLUMNS:
        sizes[view] = [box_size(sample.boxes[view]) for sample in samples if view in sample.boxes]
    quantiles = {view: np.quantile(pairs, (0, 0.5, 1), axis=0) for view, pairs in sizes.items() if pairs}
    rows = [[view, *(f"{w:.0f} x {h:.0f}" for w, h in table)] for view, table in quantiles.items()]
    show_table("width x height in pixels", ["of", "smallest", "median", "largest"], rows)
    title = f"{name}: {len(problems)} of {len(chosen)} decoded images are damaged"
    return [list_problems(title, problems)] if problems else []


if __name__ == "__main__":
    run_app(app)
