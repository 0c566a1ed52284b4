"""What it is worth to find the garment where no box is given: ways to train and to predict, at the cost of one pass and
of two.

    python demo.py Hard --hard --train 2000 --val 400 --test 400
    python preprocess.py Hard Hard-rembg --keep-background --rembg-model u2netp
    python benchmarks/gap.py Hard Gap --masks Hard-rembg --image-size 80 -- --model tf_efficientnet_lite0 \\
        --weights $PWD/lite0.safetensors --epochs 6 --t-0 6 --lr 1e-3 --batch-size 64 --amp off
    python benchmarks/gap.py Hard Gap --run learned --seed 0 ...    # one run; the table shows whatever is finished
    python benchmarks/gap.py Hard Gap --order runs/BOTH/best.pt Hard-rembg     # box in the raw photo? no training
    python benchmarks/gap.py Hard Gap --photographs Gap/runs/learned-0/best.pt boxes.png    # boxes found; no training

Starts train.py and predict.py as a user would, in the folder GAP, which keeps runs, predictions and what they printed.
What is finished there is not done again; a run that was interrupted goes on. All runs share the flags after `--`:
another set of flags needs another folder. The test photos have no boxes, so the IoU is that of the validation photos,
but where --test-boxes names a CSV that holds them.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import typer
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from checkpoint import load_model
from cli import run_app, say, show_table, usage_error
from data import BOX, Split, find_dataset, image_samples, read_split, submission_column
from evaluate import grow_boxes, run_batches, score
from loading import EvalPhotos, make_eval_loader, relative_boxes
from model import box_from_logits
from photos import box_iou
from predict import predict_rows

RUNS = {  # what train.py is told beside the flags of all runs
    "boxed": ("--crop-prob", "1", "--val-view", "bbox"),
    "whole": ("--crop-prob", "0", "--val-view", "full"),
    "mask": ("--train-view", "mask", "--crop-prob", "1", "--val-view", "mask"),
    "learned": ("--box-head", "--crop-prob", "0.7", "--val-view", "learned"),
    "larger": ("--crop-prob", "0", "--val-view", "full"),
}
ROWS = (  # what is done; the run; what a prediction costs, in passes; predict.py's view where there are no boxes
    ("boxed training, whole photo at test (the notes' way)", "boxed", "1", "full"),
    ("whole photos in training and test", "whole", "1", "full"),
    ("box head, 0.3 of the training whole; whole photo at test", "learned", "1", "full"),
    ("boxed training, mask box at test", "boxed", "1 + remover", "mask"),
    ("mask box in training and test", "mask", "1 + remover", "mask"),
    ("whole photos in training and test, side x 1.4", "larger", "2", "full"),
    ("learned view: both passes' logits", "learned", "2", "learned"),
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="Dataset folder whose test labels are known.")],
    gap: Annotated[Path, typer.Argument(help="Folder for the runs.")],
    train_flags: Annotated[list[str] | None, typer.Argument(help="Flags of train.py for all runs, after `--`.")] = None,
    masks: Annotated[Path | None, typer.Option(help="The same dataset with mask boxes, for the rows of masks.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 112,
    run: Annotated[
        list[str], typer.Option(help=f"Which runs to do: {', '.join(RUNS)}, none. Repeats.", show_default="all")
    ] = tuple(RUNS),
    seed: Annotated[list[int], typer.Option(help="Repeats.")] = (0, 1, 2),
    workers: Annotated[int, typer.Option(help="Processes that decode photos.")] = 1,
    test_boxes: Annotated[
        Path | None, typer.Option(help="The test photos' boxes: a CSV of image_name, xmin, ymin, xmax, ymax.")
    ] = None,
    order: Annotated[tuple[Path, Path] | None, typer.Option(help="A best.pt with a box head, DATA cleaned.")] = None,
    photographs: Annotated[tuple[Path, Path] | None, typer.Option(help="Such a best.pt, the picture to draw.")] = None,
) -> None:
    """Train and predict what is not done yet; print the table of all that is."""
    if photographs:
        draw_photographs(*photographs)
        return
    if order:
        compare_orders(order[0], {"raw": find_dataset(data, 1), "cleaned": find_dataset(order[1], 1)})
        return
    for name in run:
        if name not in (*RUNS, "none"):
            raise usage_error("--run", f"{name} is none of {', '.join(RUNS)}")
    data, masks, gap = find_dataset(data.resolve(), 1), masks and find_dataset(masks.resolve(), 1), gap.resolve()
    gap.mkdir(exist_ok=True)
    for one_seed in seed:
        for name in RUNS:
            if name in run and (masks or name != "mask"):
                side = round(2**0.5 * image_size / 16) * 16 if name == "larger" else image_size
                flags = ("--image-size", side, "--seed", one_seed, *RUNS[name], *(train_flags or ()))
                train_and_predict(gap, name, one_seed, flags, data, masks, ("--workers", workers))
    truth = {split: read_split(data, split) for split in ("val", "test")}
    columns = [f"{len(seed)} seeds, mean (standard deviation)", "passes", "val boxed", "val unboxed", "test unboxed"]
    show_table(f"mean Top-1, {image_size} px", columns, table(gap, seed, truth))
    for one_seed in seed:
        log = predictions(gap, "learned", one_seed, "val", "learned").with_suffix(".log")
        for line in re.findall("predicted boxes: .*", log.read_text() if log.exists() else ""):
            say(f"seed {one_seed}, validation: {line}")
        written = predictions(gap, "learned", one_seed, "test", "learned")
        if test_boxes and written.exists():
            iou = iou_with(test_boxes, written)
            share = (iou > 0.8).float().mean()
            say(f"seed {one_seed}, test: mean IoU {iou.mean():.3f}, {share:.1%} above 0.8")


def train_and_predict(
    gap: Path, name: str, seed: int, flags: tuple, data: Path, masks: Path | None, more: tuple
) -> None:
    """Everything that the rows show of a run, unless it is there; `more`: flags of training and prediction.

    Raises ValueError where a script fails.
    """
    jobs = {("val", "bbox")}  # (split, view) to predict
    for _, of, _, view in ROWS:
        if of == name and (masks or view != "mask"):
            jobs |= {("val", view), ("test", view)}
    missing = sorted(job for job in jobs if not predictions(gap, name, seed, *job).exists())
    folder = gap / "runs" / f"{name}-{seed}"
    if missing:
        new = ("--name", folder.name, "--data", masks if name == "mask" else data, *flags, *more)
        start(gap, gap / f"{folder.name}.log", "train", *(("--resume", folder) if folder.exists() else new))
    for split, view in missing:
        out, dataset = predictions(gap, name, seed, split, view), masks if "mask" in (name, view) else data
        rows = ("--data", dataset, "--split", split, "--view", view, "--out", out)
        rows += ("--boxes",) if view == "learned" else ()
        start(gap, out.with_suffix(".log"), "predict", folder / "best.pt", *rows, *more)


def start(cwd: Path, log: Path, script: str, *args: object) -> None:
    command = [sys.executable, ROOT / f"{script}.py", *map(str, args)]
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f"{script}.py failed, see {log}: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}")


def predictions(gap: Path, name: str, seed: int, split: str, view: str) -> Path:
    return gap / "runs" / f"{name}-{seed}" / f"{split}-{view}.csv"


def table(gap: Path, seeds: list[int], truth: dict[str, Split]) -> list[list[str]]:
    def cell(name: str, split: str, view: str) -> str:
        files = [predictions(gap, name, seed, split, view) for seed in seeds]
        found = [top1(file, truth[split]) for file in files if file.exists()]
        if not found:
            return ""
        spread = f" ({stdev(found):.4f})" if len(found) > 1 else ""
        return f"{mean(found):.4f}{spread}" + ("" if len(found) == len(seeds) else f" of {len(found)}")

    rows = []
    for row, name, passes, view in ROWS:
        rows.append([row, passes, cell(name, "val", "bbox"), cell(name, "val", view), cell(name, "test", view)])
    return rows


def top1(file: Path, truth: Split) -> float:
    """The share of photos and labels that predict.py got right, which is the mean Top-1. It keeps the photos' order."""
    with file.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    right = []
    for row, sample in zip(rows, truth.samples, strict=True):
        for label, names in truth.classes.items():
            right.append(row[submission_column(label)] == names[sample.labels[label]])
    return mean(right)


def iou_with(given: Path, predicted: Path) -> Tensor:
    """The IoU of each photo's given and predicted box."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = []
    for file, columns in ((given, sides), (predicted, [f"Learned_{side}" for side in sides])):
        with file.open(newline="", encoding="utf-8-sig") as f:
            rows = sorted(csv.DictReader(f), key=lambda row: row["image_name"])
        boxes.append(torch.tensor([[float(row[column]) for column in columns] for row in rows]))
    return box_iou(*boxes)


def compare_orders(checkpoint: Path, roots: dict[str, Path]) -> None:
    """Mean Top-1 on validation by the second look alone: the box is found in the raw or in the cleaned photo, and what
    it holds of one or the other is classified."""
    model, saved = load_model(checkpoint)
    splits = {kind: read_split(root, "val", saved.classes) for kind, root in roots.items()}

    def look(kind: str, crops: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loader = make_eval_loader(EvalPhotos(splits[kind].samples, saved.image_size, "full"), 64, 0)
        loader.batch_sampler.crops = crops
        return run_batches(model, loader, crops is not None, None)[:2]

    truth, rows = relative_boxes(splits["raw"].samples, "bbox"), []
    for found_in in roots:
        boxes = box_from_logits(look(found_in)[0][BOX])
        iou = box_iou(boxes, truth).mean().item()
        for classified in roots:
            scores = score(*look(classified, grow_boxes(boxes)))
            rows.append([found_in, f"{iou:.3f}", classified, f"{scores['top1_mean']:.4f}"])
    title = f"{len(truth)} validation photos, second look alone"
    show_table(title, ["box found in", "IoU", "classified", "mean Top-1"], rows)


def draw_photographs(checkpoint: Path, out: Path) -> None:
    """The photographs of tests/test_photographs.py side by side, with the boxes drawn by hand (green) and predicted
    (red); says how well these fit."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_photographs import BOXES, photographs

    model, saved = load_model(checkpoint)
    sheet = Image.new("RGB", (400 * len(BOXES), 400), "white")
    with TemporaryDirectory() as folder:
        for i, (name, photo) in enumerate(photographs().items()):
            photo.save(Path(folder) / f"{name}.png")
            rows, _ = image_samples([str(Path(folder) / f"{name}.png")])
            prediction = predict_rows(model, saved, rows, "learned", workers=0)
            boxes = prediction.boxes * torch.tensor(photo.size * 2)
            pen = ImageDraw.Draw(photo)
            pen.rectangle(BOXES[name], outline="lime", width=4)
            pen.rectangle(boxes[0].tolist(), outline="red", width=4)
            say(f"{name}: IoU {box_iou(boxes, torch.tensor([BOXES[name]]))[0]:.2f}")
            sheet.paste(ImageOps.contain(photo, (396, 396)), (400 * i, 0))
    sheet.save(out)


if __name__ == "__main__":
    run_app(app)
