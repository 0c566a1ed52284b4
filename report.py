"""Pictures of a run. train.py draws them as it ends; by hand:

    python report.py runs/NAME                  # curves, confusion, inputs, mistakes and looks .png, in runs/NAME; a few seconds
    python report.py runs/NAME runs/OTHER ...   # runs/NAME/compare.png: the curves of several runs over each other

curves: losses, validation Top-1, learning rate. confusion: truth against prediction. inputs: training images as the model receives them.
mistakes: the surest errors of validation. looks: where the model looks (Grad-CAM). Pictures of these names are replaced, nothing else is.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor

from cli import misuse, note, run_app, say, whole_file
from data import (
    BOX_COLUMNS,
    CLASS_NAMES,
    Box,
    EpochBatches,
    Photos,
    Split,
    batches,
    cutmix,
    derive_seed,
    find_dataset,
    load_photo,
    make_loader,
    read_splits,
    to_pixels,
    training_photos,
)
from model import FashionModel, load_model, read_checkpoint, score

PICTURES = ("curves.png", "confusion.png", "inputs.png", "mistakes.png", "looks.png")
HANGUL_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "UnDotum", "Baekmuk Dotum")
INK, RIGHT, WRONG, FAINT = "#222222", "#1a7f37", "#c62828", "#666666"
BOX_STYLES = {"bbox": ("given", "#ff7f0e", "-"), "mask": ("mask", "#1f77ff", "--"), "learned": ("learned", "#e0007a", "-.")}  # in words, colour, line
DPI, GAP, LINE, FONT, LOOK = 100, 10, 15, 8, 128  # pixels an inch, between cells, from line to line; points of the text; pixels of a cell of looks.png

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run's folder, runs/NAME; several: their curves over each other.", show_default=False)],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw the pictures of a run into its folder, or the curves of several runs into that of the first."""
    read = [read_run(folder) for folder in runs]
    if len(read) == 1:
        draw_pictures(runs[0])
        return
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
        if photos is None or val_split is None:
            photos, val_split = read_photos(run.settings, saved["image_size"])
        save(inputs(photos, run.settings, model.classes), folder / "inputs.png")
        if answers:
            save(mistakes(answers, val_split), folder / "mistakes.png")
        figure, inside = looks(model, saved, val_split, answers)
        save(figure, folder / "looks.png")
    if not answers:
        note(f"no {folder / 'val_predictions.csv'}: no confusion.png, no mistakes.png")
    if inside:
        say(f"heat inside the garment's box: {inside[0]:.2f} of it, where chance would give {inside[1]:.2f} (whole validation photos)")
    say(f"pictures: {folder}/" + ", ".join(name for name in PICTURES if answers or name not in ("confusion.png", "mistakes.png")))


# ---------------------------------------------------------------- what a run left


def read_run(folder: Path) -> SimpleNamespace:
    """A run's `folder`, its `settings`, `metrics` {column: an array over the epochs, NaN where a cell is empty} and `best`, the best epoch."""
    if not (folder / "config.json").is_file():
        raise misuse("RUNS", f"{folder} is no run (it has no config.json); give the folder, runs/NAME")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
        settings = {key: settings[key] for key in ("data", "subtask", "batch_size", "seed", "cutmix", "t_0", "t_mult", "fit_all")} | settings
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} is damaged or of another version of this program") from None
    rows = read_rows(folder / "metrics.csv")
    try:
        metrics = {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}
        metrics["epoch"], metrics["lr"], metrics["train_loss"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'metrics.csv'} is damaged") from None
    return SimpleNamespace(folder=folder, settings=settings, metrics=metrics, best=read_checkpoint(folder / "best.pt").get("epoch", 0))


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
        truth, predicted = ({label: torch.tensor([int(row[label + end]) for row in rows]) for label in classes} for end in ("", "_predicted"))
        probabilities = {label: torch.tensor([[float(row[f"{label}_p{c}"]) for c in range(n)] for row in rows]) for label, n in classes.items()}
        if any(not 0 <= values.min() <= values.max() < n for of in (truth, predicted) for values, n in zip(of.values(), classes.values())):
            raise ValueError
        columns = [f"Learned_{side}" for side in ("xmin", "ymin", "xmax", "ymax")]
        learned = [tuple(round(float(row[column])) for column in columns) if row[columns[0]] else None for row in rows] if columns[0] in rows[0] else None
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


def class_name(label: str, c: int) -> str:
    return CLASS_NAMES[label][c] if label in CLASS_NAMES else str(c)


# ---------------------------------------------------------------- drawing


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's own settings, whatever the user's are: dark text on opaque white, `$` a letter like others, Hangul where a font here has it."""
    import matplotlib
    from matplotlib import font_manager

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        there = {font.name for font in font_manager.fontManager.ttflist}
        fonts = ["DejaVu Sans", *[name for name in HANGUL_FONTS if name in there][:1]]
        ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
        matplotlib.rcParams.update({"font.family": fonts, "font.size": 9, "text.parse_math": False, "figure.dpi": DPI, **ink})
        yield


def save(figure, path: Path) -> None:
    with whole_file(path, "wb") as f:
        figure.savefig(f, format="png", facecolor="white")


@cache
def _drawable() -> frozenset[int]:
    """The characters that the fonts in use can draw."""
    from matplotlib import font_manager

    paths = [font_manager.findfont(name) for name in font_manager.FontProperties().get_family()]
    return frozenset(c for path in paths for c in font_manager.get_font(path).get_charmap() if c >= 32)


def drawable(text: str, row: int | None = None) -> str:
    """The text with a dot for what no font here can draw (and its row in front, by which it can be told)."""
    shown = "".join(c if ord(c) in _drawable() else "·" for c in text)
    return shown if shown == text or row is None else f"row {row}: {shown}"


@cache
def _renderer():
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, DPI)


def width_of(text: str, points: float = FONT) -> float:
    """Width of a text in pixels."""
    from matplotlib.font_manager import FontProperties

    return _renderer().get_text_width_height_descent(text, FontProperties(size=points), False)[0]


def fit(text: str, pixels: float, points: float = FONT, keep_end: bool = False) -> str:
    """The text, cut with an ellipsis where it is wider than this."""
    text, cut = drawable(text), 0
    while width_of(shown := (("…" + text[cut:] if keep_end else text[: len(text) - cut] + "…") if cut else text), points) > pixels and cut < len(text):
        cut += 1
    return shown


def sheet(title: str, rows: list[tuple[str, list]], columns: int, side: int, legend: Sequence = ()):
    """A figure of cells in rows, each row under its heading ("": none).

    A cell: (pixels uint8 (H, W, 3), at most side x side; {kind of box: box in these pixels}; lines of text under it, each (text, colour)).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    heights = [(LINE + 6 if heading else 0) + (side + 2 + LINE * max(len(cell[2]) for cell in cells) if cells else 0) + GAP for heading, cells in rows]
    width, height = columns * (side + GAP) + GAP, sum(heights) + 40
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def write(x: float, y: float, text: str, color: str = INK, **how) -> None:
        figure.text(x / width, 1 - y / height, text, color=color, va="top", **{"fontsize": FONT, **how})

    left = width - GAP
    for text, color in reversed(legend):
        left -= width_of(text, 10) + 2 * GAP
        write(left, 12, text, color, fontsize=10)
    write(GAP, 10, fit(title, left - 2 * GAP, 11), fontsize=11)
    y = 40
    for (heading, cells), tall in zip(rows, heights):
        top = y + (LINE + 6 if heading else 0)
        if heading:
            write(GAP, y, fit(heading, width - 2 * GAP, 10), fontsize=10)
        for i, (pixels, boxes, lines) in enumerate(cells):
            x = GAP + i * (side + GAP)
            at_x, at_y = x + (side - pixels.shape[1]) // 2, top + (side - pixels.shape[0]) // 2
            figure.figimage(pixels, at_x, height - at_y - pixels.shape[0], origin="upper")
            for kind, (x0, y0, x1, y1) in boxes.items():
                for color, line, thick in (("white", "-", 3.0), (*BOX_STYLES[kind][1:], 1.5)):
                    at = (at_x + x0, height - at_y - y1)
                    figure.add_artist(Rectangle(at, x1 - x0, y1 - y0, fill=False, ec=color, ls=line, lw=thick, transform=None))
            for j, (text, color) in enumerate(lines):
                write(x, top + side + 2 + j * LINE, fit(text, side), color)
        y += tall
    return figure


def shown(pixels: np.ndarray, side: int) -> np.ndarray:
    """The image (H, W, 3) as large as fits: enlarged by a whole number, so that each of its pixels is seen, or scaled down."""
    times = side // max(pixels.shape[:2])
    if times:
        return pixels.repeat(times, 0).repeat(times, 1)
    small = Image.fromarray(pixels)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


# ---------------------------------------------------------------- the pictures


def curves(runs: list[SimpleNamespace]):
    """Losses, validation Top-1 and learning rate over the epochs; of several runs each label by itself, a colour a run."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    top1 = [key for key in runs[0].metrics if key.startswith("val_top1_") and any(np.isfinite(run.metrics.get(key, [])).any() for run in runs)]
    accuracy = [("validation Top-1", top1)] if len(runs) == 1 else [(f"Top-1 {key.removeprefix('val_top1_')}", [key]) for key in top1]
    panels = [("loss", ["train_loss", "val_loss"]), *[panel for panel in accuracy if panel[1]], ("learning rate", ["lr"])]
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.6 * columns, 3.8 * math.ceil(len(panels) / columns)), layout="constrained")
    colors = [f"C{i}" for i in range(10)]
    for i, (title, keys) in enumerate(panels):
        ax = figure.add_subplot(math.ceil(len(panels) / columns), columns, i + 1)
        for r, run in enumerate(runs):
            epochs = run.metrics["epoch"]
            for k, key in enumerate(keys):
                values = run.metrics.get(key, np.full(len(epochs), np.nan))
                if np.isfinite(values).any():
                    name = key.replace("val_top1_", "").replace("val_loss", "validation").replace("train_loss", "training")
                    mean = len(runs) == 1 and key == "val_top1_mean"
                    color = INK if mean else colors[(k if len(runs) == 1 else r) % 10]
                    style = {"ls": "-" if len(runs) == 1 or k == len(keys) - 1 else ":", "marker": "o" if len(epochs) == 1 else "", "lw": 2.2 if mean else 1.5}
                    ax.plot(epochs, values, color=color, label=" " + name, **style)
                    if len(runs) > 1 and run.best in epochs and key != "lr":
                        ax.plot(run.best, values[list(epochs).index(run.best)], "o", color=color)
            if len(runs) == 1:
                for n, epoch in enumerate(restarts(run)):
                    ax.axvline(epoch, color=FAINT, lw=0.8, ls=":", label=None if n else " restart")
                ax.axvline(run.best, color=WRONG, lw=1, ls="--", label=f" best epoch, {run.best}")
        ax.set_title(fit(title, 400, 11), fontsize=11)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        ax.yaxis.set_major_formatter("{x:.1e}" if keys == ["lr"] else "{x:g}")
        ax.grid(alpha=0.25)
        if len(runs) == 1:
            ax.legend(fontsize=8)
        elif title == "loss":
            ax.legend([Line2D([], [], color=INK, ls=ls) for ls in (":", "-")], ["training", "validation"], fontsize=8)
    if len(runs) > 1:
        lines = [Line2D([], [], color=colors[r % 10], marker="o") for r in range(len(runs))]
        names = [" " + fit(f"{run.folder} (best epoch {run.best})", 400, 9, keep_end=True) for run in runs]
        figure.legend(lines, names, loc="outside lower center", ncols=min(len(runs), columns), fontsize=9)
    return figure


def restarts(run: SimpleNamespace) -> list[int]:
    """The epochs, counted from 1, that begin with the full learning rate again."""
    epochs, stretch, found = run.settings["t_0"], run.settings["t_0"], []
    while epochs < len(run.metrics["epoch"]):
        found.append(epochs + 1)
        stretch *= run.settings["t_mult"]
        epochs += stretch
    return found


def confusion(answers: SimpleNamespace):
    """A matrix a label: how many photos of each class (row) were taken for each class (column), and their share of the row."""
    from matplotlib.figure import Figure

    across, placed, right, foot = 3, [], 0.0, 0.0
    for i, (label, probabilities) in enumerate(answers.probabilities.items()):
        n = probabilities.shape[1]
        cell = 72 if n <= 8 else 44 if n <= 30 else 12  # pixels
        names = [fit(class_name(label, c), 130) for c in range(n)]
        upright = max(map(width_of, names)) > cell - 6
        if i % across == 0:
            top, right = foot, 0.0
        left = right + 45 + max(map(width_of, names))
        placed.append((label, n, cell, names, upright, left, top + 60))
        right = left + max(cell * n, 180) + GAP
        foot = max(foot, top + 60 + cell * n + 62 + (max(map(width_of, names)) if upright else LINE))
    width, height = max(left + max(cell * n, 180) for _, n, cell, *_, left, _ in placed) + 2 * GAP, foot
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for label, n, cell, names, upright, left, top in placed:
        truth, predicted = answers.truth[label], answers.predicted[label]
        counts = torch.bincount(truth * n + predicted, minlength=n * n).view(n, n).numpy()
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        scores = score({label: F.one_hot(predicted, n)}, {label: truth})
        ax = figure.add_axes((left / width, 1 - (top + cell * n) / height, cell * n / width, cell * n / height))
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero()) if n <= 30 else ():
            color = "white" if shares[row, column] > 0.55 else INK
            text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
            ax.text(column, row, text, ha="center", va="center", fontsize=FONT if cell > 50 else 6, color=color)
        title = f"{fit(label, max(cell * n, 180), 10)}\nTop-1 {scores[f'top1_{label}']:.4f}, ACSA {scores[f'acsa_{label}']:.4f}"
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xticks(range(n), names, rotation=90 if upright else 0, fontsize=FONT)
        ax.set_yticks(range(n), names, fontsize=FONT)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
    return figure


def training_images(photos: Photos, settings: dict, classes: dict[str, int], n: int = 24) -> tuple[list, list, list[tuple[int, int]]]:
    """The first `n` images of the first epoch, as they reach the model: uint8 (3, size, size), their targets {label: ...}, their (epoch, index)."""
    order = EpochBatches(len(photos), settings["batch_size"], settings["seed"])
    order.epoch, taken = 1, ([], [], [])
    for step, keys in enumerate(order, start=1):
        keys = keys if settings["cutmix"] else keys[:n]  # CutMix wants the whole batch
        images, targets = next(batches(make_loader(photos, len(keys), 0, [keys])))
        targets = {label: targets[label] for label in classes}
        images, targets = cutmix(images, targets, classes, settings["cutmix"], derive_seed(settings["seed"], "cutmix", 1, step))
        each = [{label: values[i] for label, values in targets.items()} for i in range(len(keys))]
        for part, more in zip(taken, (images, each, keys)):
            part += more
        if len(taken[0]) >= n:
            break
    return tuple(part[:n] for part in taken)


def inputs(photos: Photos, settings: dict, classes: dict[str, int]):
    """Training images as the model receives them, pixel by pixel, with their view and labels."""
    images, targets, keys = training_images(photos, settings, classes)
    size = photos.size
    side = size * max(1, round(200 / size)) if size <= 256 else 224
    cells = []
    for image, target, key in zip(images, targets, keys):
        lines = [(f"{photos.view_in(*key)}, {photos.samples[key[1]].where.partition(' (')[0].partition(', ')[2]}", FAINT)]
        for label, value in target.items():
            shares = {int(value): 1.0} if value.ndim == 0 else {c: p for p, c in sorted(zip(value.tolist(), range(len(value))), reverse=True) if p > 0}
            lines.append((", ".join(class_name(label, c) + (f" {p:.2f}" if p < 1 else "") for c, p in shares.items()), INK))
        cells.append((shown(image.permute(1, 2, 0).numpy(), side), {}, lines))
    title = f"Training images of epoch 1, as the model receives them ({size} px): {', '.join(classes)}"
    return sheet(title, [("", cells[i : i + 6]) for i in range(0, len(cells), 6)], 6, side)


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
    if answers.names != [sample.name for sample in split.samples]:
        raise ValueError(f"val_predictions.csv does not hold the photos of {split.csv}; were the data changed since?")
    side, rows, kinds = 170, [], set()
    for label in answers.truth:
        errors = surest_errors(answers, label)
        cells = []
        for i, sure in errors[: 6 * max(1, 3 // len(answers.truth))]:
            photo = np.asarray(load_photo(split.samples[i].path))
            small = shown(photo, side)
            boxes = {kind: [at * small.shape[1] / photo.shape[1] for at in box] for kind, box in boxes_of(i, split, answers).items()}
            kinds |= set(boxes)
            said = f"said {class_name(label, int(answers.predicted[label][i]))} {sure:.2f}"
            name = fit(drawable(answers.names[i], i + 1), side, keep_end=True)
            cells.append((small, boxes, [(name, FAINT), (f"is {class_name(label, int(answers.truth[label][i]))}", INK), (said, WRONG)]))
        rows.append((f"{label}: {len(errors):,} of {len(answers.names):,} are wrong", cells[:6]))
        rows += [("", cells[at : at + 6]) for at in range(6, len(cells), 6)]
    legend = [(f"{words} box", color) for kind, (words, color, _) in BOX_STYLES.items() if kind in kinds]
    return sheet("The surest errors of validation", rows, 6, side, legend)


def heat_maps(model: FashionModel, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Where the evidence for each label's predicted class lies in uint8 images (N, 3, S, S): {label: float32 (N, S, S) in 0..1}; and the logits.

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
    logits = {label: head(pooled) for label, head in zip(model.classes, model.heads)}
    heats = {}
    for label, values in logits.items():
        gradient = torch.autograd.grad((values.amax(-1) - values.mean(-1)).sum(), taken[0], retain_graph=True)[0]
        maps, gradient = (_channels_last(of.detach(), backbone) for of in (taken[0], gradient))
        if features.ndim == 4 or getattr(backbone, "global_pool", "") not in ("token", "map"):
            maps, gradient = maps - maps.mean((1, 2), keepdim=True), gradient.mean((1, 2), keepdim=True)
        heat = F.interpolate((maps * gradient).sum(-1).clamp(min=0)[:, None], images.shape[-2:], mode="bilinear")[:, 0]
        heats[label] = heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    return heats, {label: values.detach() for label, values in logits.items()}


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
    n, size, view = len(split.samples), saved["image_size"], saved["data"]["view"]
    chosen = sorted({round(i * (n - 1) / 31) for i in range(32)})
    eight = chosen[:: max(1, len(chosen) // 8)][:8]
    photos = {i: load_photo(split.samples[i].path) for i in chosen}
    rows = []
    if view != "full":
        crops = [to_pixels(photos[i], boxes_of(i, split, answers).get(view), size) for i in eight]
        rows += look_rows(f"as validation sees them ({view})", model, torch.stack(crops), eight, split)
    whole = torch.stack([to_pixels(photos[i], None, size) for i in chosen])
    boxes = {i: scaled_box(split.samples[i], photos[i], size) for i in chosen}
    rows += look_rows("whole photos", model, whole[[chosen.index(i) for i in eight]], eight, split, boxes)
    return sheet("Where the model looks (Grad-CAM)", rows, 8, LOOK), heat_inside(model, whole, list(boxes.values()))


def look_rows(heading: str, model: FashionModel, images: Tensor, chosen: list[int], split: Split, boxes: dict = {}) -> list[tuple[str, list]]:  # noqa: B006
    """A row of images (N, 3, S, S), and one a label with its heat over them and the box where it is known."""
    from matplotlib import colormaps

    heats, logits = heat_maps(model, images)
    plain = [np.asarray(Image.fromarray(image).resize((LOOK, LOOK), Image.Resampling.BICUBIC)) for image in images.permute(0, 2, 3, 1).numpy()]
    boxes = [{"bbox": [at * LOOK / images.shape[-1] for at in boxes[i]]} if boxes.get(i) else {} for i in chosen]
    names = [fit(drawable(split.samples[i].name, i + 1), LOOK, keep_end=True) for i in chosen]
    rows = [(heading, [(image, {}, [(name, FAINT)]) for image, name in zip(plain, names)])]
    for label, heat in heats.items():
        heat = F.interpolate(heat[:, None], (LOOK, LOOK), mode="bilinear")[:, 0].numpy()
        cells = []
        for image, one, values, i, box in zip(plain, heat, logits[label].softmax(-1), chosen, boxes):
            truth, said = split.samples[i].labels[label], int(values.argmax())
            strength = (0.75 * one**0.7)[..., None]
            over = image.mean(-1, keepdims=True) * (1 - strength) + colormaps["turbo"](one)[..., :3] * 255 * strength
            lines = [(f"{class_name(label, said)} {values[said]:.2f}", RIGHT if said == truth else WRONG)]
            cells.append((over.round().astype(np.uint8), box, lines + ([(f"is {class_name(label, truth)}", INK)] if said != truth else [])))
        rows.append((label, cells))
    return rows


def scaled_box(sample, photo: Image.Image, size: int) -> Box | None:
    """The garment's box (the given one, else the mask's) in a whole photo that is squashed to size."""
    box = next((sample.boxes[kind] for kind in BOX_COLUMNS if kind in sample.boxes), None)
    return box and tuple(round(at * size / side) for at, side in zip(box, photo.size * 2))


def heat_inside(model: FashionModel, images: Tensor, boxes: list[Box | None]) -> tuple[float, float] | None:
    """The mean share of the heat inside each image's box, and of the image that the box is; None where no box is known."""
    heats, _ = heat_maps(model, images)
    pairs = []
    for heat in heats.values():
        for one, box in zip(heat, boxes):
            if box and one.sum() > 0:
                x0, y0, x1, y1 = box
                pairs.append(((one[y0:y1, x0:x1].sum() / one.sum()).item(), (y1 - y0) * (x1 - x0) / one.numel()))
    return tuple(np.mean(pairs, axis=0).tolist()) if pairs else None


if __name__ == "__main__":
    run_app(app)
