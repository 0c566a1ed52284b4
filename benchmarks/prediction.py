"""predict.py on this machine's CPU beside a plain loop and beside what the machine admits, from JPEG files of 600 x 800 pixels.

    pip install -r requirements-dev.txt && python benchmarks/prediction.py            # 256 photos, EVA-02 tiny without weights; about 6 minutes
    python benchmarks/prediction.py --check runs/NAME/best.pt --data demo             # a trained model: bf16's answers beside float32's

The plain loop: float32, batches of 64, the photos decoded in the same process. The limit: 1 / (the forward time of the fastest of torch float32,
torch bf16 where the chip has it, torch.compile and ONNX Runtime, at 16 or 64 constant images + the time to decode / cores). Rounds take turns; the
best counts. Looking twice is the view `learned`, of a model with a box head, beside one without that looks once; the median of the rounds' ratios counts.
"""

import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import onnxruntime
import torch
import typer
from PIL import Image
from torch import Tensor

import data
from cli import note, run_app, say, show_table
from data import SPLITS, Sample, Split, read_split
from model import FIXED_LOOK, PIECE, FashionModel, build_model, choose_amp, load_model, score
from photos import load_photo, to_pixels
from predict import predict_rows

CLASSES = {"Daily": 6, "Gender": 5, "Embellishment": 3}
BATCH = 64
TWICE = "predict.py, looking twice"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def write_photos(folder: Path, n: int) -> Split:
    """Photos of the demo set at 600 x 800 pixels, a JPEG each, as an unlabelled split."""
    sources, samples = read_split(data.find_dataset("demo"), "train").samples, []
    for i in range(n):
        path = folder / f"{i}.jpg"
        load_photo(sources[i % len(sources)].path).resize((600, 800), Image.Resampling.BICUBIC).save(path, quality=90)
        samples.append(Sample(path.name, str(path), path.name, {}, {}))
    return Split(folder, samples, {}, (), "")


@torch.inference_mode()
def plain_loop(model: FashionModel, rows: Split, size: int) -> Tensor:
    """What one writes first: a batch is decoded, then computed."""
    paths = [sample.path for sample in rows.samples]
    batches = (
        torch.stack([to_pixels(load_photo(path), None, size) for path in paths[i : i + BATCH]])
        for i in range(0, len(paths), BATCH)
    )
    return torch.cat([model(batch)["Daily"] for batch in batches])


def forwards(model: FashionModel, images: Tensor) -> dict[str, Callable[[], object]]:
    """The forward pass of these images by each engine that works here."""

    def in_bf16() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    compiled = torch.compile(model)
    engines = {"torch float32": lambda: model(images), "torch.compile": lambda: compiled(images)}
    if choose_amp("auto", torch.device("cpu")):  # other chips imitate bf16, several times slower than float32
        engines["torch bf16"] = in_bf16
    try:
        file = io.BytesIO()
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: images.numpy()}
        engines["ONNX Runtime"] = lambda: session.run(None, given)
    except Exception as error:  # the exporters of some releases of torch refuse some backbones
        note(f"no ONNX Runtime: {str(error).splitlines()[0]}")
    return engines


def best_of(runs: dict[str, Callable[[], object]], rounds: int, n: int) -> dict[str, list[float]]:
    """Images/s of each run in each round; a first round that is not counted warms up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if done:
                rates[name].append(n / (time.perf_counter() - start))
    return rates


def check_precision(checkpoint: Path, dataset: str) -> None:
    """How many of bf16's answers are not float32's, and how far Top-1 moves, over all photos of a dataset."""
    model, saved = load_model(checkpoint)
    samples = [
        sample for split in SPLITS for sample in read_split(data.find_dataset(dataset), split, saved["classes"]).samples
    ]
    rows = Split(Path(dataset), samples, saved["classes"], tuple(saved["classes"]), "")
    view = "bbox" if rows.has("bbox") and saved["data"]["view"] == "bbox" else "full"
    (exact, targets), (half, _) = (predict_rows(model, saved, rows, view, amp=amp) for amp in ("off", "bf16"))
    differ = statistics.mean(
        (exact[label].argmax(-1) != half[label].argmax(-1)).float().mean().item() for label in targets
    )
    moved = abs(score(half, targets)["top1_mean"] - score(exact, targets)["top1_mean"])
    say(
        f"{len(samples):,} photos ({view}), {len(targets)} labels: bf16 answers {differ:.2%} differently from float32; Top-1 moves by {100 * moved:.3f} points"
    )
    if differ > 0.01 or moved > 0.002:
        raise ValueError("at most 1 % may differ, and Top-1 may move by at most 0.2 points")


@app.command()
def compare(
    images: Annotated[int, typer.Option(help="Photos to predict.", min=1)] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    backbone: Annotated[str, typer.Option("--model")] = "eva02_tiny_patch14_224.mim_in22k",
    check: Annotated[
        Path | None,
        typer.Option(help="Instead: compare bf16's answers with float32's, of this best.pt.", show_default="none"),
    ] = None,
    dataset: Annotated[str, typer.Option("--data", help="Dataset for --check, all its splits.")] = "demo",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time predict.py's function, a plain loop and the machine's limit."""
    if check:
        return check_precision(check, dataset)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, size = build_model(backbone, CLASSES)
    model.eval()
    twice, _ = build_model(backbone, CLASSES, box_head=True)
    saved = {"image_size": size, "batch_size": BATCH, "amp": "auto", "learned": FIXED_LOOK}
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        rows = write_photos(Path(folder), images)
        decoded = best_of(
            {"decode": lambda: [to_pixels(load_photo(sample.path), None, size) for sample in rows.samples]},
            rounds,
            images,
        )["decode"]
        ways = {
            "plain loop": lambda: plain_loop(model, rows, size),
            "predict.py": lambda: predict_rows(model, saved, rows, "full"),
            TWICE: lambda: predict_rows(twice, saved, rows, "learned"),
        }
        rates = best_of(ways, rounds, images)
        speeds = {}
        for n in (PIECE, BATCH):
            engines = forwards(model, torch.randint(256, (n, 3, size, size), dtype=torch.uint8))
            speeds |= {f"{name}, batch {n}": values for name, values in best_of(engines, rounds, n).items()}
    table = {"decode, one core": decoded, **{f"forward, {name}": values for name, values in speeds.items()}, **rates}
    lines = [[name, f"{max(values):.1f}", f"{min(values):.1f}"] for name, values in table.items()]
    show_table(f"{backbone}, {size} px, {cores} cores, {images} photos", ["images/s", "best", "worst"], lines)
    limit, ours = 1 / (1 / max(map(max, speeds.values())) + 1 / max(decoded) / cores), max(rates["predict.py"])
    say(
        f"looking twice, with the box head, costs {statistics.median(a / b for a, b in zip(rates['predict.py'], rates[TWICE])):.2f} times one look (2.2 asked)"
    )
    say(
        f"predict.py: {ours / max(rates['plain loop']):.2f} of the plain loop (2 asked); {ours / limit:.2f} of the limit, {limit:.1f} images/s (0.95 asked)"
    )


if __name__ == "__main__":
    run_app(app)
