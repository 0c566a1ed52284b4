"""Pictures of a run. train.py draws them as it ends; by hand:

    python report.py runs/NAME                  # curves, confusion, inputs, mistakes and looks .png, in runs/NAME
    python report.py runs/NAME runs/OTHER ...   # runs/NAME/compare.png: the curves of several runs over each other

curves: losses, validation Top-1, learning rate. confusion: truth against prediction. inputs: training images as the
model receives them. mistakes: the most confident errors of validation. looks: where the model looks (Grad-CAM).
"""

import csv
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from matplotlib import colormaps, font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from augment import cutmix
from checkpoint import Checkpoint, load_model, read
from cli import atomic_write, note, run_app, say
from data import BOX, BOX_COLUMNS, Classes, Sample, Split, class_names, find_dataset, read_splits
from evaluate import Prediction, score
from loading import EpochSampler, TrainPhotos, derive_seed, relative_boxes
from model import FashionModel
from photos import Box, crop_box, load_photo, placement, to_image, view_pixels
from settings import Settings, read_settings, restart_epochs

PICTURES = ("curves.png", "confusion.png", "inputs.png", "mistakes.png", "looks.png")
HANGUL_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "UnDotum")
BOX_STYLES = {"bbox": ("#ff7f0e", "-"), "mask": ("#1f77ff", "--"), "learned": ("#e0007a", "-.")}
RIGHT, WRONG, FAINT = "#1a7f37", "#c62828", "#666666"
SIDE, LETTERS = 1.7, 24  # of an image in a grid: inches, and the letters of a line of text above or below it

Heats = dict[str, tuple[Tensor, Tensor]]  # {label: (heat float32 (N, S, S) in 0..1, logits (N, classes))}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run's folder, runs/NAME; several: curves over each other.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw the pictures of a run into its folder, or the curves of several runs into that of the first."""
    if len(runs) == 1:
        draw_pictures(runs[0])
        return
    with drawing():
        save(curves([read_run(folder) for folder in runs]), runs[0] / "compare.png")
    say(f"files: {runs[0]}/compare.png")


def draw_pictures(folder: Path, photos: TrainPhotos | None = None, val_split: Split | None = None) -> None:
    """Draw the pictures of a finished run; its training photos and validation split are read where not given.

    Raises ValueError, OSError.
    """
    run = read_run(folder)
    model, saved = load_model(folder / "best.pt")
    answers = read_answers(folder / "val_predictions.csv", model.classes)
    if photos is None:
        roots = [find_dataset(data, run.settings.subtask) for data in run.settings.data]
        train_split, val_split = read_splits(roots, run.settings.subtask, run.settings.fit_all)
        photos = TrainPhotos(train_split.samples, saved.image_size, run.settings)
    with drawing():
        figures = {"curves.png": curves([run]), "inputs.png": inputs(photos, run.settings, model.classes)}
        if answers:
            figures["confusion.png"] = confusion(answers, model.classes)
            figures["mistakes.png"] = mistakes(answers, val_split)
        figures["looks.png"], inside = looks(model, saved, val_split, answers)
        for name, figure in figures.items():
            save(figure, folder / name)
    if not answers:
        note(f"no {folder / 'val_predictions.csv'}: no confusion.png, no mistakes.png")
    if inside:
        heat = f"{inside[0]:.2f} of it, where chance would give {inside[1]:.2f}"
        say(f"heat inside the garment's box: {heat} (whole validation photos)")
    say(f"pictures: {folder}/" + ", ".join(name for name in PICTURES if name in figures))


# ---------------------------------------------------------------- files of a run


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file causes into one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError, csv.Error):
        raise ValueError(f"{path} is damaged, or of another version of this program") from None


def read_run(folder: Path) -> Run:
    """What a run left in its folder. Raises typer.BadParameter, ValueError, OSError."""
    settings = read_settings(folder, "RUNS")
    rows = read_rows(folder / "metrics.csv")
    with reading(folder / "metrics.csv"):
        columns = {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}
        metrics = {key: values for key, values in columns.items() if np.isfinite(values).any()}
        metrics["epoch"], metrics["lr"], metrics["train_loss"]
    return Run(folder, settings, metrics, read(folder / "best.pt").get("epoch", 0))


def read_rows(path: Path) -> list[dict[str, str]]:
    with reading(path), open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        rows = list(csv.DictReader(f, strict=True))
        if not rows or any(None in row or None in row.values() for row in rows):
            raise ValueError("no rows, or rows of another length")
    return rows


def read_answers(path: Path, classes: Classes) -> Answers | None:
    """The predictions of validation; None where there is no such file. Raises ValueError."""
    if not path.exists():
        return None
    rows = read_rows(path)
    with reading(path):
        answers = Answers([row["image_name"] for row in rows], {}, {}, {}, [])
        for label, texts in classes.items():
            index = {text: c for c, text in enumerate(texts)}
            predicted = [index[row[f"{label}_predicted"]] for row in rows]
            answers.truth[label] = torch.tensor([index[row[label]] if row[label] else -1 for row in rows])
            answers.predicted[label] = torch.tensor(predicted)
            confidence = [float(row[f"{label}_p{c}"]) for c, row in zip(predicted, rows)]
            answers.confidence[label] = torch.tensor(confidence)
        for row in rows:
            sides = [row.get(f"Learned_{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            answers.learned.append({"learned": tuple(round(float(side)) for side in sides)} if all(sides) else {})
    return answers


# ---------------------------------------------------------------- drawing


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


def grid(title: str, n_rows: int, n_columns: int, side: float = SIDE) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (n_rows, n_columns) for `draw_image`, `side` inches each; call `make_room` at the end."""
    figure = Figure((n_columns * side + 0.4, n_rows * side + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], box_aspect=1)
        ax.spines[:].set_visible(False)
    return figure, axes


def make_room(figure: Figure, axes: np.ndarray) -> None:
    """Make the figure higher by the lines of text above and below its images."""
    for row in axes:
        lines = [f"{ax.get_title()}\n{ax.get_xlabel()}".strip().count("\n") + 1 for ax in row]
        figure.set_figheight(figure.get_figheight() + 0.15 * max(lines))


def draw_image(ax: Axes, image: np.ndarray, title: str, captions: list[str], color: str = "black", **how) -> None:
    """Draw an image uint8 (H, W, 3) with text above it and lines of text below; `how` is for imshow."""
    ax.imshow(image, **how)
    ax.set_adjustable("datalim")  # a photo that is not square lies in the middle of its square cell
    ax.set_title(wrapped(title), fontsize=8, color=FAINT, pad=3)
    ax.set_xlabel("\n".join(wrapped(caption) for caption in captions), fontsize=8, color=color, labelpad=3)


def draw_box(ax: Axes, kind: str, box: Box) -> None:
    x0, y0, x1, y1 = (side - 0.5 for side in box)  # the first pixel's middle is at 0
    color, line = BOX_STYLES[kind]
    for edge in ({"ec": "white", "lw": 3}, {"ec": color, "ls": line, "lw": 1.5}):
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, clip_on=False, **edge))


def curves(runs: list[Run]) -> Figure:
    """Losses, Top-1 and learning rate over the epochs, the best one as a dot; of several runs, a colour for each."""
    one = len(runs) == 1
    top1 = list(dict.fromkeys(key for run in runs for key in run.metrics if key.startswith("val_top1_")))
    panels = {"loss (dotted: training)": ["train_loss", "val_loss"]}
    for key in top1:
        panels.setdefault("validation Top-1" if one else "Top-1 " + key.removeprefix("val_top1_"), []).append(key)
    panels["learning rate"] = ["lr"]
    last, settings = runs[0].metrics["epoch"][-1], runs[0].settings
    restarts = list(takewhile(lambda epoch: epoch <= last, restart_epochs(settings)))
    n_rows, n_columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = Figure((4.6 * n_columns, 3.8 * n_rows), layout="constrained")
    for i, (title, keys) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(n_rows, n_columns, i, xlabel="epoch")
        ax.set_title(wrapped(title), fontsize=11)
        for n, run in enumerate(runs):
            best = run.metrics["epoch"] == run.best_epoch
            for key in (key for key in keys if key in run.metrics):
                color = f"C{n}" if not one else "black" if key == "val_top1_mean" else None
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
    names = [[wrapped(name, lines=1) for name in class_names(label, classes[label])] for label in classes]
    sides = [max(2.4, len(of) * (0.65 if len(of) <= 8 else 0.45 if len(of) <= 30 else 0.15)) for of in names]
    figure = Figure((sum(sides) + 1.8 * len(sides), max(sides) + 1.8), layout="constrained")
    axes = figure.subplots(1, len(sides), squeeze=False, width_ratios=sides)[0]
    for ax, label, ticks in zip(axes, classes, names):
        n = len(ticks)
        known = answers.truth[label] >= 0
        truth, predicted = answers.truth[label][known], answers.predicted[label][known]
        counts = torch.bincount(truth * n + predicted, minlength=n * n).view(n, n).numpy()
        ratios = counts / counts.sum(1, keepdims=True).clip(1)
        ax.imshow(ratios, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero()) if n <= 30 else ():
            ratio = ratios[row, column]
            how = {"color": "white" if ratio > 0.55 else "black", "fontsize": 8 if n <= 8 else 6}
            ax.text(column, row, f"{counts[row, column]}\n{ratio:.0%}", ha="center", va="center", **how)
        scores = score({label: F.one_hot(predicted, n)}, {label: truth})
        measured = f"Top-1 {scores[f'top1_{label}']:.4f}, ACSA {scores[f'acsa_{label}']:.4f}" if scores else "not known"
        ax.set_title(f"{wrapped(label, lines=1)}\n{measured}", fontsize=10, loc="left")
        ax.set_xticks(range(n), ticks, rotation=90 if max(map(len, ticks)) > 5 else 0, fontsize=8)
        ax.set_yticks(range(n), ticks, fontsize=8)
        ax.set(xlabel="predicted", ylabel="true", anchor="NW")
    return figure


def surest_errors(answers: Answers, label: str) -> list[tuple[int, float]]:
    """(index, probability of the prediction) of the photos whose `label` is predicted wrong, the surest first."""
    wrong = (answers.predicted[label] != answers.truth[label]) & (answers.truth[label] >= 0)
    errors = [(i, answers.confidence[label][i].item()) for i in wrong.nonzero().flatten().tolist()]
    return sorted(errors, key=lambda error: -error[1])


def mistakes(answers: Answers, split: Split) -> Figure:
    """The surest errors of each label: the photo with its boxes, truth and prediction."""
    if answers.names != [sample.name for sample in split.samples]:
        raise ValueError(f"val_predictions.csv does not hold the photos of {split.csv}; were the data changed since?")
    n_labels = len(answers.truth)
    figure, axes = grid("The surest errors of validation", n_labels * max(1, 3 // n_labels), 6)
    kinds = {}
    for row, label in zip(axes.reshape(n_labels, -1), answers.truth):
        names = class_names(label, split.classes[label])
        errors = surest_errors(answers, label)
        row[0].set_ylabel(wrapped(f"{label}: {len(errors):,} of {len(answers.names):,} wrong"))
        for ax, (i, confidence) in zip(row, errors):
            photo = load_photo(split.samples[i].path)
            extent = (-0.5, photo.width - 0.5, photo.height - 0.5, -0.5)
            photo.thumbnail((256, 256))  # at once: many large photos would take much memory
            truth, predicted = names[answers.truth[label][i]], names[answers.predicted[label][i]]
            captions = [f"is {truth}", f"said {predicted} {confidence:.2f}"]
            draw_image(ax, np.asarray(photo), answers.names[i], captions, WRONG, extent=extent)
            for kind, box in (split.samples[i].boxes | answers.learned[i]).items():
                draw_box(ax, kind, box)
                kinds[kind] = Line2D([], [], color=BOX_STYLES[kind][0], ls=BOX_STYLES[kind][1])
    texts = [f"{kind.replace('bbox', 'given')} box" for kind in kinds]
    figure.legend(kinds.values(), texts, loc="outside lower center", ncols=3, frameon=False)
    make_room(figure, axes)
    return figure


def inputs(photos: TrainPhotos, settings: Settings, classes: Classes) -> Figure:
    """The first training images (at most 24) as the model receives them, pixel by pixel, with their view and labels."""
    sampler = EpochSampler(len(photos), settings.batch_size if settings.cutmix else 24, settings.seed)
    sampler.epoch = 1
    items = [photos.draw(*key) for key in next(iter(sampler))]  # CutMix mixes the images of a batch
    images = torch.stack([image for image, _, _ in items])
    targets = {label: torch.stack([of[label] for _, of, _ in items]) for label in classes}
    images, targets = cutmix(images, targets, classes, settings.cutmix, derive_seed(settings.seed, "cutmix", 1, 1))
    title = f"Training images of epoch 1, as the model receives them ({photos.size} px): {', '.join(classes)}"
    side = max(2.0, photos.size / 100 + 0.2)  # an inch has 100 pixels: none of the image's may be lost
    figure, axes = grid(title, 4, 6, side)
    for n, (ax, (_, index), (_, drawn, view)) in enumerate(zip(axes.flat, next(iter(sampler)), items)):
        captions = []
        for label in classes:
            captions += target_texts(targets[label][n], class_names(label, classes[label]))
        draw_image(
            ax,
            images[n].permute(1, 2, 0).numpy(),
            f"{view}, {photos.samples[index].name}",
            captions,
            interpolation="nearest",
        )
        if BOX in drawn and drawn[BOX].isfinite().all():
            draw_box(ax, "bbox", (drawn[BOX] * photos.size).tolist())
    make_room(figure, axes)
    return figure


def target_texts(target: Tensor, names: tuple[str, ...]) -> list[str]:
    """The class of a target (), or the classes and probabilities of a target (classes,) that CutMix mixed."""
    if not target.ndim:
        return [names[target] if target >= 0 else "not known"]
    return [f"{names[c]} {target[c]:.2f}" for c in target.argsort(descending=True) if target[c] > 0]


# ---------------------------------------------------------------- where the model looks


def heat_maps(model: FashionModel, images: Tensor) -> Heats:
    """Where the evidence for each label's predicted class lies in uint8 images (N, 3, S, S), beside the logits.

    Grad-CAM (Selvaraju et al. 2017) of the class's logit less the mean of all, on the last feature map before pooling,
    less that map's mean. Of tokens it is the last block's input: behind that block a class token is all that counts.
    What such a token reads differs from place to place, and so do the gradients: there each place's own counts, not
    their mean (HiResCAM, Draelos and Carin 2020).
    """
    backbone = model.eval().requires_grad_(False).backbone
    tokens = []

    def keep_tokens(block: torch.nn.Module, args: tuple) -> None:
        if args[0].ndim == 3:
            tokens.append(args[0].requires_grad_())

    hook = backbone.blocks[-1].register_forward_pre_hook(keep_tokens) if hasattr(backbone, "blocks") else None
    features = backbone.forward_features((images.float() / 255 - model.mean) / model.std)
    if hook:
        hook.remove()
    averages = features.ndim == 4 or getattr(backbone, "global_pool", "") not in ("token", "map")
    if features.ndim == 4 or not tokens:
        features = features.detach().requires_grad_()
        tokens = [features]
    pooled = backbone.forward_head(features)
    heats = {}
    for label, head in zip(model.classes, model.heads):
        logits = head(pooled)
        evidence = (logits.amax(-1) - logits.mean(-1)).sum()
        gradient = _channels_last(torch.autograd.grad(evidence, tokens[0], retain_graph=True)[0], backbone)
        activation = _channels_last(tokens[0].detach(), backbone)
        if averages:
            activation = activation - activation.mean((1, 2), keepdim=True)
            gradient = gradient.mean((1, 2), keepdim=True)
        heat = (activation * gradient).sum(-1).clamp(min=0)
        heat = F.interpolate(heat[:, None], images.shape[-2:], mode="bilinear")[:, 0]
        heats[label] = heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny), logits.detach()
    return heats


def _channels_last(features: Tensor, backbone: torch.nn.Module) -> Tensor:
    """A backbone's features as (N, H, W, channels); of tokens (N, T, channels) those that are places of the image."""
    if features.ndim == 4:
        return features if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
    n = features.shape[1] - getattr(backbone, "num_prefix_tokens", 0)
    if math.isqrt(n) ** 2 != n:  # the class token joins only later (XCiT)
        n = features.shape[1]
    return features[:, -n:].unflatten(1, (math.isqrt(n), -1))


def looks(model: FashionModel, saved: Checkpoint, split: Split, answers: Answers | None) -> tuple[Figure, tuple | None]:
    """The heat of 8 validation photos, in the view of validation and whole; and `heat_inside` of 32 whole ones."""
    size, view = saved.image_size, saved.view
    chosen = sorted({round(i * (len(split.samples) - 1) / 31) for i in range(32)})
    samples = [split.samples[i] for i in chosen]
    photos = [load_photo(sample.path) for sample in samples]
    boxes = [box_in_image(sample, size, saved.resize) for sample in samples]
    images = torch.stack([view_pixels(photo, None, size, saved.resize) for photo in photos])
    heats = heat_maps(model, images)
    inside = heat_inside(heats, boxes)
    eighth = slice(None, None, math.ceil(len(chosen) / 8))
    heats = {label: (heat[eighth], logits[eighth]) for label, (heat, logits) in heats.items()}
    title = "Where the model looks (Grad-CAM): red is most, blue least; the frame is the given box"
    n_rows = 1 + len(model.classes)
    figure, axes = grid(title, n_rows if view == "full" else 2 * n_rows, 8)
    axes[-n_rows, 0].set_ylabel("whole photos")
    draw_heats(axes[-n_rows:], images[eighth], heats, samples[eighth], boxes[eighth], model.classes)
    if view != "full":
        learned = answers.learned if answers else [{}] * len(split.samples)
        crops = [(split.samples[i].boxes | learned[i]).get(view) for i in chosen]
        images = torch.stack(
            [view_pixels(photo, crop, size, saved.resize) for photo, crop in zip(photos[eighth], crops[eighth])]
        )
        axes[0, 0].set_ylabel(f"validation's view:\n{view}")
        draw_heats(axes, images, heat_maps(model, images), samples[eighth], [None] * 8, model.classes)
    make_room(figure, axes)
    return figure, inside


def draw_heats(axes: np.ndarray, images: Tensor, heats: Heats, samples: list, boxes: list, classes: dict) -> None:
    """Draw images (N, 3, S, S) of samples into the first row of axes, and each label's heat into the next ones."""
    images = images.permute(0, 2, 3, 1).numpy()
    for ax, image, sample in zip(axes[0], images, samples):
        draw_image(ax, image, sample.name, [])
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
            strength = heat[n].numpy()
            alpha = (0.75 * strength**0.7)[..., None]
            gray, hue = images[n].mean(-1, keepdims=True), 255 * colormaps["turbo"](strength)[..., :3]
            mixed = gray * (1 - alpha) + hue * alpha
            draw_image(ax, mixed.round().astype(np.uint8), "", captions, color)
            if box:
                draw_box(ax, "bbox", box)


def box_in_image(sample: Sample, size: int, resize: str) -> Box | None:
    """The garment's box (the given one, else the mask's) in the image of a whole photo."""
    view = next((view for view in BOX_COLUMNS if view in sample.boxes), None)
    if view is None:
        return None
    boxes = to_image(relative_boxes([sample], view), placement([sample.size], size, resize))
    return tuple((boxes[0] * size).round().int().tolist())


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


# ---------------------------------------------------------------- predictions


def draw_answers(rows: Split, prediction: Prediction, classes: Classes, prepare: Callable | None, path: Path) -> None:
    """A sheet of the first 48 photos with their answers and probabilities, and the box where the model looked."""
    samples = rows.samples[:48]
    n_columns = min(8, len(samples))
    with drawing():
        figure, axes = grid(f"Predictions: {', '.join(classes)}", math.ceil(len(samples) / n_columns), n_columns)
        for i, (ax, sample) in enumerate(zip(axes.flat, samples)):
            photo = prepare(sample)[0] if prepare else load_photo(sample.path)
            extent, size = (-0.5, photo.width - 0.5, photo.height - 0.5, -0.5), photo.size
            photo.thumbnail((256, 256))
            captions = []
            for label, logits in prediction.logits.items():
                p, c = logits[i].softmax(-1).max(-1)
                captions.append(f"{class_names(label, classes[label])[c]} {p:.2f}")
            draw_image(ax, np.asarray(photo), sample.name, captions, extent=extent)
            if "bbox" in sample.boxes:
                draw_box(ax, "bbox", sample.boxes["bbox"])
            if prediction.boxes is not None:
                draw_box(ax, "learned", crop_box(prediction.boxes[i].tolist(), size))
        make_room(figure, axes)
        save(figure, path)


if __name__ == "__main__":
    run_app(app)
