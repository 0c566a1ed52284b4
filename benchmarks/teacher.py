"""What a teacher costs: a training step with it against one without it and the teacher's forward pass, on constant
images, 1 CPU thread.

    python benchmarks/teacher.py                         # EfficientNet-Lite2 as the teacher of Lite0, 64 px; a minute
    python benchmarks/teacher.py --student test_efficientnet --teacher tf_efficientnet_lite0 --size 96

Rounds of the three take turns, so that whatever else the machine does meets all of them; the time is this process's
own, waiting aside. A step with a teacher should take at most 1.1 times the other two together.
"""

import statistics
import time
from typing import Annotated

import bench  # finds the scripts
import torch
import typer

from checkpoint import Teacher
from cli import run_app, say
from model import build_model
from settings import Settings

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
    settings = Settings(batch_size=batch_size, amp="off", lr=1e-4, seed=0)
    model, guide = build_model(student, bench.CLASSES, size), Teacher(build_model(teacher, bench.CLASSES, size))
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    targets = {label: torch.randint(len(names), (batch_size,)) for label, names in bench.CLASSES.items()}
    alone, guided = bench.Training(settings, model), bench.Training(settings, model, guide)
    kinds = {
        "without": lambda: alone.steps([(images, targets)], 1),
        "teacher": lambda: guide(images),
        "with": lambda: guided.steps([(images, targets)], 1),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(rounds + 1):
        for kind, run in kinds.items():
            start = time.process_time()
            run()
            run()
            if i:  # the first round warms up
                times[kind].append((time.process_time() - start) / 2)
    ms = {kind: f"{1000 * statistics.median(values):.0f} ms" for kind, values in times.items()}
    ratios = [a / (b + c) for a, b, c in zip(times["with"], times["without"], times["teacher"])]
    say(f"{student}, its teacher {teacher}, {size} px, {batch_size} images")
    say(f"step without {ms['without']}, teacher {ms['teacher']}, step with {ms['with']}")
    say(f"step with / (step without + teacher): median {bench.spread(ratios, 3)} of {rounds} rounds")


if __name__ == "__main__":
    run_app(app)
