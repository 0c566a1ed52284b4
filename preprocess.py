"""Remove the backgrounds of a dataset's photos (rembg), find the garment in each, cut to it: a processed copy of the dataset.

    python preprocess.py Dataset Dataset-rembg                          # all splits; `demo` is the built-in set
    python preprocess.py Dataset Dataset-rembg --rembg-model u2netp     # 4.6 MB of weights instead of 176, and three times as fast
    python preprocess.py Dataset Dataset-crops --crop bbox              # cut to the CSV's box (where there is none, to the garment's)

Writes the same folders and CSVs with four more columns, Mask_xmin to Mask_ymax (the box round the garment's foreground, in pixels of
the new image), preprocess.json (what was done) and preprocess.csv (a line a photo). Started again it goes on where it was, and ends
with the same bytes. Two CPU cores do about 4 photos/s with u2netp, 1.3 with u2net.
"""

import csv
import difflib
import gc
import hashlib
import io
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
import torch
import typer
from PIL import Image, ImageChops, ImageColor

from cli import blaming, locked, misuse, note, progress, remove_leftovers, run_app, say, whole_file, write_csv
from data import (
    BOX_COLUMNS,
    PREPARED,
    SPLITS,
    Sample,
    Table,
    check_header,
    check_preparation,
    csv_name,
    find_dataset,
    read_table,
    report,
)
from loading import default_workers
from photos import Box, clip_box, load_photo

LOG = "preprocess.csv"
LOG_COLUMNS = ("split", "image_name", "bytes", "blake2b", "cut_to", *BOX_COLUMNS["mask"], "found", *BOX_COLUMNS["bbox"])
SAVING = {  # by the suffix that a photo keeps; of any other it becomes NAME.png
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".png": {"format": "PNG", "compress_level": 1},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF"},
    ".tiff": {"format": "TIFF"},
    ".webp": {"format": "WEBP", "lossless": True, "quality": 0},
}
SMALLEST_GARMENT = 1e-4  # of the photo's pixels; a smaller foreground counts as none
SURELY = (
    2,
    253,
)  # a mask's values up to the first are background, from the second foreground: rembg's masks hardly reach 0 and 255
EDGE_SIDE = 160  # the colours on both sides of an edge are estimated at about this many pixels a side ...
EDGE_RADIUS = 4  # ... from so many of these pixels around
EDGE_NOISE = 30.0**2  # squared distance of two colours (0..255 a channel) below which they do not tell the sides apart
UNSUITABLE = {
    "sam": "it needs to be told where the garment is",
    "u2net_custom": "it is a model of one's own",
    "dis_custom": "it is a model of one's own",
    "ben_custom": "it is a model of one's own",
    "birefnet-general-fp16": "it needs a further package, onnx",
}
NON_COMMERCIAL = {"bria-rmbg": "the weights of bria-rmbg may not be used commercially without an agreement with BRIA"}

Prepared = tuple[Image.Image, dict[str, Box]]


# ---------------------------------------------------------------- one photo


class Remover:
    """rembg with one model: a session for each thread that is at work, used again and again; a process that it is sent to makes its own.

    Every inference runs on one thread: the masks then do not depend on the number of cores, and several at once are faster than one on all.
    """

    def __init__(self, model: str):
        self.model, self.idle = model, []

    def __getstate__(self) -> dict:
        return {"model": self.model, "idle": []}

    def start(self) -> list[str]:
        """Make a session; returns where it runs (ONNX Runtime's providers)."""
        rembg = import_rembg()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = rembg.new_session(self.model, sess_opts=options)
        self.idle.append(session)
        return session.inner_session.get_providers()

    def mask(self, photo: Image.Image) -> Image.Image | None:
        """How much of each pixel is foreground, 0 to 255 (mode L, the photo's size); None where the model sees nothing at all (a blank photo)."""
        while True:
            try:
                session = self.idle.pop()
                break
            except IndexError:  # another thread may take the new one first
                self.start()
        try:
            with np.errstate(invalid="raise"):  # rembg divides by the mask's range: 0 / 0 is a NaN mask
                first, *more = session.predict(photo)
        except FloatingPointError:
            return None
        finally:
            self.idle.append(session)
        for other in more:  # u2net_cloth_seg: upper, lower and full-body garments
            first = ImageChops.lighter(first, other)
        return first


def prepare_photo(sample: Sample, preparation: dict, remover: Remover | None) -> Prepared:
    """The one treatment of a photo, for stored datasets and for prediction: RGB with the background replaced, cut, and the boxes in it.

    boxes: `bbox` where the sample has one, `mask` where a foreground was found in what is left of the photo (else its background stays).
    `remover` None: no foreground is looked for. Raises ValueError where the image is damaged or its box lies outside it.
    """
    color = tuple(preparation["background_color"])
    photo = load_photo(sample.path, color)
    whole = (0, 0, *photo.size)
    boxes = {view: clip_box(box, *photo.size) for view, box in sample.boxes.items() if view == "bbox"}
    mask = remover.mask(photo) if remover else None
    if mask and (found := foreground_box(mask)):
        boxes["mask"] = found
    cut = whole
    if preparation["crop"] != "none":
        chosen = boxes.get(preparation["crop"]) or boxes.get("mask") or whole
        cut = clip_box(grow(chosen, preparation["box_margin"]), *photo.size)
    inside = {view: moved for view, box in boxes.items() if (moved := move_into(box, cut))}
    if "bbox" in boxes:
        inside.setdefault(
            "bbox", (0, 0, cut[2] - cut[0], cut[3] - cut[1])
        )  # the foreground is elsewhere: all that is left of the photo
    if "mask" in inside and not preparation["keep_background"]:
        photo = replace_background(photo, mask, color)
    return photo if cut == whole else photo.crop(cut), inside


def foreground_box(mask: Image.Image) -> Box | None:
    """The box (right and lower ends exclusive) of the garment in a mask (mode L): of the connected piece with the greatest sum of foreground.

    Smaller pieces and separate things that stand out too do not stretch it. None where the mask is empty.
    """
    from scipy import ndimage  # rembg brings it

    whole = mask.point([0] * 128 + [255] * 128).getbbox()
    if whole is None:
        return None
    foreground = np.asarray(mask.crop(whole))
    pieces, n = ndimage.label(foreground > 127, structure=np.ones((3, 3)))
    weights = np.bincount(pieces.ravel(), foreground.ravel(), n + 1)[1:]
    rows, columns = ndimage.find_objects(pieces)[weights.argmax()]
    if (pieces == weights.argmax() + 1).sum() < SMALLEST_GARMENT * mask.width * mask.height:
        return None
    return whole[0] + columns.start, whole[1] + rows.start, whole[0] + columns.stop, whole[1] + rows.stop


def replace_background(photo: Image.Image, mask: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The photo's (RGB) foreground, as far as `mask` (L) says, on one colour, without the old background's colour on soft edges.

    A pixel of a soft edge may be foreground, background or a mixture, whatever the mask's resolution makes of it. Its share b of
    foreground is read from its colour I: where it lies between the mean foreground F and background B round about. Taking the
    background's share off leaves F + b (I - b F - (1 - b) B): F on the background's side, I on the foreground's.
    """
    from scipy import ndimage

    image, alpha = np.asarray(photo), np.asarray(mask)
    surely = mask.point([0] * SURELY[1] + [255] * (256 - SURELY[1]))
    result = np.array(Image.composite(photo, Image.new("RGB", photo.size, color), surely))
    edge = np.flatnonzero((alpha > SURELY[0]) & (alpha < SURELY[1]))
    k = max(1, round(min(photo.size) / EDGE_SIDE))
    small, weight = np.asarray(photo.reduce(k), np.float32), np.asarray(mask.reduce(k), np.float32)[..., None] / 255

    def around(weight: np.ndarray) -> np.ndarray:
        """Weighted mean colour of the neighbourhood at each pixel of `small`, float32 (height, width, 3)."""
        weight = weight**3 + 1e-4
        side = 2 * EDGE_RADIUS + 1
        sums = ndimage.uniform_filter(np.concatenate([small * weight, weight], axis=2), (side, side, 0), mode="nearest")
        return sums[..., :3] / sums[..., 3:]

    front, back = around(weight), around(1 - weight)
    ys, xs = np.divmod(edge, alpha.shape[1])
    near = ys // k * small.shape[1] + xs // k
    front, back, apart = (colors.reshape(-1, 3).take(near, axis=0) for colors in (front, back, front - back))
    own = image.reshape(-1, 3).take(edge, axis=0) - back
    amount = alpha.ravel().take(edge)[:, None] / np.float32(255)
    share = np.einsum("ij,ij->i", own, apart)[:, None] + EDGE_NOISE * amount
    share = (share / (np.einsum("ij,ij->i", apart, apart)[:, None] + EDGE_NOISE)).clip(0, 1)
    share = np.maximum(
        share, 1 - 4 * (1 - amount)
    )  # a mask is seldom 255 anywhere: where it is sure, a colour is the garment's own
    clean = (front + share * (own - share * apart)).clip(0, 255)  # I - b F - (1 - b) B = (I - B) - b (F - B)
    result.reshape(-1, 3)[edge] = (amount * clean + (1 - amount) * np.array(color, np.float32)).round().astype(np.uint8)
    return Image.fromarray(result)


def grow(box: Box, margin: float) -> Box:
    """The box with `margin` of its width and height added on each side."""
    dx, dy = round(margin * (box[2] - box[0])), round(margin * (box[3] - box[1]))
    return box[0] - dx, box[1] - dy, box[2] + dx, box[3] + dy


def move_into(box: Box, cut: Box) -> Box | None:
    """The part of a box that a crop keeps, in the crop's pixels; None where it keeps nothing."""
    with suppress(ValueError):
        return clip_box(
            (box[0] - cut[0], box[1] - cut[1], box[2] - cut[0], box[3] - cut[1]), cut[2] - cut[0], cut[3] - cut[1]
        )
    return None


# ---------------------------------------------------------------- rembg and its weights


def import_rembg():
    """The module. Raises ValueError where it is not installed."""
    threads = torch.get_num_threads()
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # without ONNX Runtime rembg exits
        raise ValueError(f"rembg cannot be imported ({error or 'no ONNX Runtime'}): pip install 'rembg[cpu]'") from None
    finally:
        torch.set_num_threads(threads)  # pymatting, which it imports, sets OpenMP's number to that of all cores
    return rembg


def find_weights(model: str) -> tuple[str, Path]:
    """Checksum and file of a model's weights where rembg keeps them; downloads them if need be.

    Raises BadParameter for a model that cannot be used, ValueError where the file is not what rembg publishes, OSError where the download fails.
    """
    import_rembg()
    import pooch  # rembg brings it
    from rembg.sessions import sessions

    usable = [name for name, session in sessions.items() if session.is_local() and name not in UNSUITABLE]
    if model not in usable:
        close = difflib.get_close_matches(model, usable, cutoff=0.4) or usable
        reason = (
            UNSUITABLE.get(model, "it sends the photos to another machine")
            if model in sessions
            else "rembg has no such model"
        )
        raise misuse("--rembg-model", f"{model!r} cannot be used: {reason}; there are {', '.join(close)}")
    session = sessions[model]
    published, name = published_file(session)
    path = session.resolve_existing(name)
    if path is None:
        pooch.get_logger().setLevel("WARNING")
        say(f"downloading {name} into {session.model_dir()}")
        try:
            path = session.download_models()
        except Exception as error:  # pooch raises many kinds
            advice = (
                f"put the file there, or set U2NET_HOME to its folder ({type(error).__name__}: is there a network?)"
            )
            raise OSError(
                f"{name} ({published or 'no published checksum'}) is not in {session.model_dir()} and cannot be downloaded; {advice}"
            ) from error
    algorithm = (published or "sha256:").partition(":")[0]
    with open(path, "rb") as file:
        checksum = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    if published and checksum != published:
        raise ValueError(
            f"{path} is damaged or another file: it has {checksum}, rembg publishes {published}; delete it, and it is downloaded again"
        )
    return checksum, Path(path)


def published_file(session: type) -> tuple[str | None, str]:
    """Checksum and name of the file that rembg would download for a session class, by asking its download function with pooch held back."""
    import pooch

    asked: list = []
    asking = type("Asking", (session,), {"resolve_existing": classmethod(lambda *args, **kwargs: None)})
    retrieve = pooch.retrieve
    pooch.retrieve = lambda url, known_hash, **kwargs: asked.append((known_hash, kwargs.get("fname")))
    try:
        asking.download_models()
    finally:
        pooch.retrieve = retrieve
    checksum, name = asked[0] if asked else (None, None)
    return checksum, name or f"{session.name()}.onnx"


# ---------------------------------------------------------------- a dataset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def preprocess(
    data: Annotated[str, typer.Argument(help="A dataset folder, or `demo`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the processed dataset: a new one, or one to go on with.")],
    splits: Annotated[
        list[str] | None,
        typer.Option(help="train, val or test alone; may be repeated.", show_default="all that are there"),
    ] = None,
    subtask: Annotated[int, typer.Option(min=1, max=2, help="Which sub-task's CSVs to read.")] = 1,
    rembg_model: Annotated[
        str, typer.Option(help="Any of rembg's local models: u2net, u2netp, isnet-general-use, ...")
    ] = "u2net",
    background_color: Annotated[str, typer.Option(help="What the background becomes: a name or #rrggbb.")] = "black",
    keep_background: Annotated[
        bool, typer.Option("--keep-background", help="Find the garment's box, but leave the background.")
    ] = False,
    crop: Annotated[
        Literal["none", "bbox", "mask"],
        typer.Option(help="Cut photos to the CSV's box (else the foreground's) or the foreground's."),
    ] = "none",
    box_margin: Annotated[
        float, typer.Option(min=0, max=1, help="Room that --crop leaves on each side, as a share of the box's side.")
    ] = 0.0,
    workers: Annotated[
        int | None, typer.Option(help="Photos at a time.", min=1, max=256, show_default="one a core, at most 8")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a copy of a dataset with backgrounds removed, garments found, and photos cut if asked."""
    root = find_dataset(data, subtask)
    with blaming("--background-color"):
        color = ImageColor.getrgb(background_color)
    if len(color) != 3:
        raise misuse("--background-color", f"{background_color} is transparent; give an opaque colour")
    if crop == "none" and box_margin:
        note(f"--box-margin {box_margin:g} cannot act without --crop")
    settings = {
        "rembg_model": rembg_model,
        "background_color": list(color),
        "keep_background": keep_background,
        "crop": crop,
        "box_margin": box_margin,
    }
    if unknown := [split for split in splits or () if split not in SPLITS]:
        raise misuse("--splits", f"{unknown[0]} is none of {', '.join(SPLITS)}")
    chosen = (
        [split for split in SPLITS if split in splits]
        if splits
        else [split for split in SPLITS if (root / csv_name(split, subtask)).is_file()]
    )
    gc.disable()  # rows and rows that all stay: looking for some to collect would take a third of the time
    try:
        tables = {split: read_table(root, split, {}, subtask) for split in chosen}
        written = check_output(root, out, settings, subtask)
        job = Job(out, tables, settings)
    finally:
        gc.enable()
    begun = set(written.get("unfinished", ()))
    if written and not begun and not job.todo and not job.failed and not any(map(job.is_outdated, tables)):
        say(f"{out} is finished ({job.counted()}); nothing was changed")
        return

    remover, workers = Remover(rembg_model), default_workers(workers)
    if job.todo or not written:
        checksum, weights = find_weights(rembg_model)
        if written and written["preparation"]["checksum"] != checksum:
            before = written["preparation"]["checksum"]
            raise ValueError(
                f"{out} was begun with other weights of {rembg_model} ({before}, not {checksum}); choose another folder"
            )
        providers = remover.start()
        versions = {"python": platform.python_version()} | {
            package: version(package) for package in ("rembg", "onnxruntime", "pillow", "numpy", "scipy")
        }
        written |= {
            "preparation": settings | {"checksum": checksum, "weights_bytes": weights.stat().st_size},
            "providers": providers,
            "versions": versions,
        }
        if rembg_model in NON_COMMERCIAL:
            note(NON_COMMERCIAL[rembg_model])
        if subtask == 2:
            note("the rules of sub-task 2 admit no pretrained models, rembg's among them")
        say(
            f"{len(job.todo):,} photos to do, {len(job.done):,} done before; {rembg_model} ({checksum}), {', '.join(providers)}, {workers} at a time"
        )
    out.mkdir(parents=True, exist_ok=True)
    with locked(out), append_to(out / LOG) as log:
        here = {table.csv.name for table in tables.values()}
        write_json(out / PREPARED, written | {"subtask": subtask, "unfinished": sorted(begun | here)})
        remove_leftovers(out)
        try:
            job.run(partial(prepare_photo, preparation=written["preparation"], remover=remover), workers, log)
        except KeyboardInterrupt:
            note("stopped; the same command goes on from here")
            raise
        job.write_csvs()
        counts = written.get("counts", {}) | job.counts()
        write_json(
            out / PREPARED,
            written | {"subtask": subtask, "unfinished": sorted(begun - here), "counts": dict(sorted(counts.items()))},
        )
    say(f"{out}: {job.counted()}")
    if job.failed:
        problems = [str(job.failed[key]) for key in sorted(job.failed)]
        raise ValueError(report(f"{len(problems)} rows are left out of {out}: mend them and start again", problems))
    if all((out / csv_name(split, subtask)).exists() for split in ("train", "val")):
        say(f"next: python train.py --data {out}")


def check_output(root: Path, out: Path, settings: dict, subtask: int) -> dict:
    """What an earlier start wrote into preprocess.json, {} in a new folder. Raises ValueError where the folder is something else's or was begun otherwise."""
    if (root / PREPARED).exists():
        raise ValueError(f"{root} was made by preprocess.py already; give the dataset that it was made from")
    source, target = root.resolve(), out.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ValueError(f"{out} and {root} lie within each other; choose a folder beside it")
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"{out} cannot be written: no permission in {there}")
    path = out / PREPARED
    if not path.exists():
        if out.exists() and (
            not out.is_dir() or any(not p.name.endswith(".tmp") and p.name != LOG for p in out.iterdir())
        ):
            raise ValueError(f"{out} exists and was not made by preprocess.py; choose a new folder")
        return {}
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        check_preparation(written["preparation"])
        before = {"subtask": written["subtask"], **written["preparation"]}
        if not isinstance(written["unfinished"], list):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged; delete {out} and start again") from None
    for key, value in {"subtask": subtask, **settings}.items():
        if before[key] != value:
            raise misuse(
                "--" + key.replace("_", "-"), f"{out} was begun with {before[key]}, not {value}; choose another folder"
            )
    return written


class Job:
    """The rows of the chosen splits against what the output folder holds: what is done, what is to do, what failed.

    Photos are known by (split, normalised image_name), rows by (place of the split, place in its CSV). What the folder holds beyond the rows stays.
    """

    def __init__(self, out: Path, tables: dict[str, Table], settings: dict):
        self.out, self.tables, self.crop = out, tables, settings["crop"]
        self.done: dict[tuple[str, str], dict[str, str]] = {}  # a photo's line of the log
        self.todo: dict[tuple[str, str], tuple[tuple[int, int], Sample]] = {}  # a photo's row
        self.failed: dict[tuple[int, int], ValueError] = {}  # by row
        self.log = read_log(out / LOG)
        for split, table in tables.items():
            if "Mask_xmin" in table.header:
                raise ValueError(
                    f"{table.csv} has Mask_ columns already; take them out, or give the dataset without them"
                )
            samples = [sample for _, sample in table.rows if isinstance(sample, Sample)]
            same = [
                line["bytes"] == str(table.sizes[sample.path])
                for sample in samples
                if (line := self.log.get(self.key_of(split, sample)))
            ]
            if samples and any(where == split for where, _ in self.log) and len(same) != 1 and not any(same):
                raise ValueError(f"{out} was made of other photos than those of {table.csv}; choose another folder")
            made: dict[str, tuple[str, str]] = {}  # from which photo and box each output file comes
            times = Counter(sample.name for sample in samples)
            for i, (_, sample) in enumerate(table.rows):
                row = (SPLITS.index(split), i)
                if (
                    isinstance(sample, Sample) and times[sample.name] > 1
                ):  # a box is checked as its photo is made, and only one row's is then
                    sample = check_header(sample)
                if isinstance(sample, ValueError):
                    self.failed[row] = sample
                    continue
                key, path = self.key_of(split, sample), self.path_of(split, sample.name)
                source = (key, self.cut_to(sample))
                if made.setdefault(os.path.normpath(path), source) != source:
                    advice = "an earlier row makes the same file of another photo or box; rename one, or use --crop none where the boxes differ"
                    self.failed[row] = ValueError(f"{sample.where}: {advice}")
                elif self.is_done(key, sample, table.sizes[sample.path], path):
                    self.done[key] = self.log[key]
                else:
                    self.todo[key] = row, sample

    def key_of(self, split: str, sample: Sample) -> tuple[str, str]:
        return split, os.path.normpath(sample.name)

    def cut_to(self, sample: Sample) -> str:
        """The box of the CSV, where the output depends on it."""
        return " ".join(map(str, sample.boxes["bbox"])) if self.crop == "bbox" and "bbox" in sample.boxes else ""

    def path_of(self, split: str, name: str) -> str:
        return f"{self.out}/{split}/{new_name(name)}"

    def is_done(self, key: tuple[str, str], sample: Sample, size: int, path: str) -> bool:
        """Whether the output is there and of this photo: the same size and cut, and no newer than the output or of the same bytes."""
        line = self.log.get(key)
        if line is None or line["bytes"] != str(size) or line["cut_to"] != self.cut_to(sample):
            return False
        with suppress(OSError):  # a photo that cannot be read is reported as it is made
            return (
                os.stat(sample.path).st_mtime_ns <= os.stat(path).st_mtime_ns
                or digest_of(sample.path) == line["blake2b"]
            )
        return False

    def run(self, prepare: Callable[[Sample], Prepared], workers: int, log: IO) -> None:
        """Make all that is to do, some photos at a time; a line of the log follows each image."""
        lines = csv.DictWriter(log, LOG_COLUMNS, lineterminator="\n")
        if log.tell() == 0:
            lines.writeheader()
        with progress(len(self.todo), "photos", "photos") as bar:
            for (key, (row, _)), result in zip(
                self.todo.items(), at_once(partial(self.make, prepare), self.todo.items(), workers)
            ):
                if isinstance(result, ValueError):
                    self.failed[row] = result
                else:
                    lines.writerow(result)
                    log.flush()
                    self.done[key] = self.log[key] = result
                bar.advance(1)

    def make(
        self, prepare: Callable[[Sample], Prepared], item: tuple[tuple[str, str], tuple[tuple[int, int], Sample]]
    ) -> dict[str, str] | ValueError:
        """Prepare and save one photo; returns its line of the log, or what is wrong with it."""
        (split, name), (_, sample) = item
        try:
            photo, boxes = prepare(sample)
        except ValueError as error:
            return ValueError(f"{sample.where}: {error}")
        path, buffer = Path(self.path_of(split, name)), io.BytesIO()
        photo.info.clear()  # else Pillow would pass on what the old file said of itself
        try:
            photo.save(buffer, **SAVING[path.suffix.lower()])
        except (OSError, ValueError) as error:
            reason = f"{photo.width} x {photo.height} pixels cannot be saved as {path.suffix} ({error}); save the photo as .png"
            return ValueError(f"{sample.where}: {reason}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, "wb") as file:
            file.write(buffer.getbuffer())
        line = [split, name, os.path.getsize(sample.path), digest_of(sample.path), self.cut_to(sample)]
        line += [*boxes.get("mask", (0, 0, *photo.size)), int("mask" in boxes), *boxes.get("bbox", ("",) * 4)]
        return dict(zip(LOG_COLUMNS, map(str, line)))

    def csv_rows(self, split: str) -> Iterator[list[str]]:
        """The header and rows of a split's new CSV: the old cells, with new names and boxes where these changed, and the mask's box."""
        table = self.tables[split]
        yield [*table.header, *BOX_COLUMNS["mask"]]
        for i, (cells, sample) in enumerate(table.rows):
            if (SPLITS.index(split), i) in self.failed or not (line := self.done.get(self.key_of(split, sample))):
                continue
            changed = {"image_name": new_name(sample.name)}
            if self.crop != "none" and "bbox" in sample.boxes:
                changed |= {column: line[column] for column in BOX_COLUMNS["bbox"]}
            yield [
                *(changed.get(column, cell) for column, cell in zip(table.header, cells)),
                *(line[column] for column in BOX_COLUMNS["mask"]),
            ]

    def is_outdated(self, split: str) -> bool:
        """Whether a split's CSV in the output is not what its rows are now (labels may have been corrected)."""
        try:
            with open(
                self.out / self.tables[split].csv.name, encoding="utf-8", errors="surrogateescape", newline=""
            ) as file:
                return list(csv.reader(file)) != list(self.csv_rows(split))
        except (OSError, csv.Error):
            return True

    def write_csvs(self) -> None:
        for split, table in self.tables.items():
            header, *rows = self.csv_rows(split)
            write_csv(self.out / table.csv.name, header, rows)
        order = sorted(self.log, key=lambda key: (SPLITS.index(key[0]), key[1]))
        write_csv(self.out / LOG, list(LOG_COLUMNS), [list(self.log[key].values()) for key in order])

    def counts(self) -> dict[str, dict[str, int]]:
        counts = {}
        for split, table in self.tables.items():
            lines = [line for (where, _), line in self.done.items() if where == split]
            counts[table.csv.name] = {
                "photos": len(lines),
                "without foreground": sum(line["found"] == "0" for line in lines),
            }
        return counts

    def counted(self) -> str:
        empty = sum(line["found"] == "0" for line in self.done.values())
        return f"{len(self.done):,} photos" + (
            f", {empty:,} of them left whole, since no foreground was found" if empty else ""
        )


def new_name(name: str) -> str:
    """The image's name in the output: another one only where its kind of file cannot hold the result."""
    return name if os.path.splitext(name)[1].lower() in SAVING else f"{name}.png"


def digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def at_once(work: Callable, items: Iterable, workers: int) -> Iterator:
    """`work(item)` for all items in order, in `workers` threads (Pillow, NumPy and ONNX Runtime let go of Python's lock); few results wait."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future] = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_log(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The whole lines of the log by (split, image_name); a line that was cut off by a kill is left out, the last of several counts."""
    text = path.read_bytes().decode("utf-8", errors="surrogateescape") if path.exists() else ""
    try:
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        if rows.fieldnames and tuple(rows.fieldnames) != LOG_COLUMNS:
            raise csv.Error
        return {
            (row["split"], row["image_name"]): row
            for row in rows
            if row["split"] in SPLITS and None not in row.values() and None not in row
        }
    except csv.Error:
        raise ValueError(f"{path} is damaged; delete {path.parent} and start again") from None


def append_to(path: Path) -> IO:
    """The log, open to append whole lines: one that a kill cut off is taken away first."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8", errors="surrogateescape", newline="")


def write_json(path: Path, content: dict) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    gc.freeze()  # what was imported is no garbage; to look through it again and again takes half a second over 14,000 rows
    run_app(app)
