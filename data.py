"""From a CSV row to a tensor: samples, views, batches. By itself it describes and checks a dataset:

    python data.py Dataset            # or `demo`; seconds; --all decodes every image. Exit code 1 where something is wrong.

A dataset is the organisers' folder: Fashion-How24_sub1_{train,val,test}.csv beside train/, val/ and test/. Columns named
image_name, BBox_* and Mask_* have their meaning; every other column is a label.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

import demo
from cli import note, progress, run_app, say, show_table
from photos import SUFFIXES, Box, clip_box, load_photo, open_image, upright_size

SPLITS = ("train", "val", "test")
CLASS_NAMES = {  # the organisers' labels; any other label column has the classes 0..max of the training CSV
    "Daily": ("loungewear", "light outing", "office", "formal", "event", "sportswear"),
    "Gender": ("mannish", "unisex", "girlish", "elegant", "sexy"),
    "Embellishment": ("none", "point", "lots"),
}
BOX_COLUMNS = {  # the views that are boxes: the organisers', and the foreground's that preprocess.py found
    "bbox": ("BBox_xmin", "BBox_ymin", "BBox_xmax", "BBox_ymax"),
    "mask": ("Mask_xmin", "Mask_ymin", "Mask_xmax", "Mask_ymax"),
}
BOX = "(box)"  # where the garment is, beside the labels: a box head's output, and what it should be
MAX_CLASSES = 1000  # of a label column of one's own; a larger number is a mistake, not a label
PREPARED = "preprocess.json"  # in a dataset that preprocess.py wrote
LAYOUT = "Fashion-How24_sub{subtask}_train.csv, ..._val.csv and ..._test.csv beside the folders train/, val/ and test/ with the images"


# ---------------------------------------------------------------- from a CSV to samples


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a split: an image, the boxes known for it ((xmin, ymin, xmax, ymax) in pixels of the upright photo), its labels.

    `size`: width and height of the upright photo, once its header was read.
    """

    name: str
    path: str
    where: str
    boxes: dict[str, Box]
    labels: dict[str, int]
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Split:
    """The rows of one CSV. `classes` maps each label to its number of classes; `labelled` names the labels that the CSV holds.

    `beyond`: how many rows' boxes reached beyond their photos, and were cut to them.
    """

    csv: Path
    samples: list[Sample]
    classes: dict[str, int]
    labelled: tuple[str, ...]
    fingerprint: str
    beyond: int = 0

    def has(self, view: str) -> bool:
        return view == "full" or any(view in sample.boxes for sample in self.samples)


@dataclass(frozen=True)
class Table:
    """A split's CSV as it stands. `rows`: (cells, the Sample, or the ValueError that says what is wrong with the row); no image is opened.

    `digest` is the running SHA-256 of the file, `sizes` the bytes of each image file by its path.
    """

    csv: Path
    header: list[str]
    rows: list[tuple[list[str], Sample | ValueError]]
    labels: tuple[str, ...]
    digest: "hashlib._Hash"
    sizes: dict[str, int]


def find_dataset(data: str, subtask: int = 1) -> Path:
    """The folder of a dataset; `demo` is the built-in one, drawn if need be (./demo is a folder). Raises FileNotFoundError with the layout expected."""
    if data == "demo":
        return demo.cached()
    root = Path(data)
    if not data or not any((root / csv_name(split, subtask)).is_file() for split in SPLITS):
        kind = "holds no Fashion-How24 CSV" if root.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"--data {data} {kind}; it should hold {LAYOUT.format(subtask=subtask)}; --data demo is the built-in set"
        )
    return root


def dataset_path(data: str) -> str:
    """How a run records where its data lie: `demo`, or the whole path."""
    return data if data == "demo" else str(Path(data).resolve())


def read_preparation(root: Path) -> dict | None:
    """What preprocess.py did to this dataset's photos (`preparation` of its preprocess.json); None: they are as they were taken.

    Raises ValueError where the file is damaged or the dataset unfinished.
    """
    path = root / PREPARED
    if not path.exists():
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        preparation = written["preparation"]
        check_preparation(preparation)
        unfinished = written["unfinished"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise ValueError(
            f"{path} is damaged or of another version of this program; make the dataset again with preprocess.py"
        ) from None
    if unfinished:
        raise ValueError(f"{root} is unfinished; start the same preprocess.py command again to complete it")
    return preparation


def check_preparation(preparation: dict) -> None:
    """Raises ValueError, TypeError or KeyError where this is no record of preprocess.py."""
    red, green, blue = preparation["background_color"]
    numbers = (red, green, blue, preparation["weights_bytes"], preparation["box_margin"])
    texts = (preparation["rembg_model"], preparation["checksum"])
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers) or not all(
        isinstance(t, str) for t in texts
    ):
        raise ValueError("not the values of a preparation")
    if (
        preparation["crop"] not in ("none", "bbox", "mask")
        or not isinstance(preparation["keep_background"], bool)
        or max(red, green, blue) > 255
    ):
        raise ValueError("not the values of a preparation")


def needs_remover(preparation: dict | None, view: str) -> bool:
    """Whether a photo without a CSV box must go through rembg to be treated like this and seen in this view."""
    return view == "mask" or (
        preparation is not None and (not preparation["keep_background"] or preparation["crop"] != "none")
    )


def submission_column(label: str) -> str:
    """The column of a label in the organisers' format."""
    return "embel" if label == "Embellishment" else label.lower()


def class_name(label: str, c: int) -> str:
    """The organisers' name of a class; of another label its number."""
    return CLASS_NAMES[label][c] if label in CLASS_NAMES else str(c)


def csv_name(split: str, subtask: int = 1) -> str:
    return f"Fashion-How24_sub{subtask}_{split}.csv"


def read_split(root: Path, split: str, classes: dict[str, int] | None = None, subtask: int = 1) -> Split:
    """Read and check one split: every row, and that each image is there and is one (its header alone is read).

    `classes`: the training split's, for val and test (labels of other names are ignored); None derives them.
    Raises FileNotFoundError without the CSV, ValueError with all that is wrong with it: columns, rows, images.
    """
    table = read_table(root, split, classes, subtask)
    problems = [str(sample) for _, sample in table.rows if isinstance(sample, ValueError)]
    written = [sample for _, sample in table.rows if isinstance(sample, Sample)]
    checked = [check_header(sample) for sample in written]
    problems += [str(result) for result in checked if isinstance(result, ValueError)]
    if problems:
        raise ValueError(report(f"{table.csv}: {len(problems)} of {len(table.rows)} rows are wrong", problems))
    if classes is None:
        classes = {
            label: len(CLASS_NAMES.get(label, ())) or max(s.labels[label] for s in checked) + 1
            for label in table.labels
        }
        if single := [label for label, n in classes.items() if n < 2]:
            raise ValueError(
                f"{table.csv}: the label {single[0]} has the same class in every row; remove the column or add images of other classes"
            )
    for sample in checked:
        table.digest.update(f"{sample.name}\0{table.sizes[sample.path]}\n".encode())
    beyond = sum(before.boxes != after.boxes for before, after in zip(written, checked))
    return Split(table.csv, checked, classes, table.labels, table.digest.hexdigest(), beyond)


def read_table(root: Path, split: str, classes: dict[str, int] | None = None, subtask: int = 1) -> Table:
    """Read a split's CSV and parse its rows, each by itself; `classes` as in `read_split`, {}: no label is looked at.

    Raises FileNotFoundError without the CSV, ValueError where its columns are wrong.
    """
    path = root / csv_name(split, subtask)
    header, lines, digest = _read_csv(path)
    box_columns, labels = _columns(path, header, lines, split, classes)
    folder, rows = _Folder(root, root / split), []
    for line, row in lines:
        where = f"{path.name}, line {line}"
        try:
            rows.append((row, _parse_row(header, row, where, box_columns, labels, classes, folder)))
        except ValueError as error:
            rows.append((row, ValueError(f"{where}: {error}")))
    return Table(path, header, rows, labels, digest, folder.sizes)


def join_splits(splits: Sequence[Split]) -> Split:
    """The rows of several datasets, in order, as one split. Raises ValueError where their labels differ."""
    if len(splits) == 1:
        return splits[0]
    for split in splits[1:]:
        if set(split.classes) != set(splits[0].classes):
            raise ValueError(
                f"the labels of {split.csv} ({', '.join(split.classes)}) are not those of {splits[0].csv} ({', '.join(splits[0].classes)})"
            )
    classes = {label: max(split.classes[label] for split in splits) for label in splits[-1].classes}
    fingerprint = hashlib.sha256("".join(split.fingerprint for split in splits).encode()).hexdigest()
    samples, beyond = [sample for split in splits for sample in split.samples], sum(split.beyond for split in splits)
    return Split(splits[-1].csv, samples, classes, splits[-1].labelled, fingerprint, beyond)


def read_splits(roots: Sequence[Path], subtask: int = 1, fit_all: bool = False) -> tuple[Split, Split]:
    """What a run trains on, the train splits of all its datasets (with `fit_all` their val splits too), and the last one's val split."""
    train_split = join_splits([read_split(root, "train", subtask=subtask) for root in roots])
    val_split = read_split(roots[-1], "val", train_split.classes, subtask)
    if fit_all:
        train_split = join_splits(
            [train_split, *(read_split(root, "val", train_split.classes, subtask) for root in roots[:-1]), val_split]
        )
    return train_split, val_split


def image_samples(inputs: Sequence[str]) -> Split:
    """Image files and folders (searched whole, files of other kinds left aside) as an unlabelled split. Raises ValueError, FileNotFoundError."""
    samples = []
    for given in inputs:
        path = Path(given)
        if not path.is_file() and not path.is_dir():
            raise FileNotFoundError(f"{given}: no such image or folder")
        found = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if path.is_dir()
            else [path]
        )
        if not found:
            raise ValueError(f"{given}: no images in this folder ({', '.join(SUFFIXES)})")
        samples += [Sample(str(p), str(p), str(p), {}, {}) for p in found]
    checked = [check_header(sample) for sample in samples]
    if problems := [str(result) for result in checked if isinstance(result, Exception)]:
        raise ValueError(report(f"{len(problems)} of {len(samples)} images cannot be used", problems))
    return Split(Path(inputs[0]), checked, {}, (), "")


def report(title: str, problems: list[str]) -> str:
    """One message for all that is wrong: the first 20 problems, the rest counted."""
    rest = [f"  ... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n".join([title, *(f"  {problem}" for problem in problems[:20]), *rest])


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], "hashlib._Hash"]:
    """The header, the rows that are not blank with their line numbers, and the running SHA-256 of the file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file (python data.py {path.parent} shows what is there)") from None
    for encoding in ("utf-8-sig", "cp949"):
        try:
            text = raw.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    else:
        raise ValueError(f"{path}: neither UTF-8 nor CP949 (EUC-KR); save it as UTF-8")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
        rows = [
            (reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a CSV row ({error})") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: holds no rows")
    return rows[0][1], rows[1:], hashlib.sha256(raw)


def _columns(
    path: Path, header: list[str], rows: list, split: str, classes: dict[str, int] | None
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The boxes and the labels that the CSV holds. In test, a column that says nothing (constant, or -1 throughout) counts as absent."""
    if doubled := [name for name, n in Counter(filter(None, header)).items() if n > 1]:
        raise ValueError(f"{path}: the column {doubled[0]} occurs more than once")
    ours = {name.lower(): name for name in ("image_name", *chain(*BOX_COLUMNS.values()))}
    if misspelt := [name for name in header if ours.get(name.lower(), name) not in header]:
        raise ValueError(f"{path}: the column {misspelt[0]} should be spelt {ours[misspelt[0].lower()]}")
    if "image_name" not in header:
        raise ValueError(f"{path}: no column image_name (columns: {', '.join(header)})")
    silent = set()
    if split == "test":
        silent = {
            name
            for i, name in enumerate(header)
            if len({row[i] if i < len(row) else "" for _, row in rows}) == 1 and not name.startswith("Mask_")
        }
    boxes = {}
    for view, names in BOX_COLUMNS.items():
        present = [name for name in names if name in header and name not in silent]
        if missing := sorted(set(names) - set(header), key=names.index):
            if present:
                raise ValueError(f"{path}: no column {missing[0]}, though {present[0]} is there")
        elif present:
            boxes[view] = names
    labels = tuple(
        name
        for name in header
        if name and name != "image_name" and not name.startswith(("BBox_", "Mask_")) and name not in silent
    )
    if classes is not None:
        if split != "test" and (missing := [label for label in classes if label not in labels]):
            raise ValueError(
                f"{path}: no column {missing[0]}, which is a label in the training CSV; are both spelt alike?"
            )
        labels = tuple(label for label in classes if label in labels)
    elif not labels:
        raise ValueError(f"{path}: no label column (any column but image_name, BBox_* and Mask_*)")
    columns = Counter(["image_name", "mean", *map(submission_column, labels)])  # mean: the tables' last row
    if clash := [label for label in labels if columns[submission_column(label)] > 1]:
        raise ValueError(
            f"{path}: the label {clash[0]} would be a second column {submission_column(clash[0])} of the results; rename it"
        )
    return boxes, labels


def _parse_row(header, row, where, box_columns, labels, classes, folder) -> Sample:
    """One row as a sample. Raises ValueError with what is wrong with it."""
    if len(row) != len(header):
        raise ValueError(f"{len(row)} cells for {len(header)} columns")
    cells = dict(zip(header, row))
    name = cells["image_name"]
    boxes = {view: _parse_box(cells, names) for view, names in box_columns.items()}
    values = {label: _parse_label(label, cells[label], classes) for label in labels}
    return Sample(name, folder.locate(name), f"{where} ({name})", boxes, values)


def _parse_box(cells: dict[str, str], names: tuple[str, ...]) -> Box:
    try:
        xmin, ymin, xmax, ymax = (float(cells[name]) for name in names)
        box = (math.floor(xmin), math.floor(ymin), math.ceil(xmax), math.ceil(ymax))
    except (ValueError, OverflowError):
        raise ValueError(
            f"the box {', '.join(cells[name] or '(empty)' for name in names)} is not four numbers"
        ) from None
    if xmin >= xmax or ymin >= ymax:
        raise ValueError(f"the box {box} is empty or inverted (xmin, ymin, xmax, ymax)")
    return box


def _parse_label(label: str, cell: str, classes: dict[str, int] | None) -> int:
    try:
        value = int(cell) if cell.isascii() and cell.removeprefix("-").isdigit() else float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{label} is {cell or '(empty)'}, not a whole number")
    n = (classes or {}).get(label) or len(CLASS_NAMES.get(label, ())) or MAX_CLASSES
    if not 0 <= value < n:
        raise ValueError(f"{label} is {cell}, outside 0..{n - 1}")
    return int(value)


class _Folder:
    """Finds the images of one split and sees that none lies outside the dataset, whatever a name or a link says."""

    def __init__(self, *roots: Path):
        self.images = roots[-1]
        self.roots = tuple(os.path.join(os.path.realpath(root), "") for root in roots)
        self.folders: dict[str, bool] = {}
        self.sizes: dict[str, int] = {}

    def _inside(self, path: str) -> bool:
        return (os.path.realpath(path) + os.sep).startswith(self.roots)

    def locate(self, name: str) -> str:
        """The path of an image. Raises ValueError where it leaves the dataset, is missing or is no file."""
        outside = f"image_name {name!r} leaves the dataset folder"
        parts = re.split(r"[\\/]", name)
        if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:[\\/]", name) or "\0" in name:
            raise ValueError("image_name is empty" if not name else outside)
        path = os.path.join(self.images, *parts) if os.sep != "/" else f"{self.images}/{name}"
        folder = os.path.dirname(path)
        if folder not in self.folders:
            self.folders[folder] = self._inside(folder)
        try:
            status = os.lstat(path)
            if not self.folders[folder] or (stat.S_ISLNK(status.st_mode) and not self._inside(path)):
                raise ValueError(outside)
            if stat.S_ISLNK(status.st_mode):
                status = os.stat(path)
        except OSError as error:
            raise ValueError(f"no image {path} ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a file")
        self.sizes[path] = status.st_size
        return path


def check_header(sample: Sample) -> Sample | ValueError:
    """The sample with its boxes clipped to the photo, or what is wrong with its image; reads the header, decodes nothing."""
    try:
        with open_image(sample.path) as image:
            width, height = upright_size(image)
        boxes = {view: clip_box(box, width, height) for view, box in sample.boxes.items()}
    except ValueError as error:
        return ValueError(f"{sample.where}: {error}")
    return replace(sample, boxes=boxes, size=(width, height))


# ---------------------------------------------------------------- from a file to pixels


def relative_boxes(samples: Sequence[Sample], view: str) -> Tensor:
    """The boxes of a view, float32 (N, 4), xmin, ymin, xmax, ymax in 0..1 of each photo; NaN where there is none."""
    return torch.tensor(
        [
            [at / side for at, side in zip(s.boxes[view], s.size * 2)] if view in s.boxes else [math.nan] * 4
            for s in samples
        ]
    )


# ---------------------------------------------------------------- batches


# ---------------------------------------------------------------- python data.py DATASET

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def describe(
    data: Annotated[str, typer.Argument(help="A dataset folder, or `demo`.")] = "Dataset",
    subtask: Annotated[int, typer.Option(min=1, max=2, help="Which sub-task's CSVs to read.")] = 1,
    all_images: Annotated[bool, typer.Option("--all", help="Decode every image instead of 200 a split.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Describe and check a dataset: splits, rows, classes, images, boxes. Exit code 1 where something is wrong."""
    root = find_dataset(data, subtask)
    say(f"{data}: {root}")
    classes, wrong, left_out = None, [], False
    for split in SPLITS:
        if not (root / csv_name(split, subtask)).is_file():
            note(f"no {csv_name(split, subtask)}")
            wrong += [f"{csv_name(split, subtask)} is missing"] if split != "test" else []
            continue
        try:
            read = read_split(
                root, split, {} if split == "test" and classes is None else classes, subtask
            )  # whose labels may be absent
            classes = read.classes if split == "train" else classes
            _describe_split(split, read)
            if read.beyond:
                note(
                    f"{read.beyond:,} boxes reach beyond their photos and are cut to them; were the photos scaled since?"
                )
            chosen = read.samples if all_images else read.samples[:: max(1, len(read.samples) // 200)]
            left_out |= len(chosen) < len(read.samples)
            wrong += _describe_images(split, read.samples, chosen)
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    say("nothing wrong found" + (" (a sample of the images was decoded; --all decodes every one)" if left_out else ""))


def _describe_split(split: str, read: Split) -> None:
    labels = ", ".join(read.labelled) or ("none" if read.classes else "not looked at, as the training CSV gave none")
    say(f"\n{split}: {len(read.samples):,} rows, {'with' if read.has('bbox') else 'without'} boxes, labels: {labels}")
    rows = []
    for label in read.labelled:
        counts = Counter(sample.labels[label] for sample in read.samples)
        rows += [
            [label, str(c), class_name(label, c), str(counts[c]), f"{counts[c] / len(read.samples):.1%}"]
            for c in range(read.classes[label])
        ]
    if rows:
        show_table("classes", ["label", "class", "name", "rows", "share"], rows)
    if empty := [f"{label} {c}" for label, c, _, count, _ in rows if count == "0"]:
        note(
            f"no row is of the class {', '.join(empty[:20])}"
            + (f" and {len(empty) - 20} more" if len(empty) > 20 else "")
        )


def _describe_images(split: str, samples: list[Sample], chosen: list[Sample]) -> list[str]:
    """Decode the images that are `chosen`, print their sizes and kinds and the boxes'; returns what is wrong."""
    kinds, wrong, sizes = Counter(), [], []
    with progress(len(chosen), f"decoding {split}") as bar:
        for sample in chosen:
            try:
                with open_image(sample.path) as image:
                    kinds[f"{image.format} {image.mode}"] += 1
                sizes.append(load_photo(sample.path).size)
            except ValueError as error:
                wrong.append(f"{sample.where}: {error}")
            bar.advance(1)
    say(f"images: {len(chosen):,} decoded; {', '.join(f'{kind} {n}' for kind, n in kinds.most_common())}")
    rows = [["image", *_quartiles(sizes)]] if sizes else []
    for view in samples[0].boxes:
        rows.append(
            [
                view,
                *_quartiles(
                    [(s.boxes[view][2] - s.boxes[view][0], s.boxes[view][3] - s.boxes[view][1]) for s in samples]
                ),
            ]
        )
    show_table("width x height in pixels", ["of", "smallest", "median", "largest"], rows)
    return [report(f"{split}: {len(wrong)} of {len(chosen)} decoded images are damaged", wrong)] if wrong else []


def _quartiles(sizes: list[tuple[int, int]]) -> list[str]:
    return [f"{w:.0f} x {h:.0f}" for w, h in (f(np.array(sizes), axis=0) for f in (np.min, np.median, np.max))]


if __name__ == "__main__":
    run_app(app)
