"""Remove the backgrounds of a dataset's photos (rembg), find the garment in each, crop to it: a processed copy.

    python preprocess.py Dataset Dataset-rembg                          # all splits; `demo` is the built-in set
    python preprocess.py Dataset Dataset-rembg --rembg-model u2netp     # 4.6 MB of weights, not 176; 3 times as fast
    python preprocess.py Dataset Dataset-crops --crop bbox              # crop to the CSV's box, else to the garment's

Writes the same folders and CSVs with four more columns, Mask_xmin to Mask_ymax: the box of the garment in pixels of the
new image. preprocess.json says what was done, preprocess.jsonl holds a line for each finished photo. Started again, it
continues where it stopped, and ends with the same bytes. 2 CPU cores do about 4 photos/s with u2netp, 1.3 with u2net.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from PIL import Image, ImageChops, ImageColor

from cli import as_usage_error, atomic_write, locked, note, progress, remove_leftovers, run_app, say, usage_error
from data import (
    BOX_COLUMNS,
    PREPARED,
    SPLITS,
    Sample,
    Table,
    check_preparation,
    find_dataset,
    list_problems,
    read_table,
)
from loading import default_workers
from photos import Box, clip_box, load_photo, move_into

RESULTS = "preprocess.jsonl"
SAVE_OPTIONS = {  # by Pillow's formats; a photo of any other becomes NAME.png
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {"compress_level": 1},
    "WEBP": {"lossless": True, "quality": 0},
    "BMP": {},
    "TIFF": {},
}
MIN_FOREGROUND = 1e-4  # of the photo's pixels; less foreground counts as none
BACKGROUND_UP_TO, FOREGROUND_FROM = 2, 253  # of 255: rembg's masks hardly reach 0 and 255
EDGE_SIDE = 160  # colors beside an edge are estimated on the photo reduced to about this side ...
EDGE_RADIUS = 4  # ... from so many of its pixels around
EDGE_NOISE = 30.0**2  # squared distance (0..255 a channel) below which two colors do not separate the sides
UNSUITABLE = dict.fromkeys(("u2net_custom", "dis_custom", "ben_custom"), "it is a model of one's own")
UNSUITABLE["sam"] = "it needs to be told where the garment is"


# ---------------------------------------------------------------- rembg


class Remover:
    """rembg with one model. A session has one thread, so that masks do not depend on the cores; threads take turns."""

    def __init__(self, model: str):
        self.model, self.idle = model, []

    def __getstate__(self) -> dict:
        return {"model": self.model, "idle": []}

    def start(self):
        """A new session of rembg."""
        rembg = import_rembg()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return rembg.new_session(self.model, sess_opts=options)

    def mask(self, photo: Image.Image) -> Image.Image | None:
        """The foreground mask (mode L, the photo's size); None where the model finds nothing, as in a blank photo."""
        try:
            session = self.idle.pop()
        except IndexError:  # all are at work
            session = self.start()
        try:
            with np.errstate(invalid="raise"):  # rembg divides by the mask's range: 0 / 0 would give a mask of NaN
                mask, *more = session.predict(photo)
        except FloatingPointError:
            return None
        finally:
            self.idle.append(session)
        for other in more:  # u2net_cloth_seg: upper, lower and full-body garments
            mask = ImageChops.lighter(mask, other)
        return mask


def import_rembg():
    """The rembg module. Raises ValueError where it is not installed."""
    threads = torch.get_num_threads()
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # without ONNX Runtime rembg exits
        raise ValueError(f"rembg cannot be imported ({error or 'no ONNX Runtime'}): pip install 'rembg[cpu]'") from None
    finally:
        torch.set_num_threads(threads)  # pymatting, which it imports, sets OpenMP's number to that of all cores
    return rembg


def find_weights(model: str) -> tuple[str, Path]:
    """The SHA-256 ("sha256:...") and the file of a model's weights; rembg downloads and verifies them if need be.

    Raises BadParameter for a model that cannot be used, OSError where the download fails.
    """
    import_rembg()
    import pooch  # rembg installs it
    from rembg.sessions import sessions

    usable = [name for name, session in sessions.items() if session.is_local() and name not in UNSUITABLE]
    if model not in usable:
        reason = "it sends the photos to another machine" if model in sessions else "rembg has no such model"
        reason = UNSUITABLE.get(model, reason)
        raise usage_error("--rembg-model", f"{model} cannot be used: {reason}; there are {', '.join(usable)}")
    pooch.get_logger().setLevel("WARNING")
    try:
        path = Path(sessions[model].download_models())
    except Exception as error:  # pooch raises many kinds
        remedy = f"put it into {sessions[model].model_dir()}, or set U2NET_HOME to its folder"
        raise OSError(f"{model}.onnx could not be downloaded; {remedy} ({' '.join(str(error).split())})") from None
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}", path


# ---------------------------------------------------------------- one photo


def prepare_photo(sample: Sample, preparation: dict, remover: Remover | None) -> tuple[Image.Image, dict[str, Box]]:
    """Remove the background of a photo and crop it, for processed datasets and for prediction alike.

    Returns the RGB image and the boxes in its pixels: `bbox` where the sample has one, `mask` where a foreground was
    found and not cropped away. Without a `remover` the background stays. Raises ValueError where the image is damaged
    or its box lies outside it.
    """
    color = tuple(preparation["background_color"])
    photo = load_photo(sample.path, color)
    full = (0, 0, *photo.size)
    boxes = {"bbox": clip_box(sample.boxes["bbox"], *photo.size)} if "bbox" in sample.boxes else {}
    mask = remover.mask(photo) if remover else None
    if mask and (foreground := foreground_box(mask)):
        boxes["mask"] = foreground
    crop = full
    if preparation["crop"] != "none":
        target = boxes.get(preparation["crop"]) or boxes.get("mask", full)
        dx, dy = (round(preparation["box_margin"] * (target[i + 2] - target[i])) for i in (0, 1))
        crop = clip_box((target[0] - dx, target[1] - dy, target[2] + dx, target[3] + dy), *photo.size)
    moved = {view: move_into(box, crop) for view, box in boxes.items()}
    if "bbox" in boxes and moved["bbox"] is None:  # the crop is elsewhere
        moved["bbox"] = move_into(crop, crop)
    moved = {view: box for view, box in moved.items() if box}
    if "mask" in moved and not preparation["keep_background"]:
        photo = replace_background(photo, mask, color)
    return photo if crop == full else photo.crop(crop), moved


def foreground_box(mask: Image.Image) -> Box | None:
    """The box of the garment in a mask (mode L): of the connected component with the greatest sum of foreground.

    Other things that stand out do not extend it; the right and lower ends are exclusive. None where it is tiny.
    """
    from scipy import ndimage  # rembg installs it

    extent = mask.point(lambda value: 255 if value > 127 else 0).getbbox()
    if extent is None:
        return None
    foreground = np.asarray(mask.crop(extent))
    components, n = ndimage.label(foreground > 127, structure=np.ones((3, 3)))
    largest = np.bincount(components.ravel(), foreground.ravel(), n + 1)[1:].argmax()
    if (components == largest + 1).sum() < MIN_FOREGROUND * mask.width * mask.height:
        return None
    rows, columns = ndimage.find_objects(components)[largest]
    return extent[0] + columns.start, extent[1] + rows.start, extent[0] + columns.stop, extent[1] + rows.stop


def replace_background(photo: Image.Image, mask: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The foreground of a photo (RGB) on one color, by its mask (L), without the old background in soft edges.

    A pixel at a soft edge may be foreground, background or a mixture, whatever the mask's resolution makes of it. Its
    mixing weight w follows from its color I and the mean foreground F and background B of its neighborhood. Removing
    the background gives F + w (I - w F - (1 - w) B): F on the background's side, I on the foreground's.
    """
    image, alpha = np.asarray(photo), np.asarray(mask)
    certain = mask.point(lambda value: 255 if value >= FOREGROUND_FROM else 0)
    result = np.array(Image.composite(photo, Image.new("RGB", photo.size, color), certain))
    edge = np.flatnonzero((alpha > BACKGROUND_UP_TO) & (alpha < FOREGROUND_FROM))

    k = max(1, round(min(photo.size) / EDGE_SIDE))
    small = np.asarray(photo.reduce(k), np.float32)
    small_alpha = np.asarray(mask.reduce(k), np.float32)[..., None] / 255
    front, back = local_mean(small, small_alpha), local_mean(small, 1 - small_alpha)
    ys, xs = np.divmod(edge, alpha.shape[1])
    nearest = ys // k * small.shape[1] + xs // k
    front, back, contrast = (c.reshape(-1, 3).take(nearest, axis=0) for c in (front, back, front - back))

    alpha = alpha.ravel().take(edge)[:, None] / np.float32(255)
    difference = image.reshape(-1, 3).take(edge, axis=0) - back
    weight = np.einsum("ij,ij->i", difference, contrast)[:, None] + EDGE_NOISE * alpha
    weight = (weight / (np.einsum("ij,ij->i", contrast, contrast)[:, None] + EDGE_NOISE)).clip(0, 1)
    weight = np.maximum(weight, 1 - 4 * (1 - alpha))  # where a mask is nearly 255, the color is the garment's own
    clean = (front + weight * (difference - weight * contrast)).clip(0, 255)
    result.reshape(-1, 3)[edge] = (alpha * clean + (1 - alpha) * np.array(color, np.float32)).round().astype(np.uint8)
    return Image.fromarray(result)


def local_mean(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean color around each pixel, float32 (height, width, 3); `weight` is (height, width, 1) in 0..1."""
    from scipy import ndimage

    weight = weight**3 + 1e-4
    side = 2 * EDGE_RADIUS + 1
    sums = ndimage.uniform_filter(np.concatenate([image * weight, weight], axis=2), (side, side, 0), mode="nearest")
    return sums[..., :3] / sums[..., 3:]


# ---------------------------------------------------------------- a dataset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def preprocess(
    data: Annotated[str, typer.Argument(help="A dataset folder, or `demo`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the processed dataset: a new one, or one to continue.")],
    splits: Annotated[list[str] | None, typer.Option(help="train, val or test alone; repeats.")] = None,
    subtask: Annotated[int, typer.Option(min=1, max=2, help="Which sub-task's CSVs to read.")] = 1,
    rembg_model: Annotated[str, typer.Option(help="Any local model of rembg: u2net, u2netp, ...")] = "u2net",
    background_color: Annotated[str, typer.Option(help="What the background becomes: a name or #rrggbb.")] = "black",
    keep_background: Annotated[bool, typer.Option("--keep-background", help="Only find the garment's box.")] = False,
    crop: Annotated[Literal["none", "bbox", "mask"], typer.Option(help="To the CSV's or the garment's box.")] = "none",
    box_margin: Annotated[float, typer.Option(min=0, max=1, help="Margin around --crop, as a fraction of it.")] = 0.0,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Photos at a time.", show_default="cores")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a copy of a dataset with backgrounds removed, garments found, and photos cropped if asked."""
    root = find_dataset(data, subtask)
    with as_usage_error("--background-color"):
        color = ImageColor.getrgb(background_color)
    if len(color) != 3:
        raise usage_error("--background-color", f"{background_color} is transparent; give an opaque color")
    if crop == "none" and box_margin:
        note(f"--box-margin {box_margin:g} cannot act without --crop")
    settings = {"rembg_model": rembg_model, "background_color": list(color), "keep_background": keep_background}
    settings |= {"crop": crop, "box_margin": box_margin}
    record = open_record(root, out, subtask, settings)
    tables, photos, problems = read_photos(root, splits, subtask)
    results = read_results(out)
    todo = {file: sample for file, sample in photos.items() if not is_done(out / file, sample, results.get(file))}
    remover = start_remover(out, record) if todo else None
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        remove_leftovers(out)
        names = {table.csv.name for table in tables.values()}
        if todo:
            record["unfinished"] = sorted(names.union(record["unfinished"]))
            update(out / PREPARED, json.dumps(record, indent=2, sort_keys=True))
            make = partial(make_photo, out, record["preparation"], remover)
            problems += make_photos(out, todo, results, make, default_workers(workers))
        changed, total = bool(todo), Counter()
        for split, table in tables.items():
            changed |= update(out / table.csv.name, csv_text(split, table, results))
            made = [results[file] for file in photos if file in results and file.startswith(f"{split}/")]
            count = {"photos": len(made), "without foreground": sum(not result["foreground"] for result in made)}
            record["counts"][table.csv.name] = count
            total.update(count)
        record["unfinished"] = sorted(set(record["unfinished"]) - names)
        changed |= update(out / PREPARED, json.dumps(record, indent=2, sort_keys=True))

    empty = total["without foreground"]
    counted = f"{total['photos']:,} photos" + (f", {empty:,} of them left as they were: no foreground" if empty else "")
    say(f"{out}: {counted}" if changed else f"{out} is finished ({counted}); nothing was changed")
    if problems:
        raise ValueError(
            list_problems(f"{len(problems)} rows are left out of {out}: correct them and start again", problems)
        )


def open_record(root: Path, out: Path, subtask: int, settings: dict) -> dict:
    """The content of preprocess.json: that of the output folder, or that of a new one.

    Raises ValueError where the folder is something else, BadParameter where it was begun with other settings.
    """
    if (root / PREPARED).exists():
        raise ValueError(f"{root} was made by preprocess.py already; give the dataset that it was made from")
    if out.resolve().is_relative_to(root.resolve()) or root.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} and {root} lie within each other; choose a folder beside it")
    new = {"data": str(root.resolve()), "subtask": subtask, "preparation": settings, "unfinished": [], "counts": {}}
    path = out / PREPARED
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(file.suffix != ".tmp" for file in out.iterdir())):
            raise ValueError(f"{out} exists and was not made by preprocess.py; choose a new folder")
        return new
    try:
        record = json.loads(path.read_bytes())
        check_preparation(record["preparation"])
        before = {"data": record["data"], "subtask": record["subtask"], **record["preparation"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged or of another version; delete {out} and start again") from None
    for name, value in {"data": new["data"], "subtask": subtask, **settings}.items():
        if before[name] != value:
            flag = "DATA" if name == "data" else "--" + name.replace("_", "-")
            raise usage_error(flag, f"{out} was begun with {before[name]}, not {value}; choose another folder")
    return record


def read_photos(root: Path, splits: list[str] | None, subtask: int) -> tuple[dict[str, Table], dict, list[str]]:
    """The table of each split, the samples by the file that they become, and what is wrong with the other rows."""
    tables, photos, problems = {}, {}, []
    for split in splits or SPLITS:
        try:
            tables[split] = read_table(root, split, {}, subtask)
        except FileNotFoundError:
            if splits:
                raise
            continue
        for _, sample in tables[split].rows:
            if isinstance(sample, ValueError):
                problems.append(str(sample))
            elif photos.setdefault(output_file(split, sample), sample).boxes != sample.boxes:
                problems.append(f"{sample.where}: an earlier row has this photo with another box; copy it for this row")
    if not photos:
        raise ValueError(list_problems(f"no row of {root} can be used", problems))
    return tables, photos, problems


def output_file(split: str, sample: Sample) -> str:
    """The file that a photo becomes, relative to the output folder; NAME.png where its own kind cannot hold it."""
    kind = Image.registered_extensions().get(os.path.splitext(sample.name)[1].lower())
    return os.path.normpath(f"{split}/{sample.name}") + ("" if kind in SAVE_OPTIONS else ".png")


def is_done(path: Path, sample: Sample, result: dict | None) -> bool:
    """Whether a photo was made with the CSV's present box, after its original was written."""
    if result is None or result["csv_box"] != list(sample.boxes.get("bbox", ())) or not path.exists():
        return False
    return path.stat().st_mtime_ns >= os.stat(sample.path).st_mtime_ns


def start_remover(out: Path, record: dict) -> Remover:
    """A Remover; its weights and versions are entered into the record. Raises ValueError for weights that changed."""
    preparation = record["preparation"]
    checksum, weights = find_weights(preparation["rembg_model"])
    before = preparation.setdefault("checksum", checksum)
    if before != checksum:
        raise ValueError(f"{out} was begun with other weights ({before}, not {checksum}); choose another folder")
    preparation["weights_bytes"] = weights.stat().st_size
    record["versions"] = {name: version(name) for name in ("rembg", "onnxruntime", "pillow", "numpy", "scipy")}
    if record["subtask"] == 2:
        note("the rules of sub-task 2 admit no pretrained models, rembg's among them")
    return Remover(preparation["rembg_model"])


def make_photos(
    out: Path, todo: dict[str, Sample], results: dict[str, dict], make: Callable, workers: int
) -> list[str]:
    """Make the photos of `todo` and enter them into `results`, both by file; returns what is wrong with the others."""
    for file in todo:
        results.pop(file, None)
    say(f"{len(todo):,} photos to do, {len(results):,} done before, {workers} at a time")
    problems = []
    pool = ThreadPoolExecutor(workers)  # Pillow, NumPy and ONNX Runtime release the GIL
    try:
        with open(out / RESULTS, "a", buffering=1) as lines, progress(len(todo), "photos", "photos") as bar:
            for result in pool.map(make, todo, todo.values()):
                if isinstance(result, ValueError):
                    problems.append(str(result))
                else:
                    results[result["file"]] = result
                    lines.write(json.dumps(result) + "\n")  # its image is complete
                bar.advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
    # Sorted, so that interruptions leave no trace.
    update(out / RESULTS, "".join(json.dumps(results[file]) + "\n" for file in sorted(results)))
    return problems


def make_photo(out: Path, preparation: dict, remover: Remover, file: str, sample: Sample) -> dict | ValueError:
    """Prepare and save one photo; returns its line of preprocess.jsonl, or what is wrong with the original."""
    path, content = out / file, io.BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    try:
        photo, boxes = prepare_photo(sample, preparation, remover)
        photo.info.clear()  # else Pillow would copy the original's metadata
        photo.save(content, kind, **SAVE_OPTIONS[kind])
    except ValueError as error:
        return ValueError(f"{sample.where}: {error}")
    except OSError as error:  # of the encoder
        return ValueError(f"{sample.where}: cannot be saved as {kind} ({error}); save the photo as .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as image:
        image.write(content.getbuffer())
    cells = dict(zip(BOX_COLUMNS["mask"], boxes.get("mask", (0, 0, *photo.size))))
    if preparation["crop"] != "none" and "bbox" in boxes:
        cells |= zip(BOX_COLUMNS["bbox"], boxes["bbox"])
    csv_box = list(sample.boxes.get("bbox", ()))
    return {"file": file, "csv_box": csv_box, "foreground": "mask" in boxes, "cells": cells}


def read_results(out: Path) -> dict[str, dict]:
    """The lines of preprocess.jsonl by file, without one that a kill cut off."""
    results, path = {}, out / RESULTS
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            result = json.loads(line)
            results[result["file"]] = result
    return results


def csv_text(split: str, table: Table, results: dict[str, dict]) -> str:
    """The new CSV: the rows as they are now, with the cells that changed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*table.header, *BOX_COLUMNS["mask"]], lineterminator="\n")
    writer.writeheader()
    for cells, sample in table.rows:
        result = None if isinstance(sample, ValueError) else results.get(output_file(split, sample))
        if result and result["csv_box"] == list(sample.boxes.get("bbox", ())):
            name = result["file"].removeprefix(f"{split}/")
            writer.writerow(dict(zip(table.header, cells)) | result["cells"] | {"image_name": name})
    return text.getvalue()


def update(path: Path, text: str) -> bool:
    """Write a file unless this is its text already; returns whether it was written."""
    content = text.encode("utf-8", "surrogateescape")
    if path.exists() and path.read_bytes() == content:
        return False
    with atomic_write(path, "wb") as file:
        file.write(content)
    return True


if __name__ == "__main__":
    run_app(app)
