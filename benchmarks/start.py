"""Start-up and memory of train.py on 12,858 photos with a warm cache.

    python benchmarks/start.py      # 12 minutes, of which 10 decode the cache of 2 GB, once; --folder keeps it

Start: from the command to the first batch at the model, against `import torch, torchvision, timm` alone, in turns.
Memory: anonymous memory (mapped pages of the cache are not counted) of train.py and its processes after 3 steps, over
that of the model's own: the same model and steps on a constant batch and nothing else. Exit code 1 where the start
takes over 4 s more, or memory 1.0 GB.
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

import bench  # finds the scripts
import typer

from cli import run_app, show_table

# train.py until its first batch (start), or until three steps are done (memory): prints the time or the memory, ends.
TRAIN = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench, cli, train
mode, *sys.argv = sys.argv[1:]
train_one_epoch = train.train_one_epoch

class Watched:
    def __init__(self, loader):
        self.loader, self.batch_sampler = loader, loader.batch_sampler

    def __iter__(self):
        for step, batch in enumerate(self.loader):
            if step == (0 if mode == "start" else 3):
                print(time.time() if mode == "start" else bench.anonymous_mb(), flush=True)
                os._exit(0)
            yield batch

def watch(settings, state, loader, run):
    train_one_epoch(settings, state, Watched(loader), run)

train.train_one_epoch = watch
cli.run_app(train.app)
"""
MODEL_ALONE = f"""
import itertools, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench, torch
from model import build_model
from settings import Settings
name, batch_size = sys.argv[1], int(sys.argv[2])
model = build_model(name, bench.CLASSES)
images = torch.zeros(batch_size, 3, model.image_size, model.image_size, dtype=torch.uint8)
targets = {{label: torch.zeros(batch_size, dtype=torch.int64) for label in bench.CLASSES}}
bench.Training(Settings(batch_size=batch_size), model).steps(itertools.repeat((images, targets)), 3)
print(bench.anonymous_mb())
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def python(*arguments: object, cwd: str) -> str:
    """The last word that Python prints for these arguments."""
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
        Path | None, typer.Option(help="Where photos and cache are made and stay.", show_default="a temporary one")
    ] = None,
) -> None:
    """Measure start-up and memory."""
    with contextlib.ExitStack() as stack:
        place = (folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        if not (place / "Photos").exists():
            bench.make_dataset(place / "Photos", images, 1800)
        cwd = stack.enter_context(tempfile.TemporaryDirectory())
        flags = ["--data", place / "Photos", "--model", model, "--no-pretrained", "--batch-size", batch_size]

        def train(mode: str, name: str) -> float:
            return float(python("-c", TRAIN, mode, "train.py", *flags, "--name", name, cwd=cwd))

        train("start", "cold")  # builds the cache
        imports, starts = [], []
        for i in range(rounds):
            begun = time.time()
            python("-c", "import torch, torchvision, timm", cwd=cwd)
            imports.append(time.time() - begun)
            begun = time.time()
            starts.append(train("start", f"start{i}") - begun)
        memory = [train("memory", f"memory{i}") for i in range(2)]
        alone = [float(python("-c", MODEL_ALONE, model, batch_size, cwd=cwd)) for _ in range(2)]
    later = [start - importing for start, importing in zip(starts, imports)]
    more = [with_data - model_alone for with_data, model_alone in zip(memory, alone)]
    rows = [
        ["import torch, torchvision, timm, s", bench.spread(imports, 2), ""],
        ["command to first batch, s", bench.spread(starts, 2), ""],
        ["more, s", bench.spread(later, 2), "4"],
        ["train.py and its processes, MB", bench.spread(memory, 0), ""],
        ["the model's own, MB", bench.spread(alone, 0), ""],
        ["more, MB", bench.spread(more, 0), "1000"],
    ]
    title = f"{images + 1800:,} photos, {model}, batch {batch_size}; load {os.getloadavg()[0]:.1f}"
    show_table(title, ["", "median (least to most)", "at most"], rows)
    if statistics.median(later) > 4 or statistics.median(more) > 1000:
        raise ValueError("missed")


if __name__ == "__main__":
    run_app(app)
