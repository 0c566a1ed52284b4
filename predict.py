"""Predict with a checkpoint of train.py; score it where the labels are known.

    python predict.py runs/NAME/best.pt                                 # the test split of the data it was trained on
    python predict.py runs/NAME/best.pt --data demo --split val         # repeats training's table
    python predict.py runs/NAME/best.pt photo.jpg a_folder --names --picture a.png      # photos and folders
    python predict.py runs/NAME/best.pt --background keep --view full                   # raw and whole

Photos are prepared as the training photos were: where preprocess.py changed these, raw ones are changed too, on the
fly. Writes predictions.csv beside the checkpoint: image_name and a column a label, in the organisers' format.
"""

import csv
import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer
from typer.core import TyperCommand

import cli
from cli import NONE, OFF, note, progress, say, show_scores, show_table, usage_error, write_csv
from settings import Amp, in_run, note_unboxed

View = Literal["auto", "full", "bbox", "mask", "learned"]
Part = Literal["train", "val", "test"]
in_photos, in_output = (partial(cli.option, panel) for panel in ("Photos", "Output"))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class PredictCommand(TyperCommand):
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if ctx.params["inputs"] and (ctx.params["data"] or ctx.params["split"]):
            flag = "--data" if ctx.params["data"] else "--split"
            raise usage_error(flag, "give either a dataset and split, or photos and folders")
        return rest


@app.command(cls=PredictCommand, epilog=cli.examples(__doc__))
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A best.pt of train.py.", dir_okay=False)],
    inputs: Annotated[list[str] | None, typer.Argument(help="Photos and folders, instead of --data.")] = None,
    data: Annotated[str | None, in_photos("A dataset, or `demo`.", show_default="the one trained on")] = None,
    split: Annotated[Part | None, in_photos("Its split.", show_default="test, else val")] = None,
    view: Annotated[View, in_photos("What the model sees; auto: as in validation, if possible.")] = "auto",
    background: Annotated[Literal["auto", "keep", "remove"], in_photos("auto: as in training.")] = "auto",
    rembg_model: Annotated[str | None, in_photos("rembg's model.", show_default="as trained, u2net")] = None,
    out: Annotated[Path | None, in_output("The CSV to write.", show_default="beside the checkpoint")] = None,
    probs: Annotated[bool, in_output("Add the classes' probabilities.", "--probs", **OFF)] = False,
    names: Annotated[bool, in_output("Add the classes' names.", "--names", **OFF)] = False,
    boxes: Annotated[bool, in_output("Add the predicted boxes, in pixels of the photos.", "--boxes", **OFF)] = False,
    picture: Annotated[Path | None, in_output("Draw the first 48 photos with their answers (.png).", **NONE)] = None,
    batch_size: Annotated[int | None, in_run("Images at a time.", min=1, show_default="training's")] = None,
    workers: Annotated[int | None, in_run("Loading processes.", min=0, max=256, show_default="cores, up to 8")] = None,
    amp: Annotated[Amp | None, in_run("Mixed precision.", show_default="training's, if possible")] = None,
    device: Annotated[str, in_run("auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    debug: cli.Debug = False,
) -> None:
    """Predict the labels of a dataset's split, or of photos and folders."""
    model, saved = load_model(checkpoint)
    model.to(choose_device(device))
    choose_amp(amp or "auto", model.mean.device)  # refuses what cannot be here
    saved = replace(saved, amp=amp or saved.amp, batch_size=batch_size or saved.batch_size)
    rows, problems = image_samples(inputs) if inputs else read_rows(saved, data, split)
    out = out or checkpoint.with_name("predictions.csv")
    check_outputs(checkpoint, saved, rows, out, picture)
    view, preparation = choose_treatment(saved, rows, view, background, rembg_model)
    if boxes and view != "learned":
        raise usage_error("--boxes", f"the view {view} predicts none; --view learned does (train.py --box-head)")
    if boxes and is_cropped(preparation):
        raise usage_error("--boxes", "they are of photos as preprocess.py crops them; give a copy that it made")
    prepare = start_preparing(preparation, view, saved)
    prediction = predict_rows(model, saved, rows, view, prepare, workers)
    problems += [problem for _, problem in sorted(prediction.problems.items())]
    rows, prediction = drop_unread(rows, prediction)
    if is_cropped(preparation):
        prediction.boxes = None  # they are of the cropped photos
    if not rows.samples:
        raise ValueError(list_problems("no photo could be predicted", problems))

    table = predictions_table(rows, prediction, saved.classes, probs, names)
    table |= box_columns(prediction, rows.samples) if boxes else {}
    replaced = " (the earlier file of that name was replaced; --out chooses another)" if out.exists() else ""
    write_csv(out, list(table), zip(*table.values()))
    few = inputs and len(rows.samples) <= 20
    answers = answer_texts(prediction, saved.classes) if few or picture else {}
    if few:
        lines = zip(table["image_name"], *answers.values())
        show_table("answers", ["photo", *answers], [list(line) for line in lines])
    if picture:
        from report import draw_answers

        draw_answers(rows, prediction, answers, prepare, picture)
    if scores := score(prediction.logits, prediction.targets):
        show_scores(f"{rows.csv.name} ({view})", scores)
    if prediction.boxes is not None:
        cli.say_boxes(score_boxes(prediction.boxes, relative_boxes(rows.samples, saved.train_view)))
        if scores and rows.has("bbox"):
            boxed = predict_rows(model, saved, rows, "bbox", prepare, workers)
            show_scores("the same photos, boxes given (bbox)", score(boxed.logits, boxed.targets))
    say(f"{len(rows.samples):,} photos ({view}) predicted: {out}{replaced}")
    if problems:
        raise ValueError(list_problems(f"{len(problems)} could not be predicted and are left out", problems))


if __name__ == "__main__":
    cli.answer_early(app)  # torch takes seconds to import

from PIL import Image

from checkpoint import Checkpoint, load_model
from data import (
    Classes,
    Sample,
    Split,
    class_names,
    find_dataset,
    image_samples,
    list_problems,
    needs_remover,
    read_preparation,
    read_split,
    read_table,
    splits_of,
    submission_column,
)
from evaluate import Prediction, box_columns, predict_samples, score, score_boxes
from loading import Prepare, derive_seed, relative_boxes
from model import FashionModel, choose_amp, choose_device, choose_eval_amp
from photos import Box
from preprocess import Remover, find_weights, prepare_photo

DEFAULTS = {"rembg_model": "u2net", "background_color": [0, 0, 0], "keep_background": False}  # preprocess.py's
DEFAULTS |= {"crop": "none", "box_margin": 0.0}


def check_outputs(checkpoint: Path, saved: Checkpoint, rows: Split, out: Path, picture: Path | None) -> None:
    """Raises BadParameter where an output cannot be written, or would replace what predict.py did not write."""
    if picture and picture.suffix.lower() != ".png":
        raise usage_error("--picture", f"{picture}: its name should end in .png")
    given = {checkpoint.resolve(), rows.csv.resolve(), *(Path(sample.path).resolve() for sample in rows.samples)}
    for flag, path in (("--out", out), ("--picture", picture)):
        is_other = path and path.exists() and not path.is_file()  # a folder, or a device
        if path and (is_other or not path.parent.is_dir() or path.resolve() in given):
            raise usage_error(flag, f"{path}: name a file, in a folder that exists, that is not predicted from")
        if path and not os.access(path.parent, os.W_OK):
            raise usage_error(flag, f"{path.parent} cannot be written; name a file elsewhere")
    if picture and picture.resolve() == out.resolve():
        raise usage_error("--picture", f"{picture} is the CSV's name too; choose another")
    if picture and picture.is_file() and picture.stat().st_size and not is_drawn(picture):
        raise usage_error("--picture", f"{picture} exists; name the picture to draw (photos to predict have no flag)")
    if out.is_file() and out.stat().st_size and not is_of_predictions(out, saved.classes):
        raise usage_error("--out", f"{out} exists and holds no predictions of these labels; choose another name")


def is_of_predictions(path: Path, classes: Classes) -> bool:
    """Whether a CSV begins with the columns of `predictions_table`, and is no val_predictions.csv."""
    columns = ["image_name", *map(submission_column, classes)]
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file, suppress(csv.Error):
        header = next(csv.reader([file.readline(100_000).strip()]), [])
        return header[: len(columns)] == columns and f"{next(iter(classes))}_predicted" not in header
    return False


def is_drawn(path: Path) -> bool:
    with suppress(OSError), Image.open(path) as image:
        return image.info.get("Software", "").startswith("Matplotlib")
    return False


def read_rows(saved: Checkpoint, data: str | None, split: str | None) -> tuple[Split, list[str]]:
    """The split asked for and what is wrong with rows of it; by default test, else val, of the data trained on."""
    root = find_dataset(data or saved.data, saved.subtask)
    chosen = split or ("test" if "test" in splits_of(root, saved.subtask) else "val")
    if not (data and split):
        say(f"predicting the {chosen} split of {data or saved.data}")
    problems: list[str] = []
    return read_split(root, chosen, saved.classes, saved.subtask, problems), problems


def predict_rows(
    model: FashionModel,
    saved: Checkpoint,
    rows: Split,
    view: str,
    prepare: Prepare | None = None,
    workers: int | None = None,
) -> Prediction:
    """What load_model's model says of these rows, in the precision and batch size of `saved`.

    `view` and `prepare`: see `choose_treatment`, `start_preparing`. `workers`: None is a loading process a core.
    What is to change answers (a prior, thresholds) goes in here: predict.py's tables and the entry all call it.
    """
    device = model.mean.device
    amp_dtype = choose_eval_amp(saved.amp, device)
    looks = 2 if view == "learned" else 1
    with TemporaryDirectory() as folder, progress(looks * len(rows.samples), "predicting") as bar:
        if prepare and looks > 1:
            prepare = partial(prepare_once, prepare=prepare, folder=Path(folder))
        return predict_samples(
            model, rows.samples, view, saved.resize, saved.batch_size, workers, amp_dtype, prepare, bar.advance
        )


def prepare_once(sample: Sample, prepare: Prepare, folder: Path) -> tuple[Image.Image, dict[str, Box]]:
    """What `prepare` gives, the photo from `folder` the second time: removing a background takes longest of all."""
    file = folder / f"{derive_seed(sample)}.png"
    if file.exists():
        with Image.open(file) as photo:
            return photo.copy(), {}
    photo, boxes = prepare(sample)
    photo.save(file, compress_level=1)
    return photo, boxes


def drop_unread(rows: Split, prediction: Prediction) -> tuple[Split, Prediction]:
    """Without the photos that could not be read."""
    keep = [i for i in range(len(rows.samples)) if i not in prediction.problems]
    logits = {label: values[keep] for label, values in prediction.logits.items()}
    targets = {label: values[keep] for label, values in prediction.targets.items()}
    boxes = None if prediction.boxes is None else prediction.boxes[keep]
    return replace(rows, samples=[rows.samples[i] for i in keep]), Prediction(logits, targets, boxes, {})


def predictions_table(
    rows: Split, prediction: Prediction, classes: Classes, probs: bool = False, names: bool = False
) -> dict[str, list]:
    """The columns in the organisers' format: image_name and a class of each label; then its name, its probabilities."""
    table, more = {"image_name": [sample.name for sample in rows.samples]}, {}
    for label, logits in prediction.logits.items():
        column, best = submission_column(label), logits.argmax(-1).tolist()
        table[column] = [classes[label][c] for c in best]
        if names:
            more[f"{column}_name"] = [class_names(label, classes[label])[c] for c in best]
        if probs:
            more |= {f"{column}_p{c}": p for c, p in enumerate(logits.double().softmax(-1).T.tolist())}
    if clash := table.keys() & more.keys():
        raise ValueError(f"the predictions would hold the column {min(clash)} twice; leave out --names or --probs")
    return table | more


def predict_every_row(rows: Split, model: FashionModel, saved: Checkpoint, view: str, prepare: Prepare | None) -> dict:
    """An entry's columns: an answer for each row of the test CSV; for those not in `rows` the commonest classes."""
    header, table = read_table(rows.csv.parent, "test", {}, saved.subtask)
    prediction = predict_rows(model, saved, rows, view, prepare, workers=0)  # containers are short of shared memory
    rows, prediction = drop_unread(rows, prediction)
    answers = predictions_table(rows, prediction, saved.classes)
    every = [cells[header.index("image_name")] for cells, _ in table]
    columns = {"image_name": every}
    for label, classes in saved.classes.items():
        column, common = submission_column(label), classes[saved.common_classes[label]]
        found = dict(zip(answers["image_name"], answers[column]))
        values = [found.get(name, common) for name in every]
        numbers = all(text.isdecimal() for text in classes)  # the organisers compare numbers
        columns[column] = [int(value) for value in values] if numbers else values
    if unread := len(set(every) - {sample.name for sample in rows.samples}):
        note(f"{unread:,} photos could not be read: they get the commonest classes of training")
    return columns


def answer_texts(prediction: Prediction, classes: Classes) -> dict[str, list[str]]:
    """{label: each photo's class and its probability}, as people read them."""
    texts = {}
    for label, logits in prediction.logits.items():
        names, best = class_names(label, classes[label]), logits.softmax(-1).max(-1)
        texts[label] = [f"{names[c]} {p:.2f}" for p, c in zip(best.values.tolist(), best.indices.tolist())]
    return texts


def choose_treatment(
    saved: Checkpoint, rows: Split, view: str = "auto", background: str = "auto", rembg_model: str | None = None
) -> tuple[str, dict | None]:
    """The view of these rows, and what preprocess.py's way of preparing does to each photo before (None: nothing).

    The last three are the flags' values; raises BadParameter where they cannot act.
    """
    prepared = read_preparation(rows.csv.parent) if rows.classes else None  # photos and folders are raw
    treated = (saved.preparation or DEFAULTS) | ({"rembg_model": rembg_model} if rembg_model else {})
    preparation = None
    if prepared:
        if rembg_model not in (None, prepared["rembg_model"]):
            raise usage_error("--rembg-model", f"these went through {prepared['rembg_model']}; give the raw photos")
        if background == "remove" and prepared["keep_background"]:
            raise usage_error("--background", "these went through preprocess.py; give the raw photos")
        if background != "keep" and prepared != saved.preparation:
            note(f"the model was trained on {described(saved.preparation)}; these are {described(prepared)}")
    elif background == "remove":
        preparation = treated | {"keep_background": False}
    elif background == "auto" and saved.preparation:
        preparation = treated
    view = choose_view(view, saved, rows, cleans=preparation is not None, raw=prepared is None)
    if view == "mask" and not preparation and not rows.has("mask"):
        preparation = treated | {"keep_background": True, "crop": "none"}  # only to find the foreground's box
    if view == "learned" and is_cropped(preparation) and saved.resize == "letterbox":
        remedy = "give a copy that preprocess.py made, or --view full"
        raise usage_error("--view", f"the model predicts boxes in photos that preprocess.py cropped; {remedy}")
    if not preparation:
        note_unboxed("of these", rows, view)
    if rembg_model and not prepared and not needs_remover(preparation, view):
        raise usage_error("--rembg-model", "nothing is removed here; add --view mask or --background remove")
    return view, preparation


def is_cropped(preparation: dict | None) -> bool:
    return preparation is not None and preparation["crop"] != "none"


def described(preparation: dict | None) -> str:
    """A preparation in words."""
    if preparation is None:
        return "raw photos"
    color = "#{:02x}{:02x}{:02x}".format(*preparation["background_color"])
    background = "their background" if preparation["keep_background"] else f"the background {color}"
    crop = "" if preparation["crop"] == "none" else f", cropped to {preparation['crop']}"
    return f"photos with {background}{crop} ({preparation['rembg_model']})"


def choose_view(asked: str, saved: Checkpoint, rows: Split, cleans: bool, raw: bool) -> str:
    """The view that was asked for, or that of validation, or the nearest that is possible here, which is said."""
    these = rows.csv.name if rows.classes else "these photos"
    if asked == "learned" and not saved.box_head:
        raise usage_error("--view", "this model has no box head (train.py --box-head); --view mask does without one")
    if asked == "bbox" and not rows.has("bbox"):
        raise usage_error("--view", f"there are no boxes for {these}; --view mask finds them, --view full does without")
    if asked != "auto":
        return asked
    if saved.view == "mask":
        return "mask" if raw or rows.has("mask") else "full"
    if saved.view != "bbox" or rows.has("bbox"):
        return saved.view
    boxed = f"this model was made for boxed garments, and there are no boxes for {these}"
    if cleans or (rows.has("mask") and not raw):
        note(f"{boxed}: it sees the box round the foreground (mask)")
        return "mask"
    note(f"{boxed}: it sees whole photos, so expect far less; --view mask finds boxes, train.py --box-head learns them")
    return "full"


def start_preparing(preparation: dict | None, view: str, saved: Checkpoint) -> Prepare | None:
    """The function that prepares a sample's photo. Raises BadParameter, ValueError or OSError for its remover."""
    if preparation is None:
        return None
    remover, model, trained = None, preparation["rembg_model"], saved.preparation
    if needs_remover(preparation, view):
        checksum, _ = find_weights(model)
        if trained and trained["rembg_model"] == model and trained["checksum"] != checksum:
            note(f"the weights of {model} here ({checksum}) are not those of training ({trained['checksum']})")
        found = f"cropped to the foreground ({model})"
        say(f"on the fly, raw photos become {described(preparation) if needs_remover(preparation, 'full') else found}")
        remover = Remover(model)
    return partial(prepare_photo, preparation=preparation, remover=remover)


if __name__ == "__main__":
    cli.run_app(app)
