"""predict.py on this machine's CPU beside a plain loop and beside what the machine admits, from JPEGs of 600 x 800.

    python benchmarks/prediction.py       # 256 photos, EVA-02 tiny without weights; 6 minutes; requirements-dev.txt
    python benchmarks/prediction.py --check runs/NAME/best.pt --data demo     # bf16's answers beside float32's

The plain loop: float32, batches of 64, the photos decoded in the same process. The limit: 1 / (the forward time of the
fastest of torch float32, torch bf16 where the chip has it, torch.compile and ONNX Runtime, at 8 or 64 constant images
+ the time to decode / cores). Rounds take turns; the best counts. Looking twice is the view `learned`, of a model with
a box head, beside one without that looks once; the median of the rounds' ratios counts.
"""

import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import bench  # finds the scripts
import onnxruntime
import torch
import typer
from PIL import Image
from torch import Tensor

from checkpoint import load_model, new_checkpoint
from cli import note, run_app, say, show_table
from data import SPLITS, Sample, Split, find_dataset, join_splits, read_split
from evaluate import CHUNK, score
from model import FashionModel, build_model, choose_amp
from photos import load_photo, view_pixels
from predict import predict_rows
from settings import Settings

BATCH = 64
SIZE = (600, 800)  # of the photos
TWICE = "predict.py, looking twice"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def write_photos(folder: Path, n: int) -> Split:
    """Photos of the demo set at SIZE, a JPEG each, as an unlabelled split."""
    sources, samples = read_split(find_dataset("demo"), "train").samples, []
    for i in range(n):
        path = folder / f"{i}.jpg"
        photo = load_photo(sources[i % len(sources)].path)
        photo.resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
        labels = dict.fromkeys(bench.CLASSES, -1)
        samples.append(Sample(path.name, str(path), path.name, folder, {}, labels, SIZE))
    return Split(folder, samples, bench.CLASSES, (), "")


def decode(sample: Sample, size: int) -> Tensor:
    return view_pixels(load_photo(sample.path), None, size)


@torch.inference_mode()
def plain_loop(model: FashionModel, rows: Split) -> Tensor:
    """What one writes first: a batch is decoded, then computed."""
    logits = []
    for start in range(0, len(rows.samples), BATCH):
        images = [decode(sample, model.image_size) for sample in rows.samples[start : start + BATCH]]
        logits.append(model(torch.stack(images))["Daily"])
    return torch.cat(logits)


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
        inputs = {session.get_inputs()[0].name: images.numpy()}
        engines["ONNX Runtime"] = lambda: session.run(None, inputs)
    except Exception as error:  # the exporters of some releases of torch refuse some backbones
        note(f"no ONNX Runtime: {str(error).splitlines()[0]}")
    return engines


def time_in_turns(runs: dict[str, Callable[[], object]], rounds: int, n: int) -> dict[str, list[float]]:
    """Images/s of each run in each round; a first round that is not counted warms up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                rates[name].append(n / (time.perf_counter() - start))
    return rates


def check_precision(checkpoint: Path, dataset: str) -> None:
    """How many of bf16's answers are not float32's, and how far Top-1 moves, over all photos of a dataset."""
    model, saved = load_model(checkpoint)
    root = find_dataset(dataset)
    rows = join_splits([read_split(root, split, saved.classes) for split in SPLITS])
    view = "bbox" if rows.has("bbox") and saved.view == "bbox" else "full"
    exact, half = (predict_rows(model, replace(saved, amp=amp), rows, view) for amp in ("off", "bf16"))
    labels = list(exact.targets)
    changed = [exact.logits[label].argmax(-1) != half.logits[label].argmax(-1) for label in labels]
    differ = torch.stack(changed).float().mean().item()
    top1 = [score(prediction.logits, prediction.targets)["top1_mean"] for prediction in (exact, half)]
    moved = abs(top1[1] - top1[0])
    say(f"{len(rows.samples):,} photos ({view}), {len(labels)} labels")
    say(f"bf16 answers {differ:.2%} differently from float32; Top-1 moves by {100 * moved:.3f} points")
    if differ > 0.01 or moved > 0.002:
        raise ValueError("at most 1 % may differ, and Top-1 may move by at most 0.2 points")


@app.command()
def compare(
    images: Annotated[int, typer.Option(help="Photos to predict.", min=1)] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    backbone: Annotated[str, typer.Option("--model")] = "eva02_tiny_patch14_224.mim_in22k",
    check: Annotated[
        Path | None, typer.Option(help="Instead: compare bf16's answers of this best.pt with float32's.")
    ] = None,
    dataset: Annotated[str, typer.Option("--data", help="Dataset for --check, all its splits.")] = "demo",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time predict.py's function, a plain loop and the machine's limit."""
    if check:
        return check_precision(check, dataset)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = build_model(backbone, bench.CLASSES).eval()
    boxed = build_model(backbone, bench.CLASSES, box_head=True).eval()
    size, cores = model.image_size, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        rows = write_photos(Path(folder), images)
        decoding = {"decode, one core": lambda: [decode(sample, size) for sample in rows.samples]}
        decoded = time_in_turns(decoding, rounds, images)
        settings = Settings(data=("demo",), model=backbone, batch_size=BATCH)
        saved = new_checkpoint(settings, model, rows, "full", preparation=None)
        ways = {
            "predict.py": lambda: predict_rows(model, saved, rows, "full"),
            TWICE: lambda: predict_rows(boxed, saved, rows, "learned"),
        }
        rates = time_in_turns(ways, rounds, images)
        # behind them: what it leaves of memory is copied when their loading processes write, which predict.py is spared
        rates |= time_in_turns({"plain loop": lambda: plain_loop(model, rows)}, rounds, images)
        forward = {}
        for n in (CHUNK, BATCH):
            engines = forwards(model, torch.randint(256, (n, 3, size, size), dtype=torch.uint8))
            for name, values in time_in_turns(engines, rounds, n).items():
                forward[f"forward, {name}, batch {n}"] = values
    table = decoded | forward | rates
    lines = [[name, f"{max(values):.1f}", f"{min(values):.1f}"] for name, values in table.items()]
    show_table(f"{backbone}, {size} px, {cores} cores, {images} photos", ["images/s", "best", "worst"], lines)
    fastest = max(map(max, forward.values()))
    limit = 1 / (1 / fastest + 1 / max(decoded["decode, one core"]) / cores)
    ours, plain = max(rates["predict.py"]), max(rates["plain loop"])
    twice = statistics.median(once / two for once, two in zip(rates["predict.py"], rates[TWICE]))
    say(f"looking twice, with the box head, costs {twice:.2f} times one look (at most 2.2)")
    say(f"predict.py: {ours / plain:.2f} of the plain loop (at least 2)")
    say(f"predict.py: {ours / limit:.2f} of the limit, {limit:.1f} images/s (at least 0.95)")


if __name__ == "__main__":
    run_app(app)
