"""Remove the backgrounds of a dataset's photos (rembg), find the garment in each, crop to it: a processed copy.

    python preprocess.py Dataset Dataset-rembg                          # all splits; `demo` is the built-in set
    python preprocess.py Dataset Dataset-rembg --rembg-model u2netp     # 4.6 MB of weights, not 176; 3 times as fast
    python preprocess.py Dataset Dataset-crops --crop bbox              # and cropped, to the CSV's or the garment's box

Writes the organisers' layout with four more columns, Mask_xmin to Mask_ymax: the garment's box in the new image.
preprocess.json says what was done, preprocess.jsonl holds a line for each finished photo. Started again, it continues
where it stopped, and ends with the same bytes. 2 CPU cores do about 4 photos/s with u2netp, 1.3 with u2net.
"""

import csv
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from PIL import Image, ImageChops, ImageColor

import cli
from cli import OFF, atomic_write, locked, note, progress, run_app, say, usage_error
from data import BOX_COLUMNS, PREPARED, Sample, csv_name, find_dataset, list_problems, read_table, record_of, splits_of
from photos import Box, clip_box, load_photo, move_into
from settings import SHARE, flag_of, in_run

RESULTS = "preprocess.jsonl"
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_level": 1}, "BMP": {}, "TIFF": {}}
SAVE_OPTIONS["WEBP"] = {"lossless": True, "quality": 0}  # a photo of any other format becomes NAME.png
MIN_FOREGROUND = 1e-4  # of the photo's pixels; less foreground counts as none
BACKGROUND_UP_TO, FOREGROUND_FROM = 2, 253  # of 255: rembg's masks hardly reach 0 and 255
EDGE_SIDE = 160  # colors beside an edge are estimated on the photo reduced to about this side ...
EDGE_WINDOW = 9  # ... from a square of so many of its pixels a side
EDGE_NOISE = 30.0**2  # squared distance (0..255 a channel) below which two colors do not separate the sides
UNSUITABLE = ("u2net_custom", "dis_custom", "ben_custom", "sam")  # they need a file or a prompt of the user's


class Remover:
    """rembg with one model. A session has one thread, so that masks do not depend on the cores; threads take turns."""

    def __init__(self, model: str):
        self.model, self.idle = model, []

    def start(self):
        """A new session of rembg."""
        import onnxruntime  # rembg needs it

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return import_rembg().new_session(self.model, sess_opts=options)

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
    import torch

    threads = torch.get_num_threads()
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # without ONNX Runtime rembg exits
        raise ValueError(f"rembg cannot be imported ({error or 'no ONNX Runtime'}): pip install 'rembg[cpu]'") from None
    finally:
        torch.set_num_threads(threads)  # pymatting, which it imports, sets OpenMP's number to that of all cores
    return rembg


def find_weights(model: str) -> tuple[str, Path]:
    """The SHA-256 ("sha256:...") and file of a model's weights, which rembg downloads. Raises BadParameter, OSError."""
    import_rembg()
    import pooch  # rembg installs it
    from rembg.sessions import sessions

    usable = [name for name, session in sessions.items() if session.is_local() and name not in UNSUITABLE]
    if model not in usable:
        raise usage_error("--rembg-model", f"{model} cannot be used; choose one of {', '.join(usable)}")
    pooch.get_logger().setLevel("WARNING")
    try:
        path = Path(sessions[model].download_models())
    except Exception as error:  # pooch raises many kinds
        remedy = f"put it into {sessions[model].model_dir()}, or set U2NET_HOME to its folder"
        raise OSError(f"{model}.onnx could not be downloaded; {remedy} ({' '.join(str(error).split())})") from None
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}", path


def prepare_photo(sample: Sample, preparation: dict, remover: Remover | None) -> tuple[Image.Image, dict[str, Box]]:
    """Remove the background of a photo and crop it, for processed copies and for prediction alike.

    Returns the RGB image and the boxes in its pixels: `bbox` where the sample has one, `mask` where a foreground was
    found and not cropped away. Raises ValueError where the image is damaged or its box lies outside it.
    """
    color = tuple(preparation["background_color"])
    photo = load_photo(sample.path, color)
    crop = full = (0, 0, *photo.size)
    boxes = {"bbox": clip_box(sample.boxes["bbox"], *photo.size)} if "bbox" in sample.boxes else {}
    mask = remover.mask(photo) if remover else None
    if mask and (foreground := foreground_box(mask)):
        boxes["mask"] = foreground
    if preparation["crop"] != "none":
        x0, y0, x1, y1 = boxes.get(preparation["crop"]) or boxes.get("mask", full)
        dx, dy = (round(preparation["box_margin"] * side) for side in (x1 - x0, y1 - y0))
        crop = clip_box((x0 - dx, y0 - dy, x1 + dx, y1 + dy), *photo.size)
    moved = {view: move_into(box, crop) for view, box in boxes.items()}
    if "bbox" in boxes:
        moved["bbox"] = moved["bbox"] or move_into(crop, crop)  # the crop may be elsewhere
    moved = {view: box for view, box in moved.items() if box}
    if "mask" in moved and not preparation["keep_background"]:
        photo = replace_background(photo, mask, color)
    return (photo if crop == full else photo.crop(crop)), moved


def foreground_box(mask: Image.Image) -> Box | None:
    """The garment's box in a mask (mode L): of the connected component with the most foreground. None: it is tiny."""
    from scipy import ndimage  # rembg installs it

    foreground = np.asarray(mask)
    components, n = ndimage.label(foreground > 127, structure=np.ones((3, 3)))
    if n == 0:
        return None
    largest = np.bincount(components.ravel(), foreground.ravel(), n + 1)[1:].argmax()
    if (components == largest + 1).sum() < MIN_FOREGROUND * foreground.size:
        return None
    rows, columns = ndimage.find_objects(components)[largest]
    return columns.start, rows.start, columns.stop, rows.stop


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

    weight, window = weight**3 + 1e-4, (EDGE_WINDOW, EDGE_WINDOW, 0)
    sums = ndimage.uniform_filter(np.concatenate([image * weight, weight], axis=2), window, mode="nearest")
    return sums[..., :3] / sums[..., 3:]


in_photos, in_garment = (partial(cli.option, panel) for panel in ("Photos", "Garment"))
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=cli.examples(__doc__))
def preprocess(
    data: Annotated[str, typer.Argument(help="A dataset folder, or `demo`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the processed copy: a new one, or one to continue.")],
    splits: Annotated[list[str] | None, in_photos("train, val or test alone; repeats.", show_default="all")] = None,
    subtask: Annotated[int, in_photos("Which sub-task's CSVs to read.", min=1, max=2)] = 1,
    rembg_model: Annotated[str, in_garment("Any local model of rembg: u2net, u2netp, ...")] = "u2net",
    background_color: Annotated[str, in_garment("What the background becomes: a name or #rrggbb.")] = "black",
    keep_background: Annotated[bool, in_garment("Only find the garment's box.", "--keep-background", **OFF)] = False,
    crop: Annotated[Literal["none", "bbox", "mask"], in_garment("To the CSV's or the garment's box.")] = "none",
    box_margin: Annotated[float, in_garment("Margin around --crop, as a fraction of it.", **SHARE)] = 0.0,
    workers: Annotated[int | None, in_run("Photos at a time.", min=1, max=256, show_default="cores, up to 8")] = None,
    debug: cli.Debug = False,
) -> None:
    """Write a copy of a dataset with backgrounds removed, garments found, and photos cropped if asked."""
    root = find_dataset(data, subtask, "DATA")
    try:
        color = ImageColor.getcolor(background_color, "RGB")
    except ValueError as error:
        raise usage_error("--background-color", error) from None
    settings = {"rembg_model": rembg_model, "background_color": list(color), "keep_background": keep_background}
    settings |= {"crop": crop, "box_margin": box_margin}
    if box_margin and crop == "none":
        raise usage_error("--box-margin", "it is the margin around --crop; add --crop bbox or --crop mask")
    record = open_record(root, out, subtask, settings)
    tables, photos, problems = read_photos(root, splits or splits_of(root, subtask), subtask)
    results = read_results(out, photos)
    todo = {file: sample for file, sample in photos.items() if file not in results}
    remover = start_remover(out, record) if todo else None
    out.mkdir(parents=True, exist_ok=True)
    changed = bool(todo)
    with locked(out):
        if todo:
            record["unfinished"] = sorted({*tables, *record["unfinished"]})
            update(out / PREPARED, json.dumps(record, indent=2, sort_keys=True))
            make = partial(make_photo, out, record["preparation"], remover)
            problems += make_photos(out, todo, results, make, workers)
        for name, (header, rows) in tables.items():
            changed |= update(out / name, csv_text(header, rows, results))
        record["unfinished"] = [name for name in record["unfinished"] if name not in tables]
        changed |= update(out / PREPARED, json.dumps(record, indent=2, sort_keys=True))

    found = [results[file]["foreground"] for file in photos if file in results]
    counted = f"{len(found):,} photos, no foreground in {found.count(False):,} of them"
    say(f"{out}: {counted}" if changed else f"{out} is finished ({counted}); nothing was changed")
    if problems:
        raise ValueError(list_problems(f"{len(problems)} rows are left out: correct them and start again", problems))


def open_record(root: Path, out: Path, subtask: int, settings: dict) -> dict:
    """The content of preprocess.json. Raises ValueError for a foreign folder, BadParameter for other settings."""
    if (root / PREPARED).exists():
        raise ValueError(f"{root} was made by preprocess.py already; give the dataset that it was made from")
    if out.resolve().is_relative_to(root.resolve()) or root.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} and {root} lie within each other; choose a folder beside it")
    new = {"data": str(root.resolve()), "subtask": subtask, "preparation": settings, "unfinished": []}
    record = record_of(out)
    if record is None:
        if out.exists() and (not out.is_dir() or any(file.suffix != ".tmp" for file in out.iterdir())):
            raise ValueError(f"{out} exists and was not made by preprocess.py; choose a new folder")
        return new
    before, asked = record | record["preparation"], new | settings
    for key in ("data", "subtask", *settings):
        if before.get(key) != asked[key]:
            flag = "DATA" if key == "data" else flag_of(key)
            raise usage_error(flag, f"{out} was begun with {before.get(key)}, not {asked[key]}; choose another folder")
    return record


def read_photos(root: Path, splits: list[str], subtask: int) -> tuple[dict, dict[str, Sample], list[str]]:
    """{CSV: (header, [(file, cells)])}, {file: sample}, problems. `file` is what a photo becomes, relative to OUT."""
    tables, photos, problems = {}, {}, []
    for split in splits:
        header, found = read_table(root, split, {}, subtask)
        rows = []
        for cells, sample in found:
            if isinstance(sample, ValueError):
                problems.append(str(sample))
                continue
            kind = Image.registered_extensions().get(os.path.splitext(sample.name)[1].lower())
            file = os.path.normpath(f"{split}/{sample.name}") + ("" if kind in SAVE_OPTIONS else ".png")
            first = photos.setdefault(file, sample)
            if first.path != sample.path:
                problems.append(f"{sample.where}: it becomes the same file as {first.name}; rename one of them")
            elif first.boxes == sample.boxes:
                rows.append((file, cells))
            else:
                problems.append(f"{sample.where}: an earlier row has this photo with another box; copy it for this row")
        tables[csv_name(split, subtask)] = (header, rows)
    if not photos:
        raise ValueError(list_problems(f"no row of {root} can be used", problems))
    return tables, photos, problems


def start_remover(out: Path, record: dict) -> Remover:
    """A Remover; its weights and versions are entered into the record. Raises ValueError for weights that changed."""
    preparation = record["preparation"]
    checksum, weights = find_weights(preparation["rembg_model"])
    if preparation.setdefault("checksum", checksum) != checksum:
        raise ValueError(f"{out} was begun with other weights ({preparation['checksum']}); choose another folder")
    preparation["weights_bytes"] = weights.stat().st_size
    record["versions"] = {name: version(name) for name in ("rembg", "onnxruntime", "pillow", "numpy", "scipy")}
    if record["subtask"] == 2:
        note("the rules of sub-task 2 admit no pretrained models, rembg's among them")
    return Remover(preparation["rembg_model"])


def make_photos(out: Path, todo: dict, results: dict, make: partial, workers: int | None) -> list[str]:
    """Make the photos of `todo` and enter them into `results`, both by file; returns what is wrong with the others."""
    from loading import default_workers

    workers = default_workers(workers)
    say(f"{len(todo):,} photos to do, {len(results):,} done before, {workers} at a time")
    problems = []
    pool = ThreadPoolExecutor(workers)  # Pillow, NumPy and ONNX Runtime release the GIL
    with pool, open(out / RESULTS, "a", buffering=1) as lines, progress(len(todo), "photos", "photos") as bar:
        for result in pool.map(make, todo, todo.values()):
            if isinstance(result, ValueError):
                problems.append(str(result))
            else:
                results[result["file"]] = result
                lines.write(json.dumps(result) + "\n")  # its image is complete
            bar.advance(1)
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
    except (ValueError, OSError) as error:  # OSError: of the encoder
        return ValueError(f"{sample.where}: {error}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as image:
        image.write(content.getbuffer())
    cells = dict(zip(BOX_COLUMNS["mask"], boxes.get("mask", (0, 0, *photo.size))))
    if preparation["crop"] != "none" and "bbox" in boxes:
        cells |= zip(BOX_COLUMNS["bbox"], boxes["bbox"])
    original = {"csv_box": list(sample.boxes.get("bbox", ())), "bytes": os.path.getsize(sample.path)}
    return {"file": file, **original, "foreground": "mask" in boxes, "cells": cells}


def read_results(out: Path, photos: dict[str, Sample]) -> dict[str, dict]:
    """The lines of preprocess.jsonl by file, without those of photos whose original or box in the CSV has changed."""
    results, path = {}, out / RESULTS
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # a kill cut it off
            result = json.loads(line)
            results[result["file"]] = result
    for file in photos.keys() & results.keys():
        made, sample, original = out / file, photos[file], os.stat(photos[file].path)
        same_box = results[file]["csv_box"] == list(sample.boxes.get("bbox", ()))
        same_bytes = results[file]["bytes"] == original.st_size
        if not (same_box and same_bytes and made.exists() and made.stat().st_mtime_ns >= original.st_mtime_ns):
            del results[file]
    return results


def csv_text(header: list[str], rows: list[tuple[str, list[str]]], results: dict[str, dict]) -> str:
    """The new CSV: the rows as they are now, with the cells that changed."""
    text = io.StringIO()
    columns = dict.fromkeys([*header, *BOX_COLUMNS["mask"]])  # the original may have them too
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for file, cells in rows:
        if file in results:
            writer.writerow(dict(zip(header, cells)) | results[file]["cells"] | {"image_name": file.partition("/")[2]})
    return text.getvalue()


def update(path: Path, text: str) -> bool:
    """Write a file unless this is its text already; returns whether it was written."""
    if path.exists() and path.read_bytes() == text.encode("utf-8", "surrogateescape"):
        return False
    with atomic_write(path) as file:
        file.write(text)
    return True


if __name__ == "__main__":
    run_app(app)
