"""What it is worth to find the garment where no box is given: ways to train and to predict, at the cost of one pass and of two.

    python demo.py Hard --hard --train 2000 --val 400 --test 400
    python preprocess.py Hard Hard-rembg --keep-background --rembg-model u2netp
    python benchmarks/gap.py Hard Gap --masks Hard-rembg --image-size 80 -- --model tf_efficientnet_lite0 --weights $PWD/lite0.safetensors \\
        --epochs 6 --t-0 6 --lr 1e-3 --batch-size 64 --amp off
    python benchmarks/gap.py Hard Gap --run learned --seed 0 ...     # one run of one seed; the table shows whatever is finished
    python benchmarks/gap.py Hard Gap --order runs/BOTH/best.pt Hard-rembg     # no training: is the box found in the raw or the cleaned photo?
    python benchmarks/gap.py Hard Gap --photographs Gap/runs/learned-0/best.pt boxes.png      # no training: boxes found on photographs

Starts train.py and predict.py as a user would, in the folder GAP, which keeps runs, predictions and what they printed. What is finished there is
not done again; a run that was interrupted goes on. All runs share the flags after `--`: another set of flags wants another folder.
The demo's test photos have no boxes, so the quality of the boxes found is that of the validation photos.
"""

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

from cli import run_app, say, show_table, usage_error
from data import BOX, Split, find_dataset, image_samples, read_split, relative_boxes, submission_column
from loading import Photos, batches, make_loader
from model import box_of, choose_margin, crops_of, load_model, overlaps, predict_logits, score
from predict import predict_rows

RUNS = {  # what train.py is told beside the flags of all runs
    "boxed": ("--crop-prob", "1", "--val-view", "bbox"),
    "whole": ("--crop-prob", "0", "--val-view", "full"),
    "mask": ("--train-view", "mask", "--crop-prob", "1", "--val-view", "mask"),
    "learned": ("--box-head", "--crop-prob", "0.7", "--val-view", "learned"),
    "larger": ("--crop-prob", "0", "--val-view", "full"),
}
ROWS = (  # what is done; the run; what a prediction costs, in passes; what predict.py is told where there are no boxes
    ("boxed training, whole photo at test (the notes' way)", "boxed", "1", ("--view", "full")),
    ("whole photos in training and test", "whole", "1", ("--view", "full")),
    ("box head, 0.3 of the training whole; whole photo at test", "learned", "1", ("--view", "full")),
    ("boxed training, mask box at test", "boxed", "1 + remover", ("--view", "mask")),
    ("mask box in training and test", "mask", "1 + remover", ("--view", "mask")),
    ("whole photos in training and test, side x 1.4", "larger", "2", ("--view", "full")),
    ("learned view", "learned", "2", ("--view", "learned", "--no-view-sum")),
    ("learned view + pass 1's logits", "learned", "2", ("--view", "learned")),
)
BOXED = ("--view", "bbox")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="Dataset folder whose test labels are known.")],
    gap: Annotated[Path, typer.Argument(help="Folder for the runs.")],
    train_flags: Annotated[list[str] | None, typer.Argument(help="Flags of train.py for all runs, after `--`.")] = None,
    masks: Annotated[
        Path | None, typer.Option(help="The same dataset with mask boxes; without it the rows of masks stay empty.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 112,
    run: Annotated[
        list[str], typer.Option(help=f"Which runs to do: {', '.join(RUNS)}, none. Repeats.", show_default="all")
    ] = list(RUNS),  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Repeats.")] = [0, 1, 2],  # noqa: B006
    workers: Annotated[int, typer.Option(help="Processes that decode photos.")] = 1,
    order: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="A checkpoint with a box head, and DATA cleaned: compare orders.", show_default=False),
    ] = None,
    photographs: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="A checkpoint with a box head, and the picture to draw.", show_default=False),
    ] = None,
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
    data, masks = find_dataset(data.resolve(), 1), masks and find_dataset(masks.resolve(), 1)
    gap.mkdir(exist_ok=True)
    for one_seed in seed:
        for name in RUNS:
            if name in run and (masks or name != "mask"):
                side = round(2**0.5 * image_size / 16) * 16 if name == "larger" else image_size
                flags = (
                    "--image-size",
                    side,
                    "--seed",
                    one_seed,
                    "--workers",
                    workers,
                    *RUNS[name],
                    *(train_flags or ()),
                )
                train_and_predict(gap.resolve(), name, one_seed, flags, data, masks, workers)
    truth = {split: read_split(data, split) for split in ("val", "test")}
    columns = [f"{len(seed)} seeds, mean (standard deviation)", "passes", "val boxed", "val unboxed", "test unboxed"]
    show_table(f"mean Top-1, {image_size} px", columns, table(gap, seed, truth))
    for one_seed in seed:
        log = predictions(gap, "learned", one_seed, "val", ("--view", "learned")).with_suffix(".log")
        for found in re.findall("boxes found: .*", log.read_text() if log.exists() else ""):
            say(f"seed {one_seed}, validation: {found}")


def train_and_predict(
    gap: Path, name: str, seed: int, flags: tuple, data: Path, masks: Path | None, workers: int
) -> None:
    """Everything that the rows show of a run, unless it is there. Raises ValueError where a script fails."""
    wanted = {
        (split, view)
        for _, of, _, view in ROWS
        if of == name and (masks or "mask" not in view)
        for split in ("val", "test")
    } | {("val", BOXED)}
    missing = sorted(job for job in wanted if not predictions(gap, name, seed, *job).exists())
    folder = gap / "runs" / f"{name}-{seed}"
    if missing:
        fresh = ("--name", folder.name, "--data", masks if name == "mask" else data, *flags)
        start(gap, gap / f"{folder.name}.log", "train", *(("--resume", folder) if folder.exists() else fresh))
    for split, view in missing:
        csv = predictions(gap, name, seed, split, view)
        of = masks if name == "mask" or "mask" in view else data
        start(
            gap,
            csv.with_suffix(".log"),
            "predict",
            folder / "best.pt",
            "--data",
            of,
            "--split",
            split,
            *view,
            "--out",
            csv,
            "--workers",
            workers,
        )


def start(cwd: Path, log: Path, script: str, *args: object) -> None:
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, ROOT / f"{script}.py", *map(str, args)], cwd=cwd, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise ValueError(f"{script}.py failed, see {log}: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}")


def predictions(gap: Path, name: str, seed: int, split: str, view: tuple[str, ...]) -> Path:
    return gap / "runs" / f"{name}-{seed}" / f"{'-'.join([split, *(word.lstrip('-') for word in view[1:])])}.csv"


def table(gap: Path, seeds: list[int], truth: dict[str, Split]) -> list[list[str]]:
    def cell(name: str, split: str, view: tuple[str, ...]) -> str:
        files = [file for seed in seeds if (file := predictions(gap, name, seed, split, view)).exists()]
        found = [top1(file, truth[split]) for file in files]
        spread = f" ({stdev(found):.4f})" if len(found) > 1 else ""
        return f"{mean(found):.4f}{spread}{'' if len(found) == len(seeds) else f' of {len(found)}'}" if found else ""

    return [
        [row, passes, cell(name, "val", BOXED), cell(name, "val", view), cell(name, "test", view)]
        for row, name, passes, view in ROWS
    ]


def top1(predicted: Path, truth: Split) -> float:
    """The share of photos and labels that predict.py got right, which is the labels' mean Top-1. It keeps the photos' order."""
    header, *rows = (line.split(",") for line in predicted.read_text(encoding="utf-8").splitlines())
    columns = {
        label: header.index(submission_column(label)) - len(header) for label in truth.classes
    }  # from the right: a name may hold a comma
    return mean(
        int(row[column]) == sample.labels[label]
        for row, sample in zip(rows, truth.samples, strict=True)
        for label, column in columns.items()
    )


def compare_orders(checkpoint: Path, roots: dict[str, Path]) -> None:
    """Mean Top-1 on validation where the box is found in the raw or in the cleaned photo, and what it holds of one or the other is classified."""
    model, saved = load_model(checkpoint)
    splits = {kind: read_split(root, "val", saved["classes"]) for kind, root in roots.items()}

    def look(kind: str, **seen) -> tuple[dict, dict]:
        photos = Photos(splits[kind].samples, saved["image_size"], **seen)
        return predict_logits(
            model, batches(make_loader(photos, 64, 0)), torch.device("cpu"), find_box="crops" not in seen
        )

    truth, rows = relative_boxes(splits["raw"].samples, "bbox"), []
    for found_in in roots:
        first, targets = look(found_in)
        iou = overlaps(box_of(first[BOX])[0], truth).mean().item()
        crops = crops_of(first[BOX], choose_margin(first[BOX], truth))
        for classified in roots:
            second, _ = look(classified, crops=crops)
            rows.append([found_in, f"{iou:.3f}", classified, f"{score(second, targets)['top1_mean']:.4f}"])
    show_table(
        f"{len(truth)} validation photos, second look alone", ["box found in", "IoU", "classified", "mean Top-1"], rows
    )


def draw_photographs(checkpoint: Path, out: Path) -> None:
    """The photographs of tests/test_photographs.py side by side, with the boxes drawn by hand (green) and found (red); says how well these fit."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_photographs import BOXES, photographs

    model, saved = load_model(checkpoint)
    sheet = Image.new("RGB", (400 * len(BOXES), 400), "white")
    with TemporaryDirectory() as folder:
        for i, (name, photo) in enumerate(photographs().items()):
            photo.save(Path(folder) / f"{name}.png")
            rows = image_samples([str(Path(folder) / f"{name}.png")])
            found = predict_rows(model, saved, rows, "learned", workers=0)[0][BOX] * torch.tensor(photo.size * 2)
            pen = ImageDraw.Draw(photo)
            pen.rectangle(BOXES[name], outline="lime", width=4)
            pen.rectangle(found[0].tolist(), outline="red", width=4)
            say(f"{name}: IoU {overlaps(found, torch.tensor([BOXES[name]]))[0]:.2f}")
            sheet.paste(ImageOps.contain(photo, (396, 396)), (400 * i, 0))
    sheet.save(out)


if __name__ == "__main__":
    run_app(app)
