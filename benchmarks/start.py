"""Start-up and memory of train.py on 12,858 photos with a warm cache.

    python benchmarks/start.py               # 12 minutes, of which 10 decode the cache of 2 GB, once; --folder keeps it

Start: from the command to the first batch at the model, against `import torch, torchvision, timm` alone, in turns. Memory: anonymous memory
(mapped pages of the cache are not counted) of train.py and its processes after 3 steps, over that of the model's own: the same model and steps
on a constant batch and nothing else. Exit code 1 where the start takes over 4 s more, or memory 1.0 GB.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

import bench
from cli import run_app, show_table

HERE = Path(__file__).parent
# train.py, until it is at work: prints the time and the memory, and ends
RUN = f"""
import itertools, os, sys, time
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import bench
mode, *sys.argv = sys.argv[1:]
import cli, train
real = train.train_one_epoch

def watched(parts, batches, criteria, state, order, flags, amp_dtype, after_step):
    batches, steps = iter(batches), itertools.count(1)
    first = next(batches)
    if mode == "start":
        print(time.time(), flush=True)
        os._exit(0)
    def stop(images):
        if next(steps) == 3:
            print(bench.anonymous_mb(), flush=True)
            os._exit(0)
    real(parts, itertools.chain([first], batches), criteria, state, order, flags, amp_dtype, stop)

train.train_one_epoch = watched
cli.run_app(train.app)
"""
ALONE = f"""
import itertools, os, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import bench
import torch, losses, data
from functools import partial
from types import SimpleNamespace
from model import build_model, choose_amp, parameter_groups
from train import START, train_one_epoch
name, batch = sys.argv[1], int(sys.argv[2])
classes = {{"Daily": 6, "Gender": 5, "Embellishment": 3}}
net, size = build_model(name, classes)
images = torch.zeros(batch, 3, size, size, dtype=torch.uint8), {{label: torch.zeros(batch, dtype=torch.int64) for label in classes}}
optimizer = torch.optim.AdamW(parameter_groups(net), lr=1e-6, fused=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1)
parts = {{"model": net, "forward": net, "optimizer": optimizer, "schedule": schedule, "scaler": torch.amp.GradScaler("cpu", enabled=False), "teach": None}}
criteria = {{label: (partial(losses.cross_entropy, class_weights=None), None) for label in classes}}
amp = choose_amp("auto", torch.device("cpu"))
flags = SimpleNamespace(seed=0, cutmix=None, grad_accum=1, batch_size=batch, clip_grad=0, warmup_epochs=0)
train_one_epoch(parts, itertools.repeat(images, 3), criteria, dict(START), loading.EpochBatches(batch, batch, 0), flags, amp, lambda n: None)
print(bench.anonymous_mb())
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def python(*arguments: object, cwd: str) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stdout + done.stderr)
    return done.stdout.split()[-1] if done.stdout.split() else ""


@app.command()
def measure(
    model: str = "eva02_tiny_patch14_224.mim_in22k",
    images: Annotated[int, typer.Option(help="Training photos; validation has 1,800 more.", min=64)] = 11_058,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the photos and their cache are made and stay.", show_default="a temporary one"),
    ] = None,
) -> None:
    """Measure start-up and memory."""
    with contextlib.ExitStack() as stack:
        place = (folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        if not (place / "Photos").exists():
            bench.make_dataset(place / "Photos", images, 1800)
        cwd = stack.enter_context(tempfile.TemporaryDirectory())
        flags = ["--data", place / "Photos", "--model", model, "--no-pretrained", "--batch-size", batch_size]
        python("-c", RUN, "start", "train.py", *flags, "--name", "cold", cwd=cwd)  # builds the cache
        imports, starts, more = [], [], []
        for i in range(rounds):
            begun = time.time()
            python("-c", "import torch, torchvision, timm", cwd=cwd)
            imports.append(time.time() - begun)
            begun = time.time()
            starts.append(float(python("-c", RUN, "start", "train.py", *flags, "--name", f"start{i}", cwd=cwd)) - begun)
            more.append(starts[-1] - imports[-1])
        memory = [
            float(python("-c", RUN, "memory", "train.py", *flags, "--name", f"memory{i}", cwd=cwd)) for i in range(2)
        ]
        alone = [float(python("-c", ALONE, model, batch_size, cwd=cwd)) for _ in range(2)]
    over = [a - b for a, b in zip(memory, alone)]
    rows = [
        ["import torch, torchvision, timm, s", bench.spread(imports, 2), ""],
        ["command to first batch, s", bench.spread(starts, 2), ""],
        ["more, s", bench.spread(more, 2), "4"],
        ["train.py and its processes, MB", bench.spread(memory, 0), ""],
        ["the model's own, MB", bench.spread(alone, 0), ""],
        ["more, MB", bench.spread(over, 0), "1000"],
    ]
    show_table(
        f"{images + 1800:,} photos, {model}, batch {batch_size}; load {os.getloadavg()[0]:.1f}",
        ["", "median (least to most)", "at most"],
        rows,
    )
    if statistics.median(more) > 4 or statistics.median(over) > 1000:
        raise ValueError("missed")


if __name__ == "__main__":
    run_app(app)
