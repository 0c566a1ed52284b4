"""The size of best.pt in each precision beside the 25 MB of an entry, and with --time what an image takes on this CPU.

    python benchmarks/sizes.py --time
    python benchmarks/sizes.py test_resnet tiny_vit_5m_224        # other backbones of timm

The weights are random: neither bytes nor times depend on them. Every model has a box head, and sees images of the size
that its backbone takes by default. The time is the CPU time of the function that an entry calls, decoding included, in
float32, of all threads together, so that it is the same on a busy machine: on N idle cores an image takes an Nth of
it. The median of the rounds, with the least and the most. One look is the view `full`, two are `learned`.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import bench  # finds the scripts
import torch
import typer

from checkpoint import Checkpoint, megabytes, new_checkpoint
from cli import run_app, say
from data import Split, read_split
from entry import MAX_MB
from experiments import print_markdown
from model import FashionModel, build_model
from predict import predict_rows
from settings import Settings

MODELS = (
    "tf_efficientnet_lite0",
    "tf_efficientnet_lite2",
    "tiny_vit_5m_224.dist_in22k",
    "eva02_tiny_patch14_224.mim_in22k",
    "tiny_vit_11m_224.dist_in22k",
    "convnext_nano.in12k",
    "tiny_vit_21m_224.dist_in22k",
    "eva02_small_patch14_224.mim_in22k",
    "eva02_small_patch14_336.mim_in22k_ft_in1k",
)
PRECISIONS = ("fp32", "fp16", "int8")
U2NETP_MB = 4.57  # the smallest remover of backgrounds

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def table(
    models: Annotated[list[str] | None, typer.Argument(help="Backbones of timm.", show_default="nine")] = None,
    timed: Annotated[bool, typer.Option("--time", help="Measure the time an image, too.")] = False,
    photos: Annotated[int, typer.Option(help="Photos to predict in a round.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="After one that warms up.", min=1)] = 3,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print a table in Markdown."""
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    columns = ["model", "px", "parameters", *(f"{name}, MB" for name in PRECISIONS), "fits", "fits beside u2netp"]
    with tempfile.TemporaryDirectory() as folder:
        rows = read_split(bench.make_dataset(Path(folder, "photos"), photos), "train", bench.CLASSES)
        if timed:
            columns += ["one look, CPU ms", "two looks, CPU ms"]
        lines = []
        for name in models or MODELS:
            model = build_model(name, bench.CLASSES, box_head=True).eval()
            saved = {dtype: new_best(name, model, rows, dtype) for dtype in PRECISIONS}
            lines.append([name, *sizes(model, saved)])
            if timed:
                lines[-1] += [milliseconds(model, saved["fp32"], rows, view, rounds) for view in ("full", "learned")]
    print_markdown(f"best.pt with a box head, beside {MAX_MB} MB", columns, lines)
    if timed:
        say(f"{threads} threads, {torch.backends.cpu.get_cpu_capability()}, {photos} photos a round, {rounds} rounds")


def new_best(name: str, model: FashionModel, rows: Split, export_dtype: str) -> Checkpoint:
    settings = Settings(data=("Dataset",), model=name, box_head=True, export_dtype=export_dtype, amp="off")
    return new_checkpoint(settings, model, rows, "learned", preparation=None)


def sizes(model: FashionModel, saved: dict[str, Checkpoint]) -> list[str]:
    """Image size, parameters, the MB of each precision, and the first of these that fits, alone and beside u2netp."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mb = {dtype: megabytes(best) for dtype, best in saved.items()}
    fits = [next((dtype for dtype in mb if mb[dtype] <= room), "none") for room in (MAX_MB, MAX_MB - U2NETP_MB)]
    return [str(model.image_size), f"{parameters / 1e6:.1f} M", *(f"{value:.2f}" for value in mb.values()), *fits]


def milliseconds(model: FashionModel, saved: Checkpoint, rows: Split, view: str, rounds: int) -> str:
    """The CPU time of an image as an entry predicts it."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        predict_rows(model, saved, rows, view, workers=0)
        times.append(1000 * (time.process_time() - start) / len(rows.samples))
    return bench.spread(times[1:], 0)


if __name__ == "__main__":
    run_app(app)
