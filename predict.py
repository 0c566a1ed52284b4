"""Predict with a checkpoint of train.py; score it where the labels are known.

    python predict.py runs/NAME/best.pt                                      # the test split of the data that it was trained on
    python predict.py runs/NAME/best.pt --data demo --split val              # repeats training's table
    python predict.py runs/NAME/best.pt photo.jpg a_folder_of_photos --names
    python predict.py runs/NAME/best.pt --data Dataset --background keep --view full      # raw and whole, whatever it was trained on

    python predict.py runs/NAME/best.pt --entry Entry                        # the folder to send in

Photos are treated as the training photos were: where these were cleaned or cut by preprocess.py, raw ones are too, on the fly.

Writes predictions.csv beside the checkpoint (replaced if there): image_name and a column a label, in the organisers' format.
The demo set's 400 test photos take seconds on two CPU cores with README's small backbone, most of it for starting up.
"""

import ast
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import typer
from PIL import Image
from torch import Tensor

import demo
from cli import blaming, misuse, note, progress, run_app, say, say_boxes, show_scores, show_table, write_csv
from data import (
    BOX,
    Sample,
    Split,
    check_preparation,
    class_name,
    csv_name,
    find_dataset,
    image_samples,
    needs_remover,
    read_preparation,
    read_split,
    relative_boxes,
    submission_column,
)
from loading import Photos, as_it_is, batches, default_workers, make_loader
from model import FashionModel, choose_amp, choose_device, load_model, look_twice, predict_logits, score, score_boxes
from photos import SUFFIXES, load_photo
from preprocess import Remover, find_weights, prepare_photo

UNTRAINED = {
    "rembg_model": "u2net",
    "background_color": [0, 0, 0],
    "keep_background": False,
    "crop": "none",
    "box_margin": 0.0,
}  # preprocess.py's defaults

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A best.pt of train.py.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Image files and folders, instead of --data.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Dataset folder, or `demo`.", show_default="the one trained on")
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(help="Split of the dataset.", show_default="test, else val"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The CSV to write.", show_default="predictions.csv beside the checkpoint")
    ] = None,
    view: Annotated[
        Literal["auto", "full", "bbox", "mask", "learned"],
        typer.Option(
            help="What the model sees; auto: as in validation, where that can be had; learned: the box that its box head finds."
        ),
    ] = "auto",
    view_sum: Annotated[bool, typer.Option(help="In the view learned, add what it made of the whole photo.")] = True,
    background: Annotated[
        Literal["auto", "keep", "remove"],
        typer.Option(help="auto: as in training; keep: raw photos as they are, whole."),
    ] = "auto",
    rembg_model: Annotated[
        str | None,
        typer.Option(help="Which of rembg's models cleans raw photos.", show_default="training's, else u2net"),
    ] = None,
    probs: Annotated[bool, typer.Option("--probs", help="Add the classes' probabilities.")] = False,
    names: Annotated[bool, typer.Option("--names", help="Add the classes' names.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.", min=1, show_default="training's")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that decode photos; 0: none.", min=0, max=256, show_default="one a core, at most 8"
        ),
    ] = None,
    amp: Annotated[
        Literal["auto", "fp16", "bf16", "off"] | None,
        typer.Option(help="Mixed precision.", show_default="training's, where it can be had"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    entry: Annotated[
        Path | None,
        typer.Option(help="Write the folder to send in, instead of predicting; --data: whose photos to time it on."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Predict the labels of a dataset's split, or of image files and folders."""
    if inputs and (data or split):
        raise misuse("--data" if data else "--split", "give either a dataset and split, or image files and folders")
    if entry:
        others = {
            "INPUTS": inputs,
            "--split": split,
            "--out": out,
            "--probs": probs,
            "--names": names,
            "--batch-size": batch_size,
            "--workers": workers,
        }
        check_entry(entry, others | {"--amp": amp, "--device": device != "auto"})
    if checkpoint.is_dir():
        raise misuse("CHECKPOINT", f"{checkpoint} is a folder; give {checkpoint / 'best.pt'}")
    model, saved = load_model(checkpoint)
    check_treatment(checkpoint, saved["data"])
    if entry:
        write_entry(entry, checkpoint, saved, data, view, view_sum, background, rembg_model)
        return
    with blaming("--device"):
        place = choose_device(device)
    out = out or checkpoint.with_name("predictions.csv")
    if out.is_dir() or not out.parent.is_dir():
        raise misuse("--out", f"{out} is a folder" if out.is_dir() else f"no folder {out.parent}")
    rows = image_samples(inputs) if inputs else read_labelled(saved, data, split)
    if out.resolve() in {
        checkpoint.resolve(),
        rows.csv.resolve(),
        *(Path(sample.path).resolve() for sample in rows.samples),
    }:
        raise misuse("--out", f"{out} is what is predicted from")
    view, preparation = choose_treatment(saved, rows, view, background, rembg_model)
    prepare = start_preparing(preparation, view, saved)
    if view == "learned" and not view_sum:
        if saved["learned"]["view_weight"] == 0:
            note("--no-view-sum changes nothing: validation gave the first look no weight")
        saved["learned"]["view_weight"] = 0.0
    elif not view_sum:
        note(f"--no-view-sum cannot act in the view {view}")
    logits, targets = predict_rows(model.to(place), saved, rows, view, prepare, batch_size, workers, amp)

    table = predictions_table(rows, logits, probs, names)
    replaced = " (the earlier file of that name was replaced; --out chooses another)" if out.exists() else ""
    write_csv(out, list(table), zip(*table.values()))
    if inputs and len(rows.samples) <= 20:
        show_answers(rows, logits)
    if targets:
        show_scores(f"{rows.csv.name} ({view})", score(logits, targets))
        if view == "learned" and rows.has("bbox"):
            say_boxes(score_boxes(logits[BOX], relative_boxes(rows.samples, "bbox")))
            show_scores(
                "the same photos, boxes given (bbox)",
                score(*predict_rows(model, saved, rows, "bbox", prepare, batch_size, workers, amp)),
            )
    say(f"{len(rows.samples):,} photos ({view}) predicted: {out}{replaced}")


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
    `view`: choose_treatment's, `prepare`: start_preparing's. None is training's `batch_size` and precision (`amp`), and a worker a core.
    Raises BadParameter for a precision that the model's device cannot have, ValueError for photos that cannot be decoded.
    """
    device = model.mean.device
    with blaming("--amp"):
        amp_dtype = choose_amp(
            "auto" if amp is None and saved["amp"] == "fp16" and device.type != "cuda" else amp or saved["amp"], device
        )

    def look(find_box: bool = False, **seen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loader = make_loader(
            Photos(rows.samples, saved["image_size"], **seen),
            batch_size or saved["batch_size"],
            default_workers(workers),
        )
        with progress(len(rows.samples), "finding garments" if find_box else "predicting") as bar:
            return predict_logits(model, batches(loader), device, amp_dtype, bar.advance, find_box)

    if view != "learned":
        return look(view=view, prepare=prepare)
    with TemporaryDirectory() as folder:
        first, second = (
            (prepare, prepare)
            if prepare is as_it_is
            else (partial(prepare_and_keep, prepare=prepare, folder=folder), partial(kept, folder=folder))
        )
        logits, targets, _ = look_twice(
            lambda crops: look(find_box=True, prepare=first) if crops is None else look(crops=crops, prepare=second),
            saved["learned"],
        )
    return logits, targets


def prepare_and_keep(sample: Sample, prepare: Callable, folder: str) -> tuple[Image.Image, dict]:
    """What `prepare` gives, which is kept in `folder` for `kept`: removing a background takes longer than all else."""
    photo, boxes = prepare(sample)
    photo.save(kept_file(sample, folder), compress_level=1)
    return photo, boxes


def kept(sample: Sample, folder: str) -> tuple[Image.Image, dict]:
    return load_photo(kept_file(sample, folder)), {}


def kept_file(sample: Sample, folder: str) -> Path:
    return Path(folder) / f"{hashlib.sha256(os.fsencode(sample.path)).hexdigest()}.png"


def predictions_table(
    rows: Split, logits: dict[str, Tensor], probs: bool = False, names: bool = False
) -> dict[str, list]:
    """The columns in the organisers' format, image_name and a class number a label; then, where asked for, the classes' names and probabilities."""
    table, more = {"image_name": [sample.name for sample in rows.samples]}, {}
    for label in (label for label in logits if label != BOX):
        column, best = submission_column(label), logits[label].argmax(-1).tolist()
        table[column] = best
        if names:
            more[f"{column}_name"] = [class_name(label, c) for c in best]
        if probs:
            more |= {f"{column}_p{c}": p for c, p in enumerate(logits[label].double().softmax(-1).T.tolist())}
    if clash := table.keys() & more.keys():
        raise ValueError(
            f"the predictions would hold the column {min(clash)} twice; leave out --names or --probs, or rename the label"
        )
    return table | more


def show_answers(rows: Split, logits: dict[str, Tensor]) -> None:
    """A table of a few photos' answers: for each label the class and its probability."""
    labels, columns = [label for label in logits if label != BOX], [[sample.name for sample in rows.samples]]
    for label in labels:
        shares, classes = logits[label].softmax(-1).max(-1)
        columns.append([f"{class_name(label, c)} {share:.2f}" for c, share in zip(classes.tolist(), shares.tolist())])
    show_table("answers", ["photo", *labels], [list(row) for row in zip(*columns)])


# ---------------------------------------------------------------- how the photos are treated


def check_treatment(checkpoint: Path, trained_on: dict) -> None:
    """Raises ValueError where the checkpoint's record of its data makes no sense."""
    try:
        if trained_on["view"] not in ("full", "bbox", "mask", "learned"):
            raise ValueError
        if trained_on["preparation"] is not None:
            check_preparation(trained_on["preparation"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{checkpoint} does not say how its photos were treated; train again with this version"
        ) from None


def choose_treatment(
    saved: dict, rows: Split, view: str = "auto", background: str = "auto", rembg_model: str | None = None
) -> tuple[str, dict | None]:
    """What the model is to see of these rows, and what is to be done to each photo before (None: nothing); says where that is not as in training.

    `view`, `background`, `rembg_model`: the flags' values. Raises BadParameter where they cannot be had.
    """
    of_dataset, trained = bool(rows.classes), saved["data"]["preparation"]
    there = read_preparation(rows.csv.parent) if of_dataset else None  # image files are raw photos
    treated = (trained or UNTRAINED) | ({"rembg_model": rembg_model} if rembg_model else {})
    preparation = None
    if there:
        check_processed(there, trained, background, rembg_model)
    elif background == "remove":
        preparation = treated | {"keep_background": False}
    elif background == "auto" and trained:
        preparation = treated
    view = choose_view(
        view, saved, rows, rows.csv.name if of_dataset else "these photos", cleans=bool(preparation), raw=there is None
    )
    if view == "mask" and not preparation and not rows.has("mask"):
        preparation = treated | {
            "keep_background": True,
            "crop": "none",
        }  # to find the foreground's box; nothing else is changed
    if rembg_model and not needs_remover(preparation, view):
        note(f"--rembg-model {rembg_model} cannot act: these photos are taken as they are")
    return view, preparation


def check_processed(there: dict, trained: dict | None, background: str, rembg_model: str | None) -> None:
    """Says where photos that were processed already are not as the training photos were. Raises BadParameter for flags that would need the raw ones."""
    if background == "remove" and there["keep_background"]:
        raise misuse("--background", "these photos went through preprocess.py --keep-background; give the raw ones")
    if rembg_model and rembg_model != there["rembg_model"]:
        raise misuse(
            "--rembg-model", f"these photos were processed with {there['rembg_model']} already; give the raw ones"
        )
    if background != "keep" and there != trained:
        said = f"the model was trained on {described(trained)}; these are {described(there)}, and stay so"
        note(said + ("" if trained is None else "; give the raw photos, and they are treated as in training"))


def described(preparation: dict | None) -> str:
    """A preparation in words."""
    if preparation is None:
        return "raw photos"
    color = "#{:02x}{:02x}{:02x}".format(*preparation["background_color"])
    background = (
        "with their background"
        if preparation["keep_background"]
        else f"with {color} for a background (by {preparation['rembg_model']})"
    )
    margin = f" with a margin of {preparation['box_margin']:g}" if preparation["box_margin"] else ""
    return f"photos {background}" + (f", cut to {preparation['crop']}{margin}" if preparation["crop"] != "none" else "")


def choose_view(asked: str, saved: dict, rows: Split, these: str, cleans: bool, raw: bool) -> str:
    """What the model sees: what was asked for, or what it was validated with, or the nearest thing that can be had here, saying so."""
    if asked == "auto":
        view = saved["data"]["view"]
        if view != "bbox" or rows.has("bbox"):
            return view if view != "mask" or raw or rows.has("mask") else "full"
        top1 = saved["scores"]["top1_mean"]
        made = (
            "trained for boxed garments" if math.isnan(top1) else f"validated on boxed garments (Top-1 {top1:.4f})"
        )  # --fit-all has no score
        boxed = f"this model was {made}, and there are no boxes for {these}"
        if cleans or (rows.has("mask") and not raw):
            note(f"{boxed}: it sees the box round the foreground (mask)")
            return "mask"
        note(f"{boxed}: it sees whole photos, so expect far less (the notes' author fell from 0.65 to 0.50)")
        note(
            "train.py --box-head --crop-prob 0.7 --lr 5e-5 makes a model that finds the garment itself; --view mask shows this one the foreground's box"
        )
        return "full"
    if asked == "learned" and saved["learned"] is None:
        raise misuse(
            "--view", "this model has no box head (train.py --box-head); --view mask finds garments without one"
        )
    if asked == "bbox" and not rows.has("bbox"):
        raise misuse("--view", f"there are no boxes for {these}; --view mask finds them, --view full does without")
    return asked


def start_preparing(preparation: dict | None, view: str, saved: dict) -> Callable[[Sample], tuple[Image.Image, dict]]:
    """The function that gives a sample's photo and the boxes in it, with its remover where a foreground is needed; says what is done.

    Raises BadParameter for a remover that cannot be used, ValueError or OSError where its weights cannot.
    """
    if preparation is None:
        return as_it_is
    if not needs_remover(preparation, view):
        return partial(prepare_photo, preparation=preparation, remover=None)
    model, trained = preparation["rembg_model"], saved["data"]["preparation"]
    checksum, _ = find_weights(model)
    if trained and trained["rembg_model"] == model and trained["checksum"] != checksum:
        note(f"the weights of {model} here ({checksum}) are not those of training ({trained['checksum']})")
    changed = needs_remover(preparation, "full")
    say(
        f"on the fly, raw photos become {described(preparation)}"
        if changed
        else f"on the fly, the foreground of raw photos is found with {model}"
    )
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


# ---------------------------------------------------------------- the folder to send in

ENTRY_MB = 25  # what the competition admits
TRIAL = 8  # photos to time an entry on
NOTES = """\
# The entry of {name}
Written by `predict.py --entry`. It needs this folder and the packages of `requirements.txt`. To send it in:
`pip install -r requirements.txt "aifactory<3" jupyter`, put your key
into the environment variable `AIFACTORY_KEY`, start Jupyter in this folder and run the cells. The key is stored nowhere.
"""
FUNCTION = """\
def etri_task{subtask}_submit():
    import os
    from pathlib import Path

    os.environ["U2NET_HOME"] = os.path.abspath("./model")  # where rembg finds its weights, if it is used

    import pandas as pd

    from data import read_split
    from model import load_model
    from predict import choose_treatment, predict_rows, predictions_table, start_preparing

    model, saved = load_model("./model/best.pt"){no_view_sum}
    rows = read_split(Path("/aif/Dataset"), "test", {{}}, {subtask})  # {csv} and test/ there; {{}}: labels are not looked at
    view, preparation = choose_treatment(saved, rows, view={view!r}, background={background!r}, rembg_model={remover!r})
    prepare = start_preparing(preparation, view, saved)
    logits, _ = predict_rows(model, saved, rows, view, prepare, workers=0)  # more processes would need shared memory, which containers are short of
    return pd.DataFrame(predictions_table(rows, logits))
"""
WRAPPER = """\
def submit():
    return etri_task{subtask}_submit
"""
SUBMIT = """\
import os

import aifactory.score

if __name__ == "__main__":
    aifactory.score.submit(model_name={name!r}, key=os.environ.get("AIFACTORY_KEY", ""), func=submit)
"""
TRY = """\
import json, sys, time, types

_, one, many, photos = sys.argv
function, wrapper, _ = (cell["source"] for cell in json.load(open("task.ipynb", encoding="utf-8"))["cells"] if cell["cell_type"] == "code")
source = "".join([*function, "\\n", *wrapper]).replace("import pandas as pd", "pass")  # it need not be installed here

def seconds(dataset, photos):
    names = {"pd": types.SimpleNamespace(DataFrame=dict)}
    exec(source.replace("/aif/Dataset", dataset), names)
    start = time.perf_counter()
    frame = names["submit"]()()
    assert all(len(column) == photos for column in frame.values())
    return time.perf_counter() - start

seconds(one, 1)  # imports, and what is compiled at first use
print(min(seconds(many, int(photos)) for _ in range(2)) - min(seconds(one, 1) for _ in range(2)))
"""


def check_entry(entry: Path, others: dict[str, object]) -> None:
    """Raises BadParameter where the folder cannot be written, or for an option that means nothing to it."""
    if given := [flag for flag, value in others.items() if value]:
        raise misuse(given[0], "cannot act with --entry, which predicts the competition's test split as in training")
    if entry.exists() or not entry.absolute().parent.is_dir():
        raise misuse("--entry", f"{entry} exists; name a new folder" if entry.exists() else f"no folder {entry.parent}")


def write_entry(
    entry: Path,
    checkpoint: Path,
    saved: dict,
    data: str | None,
    view: str,
    view_sum: bool,
    background: str,
    rembg_model: str | None,
) -> None:
    """Write the folder to send in, whole or not at all, and try it in a process of its own; says its size and its time an image.

    Raises ValueError where it does not work, and where it is over the budget, but written.
    """
    subtask = saved["data"]["subtask"]
    with TemporaryDirectory(prefix=f".{entry.name}.unfinished-", dir=entry.absolute().parent) as folder:
        place, unfinished = Path(folder), Path(folder) / "entry"
        source, photos = trial_photos(place, data or saved["data"]["path"], given=bool(data))
        one, many = (make_trial(place / str(n), photos[:n], subtask) for n in (1, len(photos)))
        rows = read_split(many, "test", saved["classes"], subtask)
        view, preparation = choose_treatment(saved, rows, view, background, rembg_model)
        start_preparing(preparation, view, saved)  # says what is done
        remover = preparation["rembg_model"] if preparation and needs_remover(preparation, view) else None
        if remover and subtask == 2:
            note("the rules of sub-task 2 admit no pretrained models, rembg's among them")
        words = {"name": checkpoint.resolve().parent.name, "subtask": subtask, "csv": csv_name("test", subtask)}
        words |= {"view": view, "background": background, "remover": remover}
        words["no_view_sum"] = (
            '\n    saved["learned"]["view_weight"] = 0.0' if view == "learned" and not view_sum else ""
        )
        files, packages = modules_of("predict")
        (unfinished / "model").mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, unfinished / file.name)
        shutil.copyfile(checkpoint, unfinished / "model" / "best.pt")
        if remover:
            _, weights = find_weights(remover)
            shutil.copyfile(weights, unfinished / "model" / weights.name)
        (unfinished / "requirements.txt").write_text(
            "\n".join(requirements(packages, remover)) + "\n", encoding="utf-8"
        )
        notebook = make_notebook(*(cell.format(**words) for cell in (NOTES, FUNCTION, WRAPPER, SUBMIT)))
        (unfinished / "task.ipynb").write_text(
            json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        seconds = try_entry(unfinished, one, many, len(photos))
        sizes = {path.name: path.stat().st_size / 1e6 for path in unfinished.rglob("*") if path.is_file()}
        unfinished.rename(entry)

    size, parts = sum(sizes.values()), ", ".join(f"{name} {size:.2f}" for name, size in sizes.items() if size >= 0.1)
    seconds = max(seconds, 0)  # so small a model may be lost in the noise
    say(
        f"it works by itself: {1000 * seconds:.0f} ms an image here ({TRIAL} photos of {source}), {1500 * seconds:,.0f} s for 1,500"
    )
    say(f"{entry}: {size:.2f} MB of at most {ENTRY_MB} MB ({parts})")
    if size > ENTRY_MB:
        half = any(value.dtype == torch.float32 for value in saved["weights"].values())
        advice = "train.py --export-dtype fp16 halves best.pt" if half else "choose a smaller backbone"
        advice += "; --rembg-model u2netp takes 4.6 MB" if remover and remover != "u2netp" else ""
        raise ValueError(
            f"{entry} is written, but with {size:.2f} MB it is over the {ENTRY_MB} MB that are admitted: {advice}"
        )
    say(
        f'next, in {entry}: pip install -r requirements.txt "aifactory<3" jupyter, set AIFACTORY_KEY, start Jupyter and run task.ipynb'
    )


def trial_photos(place: Path, data: str, given: bool) -> tuple[str, list[Path]]:
    """TRIAL + 1 photos like the competition's, and whose they are: of a dataset's test split, few again and again; drawn ones where it is not `given`."""
    photos = (
        []
        if data == "demo"
        else sorted(
            path for path in Path(data, "test").rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
        )
    )
    if photos:
        return data, [photos[i * len(photos) // (TRIAL + 1)] for i in range(TRIAL + 1)]
    if given and data != "demo":
        raise misuse("--data", f"no photos to time the entry on in {Path(data, 'test')}")
    demo.draw(place / "drawn", 0, 0, TRIAL + 1, processes=1)
    return "the demo set", sorted(path for path in (place / "drawn" / "test").rglob("*") if path.is_file())


def make_trial(root: Path, photos: list[Path], subtask: int) -> Path:
    """A test split of these photos in the competition's layout, without labels."""
    (root / "test").mkdir(parents=True)
    names = [f"{i}{path.suffix}" for i, path in enumerate(photos)]
    for path, name in zip(photos, names):
        shutil.copyfile(path, root / "test" / name)
    write_csv(root / csv_name("test", subtask), ["image_name"], [[name] for name in names])
    return root


def modules_of(module: str) -> tuple[list[Path], set[str]]:
    """The files of ours that a module needs, itself included, and the names under which they import everything else."""
    files, others = [Path(__file__).with_name(f"{module}.py")], set()
    for file in files:  # grows
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                ours = file.with_name(f"{name.partition('.')[0]}.py")
                if not ours.is_file():
                    others.add(ours.stem)
                elif ours not in files:
                    files.append(ours)
    return files, others


def requirements(imported: set[str], remover: str | None) -> list[str]:
    """The lines of requirements.txt that an entry needs, and pandas."""
    packages = {"pillow" if name == "PIL" else name for name in imported} - (set() if remover else {"rembg", "scipy"})
    lines = [
        line.partition("#")[0].strip()
        for line in Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and re.split(r"[^\w-]", line)[0] in packages] + ["pandas"]


def make_notebook(notes: str, *cells: str) -> dict:
    """A notebook (nbformat 4.4) of a Markdown cell and code cells."""
    parts = [{"cell_type": "markdown", "metadata": {}, "source": notes.strip().splitlines(keepends=True)}]
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    parts += [code | {"source": cell.strip().splitlines(keepends=True)} for cell in cells]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": parts,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python", "file_extension": ".py"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }


def try_entry(entry: Path, one: Path, many: Path, photos: int) -> float:
    """Call an entry's function as the service does, in a process that knows its folder alone; seconds an image, of `photos` - 1. Raises ValueError."""
    command = [sys.executable, "-B", "-c", TRY, one.as_posix(), many.as_posix(), str(photos)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=entry, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(
            f"the entry does not work by itself and was not kept: {(done.stderr.strip() or 'it was stopped').splitlines()[-1]}"
        )
    return float(done.stdout.split()[-1]) / (photos - 1)


if __name__ == "__main__":
    run_app(app)
