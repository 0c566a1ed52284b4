"""What a teacher costs: a training step with it against one without it and the teacher's forward pass, on constant images, 1 CPU thread.

    python benchmarks/teacher.py                                                     # EfficientNet-Lite2 teaches Lite0, 64 px; a minute
    python benchmarks/teacher.py --student test_efficientnet --teacher tf_efficientnet_lite0 --size 96

Rounds of the three take turns, so that whatever else the machine does meets all of them; the time is this process's own, waiting aside.
A step with a teacher should take at most 1.1 times the other two together.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer

import losses
from cli import run_app, say
from loading import EpochBatches
from model import build_model, parameter_groups
from train import START, train_one_epoch

CLASSES = {"Daily": 6, "Gender": 5, "Embellishment": 3}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    student: str = "tf_efficientnet_lite0",
    teacher: str = "tf_efficientnet_lite2",
    size: Annotated[int, typer.Option(min=16)] = 64,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """Time the step of train.py with and without a teacher, and the teacher alone."""
    torch.set_num_threads(1)
    net, taught_by = (
        build_model(student, CLASSES, size)[0],
        build_model(teacher, CLASSES, size)[0].eval().requires_grad_(False),
    )
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    targets = {label: torch.randint(n, (batch_size,)) for label, n in CLASSES.items()}
    criteria = {label: (partial(losses.cross_entropy, class_weights=None), None) for label in CLASSES}
    flags = SimpleNamespace(
        seed=0,
        cutmix=None,
        grad_accum=1,
        batch_size=batch_size,
        clip_grad=0,
        warmup_epochs=0,
        distill_weight=0.9,
        distill_temperature=4.0,
    )
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1)
    parts = {
        "model": net,
        "forward": net,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
    }

    def step(teach) -> None:
        order = EpochBatches(batch_size, batch_size, 0)
        train_one_epoch(
            parts | {"teach": teach},
            [(images, targets)],
            criteria,
            dict(START),
            order,
            flags,
            None,
            lambda images: None,
        )

    kinds = {
        "without": lambda: step(None),
        "teacher": lambda: torch.no_grad()(taught_by)(images),
        "with": lambda: step(torch.no_grad()(taught_by)),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for done in range(rounds + 1):
        for kind, run in kinds.items():
            start = time.process_time()
            run()
            run()
            if done:  # the first round warms up
                times[kind].append((time.process_time() - start) / 2)
    shown = {kind: f"{1000 * statistics.median(values):.0f} ms" for kind, values in times.items()}
    ratios = [
        both / (alone + forward) for both, alone, forward in zip(times["with"], times["without"], times["teacher"])
    ]
    say(
        f"{student} taught by {teacher}, {size} px, {batch_size} images: step without {shown['without']}, teacher {shown['teacher']}, step with {shown['with']}"
    )
    say(
        f"step with / (step without + teacher): median {statistics.median(ratios):.3f} of {rounds} rounds, {min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    run_app(app)
