"""Pictures of a run, drawn as it ends; by hand:

python report.py runs/NAME                  # curves, confusion, inputs, mistakes and looks .png, in runs/NAME
python report.py runs/NAME runs/OTHER ...   # runs/NAME/compare.png: the curves of several runs over each other
"""

import csv
import math
import os
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

import cli
from cli import atomic_write, note, say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=cli.examples(__doc__))
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run's folder, runs/NAME; several: curves over each other.")],
    data: Annotated[list[str] | None, typer.Option(help="Its data, where they were moved.", **cli.NONE)] = None,
    debug: cli.Debug = False,
) -> None:
    """Draw the pictures of a run into its folder, or the curves of several runs into that of the first."""
    if len(runs) == 1:
        draw_pictures(runs[0], data=data)
        return
    if data:
        raise cli.usage_error("--data", "it is for the pictures of one run; the curves of several need no data")
    with drawing():
        save(curves([read_run(folder) for folder in runs]), runs[0] / "compare.png")
    say(f"files: {runs[0]}/compare.png")


if __name__ == "__main__":
    cli.answer_early(app)  # torch takes seconds to import

import numpy as np
import torch
import torch.nn.functional as F

if "ipykernel" not in sys.modules:  # a notebook's backend need not be installed here; these pictures need none
    os.environ.pop("MPLBACKEND", None)

from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from augment import cutmix
from checkpoint import Checkpoint, load_model, read
from data import BOX, Classes, Split, class_names, find_dataset, read_splits
from evaluate import Prediction, score, second_look
from loading import EpochSampler, EvalPhotos, TrainPhotos, derive_seed
from model import FashionModel
from photos import Box, boxes_in_image, crop_box, load_photo
from settings import Settings, read_settings, restart_epochs

HANGUL_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "UnDotum")
BOX_LINES = {"bbox": ("given", "C1", "-"), "mask": ("mask", "#1f77ff", "--"), "learned": ("predicted", "#e0007a", "-.")}
RIGHT, WRONG, FAINT = "#1a7f37", "#c62828", "#666666"
SIDE, LETTERS = 1.7, 24  # of an image in a grid: inches, and the letters of a line of text above or below it

Heats = dict[str, tuple[Tensor, Tensor]]  # {label: (heat float32 (N, S, S) in 0..1, logits (N, classes))}


@dataclass
class Run:
    folder: Path
    settings: Settings
    metrics: dict[str, np.ndarray]  # {column: (epochs,)}, NaN where a cell is empty; empty columns are left out
    best_epoch: int


@dataclass
class Answers:
    """val_predictions.csv: {label: (N,)}, classes as indices; a truth of -1 is not known."""

    names: list[str]
    truth: dict[str, Tensor]
    predicted: dict[str, Tensor]
    confidence: dict[str, Tensor]  # the probability of the predicted class
    learned: list[dict[str, Box]]  # {"learned": box}, {} without a box head


def draw_pictures(
    folder: Path, photos: TrainPhotos | None = None, val_split: Split | None = None, data: list[str] | None = None
) -> None:
    """Draw the pictures of a run; its data are read where not given. Raises ValueError, OSError, BadParameter."""
    run = read_run(folder)
    model, saved = load_model(folder / "best.pt")
    table = folder / "val_predictions.csv"
    answers = read_answers(table, model.classes) if table.exists() else None
    if photos is None:
        roots = [find_dataset(path, run.settings.subtask) for path in data or run.settings.data]
        train_split, val_split = read_splits(roots, run.settings.subtask, run.settings.fit_all)
        photos = TrainPhotos(train_split.samples, saved.image_size, run.settings)
    draw = {"curves": lambda: curves([run]), "inputs": lambda: inputs(photos, run.settings, model.classes)}
    if answers:
        draw["confusion"] = lambda: confusion(answers, model.classes)
        draw["mistakes"] = lambda: mistakes(answers, val_split)
    draw["looks"] = lambda: looks(model, saved, val_split, answers)
    drawn, problems = [], []
    with drawing():
        for name, figure in draw.items():
            try:
                save(figure(), folder / f"{name}.png")
                drawn.append(f"{name}.png")
            except Exception as error:  # of an edit, perhaps: the others are drawn
                problems.append(f"{name}.png could not be drawn ({type(error).__name__}: {error})")
    say(f"pictures: {folder}/" + ", ".join(drawn))
    if problems:
        raise ValueError("; ".join(problems))


@contextmanager
def read_rows(path: Path) -> Iterator[list[dict[str, str]]]:
    """The rows of a CSV file; what a damaged one causes within becomes one line."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        try:
            yield list(csv.DictReader(f))
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path} is damaged, or of another version of this program") from None


def read_run(folder: Path) -> Run:
    """What a run left in its folder. Raises typer.BadParameter, ValueError, OSError."""
    settings = read_settings(folder, "RUNS")
    if not (folder / "metrics.csv").exists():
        raise cli.usage_error("RUNS", f"{folder} has no finished epoch yet")
    with read_rows(folder / "metrics.csv") as rows:
        columns = {}
        for key in rows[0]:
            with suppress(ValueError):  # a column of your own may hold words
                columns[key] = np.array([float(row[key] or "nan") for row in rows])
        metrics = {key: values for key, values in columns.items() if np.isfinite(values).any()}
        metrics["epoch"], metrics["lr"], metrics["train_loss"]  # a KeyError here: the file is damaged
    return Run(folder, settings, metrics, read(folder / "best.pt").get("epoch", 0))


def read_answers(path: Path, classes: Classes) -> Answers:
    """The predictions of validation. Raises ValueError, OSError."""
    with read_rows(path) as rows:
        answers = Answers([row["image_name"] for row in rows], {}, {}, {}, [])
        for label, texts in classes.items():
            predicted = [texts.index(row[f"{label}_predicted"]) for row in rows]
            answers.truth[label] = torch.tensor([texts.index(row[label]) if row[label] else -1 for row in rows])
            answers.predicted[label] = torch.tensor(predicted)
            answers.confidence[label] = torch.tensor([float(row[f"{label}_p{c}"]) for c, row in zip(predicted, rows)])
        for row in rows:
            sides = [row.get(f"Learned_{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            answers.learned.append({"learned": tuple(round(float(side)) for side in sides)} if all(sides) else {})
    return answers


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's default style in place of the user's, with Hangul where a font here has it, and `$` as a letter."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *[name for name in HANGUL_FONTS if name in installed]]
    ours = {"font.family": fonts, "font.size": 9, "text.parse_math": False}
    with style.context(["default", ours]), warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph .* missing")
        yield
    if missing := [str(warning.message) for warning in caught if "missing" in str(warning.message)]:
        note(f"pictures lack characters: {missing[0]} {HANGUL_FONTS[2]}, once installed, has the Korean ones.")


def save(figure: Figure, path: Path) -> None:
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png")


def wrapped(text: str, lines: int = 2) -> str:
    """The text in lines of LETTERS; one too long for `lines` loses its middle, as names differ at the end."""
    text = text.encode(errors="replace").decode()  # a file name may hold bytes that are no UTF-8
    wide = any(unicodedata.east_asian_width(c) in "FW" for c in text)
    letters = LETTERS // 2 if wide else LETTERS
    half = letters * lines // 2
    if len(text) > 2 * half:
        text = text[: half - 1] + "…" + text[-half:]
    return "\n".join(textwrap.wrap(text, letters))


@contextmanager
def grid(title: str, n_rows: int, n_columns: int, side: float = SIDE) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure and its axes (n_rows, n_columns) for `draw_image`, `side` inches each and higher by their texts."""
    figure = Figure((n_columns * side + 0.4, n_rows * side + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    bare = {"xticks": [], "yticks": [], "box_aspect": 1, "frameon": False}
    axes = figure.subplots(n_rows, n_columns, squeeze=False, subplot_kw=bare)
    yield figure, axes
    if boxes := {name: box for ax in axes.flat for box, name in zip(*ax.get_legend_handles_labels())}:
        figure.legend(boxes.values(), boxes, loc="outside lower center", ncols=3, frameon=False)
    for row in axes:
        lines = [f"{ax.get_title()}\n{ax.get_xlabel()}".strip().count("\n") + 1 for ax in row]
        figure.set_figheight(figure.get_figheight() + 0.15 * max(lines))


def draw_image(ax: Axes, image: np.ndarray, title: str, captions: list[str], color: str, boxes: dict, **how) -> None:
    """Draw an image (H, W, 3) or (H, W), text above it, captions of this color below, {kind: box}; `how`: imshow's."""
    ax.imshow(image, **how)
    ax.set_adjustable("datalim")  # a photo that is not square lies in the middle of its square cell
    ax.set_title(wrapped(title), fontsize=8, color=FAINT, pad=3)
    ax.set_xlabel("\n".join(wrapped(caption) for caption in captions), fontsize=8, color=color, labelpad=3)
    for kind, box in boxes.items():
        x0, y0, x1, y1 = (side - 0.5 for side in box)  # the first pixel's middle is at 0
        name, edge, line = BOX_LINES[kind]
        for pen in ({"ec": "white", "lw": 3}, {"ec": edge, "ls": line, "lw": 1.5, "label": f"{name} box"}):
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, clip_on=False, **pen))


def draw_photo(ax: Axes, photo: Image.Image, title: str, captions: list[str], color: str, boxes: dict) -> None:
    """Draw a photo, made smaller at once: many large ones would take much memory."""
    extent = (-0.5, photo.width - 0.5, photo.height - 0.5, -0.5)
    photo.thumbnail((256, 256))
    draw_image(ax, np.asarray(photo), title, captions, color, boxes, extent=extent)


def curves(runs: list[Run]) -> Figure:
    """Losses, Top-1 and learning rate over the epochs, the best one as a dot; of several runs, a colour for each."""
    one = len(runs) == 1
    panels = {"loss (dotted: training)": ["train_loss", "val_loss"]}
    for key in dict.fromkeys(key for run in runs for key in run.metrics):
        if key.startswith("val_top1_"):
            panels.setdefault("validation Top-1" if one else "Top-1 " + key.removeprefix("val_top1_"), []).append(key)
    panels["learning rate"] = ["lr"]
    restarts = list(takewhile(lambda epoch: epoch <= runs[0].metrics["epoch"][-1], restart_epochs(runs[0].settings)))
    n_rows, n_columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = Figure((4.6 * n_columns, 3.8 * n_rows), layout="constrained")
    for i, (title, keys) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(n_rows, n_columns, i, xlabel="epoch")
        ax.set_title(wrapped(title), fontsize=11)
        for n, run in enumerate(runs):
            best = run.metrics["epoch"] == run.best_epoch
            for key in [key for key in keys if key in run.metrics]:
                color = "black" if key == "val_top1_mean" else None
                color = color if one else f"C{n}"
                how = {"ls": ":" if key == "train_loss" else "-", "color": color, "marker": "o", "markevery": best}
                ax.plot(run.metrics["epoch"], run.metrics[key], label=wrapped(key.removeprefix("val_top1_")), **how)
        ax.locator_params("x", integer=True, nbins=8)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.25)
        if one:
            for number, epoch in enumerate(restarts):
                ax.axvline(epoch, color=FAINT, lw=0.8, ls=":", label=None if number else "restart")
            ax.axvline(runs[0].best_epoch, color=WRONG, lw=1, ls="--", label=f"best epoch, {runs[0].best_epoch}")
            ax.legend(fontsize=8)
    if not one:
        names = [f"{wrapped(str(run.folder))} (best epoch {run.best_epoch})" for run in runs]
        figure.legend(ax.lines, names, loc="outside lower center", ncols=3)  # the last panel has one line of each run
    return figure


def confusion(answers: Answers, classes: Classes) -> Figure:
    """A matrix for each label: how many photos of a class (row) were predicted as each class (column)."""
    sizes = [len(texts) for texts in classes.values()]
    sides = [max(2.4, n * (0.65 if n <= 8 else 0.45 if n <= 30 else 0.15)) for n in sizes]
    figure = Figure((sum(sides) + 1.8 * len(sides), max(sides) + 1.8), layout="constrained")
    axes = figure.subplots(1, len(sides), squeeze=False, width_ratios=sides)[0]
    for ax, label, n in zip(axes, classes, sizes):
        ticks = [wrapped(name, lines=1) for name in class_names(label, classes[label])]
        known = answers.truth[label] >= 0
        truth, predicted = answers.truth[label][known], answers.predicted[label][known]
        counts = torch.bincount(truth * n + predicted, minlength=n * n).view(n, n).numpy()
        ratios = counts / counts.sum(1, keepdims=True).clip(1)
        ax.imshow(ratios, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero()) if n <= 30 else ():
            ratio = ratios[row, column]
            how = {"color": "white" if ratio > 0.55 else "black", "fontsize": 8 if n <= 8 else 6}
            ax.text(column, row, f"{counts[row, column]}\n{ratio:.0%}", ha="center", va="center", **how)
        scores = score({label: F.one_hot(predicted, n).float()}, {label: truth})
        measured = f"Top-1 {scores[f'top1_{label}']:.4f}, ACSA {scores[f'acsa_{label}']:.4f}" if scores else "not known"
        ax.set_title(f"{wrapped(label, lines=1)}\n{measured}", fontsize=10, loc="left")
        ax.set_xticks(range(n), ticks, rotation=90 if max(map(len, ticks)) > 5 else 0, fontsize=8)
        ax.set_yticks(range(n), ticks, fontsize=8)
        ax.set(xlabel="predicted", ylabel="true", anchor="NW")
    return figure


def most_confident_errors(answers: Answers, label: str) -> list[tuple[int, float]]:
    """(index, probability of the prediction) of the photos with a wrong `label`, the most confident first."""
    wrong = (answers.predicted[label] != answers.truth[label]) & (answers.truth[label] >= 0)
    errors = [(i, answers.confidence[label][i].item()) for i in wrong.nonzero().flatten().tolist()]
    return sorted(errors, key=lambda error: -error[1])


def mistakes(answers: Answers, split: Split) -> Figure:
    """The most confident errors of each label: the photo with its boxes, truth and prediction."""
    if answers.names != [sample.name for sample in split.samples]:
        raise ValueError(f"val_predictions.csv does not hold the photos of {split.csv}; were the data changed since?")
    n_labels = len(answers.truth)
    with grid("The most confident errors of validation", n_labels * max(1, 3 // n_labels), 6) as (figure, axes):
        for row, label in zip(axes.reshape(n_labels, -1), answers.truth):
            names, errors = class_names(label, split.classes[label]), most_confident_errors(answers, label)
            row[0].set_ylabel(wrapped(f"{label}: {len(errors):,} of {(answers.truth[label] >= 0).sum():,} wrong"))
            for ax, (i, confidence) in zip(row, errors):
                sample, boxes = split.samples[i], split.samples[i].boxes | answers.learned[i]
                truth, predicted = names[answers.truth[label][i]], names[answers.predicted[label][i]]
                captions = [f"is {truth}", f"said {predicted} {confidence:.2f}"]
                draw_photo(ax, load_photo(sample.path), sample.name, captions, WRONG, boxes)
    return figure


def inputs(photos: TrainPhotos, settings: Settings, classes: Classes) -> Figure:
    """The first training images (at most 24) as the model receives them, pixel by pixel, with their view and labels."""
    sampler = EpochSampler(len(photos), settings.batch_size if settings.cutmix else 24, settings.seed)
    sampler.epoch = 1
    batch = next(iter(sampler))  # all of it: CutMix mixes the images of a batch
    images, drawn, views = zip(*(photos.draw(*key) for key in batch))
    targets = {label: torch.stack([of[label] for of in drawn]) for label in classes}
    seed = derive_seed(settings.seed, "cutmix", 1, 1)
    images, targets = cutmix(torch.stack(images), targets, classes, settings.cutmix, seed)
    title = f"Training images of epoch 1, as the model receives them ({photos.size} px): {', '.join(classes)}"
    side = max(2.0, photos.size / 100 + 0.2)  # an inch has 100 pixels: none of the image's may be lost
    with grid(title, 4, 6, side) as (figure, axes):
        for n, (ax, image) in enumerate(zip(axes.flat, images.permute(0, 2, 3, 1).numpy())):
            captions = []
            for label in classes:
                names, target = class_names(label, classes[label]), targets[label][n]
                if target.ndim:  # the probabilities of CutMix
                    order = target.argsort(descending=True)
                    captions += [f"{names[c]} {target[c]:.2f}" for c in order if target[c] > 0]
                else:
                    captions.append(names[target] if target >= 0 else "not known")
            box = drawn[n].get(BOX, torch.tensor(math.nan))
            boxes = {photos.view: (box * photos.size).tolist()} if box.isfinite().all() else {}
            name = f"{views[n]}, {photos.samples[batch[n][1]].name}"
            draw_image(ax, image, name, captions, "black", boxes, interpolation="nearest")
    return figure


def draw_answers(rows: Split, prediction: Prediction, answers: dict, prepare: Callable | None, path: Path) -> None:
    """A sheet of the first 48 photos with their boxes and answers, {label: a text for each photo}."""
    samples = rows.samples[:48]
    n_columns = min(8, max(3, len(samples)))  # room for the title
    n_rows = math.ceil(len(samples) / n_columns)
    with drawing():
        with grid(f"Predictions: {', '.join(answers)}", n_rows, n_columns) as (figure, axes):
            for i, (ax, sample) in enumerate(zip(axes.flat, samples)):
                photo, given = prepare(sample) if prepare else (load_photo(sample.path), sample.boxes)
                captions = [texts[i] for texts in answers.values()]
                boxes = {kind: box for kind, box in given.items() if kind == "bbox"}
                if prediction.boxes is not None:
                    boxes["learned"] = crop_box(prediction.boxes[i].tolist(), photo.size)
                draw_photo(ax, photo, sample.name, captions, "black", boxes)
        save(figure, path)


# ---------------------------------------------------------------- where the model looks


def heat_maps(model: FashionModel, images: Tensor) -> Heats:
    """Where the evidence for each label's predicted class lies in uint8 images (N, 3, S, S), beside the logits.

    Grad-CAM (Selvaraju et al. 2017) of the class's logit less the mean of all, on the last feature map before pooling,
    less that map's mean. Of tokens it is the last block's input: behind it only the class token counts. There each
    place's own gradient weighs, not their mean (HiResCAM, Draelos and Carin 2020).
    """
    backbone = model.eval().requires_grad_(False).backbone
    last_block = getattr(backbone, "blocks", [torch.nn.Identity()])[-1]
    received = []
    with last_block.register_forward_pre_hook(lambda block, args: received.append(args[0].requires_grad_())):
        features = backbone.forward_features((images.float() / 255 - model.mean) / model.std)
    averages = features.ndim == 4 or getattr(backbone, "global_pool", "") not in ("token", "map")
    if features.ndim == 4 or not received:
        features = features.detach().requires_grad_()
        received = [features]
    pooled = backbone.forward_head(features)
    heats = {}
    for label, head in zip(model.classes, model.heads):
        logits = head(pooled)
        evidence = (logits.amax(-1) - logits.mean(-1)).sum()
        gradient = _channels_last(torch.autograd.grad(evidence, received[0], retain_graph=True)[0], backbone)
        activation = _channels_last(received[0].detach(), backbone)
        if averages:
            activation = activation - activation.mean((1, 2), keepdim=True)
            gradient = gradient.mean((1, 2), keepdim=True)
        heat = (activation * gradient).sum(-1).clamp(min=0)
        heat = F.interpolate(heat[:, None], images.shape[-2:], mode="bilinear")[:, 0]
        heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
        heats[label] = (heat, logits.detach())
    return heats


def _channels_last(features: Tensor, backbone: torch.nn.Module) -> Tensor:
    """A backbone's features as (N, H, W, channels); of tokens (N, T, channels) those that are places of the image."""
    if features.ndim == 4:
        return features if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
    side = math.isqrt(features.shape[1])  # class and register tokens come first, and are too few for another row
    return features[:, -(side**2) :].unflatten(1, (side, side))


def looks(model: FashionModel, saved: Checkpoint, split: Split, answers: Answers | None) -> Figure:
    """The heat of 8 validation photos, in the view of validation and whole; prints `heat_inside` of 32 whole ones."""
    size, view, resize = saved.image_size, saved.view, saved.resize
    chosen = sorted({round(i * (len(split.samples) - 1) / 31) for i in range(32)})
    samples = [split.samples[i] for i in chosen]
    whole = EvalPhotos(samples, size, "full", resize)
    images = torch.stack([whole.read(i, None) for i in range(len(samples))])
    boxes = []
    for i, sample in zip(chosen, samples):
        of_photo = sample.boxes | (answers.learned[i] if answers else {})
        moved = boxes_in_image(of_photo.values(), sample.size, size, resize).round().int()
        boxes.append(dict(zip(of_photo, map(tuple, moved.tolist()))))
    heats = heat_maps(model, images)
    if inside := heat_inside(heats, [box.get("bbox", box.get("mask")) for box in boxes]):
        heat = f"{inside[0]:.2f} of it, where chance would give {inside[1]:.2f}"
        say(f"heat inside the garment's box: {heat} (whole validation photos)")
    eighth = slice(None, None, math.ceil(len(chosen) / 8))
    heats = {label: (heat[eighth], logits[eighth]) for label, (heat, logits) in heats.items()}
    parts = {"whole photos": (images[eighth], heats, boxes[eighth])}
    if view != "full":
        seen = EvalPhotos(samples[eighth], size, view, resize)
        regions = [None] * len(seen)
        if view == "learned":
            sizes = [sample.size for sample in seen.samples]
            with torch.no_grad():
                regions = second_look(model(images[eighth])[BOX], sizes, size, resize).tolist()
        crops = torch.stack([seen.read(i, region) for i, region in enumerate(regions)])
        parts = {f"validation's view:\n{view}": (crops, heat_maps(model, crops), [{}] * len(crops))} | parts
    title = "Where the model looks (Grad-CAM): red is most, blue least"
    with grid(title, len(parts) * (1 + len(model.classes)), 8) as (figure, axes):
        for rows, (name, part) in zip(np.split(axes, len(parts)), parts.items()):
            rows[0, 0].set_ylabel(name)
            draw_heats(rows, *part, samples[eighth], model.classes)
    return figure


def draw_heats(axes: np.ndarray, images: Tensor, heats: Heats, boxes: list, samples: list, classes: Classes) -> None:
    """Draw images (N, 3, S, S) of samples into the first row of axes, each label's heat and the boxes into the next."""
    images = images.permute(0, 2, 3, 1).numpy()
    for ax, image, sample in zip(axes[0], images, samples):
        draw_image(ax, image, sample.name, [], "black", {})
    for row, (label, (heat, logits)) in zip(axes[1:], heats.items()):
        names = class_names(label, classes[label])
        row[0].set_ylabel(wrapped(label))
        confidences, predictions = logits.softmax(-1).max(-1)
        for n, (ax, sample, box) in enumerate(zip(row, samples, boxes)):
            truth, predicted = sample.labels[label], int(predictions[n])
            captions = [f"{names[predicted]} {confidences[n]:.2f}"]
            if truth not in (predicted, -1):
                captions.append(f"is {names[truth]}")
            color = FAINT if truth < 0 else RIGHT if truth == predicted else WRONG
            draw_image(ax, images[n].mean(-1), "", captions, color, box, cmap="gray", vmin=0, vmax=255)
            strength = heat[n].numpy()
            ax.imshow(strength, cmap="turbo", vmin=0, vmax=1, alpha=0.75 * strength**0.7)


def heat_inside(heats: Heats, boxes: list[Box | None]) -> tuple[float, float] | None:
    """The mean share of the heat that lies inside the boxes, and of the image that they are; None without boxes."""
    pairs = []
    for heat, _ in heats.values():
        for strength, box in zip(heat, boxes):
            if box and strength.sum() > 0:
                x0, y0, x1, y1 = box
                inside = strength[y0:y1, x0:x1].sum() / strength.sum()
                pairs.append((inside.item(), (y1 - y0) * (x1 - x0) / strength.numel()))
    return tuple(np.mean(pairs, axis=0).tolist()) if pairs else None


if __name__ == "__main__":
    cli.run_app(app)
