"""Predict with a checkpoint of train.py; score it where the labels are known.

    python predict.py runs/NAME/best.pt                                      # the test split of the data that it was trained on
    python predict.py runs/NAME/best.pt --data demo --split val              # repeats training's table
    python predict.py runs/NAME/best.pt photo.jpg a_folder_of_photos --names
    python predict.py runs/NAME/best.pt --data Dataset --background keep --view full      # raw and whole, whatever it was trained on

Photos are treated as the training photos were: where these were cleaned or cut by preprocess.py, raw ones are too, on the fly.

Writes predictions.csv beside the checkpoint (replaced if there): image_name and a column a label, in the organisers' format.
The demo set's 400 test photos take about 4 s on two CPU cores with README's small backbone, starting up included.
"""

import hashlib
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer
from PIL import Image
from torch import Tensor

from cli import blaming, misuse, note, progress, run_app, say, say_boxes, show_scores, write_csv
from data import (
    BOX,
    CLASS_NAMES,
    Photos,
    Sample,
    Split,
    as_it_is,
    batches,
    check_preparation,
    csv_name,
    default_workers,
    find_dataset,
    image_samples,
    load_photo,
    make_loader,
    needs_remover,
    read_preparation,
    read_split,
    relative_boxes,
    submission_column,
)
from model import (
    FashionModel,
    box_of,
    choose_amp,
    choose_device,
    crops_of,
    join_looks,
    load_model,
    predict_logits,
    score,
    score_boxes,
)
from preprocess import Remover, find_weights, prepare_photo

UNTRAINED = {"rembg_model": "u2net", "background_color": [0, 0, 0], "keep_background": False, "crop": "none", "box_margin": 0.0}  # preprocess.py's defaults

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A best.pt of train.py.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Image files and folders, instead of --data.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Dataset folder, or `demo`.", show_default="the one trained on")] = None,
    split: Annotated[Literal["train", "val", "test"] | None, typer.Option(help="Split of the dataset.", show_default="test, else val")] = None,
    out: Annotated[Path | None, typer.Option(help="The CSV to write.", show_default="predictions.csv beside the checkpoint")] = None,
    view: Annotated[
        Literal["auto", "full", "bbox", "mask", "learned"],
        typer.Option(help="What the model sees; auto: as in validation, where that can be had; learned: the box that its box head finds."),
    ] = "auto",
    view_sum: Annotated[bool, typer.Option(help="In the view learned, add what it made of the whole photo.")] = True,
    background: Annotated[Literal["auto", "keep", "remove"], typer.Option(help="auto: as in training; keep: raw photos as they are, whole.")] = "auto",
    rembg_model: Annotated[str | None, typer.Option(help="Which of rembg's models cleans raw photos.", show_default="training's, else u2net")] = None,
    probs: Annotated[bool, typer.Option("--probs", help="Add the classes' probabilities.")] = False,
    names: Annotated[bool, typer.Option("--names", help="Add the classes' names.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.", min=1, show_default="training's")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode photos; 0: none.", min=0, max=256, show_default="one a core, at most 8")] = None,
    amp: Annotated[Literal["auto", "fp16", "bf16", "off"] | None, typer.Option(help="Mixed precision.", show_default="training's, where it can be had")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Predict the labels of a dataset's split, or of image files and folders."""
    if inputs and (data or split):
        raise misuse("--data" if data else "--split", "give either a dataset and split, or image files and folders")
    model, saved = load_model(checkpoint)
    check_treatment(checkpoint, saved["data"])
    with blaming("--device"):
        place = choose_device(device)
    out = out or checkpoint.with_name("predictions.csv")
    if out.is_dir() or not out.parent.is_dir():
        raise misuse("--out", f"{out} is a folder" if out.is_dir() else f"no folder {out.parent}")
    rows = image_samples(inputs) if inputs else read_labelled(saved, data, split)
    if out.resolve() in {checkpoint.resolve(), rows.csv.resolve(), *(Path(sample.path).resolve() for sample in rows.samples)}:
        raise misuse("--out", f"{out} is what is predicted from")
    view, prepare = choose_treatment(saved, rows, view, background, rembg_model)
    if view == "learned" and not view_sum:
        saved["learned"]["view_weight"] = 0.0
    elif not view_sum:
        note(f"--no-view-sum cannot act in the view {view}")
    logits, targets = predict_rows(model.to(place), saved, rows, view, prepare, batch_size, workers, amp)

    header, columns = predictions_table(rows, logits, probs, names)
    write_csv(out, header, zip(*columns))
    if targets:
        show_scores(f"{rows.csv.name} ({view})", score(logits, targets))
        if view == "learned" and rows.has("bbox"):
            say_boxes(score_boxes(logits[BOX], relative_boxes(rows.samples, "bbox")))
            show_scores("the same photos, boxes given (bbox)", score(*predict_rows(model, saved, rows, "bbox", prepare, batch_size, workers, amp)))
    say(f"{len(rows.samples):,} photos ({view}) predicted: {out}")


# ---------------------------------------------------------------- from rows to answers


def predict_rows(
    model: FashionModel,
    saved: dict,
    rows: Split,
    view: str,
    prepare: Callable[[Sample], tuple[Image.Image, dict]] = as_it_is,
    batch_size: int | None = None,
    workers: int | None = None,
    amp: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits {label: float32 (N, classes)} and, of labels that the rows hold, targets {label: int64 (N,)}. `model`, `saved`: load_model's.

    The view `learned` is two passes: over the whole photos, and over the boxes that the first one found, float32 (N, 4) as the logits' BOX.
    `view`, `prepare`: choose_treatment's. None means training's `batch_size` and precision (`amp`), and as many `workers` as there are cores.
    Raises BadParameter for a precision that the model's device cannot have, ValueError for photos that cannot be decoded.
    """
    device = model.mean.device
    with blaming("--amp"):
        amp_dtype = choose_amp("auto" if amp is None and saved["amp"] == "fp16" and device.type != "cuda" else amp or saved["amp"], device)

    def look(**seen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loader = make_loader(Photos(rows.samples, saved["image_size"], **seen), batch_size or saved["batch_size"], default_workers(workers))
        with progress(len(rows.samples), "finding garments" if view == "learned" and "crops" not in seen else "predicting") as bar:
            return predict_logits(model, batches(loader), device, amp_dtype, bar.advance)

    if view != "learned":
        return look(view=view, prepare=prepare)
    with TemporaryDirectory() as folder:
        first, targets = look(prepare=prepare if prepare is as_it_is else partial(prepare_and_keep, prepare=prepare, folder=folder))
        crops = crops_of(first[BOX], saved["learned"]["margin"])
        second, _ = look(crops=crops, prepare=prepare if prepare is as_it_is else partial(kept, folder=folder))
    return join_looks(first, second, saved["learned"]) | {BOX: box_of(first[BOX])[0]}, targets


def prepare_and_keep(sample: Sample, prepare: Callable, folder: str) -> tuple[Image.Image, dict]:
    """What `prepare` gives, which is kept in `folder` for `kept`: removing a background takes longer than all else."""
    photo, boxes = prepare(sample)
    photo.save(kept_file(sample, folder), compress_level=1)
    return photo, boxes


def kept(sample: Sample, folder: str) -> tuple[Image.Image, dict]:
    return load_photo(kept_file(sample, folder)), {}


def kept_file(sample: Sample, folder: str) -> Path:
    return Path(folder) / f"{hashlib.sha256(os.fsencode(sample.path)).hexdigest()}.png"


def predictions_table(rows: Split, logits: dict[str, Tensor], probs: bool = False, names: bool = False) -> tuple[list[str], list[list]]:
    """Header and columns in the organisers' format, image_name and a class number a label; then, where asked for, the classes' names and probabilities."""
    header, columns, more = ["image_name"], [[sample.name for sample in rows.samples]], []
    for label, values in ((label, values) for label, values in logits.items() if label != BOX):
        column, best = submission_column(label), values.argmax(-1).tolist()
        header.append(column)
        columns.append(best)
        if names:
            known = CLASS_NAMES.get(label)
            more.append((f"{column}_name", [known[c] if known else str(c) for c in best]))
        if probs:
            more += [(f"{column}_p{c}", p) for c, p in enumerate(values.double().softmax(-1).T.tolist())]
    return header + [name for name, _ in more], columns + [column for _, column in more]


# ---------------------------------------------------------------- how the photos are treated


def check_treatment(checkpoint: Path, trained_on: dict) -> None:
    """Raises ValueError where the checkpoint's record of its data makes no sense."""
    try:
        if trained_on["view"] not in ("full", "bbox", "mask", "learned"):
            raise ValueError
        if trained_on["preparation"] is not None:
            check_preparation(trained_on["preparation"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{checkpoint} does not say how its photos were treated; train again with this version") from None


def choose_treatment(
    saved: dict, rows: Split, view: str = "auto", background: str = "auto", rembg_model: str | None = None
) -> tuple[str, Callable[[Sample], tuple[Image.Image, dict]]]:
    """What the model is to see of these rows, and the function that gives a sample's photo and boxes; says where it is not as in training.

    `view`, `background`, `rembg_model`: the flags' values. Raises BadParameter where they cannot be had, ValueError or OSError where the remover cannot.
    """
    of_dataset, trained = bool(rows.classes), saved["data"]["preparation"]
    there = read_preparation(rows.csv.parent) if of_dataset else None  # image files are raw photos
    preparation = choose_preparation(background, trained, there, rembg_model)
    view = choose_view(view, saved, rows, rows.csv.name if of_dataset else "these photos", cleans=bool(preparation), raw=there is None)
    if view == "mask" and not preparation and not rows.has("mask"):
        preparation = find_garments(trained, rembg_model)
    if rembg_model and not needs_remover(preparation, view):
        note(f"--rembg-model {rembg_model} cannot act: these photos are taken as they are")
    return view, start_preparing(preparation, trained, view) if preparation else as_it_is


def choose_preparation(background: str, trained: dict | None, there: dict | None, rembg_model: str | None) -> dict | None:
    """What preprocess.py's function is to do to each photo; None: nothing. `trained`, `there`: what was done to the training photos and to these."""
    if there:
        if background == "remove" and there["keep_background"]:
            raise misuse("--background", "these photos went through preprocess.py --keep-background; give the raw ones")
        if rembg_model and rembg_model != there["rembg_model"]:
            raise misuse("--rembg-model", f"these photos were processed with {there['rembg_model']} already; give the raw ones")
        if background != "keep" and there != trained:
            said = f"the model was trained on {described(trained)}; these are {described(there)}, and stay so"
            note(said + ("" if trained is None else "; give the raw photos, and they are treated as in training"))
        return None
    if background == "keep" or (background == "auto" and not trained):
        return None
    preparation = trained or UNTRAINED
    if background == "remove":
        preparation = preparation | {"keep_background": False}
    return preparation | ({"rembg_model": rembg_model} if rembg_model else {})


def described(preparation: dict | None) -> str:
    """A preparation in words."""
    if preparation is None:
        return "raw photos"
    color = "#{:02x}{:02x}{:02x}".format(*preparation["background_color"])
    background = "with their background" if preparation["keep_background"] else f"with {color} for a background (by {preparation['rembg_model']})"
    margin = f" with a margin of {preparation['box_margin']:g}" if preparation["box_margin"] else ""
    return f"photos {background}" + (f", cut to {preparation['crop']}{margin}" if preparation["crop"] != "none" else "")


def find_garments(trained: dict | None, rembg_model: str | None) -> dict:
    """The preparation that finds the foreground's box and changes nothing else."""
    preparation = (trained or UNTRAINED) | {"keep_background": True, "crop": "none"}
    return preparation | ({"rembg_model": rembg_model} if rembg_model else {})


def choose_view(asked: str, saved: dict, rows: Split, these: str, cleans: bool, raw: bool) -> str:
    """What the model sees: what was asked for, or what it was validated with, or the nearest thing that can be had here, saying so."""
    if asked == "auto":
        view = saved["data"]["view"]
        if view != "bbox" or rows.has("bbox"):
            return view if view != "mask" or raw or rows.has("mask") else "full"
        top1 = saved["scores"]["top1_mean"]
        made = "trained for boxed garments" if math.isnan(top1) else f"validated on boxed garments (Top-1 {top1:.4f})"  # --fit-all has no score
        boxed = f"this model was {made}, and there are no boxes for {these}"
        if cleans or (rows.has("mask") and not raw):
            note(f"{boxed}: it sees the box round the foreground (mask)")
            return "mask"
        note(f"{boxed}: it sees whole photos, so expect far less (the notes' author fell from 0.65 to 0.50)")
        note("--view mask shows it the box round the foreground; --crop-prob below 1 with --val-view full trains for whole photos")
        return "full"
    if asked == "learned" and saved["learned"] is None:
        raise misuse("--view", "this model has no box head (train.py --box-head); --view mask finds garments without one")
    if asked == "bbox" and not rows.has("bbox"):
        raise misuse("--view", f"there are no boxes for {these}; --view mask finds them, --view full does without")
    return asked


def start_preparing(preparation: dict, trained: dict | None, view: str) -> Callable[[Sample], tuple[Image.Image, dict]]:
    """preprocess.py's function for one photo, with its remover where a foreground is needed; says what is done."""
    if not needs_remover(preparation, view):
        return partial(prepare_photo, preparation=preparation, remover=None)
    model = preparation["rembg_model"]
    checksum, _ = find_weights(model)
    if trained and trained["rembg_model"] == model and trained["checksum"] != checksum:
        note(f"the weights of {model} here ({checksum}) are not those of training ({trained['checksum']})")
    changed = not preparation["keep_background"] or preparation["crop"] != "none"
    say(f"on the fly, raw photos become {described(preparation)}" if changed else f"on the fly, the foreground of raw photos is found with {model}")
    return partial(prepare_photo, preparation=preparation, remover=Remover(model))


# ---------------------------------------------------------------- which rows


def read_labelled(saved: dict, data: str | None, split: str | None) -> Split:
    """The split asked for; by default test (val where there is none) of the data that the checkpoint was trained on, which is said."""
    subtask = saved["data"]["subtask"]
    root = find_dataset(data or saved["data"]["path"], subtask)
    chosen = split or next((s for s in ("test", "val") if (root / csv_name(s, subtask)).is_file()), "test")
    if not (data and split):
        say(f"predicting the {chosen} split of {data or saved['data']['path']}")
    return read_split(root, chosen, saved["classes"], subtask)


if __name__ == "__main__":
    run_app(app)
