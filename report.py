"""Pictures of a run. train.py draws them as it ends; by hand:

    python report.py runs/NAME                  # curves, confusion, inputs, mistakes and looks .png, in runs/NAME; a few seconds
    python report.py runs/NAME runs/OTHER ...   # runs/NAME/compare.png: the curves of several runs over each other

curves: losses, validation Top-1, learning rate. confusion: truth against prediction. inputs: training images as the model receives them.
mistakes: the surest errors of validation. looks: where the model looks (Grad-CAM). Pictures of these names are replaced, nothing else is.
"""

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, islice, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor

from augment import cutmix
from cli import misuse, note, run_app, say, whole_file
from data import BOX_COLUMNS, Sample, Split, class_name, find_dataset, read_splits
from loading import EpochBatches, Photos, batches, derive_seed, make_loader, training_photos
from model import FashionModel, load_model, read_checkpoint, score
from photos import Box, load_photo, to_pixels

PICTURES = ("curves.png", "confusion.png", "inputs.png", "mistakes.png", "looks.png")
HANGUL_FONTS = (
    "Noto Sans CJK KR",
    "Noto Sans KR",
    "NanumGothic",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "AppleGothic",
    "UnDotum",
    "Baekmuk Dotum",
)
INK, RIGHT, WRONG, FAINT = "black", "#1a7f37", "#c62828", "#666666"
BOX_STYLES = {
    "bbox": ("given", "#ff7f0e", "-"),
    "mask": ("mask", "#1f77ff", "--"),
    "learned": ("learned", "#e0007a", "-."),
}  # in words, colour, line
DPI, GAP, LINE, FONT, SIDE = (
    100,
    10,
    15,
    8,
    170,
)  # pixels an inch, between cells, from line to line; points of the text; pixels of a mistake's photo

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="A run's folder, runs/NAME; several: their curves over each other.", show_default=False),
    ],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw the pictures of a run into its folder, or the curves of several runs into that of the first."""
    if len(runs) == 1:
        draw_pictures(runs[0])
        return
    read = [read_run(folder) for folder in runs]
    with drawing():
        save(curves(read), runs[0] / "compare.png")
    say(f"files: {runs[0]}/compare.png")


def draw_pictures(folder: Path, photos: Photos | None = None, val_split: Split | None = None) -> None:
    """Draw the pictures of a finished run; `photos`, `val_split`: the run's, where they are at hand. Raises ValueError, OSError, ImportError."""
    run = read_run(folder)
    model, saved = load_model(folder / "best.pt")
    answers = read_answers(folder / "val_predictions.csv", model.classes)
    with drawing():
        save(curves([run]), folder / "curves.png")
        if answers:
            save(confusion(answers), folder / "confusion.png")
        if photos is None:
            photos, val_split = read_photos(run.settings, saved["image_size"])
        save(inputs(photos, run.settings, model.classes), folder / "inputs.png")
        if answers:
            save(mistakes(answers, val_split), folder / "mistakes.png")
        figure, inside = looks(model, saved, val_split, answers)
        save(figure, folder / "looks.png")
        dotted = [text for text in [*model.classes, *(answers.names if answers else ())] if drawable(text) != text]
    if dotted:
        note(
            f"no font here has every character of {dotted[0]}: pictures show dots for them; a font such as {HANGUL_FONTS[2]} has the Korean ones"
        )
    if not answers:
        note(f"no {folder / 'val_predictions.csv'}: no confusion.png, no mistakes.png")
    if inside:
        say(
            f"heat inside the garment's box: {inside[0]:.2f} of it, where chance would give {inside[1]:.2f} (whole validation photos)"
        )
    say(
        f"pictures: {folder}/"
        + ", ".join(name for name in PICTURES if answers or name not in ("confusion.png", "mistakes.png"))
    )


# ---------------------------------------------------------------- what a run left


def read_run(folder: Path) -> SimpleNamespace:
    """A run's `folder`, its `settings`, `metrics` and `best`, the best epoch.

    `metrics`: {column: an array over the epochs, NaN where a cell is empty}, of the columns that hold anything.
    """
    if not (folder / "config.json").is_file():
        raise misuse("RUNS", f"{folder} is no run (it has no config.json); give the folder, runs/NAME")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
        settings = {
            key: settings[key]
            for key in ("data", "subtask", "batch_size", "seed", "cutmix", "t_0", "t_mult", "fit_all")
        } | settings
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} is damaged or of another version of this program") from None
    rows = read_rows(folder / "metrics.csv")
    try:
        metrics = {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}
        metrics = {key: values for key, values in metrics.items() if np.isfinite(values).any()}
        metrics["epoch"], metrics["lr"], metrics["train_loss"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'metrics.csv'} is damaged") from None
    return SimpleNamespace(
        folder=folder, settings=settings, metrics=metrics, best=read_checkpoint(folder / "best.pt").get("epoch", 0)
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that this program wrote. Raises ValueError, FileNotFoundError."""
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
            rows = list(csv.DictReader(f, strict=True))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except csv.Error:
        rows = []
    if not rows or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is damaged or holds no rows")
    return rows


def read_answers(path: Path, classes: dict[str, int]) -> SimpleNamespace | None:
    """val_predictions.csv: `names`; {label: (N,)} `truth` and `predicted`; {label: (N, classes)} `probabilities`; `learned` boxes, or None. None: no file."""
    if not path.exists():
        return None
    rows = read_rows(path)
    try:
        truth, predicted = (
            {label: torch.tensor([int(row[label + end]) for row in rows]) for label in classes}
            for end in ("", "_predicted")
        )
        probabilities = {
            label: torch.tensor([[float(row[f"{label}_p{c}"]) for c in range(n)] for row in rows])
            for label, n in classes.items()
        }
        if any(
            not 0 <= values.min() <= values.max() < n
            for of in (truth, predicted)
            for values, n in zip(of.values(), classes.values())
        ):
            raise ValueError
        columns = [f"Learned_{side}" for side in ("xmin", "ymin", "xmax", "ymax")]
        learned = (
            [tuple(round(float(row[column])) for column in columns) if row[columns[0]] else None for row in rows]
            if columns[0] in rows[0]
            else None
        )
        names = [row["image_name"] for row in rows]
    except (ValueError, KeyError):
        raise ValueError(f"{path} is damaged, or of other labels than best.pt") from None
    return SimpleNamespace(names=names, truth=truth, predicted=predicted, probabilities=probabilities, learned=learned)


def read_photos(settings: dict, size: int) -> tuple[Photos, Split]:
    """The training photos as the run saw them, and its validation split."""
    roots = [find_dataset(data, settings["subtask"]) for data in settings["data"]]
    train_split, val_split = read_splits(roots, settings["subtask"], settings["fit_all"])
    try:
        return training_photos(train_split.samples, size, SimpleNamespace(**settings)), val_split
    except AttributeError as error:
        raise ValueError(f"config.json is of another version of this program ({error})") from None


# ---------------------------------------------------------------- drawing


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's own settings, whatever the user's are: dark text on opaque white, `$` a letter like others, Hangul where a font here has it."""
    from matplotlib import font_manager, style

    there = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *[name for name in HANGUL_FONTS if name in there][:1]]
    with style.context(
        ["default", {"font.family": fonts, "font.size": 9, "text.parse_math": False, "figure.dpi": DPI}]
    ):
        yield


def save(figure, path: Path) -> None:
    with whole_file(path, "wb") as f:
        figure.savefig(f, format="png", facecolor="white")


def drawable(text: str, row: int | None = None) -> str:
    """The text with a dot for what no font here can draw (and its row in front, by which it can be told)."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[name]))) for name in FontProperties().get_family()]
    shown = "".join(c if c >= " " and any(font.get_char_index(ord(c)) for font in fonts) else "·" for c in text)
    return shown if shown == text or row is None else f"row {row}: {shown}"


def width_of(text: str, points: float = FONT) -> float:
    """Width of a text in pixels."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    return RendererAgg(1, 1, DPI).get_text_width_height_descent(text, FontProperties(size=points), False)[0]


def fit(text: str, pixels: float, points: float = FONT, front: float = 1 / 3) -> str:
    """The text, with an ellipsis where it is wider than this; `front` of what is kept lies before it, little, as names differ at their end."""
    text = shown = drawable(text)
    kept = len(text)
    while kept and width_of(shown, points) > pixels:
        kept -= 1
        before = round(kept * front)
        shown = text[:before] + "…" + text[len(text) - kept + before :]
    return shown


def sheet(title: str, rows: list[str | list[tuple]], columns: int, side: int):
    """A figure of headings (text) and rows of cells; a row of more cells than `columns` goes on below.

    A cell: (pixels uint8 (H, W, 3), shown as large as side x side allows; {kind of box: box in these pixels}; lines of text under it, each (text, colour)).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import Affine2D

    rows = [
        part
        for row in rows
        for part in ([row] if isinstance(row, str) else [row[at : at + columns] for at in range(0, len(row), columns)])
    ]
    heights = [
        LINE + 6 if isinstance(row, str) else side + 2 + LINE * max(len(lines) for *_, lines in row) + GAP
        for row in rows
    ]
    *tops, height = accumulate(heights, initial=40)
    width = columns * (side + GAP) + GAP
    figure = Figure(figsize=(width / DPI, height / DPI))
    down = Affine2D().scale(1, -1).translate(0, height)  # places are pixels from the upper left corner
    write = partial(figure.text, color=INK, fontsize=FONT, va="top", transform=down)
    write(GAP, 10, fit(title, width - 2 * GAP, 11), fontsize=11)
    for top, row in zip(tops, rows):
        if isinstance(row, str):
            write(GAP, top, fit(row, width - 2 * GAP, 10), fontsize=10)
            continue
        for i, (pixels, boxes, lines) in enumerate(row):
            scale, left = side / max(pixels.shape[:2]), GAP + i * (side + GAP)
            image = Image.fromarray(pixels).resize(
                [max(1, round(at * scale)) for at in pixels.shape[1::-1]], Image.Resampling.LANCZOS
            )
            x, y = left + (side - image.width) // 2, top + (side - image.height) // 2
            figure.figimage(np.asarray(image), x, height - y - image.height, origin="upper")
            for kind, box in boxes.items():
                x0, y0, x1, y1 = (at * scale for at in box)
                for color, line, thick in (("white", "-", 3.0), (*BOX_STYLES[kind][1:], 1.5)):
                    figure.add_artist(
                        Rectangle(
                            (x + x0, y + y0), x1 - x0, y1 - y0, fill=False, ec=color, ls=line, lw=thick, transform=down
                        )
                    )
            for j, (text, color) in enumerate(lines):
                write(left, top + side + 2 + j * LINE, fit(text, side), color=color)
    return figure


# ---------------------------------------------------------------- the pictures


def curves(runs: list[SimpleNamespace]):
    """Losses, validation Top-1 and learning rate over the epochs, the best one dotted; of several runs each label by itself, a colour a run."""
    from matplotlib.figure import Figure

    alone = len(runs) == 1
    top1 = [key for key in dict.fromkeys(key for run in runs for key in run.metrics) if key.startswith("val_top1_")]
    accuracy = (
        {"validation Top-1": top1}
        if alone and top1
        else {f"Top-1 {key.removeprefix('val_top1_')}": [key] for key in top1}
    )
    panels = {
        "loss" if alone else "loss (training: dotted)": ["train_loss", "val_loss"],
        **accuracy,
        "learning rate": ["lr"],
    }
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    for i, (title, keys) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(rows, columns, i)
        for r, run in enumerate(runs):
            epochs = run.metrics["epoch"]
            for k, key in enumerate(keys):
                if key in run.metrics:
                    training = "training, with the boxes'" if "val_iou" in run.metrics else "training"
                    name = {"train_loss": training, "val_loss": "validation"}.get(
                        key, drawable(key.removeprefix("val_top1_"))
                    )
                    how = (
                        {"color": INK, "lw": 2.2}
                        if alone and key == "val_top1_mean"
                        else {"color": f"C{k if alone else r}"}
                    )
                    how |= {"ls": ":" if key == "train_loss" else "-", "marker": "o", "markevery": epochs == run.best}
                    ax.plot(
                        epochs, run.metrics[key], label=" " + name, **how
                    )  # the space: a legend leaves out what begins with _
        ax.set_title(fit(title, 400, 11), fontsize=11)
        ax.set_xlabel("epoch")
        ax.locator_params("x", integer=True, nbins=8)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.25)
        if alone:
            for n, epoch in enumerate(
                takewhile(lambda epoch: epoch <= runs[0].metrics["epoch"][-1], restarts(runs[0].settings))
            ):
                ax.axvline(epoch, color=FAINT, lw=0.8, ls=":", label=None if n else " restart")
            ax.axvline(runs[0].best, color=WRONG, lw=1, ls="--", label=f" best epoch, {runs[0].best}")
            ax.legend(fontsize=8)
    if not alone:
        names = [" " + fit(f"{run.folder} (best epoch {run.best})", 400, 9) for run in runs]
        figure.legend(ax.lines, names, loc="outside lower center", ncols=min(len(runs), columns))
    return figure


def restarts(settings: dict) -> Iterator[int]:
    """The epochs, counted from 1, that begin with the full learning rate again, without end."""
    epoch, stretch = 1, settings["t_0"]
    if not min(stretch, settings["t_mult"]) >= 1:
        raise ValueError(f"T_0 {stretch} and T_mult {settings['t_mult']} are no schedule: config.json is damaged")
    while True:
        epoch, stretch = epoch + stretch, stretch * settings["t_mult"]
        yield epoch


def confusion(answers: SimpleNamespace):
    """A matrix a label: how many photos of each class (row) were taken for each class (column), and their share of the row."""
    from matplotlib.figure import Figure

    names = {
        label: [fit(class_name(label, c), 130) for c in range(p.shape[1])] for label, p in answers.probabilities.items()
    }
    longest = {label: max(map(width_of, of)) for label, of in names.items()}
    cells = {
        label: 72 if len(of) <= 8 else 44 if len(of) <= 30 else 12 for label, of in names.items()
    }  # pixels, at least
    sides = [max(180, cells[label] * len(of)) for label, of in names.items()]
    rows = [sides[at : at + 3] for at in range(0, len(sides), 3)]
    beside, below = (max(longest.values()) + more for more in (60, 110))  # names, titles
    width, heights = max(sum(row) + beside * len(row) for row in rows), [max(row) + below for row in rows]
    figure = Figure((width / DPI, sum(heights) / DPI), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights).flat
    axes = [
        ax for part, row in zip(parts, rows) for ax in part.subplots(1, len(row), squeeze=False, width_ratios=row).flat
    ]
    for ax, label in zip(axes, names):
        n, cell = len(names[label]), cells[label]
        truth, predicted = answers.truth[label], answers.predicted[label]
        counts = torch.bincount(truth * n + predicted, minlength=n * n).view(n, n).numpy()
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        scores = score({label: F.one_hot(predicted, n)}, {label: truth})
        ax.set_anchor("NW")
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero()) if n <= 30 else ():
            color = "white" if shares[row, column] > 0.55 else INK
            text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
            ax.text(column, row, text, ha="center", va="center", fontsize=FONT if cell > 50 else 6, color=color)
        title = f"{fit(label, 180, 10)}\nTop-1 {scores[f'top1_{label}']:.4f}, ACSA {scores[f'acsa_{label}']:.4f}"
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xticks(range(n), names[label], rotation=90 if longest[label] > cell - 6 else 0, fontsize=FONT)
        ax.set_yticks(range(n), names[label], fontsize=FONT)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
    return figure


def training_images(
    photos: Photos, settings: dict, classes: dict[str, int]
) -> Iterator[tuple[Tensor, dict[str, Tensor], tuple[int, int]]]:
    """The images of the first epoch as they reach the model: uint8 (3, size, size), their targets {label: ...}, their (epoch, index)."""
    order = EpochBatches(
        len(photos), settings["batch_size"] if settings["cutmix"] else 24, settings["seed"]
    )  # CutMix wants the whole batch
    order.epoch = 1
    for step, (keys, (images, targets)) in enumerate(zip(order, batches(make_loader(photos, 0, 0, order))), start=1):
        targets = {label: targets[label] for label in classes}
        images, targets = cutmix(
            images, targets, classes, settings["cutmix"], derive_seed(settings["seed"], "cutmix", 1, step)
        )
        for i, key in enumerate(keys):
            yield images[i], {label: values[i] for label, values in targets.items()}, key


def inputs(photos: Photos, settings: dict, classes: dict[str, int]):
    """Training images as the model receives them, pixel by pixel, with their view and labels."""
    size = photos.size
    times = max(1, round(200 / size))  # a whole number, so that each pixel is seen
    side = size * times if size <= 256 else 224
    cells = []
    for image, target, key in islice(training_images(photos, settings, classes), 24):
        lines = [
            (f"{photos.view_in(*key)}, {photos.samples[key[1]].where.partition(' (')[0].partition(', ')[2]}", FAINT)
        ]
        for label, value in target.items():
            shares = value if value.ndim else F.one_hot(value, classes[label])
            parts = sorted(((p, c) for c, p in enumerate(shares.tolist()) if p > 0), reverse=True)
            text = ", ".join(class_name(label, c) + (f" {p:.2f}" if p < 1 else "") for p, c in parts)
            lines.append((fit(text, side, front=1), INK))
        cells.append((image.permute(1, 2, 0).numpy().repeat(times, 0).repeat(times, 1), {}, lines))
    title = f"Training images of epoch 1, as the model receives them ({size} px): {', '.join(classes)}"
    return sheet(title, [cells], 6, side)


def surest_errors(answers: SimpleNamespace, label: str) -> list[tuple[int, float]]:
    """The photos whose `label` is predicted wrong, with the probability of the prediction, the surest first."""
    wrong = (answers.predicted[label] != answers.truth[label]).nonzero().flatten().tolist()
    sure = answers.probabilities[label].gather(1, answers.predicted[label][:, None])[:, 0].tolist()
    return sorted(((i, sure[i]) for i in wrong), key=lambda error: -error[1])


def boxes_of(i: int, split: Split, answers: SimpleNamespace | None) -> dict[str, Box]:
    """The boxes known for a photo of the split, by kind."""
    learned = answers.learned[i] if answers and answers.learned else None
    return split.samples[i].boxes | ({"learned": learned} if learned else {})


def mistakes(answers: SimpleNamespace, split: Split):
    """The surest errors of each label: the whole photo with its boxes, truth and prediction."""
    from matplotlib.lines import Line2D

    if answers.names != [sample.name for sample in split.samples]:
        raise ValueError(f"val_predictions.csv does not hold the photos of {split.csv}; were the data changed since?")
    rows, kinds = [], set()
    for label in answers.truth:
        errors = surest_errors(answers, label)
        cells = []
        for i, sure in errors[: 6 * max(1, 3 // len(answers.truth))]:
            photo = load_photo(split.samples[i].path)
            width = photo.width
            photo.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)  # at once: many large photos would take much memory
            boxes = {
                kind: [at * photo.width / width for at in box] for kind, box in boxes_of(i, split, answers).items()
            }
            kinds |= set(boxes)
            truth, said = (class_name(label, int(of[label][i])) for of in (answers.truth, answers.predicted))
            lines = [
                (drawable(answers.names[i], i + 1), FAINT),
                (f"is {truth}", INK),
                (f"said {said} {sure:.2f}", WRONG),
            ]
            cells.append((np.asarray(photo), boxes, lines))
        rows += [f"{label}: {len(errors):,} of {len(answers.names):,} are wrong", cells]
    figure = sheet("The surest errors of validation", rows, 6, SIDE)
    lines = [
        Line2D([], [], color=color, ls=line, label=f"{words} box")
        for kind, (words, color, line) in BOX_STYLES.items()
        if kind in kinds
    ]
    figure.legend(handles=lines, loc="upper right", ncols=3, frameon=False)
    return figure


def heat_maps(model: FashionModel, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Where the evidence for each label's predicted class lies in uint8 images (N, 3, S, S), float32 (N, S, S) in 0..1, beside the logits (N, classes).

    Grad-CAM (Selvaraju et al. 2017) of the class's logit less the mean of all, on the last feature map before pooling, less that map's mean.
    Of tokens it is the last block's input: behind that block a class token is all that counts. What such a token reads differs from place to
    place, and so do the gradients: there each place's own counts, not their mean (HiResCAM, Draelos and Carin 2020).
    """
    backbone, taken = model.eval().requires_grad_(False).backbone, []

    def take(block: torch.nn.Module, given: tuple) -> None:
        if given[0].ndim == 3:
            taken.append(given[0].requires_grad_())

    hook = backbone.blocks[-1].register_forward_pre_hook(take) if hasattr(backbone, "blocks") else None
    features = backbone.forward_features((images.float() / 255 - model.mean) / model.std)
    if hook:
        hook.remove()
    if features.ndim == 4 or not taken:
        features = features.detach().requires_grad_()
        taken = [features]
    pooled = backbone.forward_head(features)
    found = {}
    for label, head in zip(model.classes, model.heads):
        values = head(pooled)
        gradient = torch.autograd.grad((values.amax(-1) - values.mean(-1)).sum(), taken[0], retain_graph=True)[0]
        maps, gradient = (_channels_last(of.detach(), backbone) for of in (taken[0], gradient))
        if features.ndim == 4 or getattr(backbone, "global_pool", "") not in ("token", "map"):
            maps, gradient = maps - maps.mean((1, 2), keepdim=True), gradient.mean((1, 2), keepdim=True)
        heat = F.interpolate((maps * gradient).sum(-1).clamp(min=0)[:, None], images.shape[-2:], mode="bilinear")[:, 0]
        found[label] = heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny), values.detach()
    return found


def _channels_last(features: Tensor, backbone: torch.nn.Module) -> Tensor:
    """Feature maps (N, H, W, channels) of the backbone's own kind; of tokens (N, T, channels) those that are places of the square image."""
    if features.ndim == 4:
        return features if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
    n = features.shape[1] - getattr(backbone, "num_prefix_tokens", 0)
    if math.isqrt(n) ** 2 != n:  # the class token joins only later (XCiT)
        n = features.shape[1]
    return features[:, -n:].unflatten(1, (math.isqrt(n), -1))


def looks(model: FashionModel, saved: dict, split: Split, answers: SimpleNamespace | None):
    """Eight validation photos, whole and in the view of validation, with each label's heat; and the share of the heat that lies inside the garment's box.

    The share is the mean over 32 whole photos and all labels, beside the box's share of the photo, which chance would give; None without boxes.
    """
    size, view = saved["image_size"], saved["data"]["view"]
    chosen = sorted({round(i * (len(split.samples) - 1) / 31) for i in range(32)})
    step = max(1, len(chosen) // 8)
    eight = slice(0, 8 * step, step)
    photos = [load_photo(split.samples[i].path) for i in chosen]
    rows = []
    if view != "full":
        crops = torch.stack(
            [
                to_pixels(photo, boxes_of(i, split, answers).get(view), size)
                for i, photo in zip(chosen[eight], photos[eight])
            ]
        )
        rows += [
            f"as validation sees them ({view})",
            *look_rows(crops, heat_maps(model, crops), chosen[eight], split, [None] * 8),
        ]
    whole = torch.stack([to_pixels(photo, None, size) for photo in photos])
    found = heat_maps(model, whole)
    boxes = [squashed_box(split.samples[i], size) for i in chosen]
    shown = {label: (heats[eight], logits[eight]) for label, (heats, logits) in found.items()}
    rows += [
        "whole photos" + (", the first look" if view == "learned" else ""),
        *look_rows(whole[eight], shown, chosen[eight], split, boxes[eight]),
    ]
    return sheet(
        "Where the model looks (Grad-CAM): red is most, blue least; the frame is the given box", rows, 8, 128
    ), heat_inside(found, boxes)


def look_rows(
    images: Tensor, found: dict[str, tuple[Tensor, Tensor]], chosen: list[int], split: Split, boxes: list[Box | None]
) -> Iterator:
    """A row of images (N, 3, S, S), and one a label with what `heat_maps` found over them and the box where it is known."""
    from matplotlib import colormaps

    images = images.permute(0, 2, 3, 1).numpy()
    yield [(image, {}, [(drawable(split.samples[i].name, i + 1), FAINT)]) for image, i in zip(images, chosen)]
    for label, (heats, logits) in found.items():
        cells = []
        for image, heat, values, i, box in zip(images, heats.numpy(), logits.softmax(-1), chosen, boxes):
            truth, said = split.samples[i].labels[label], int(values.argmax())
            strength = (0.75 * heat**0.7)[..., None]
            over = image.mean(-1, keepdims=True) * (1 - strength) + colormaps["turbo"](heat)[..., :3] * 255 * strength
            lines = [(f"{class_name(label, said)} {values[said]:.2f}", RIGHT if said == truth else WRONG)]
            lines += [(f"is {class_name(label, truth)}", INK)] if said != truth else []
            cells.append((over.round().astype(np.uint8), {"bbox": box} if box else {}, lines))
        yield from (label, cells)


def squashed_box(sample: Sample, size: int) -> Box | None:
    """The garment's box (the given one, else the mask's) in a whole photo that is squashed to size."""
    box = next((sample.boxes[kind] for kind in BOX_COLUMNS if kind in sample.boxes), None)
    return box and tuple(round(at * size / side) for at, side in zip(box, sample.size * 2))


def heat_inside(found: dict[str, tuple[Tensor, Tensor]], boxes: list[Box | None]) -> tuple[float, float] | None:
    """The mean share of the heat that lies inside each image's box, and of the image that the box is; None where no box is known."""
    pairs = []
    for heats, _ in found.values():
        for heat, box in zip(heats, boxes):
            if box and heat.sum() > 0:
                x0, y0, x1, y1 = box
                pairs.append(((heat[y0:y1, x0:x1].sum() / heat.sum()).item(), (y1 - y0) * (x1 - x0) / heat.numel()))
    return tuple(np.mean(pairs, axis=0).tolist()) if pairs else None


if __name__ == "__main__":
    run_app(app)
