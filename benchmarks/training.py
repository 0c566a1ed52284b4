"""Training from photos against its loop on a constant batch (the limit), and against timm's loader and a plain loop.

    python benchmarks/training.py                              # EVA-02 tiny, 224 px: 5 minutes on two cores
    python benchmarks/training.py --batch-size 16 --rounds 2   # 1 minute
    python benchmarks/training.py --batch-size 256 --steps 20  # on a GPU: images/s of EVA-02 tiny, a minute or two

Photos are JPEGs of 600 x 800, cut to their boxes, `--augment basic`, from a warm cache. timm's way is its
`create_loader` with the settings of its training script, a random resized crop and a flip, which is less than `basic`.
Every round times each once, forwards and backwards in turn, from the step at which the loader's queue is full, with the
loader at work behind it; ratios are of the same round. Exit code 1 where the median ratio is below 0.97 of the limit or
1.05 times timm.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import bench  # finds the scripts
import numpy as np
import timm
import torch
import typer
from PIL import Image
from torch import Tensor, nn

import data
import loading
from cli import run_app, say, show_table
from model import FashionModel, build_model
from settings import Settings
from train import set_up_torch

OURS, LIMIT, TIMM = "train.py", "constant batch", "timm's loader"
AT_LEAST = {LIMIT: 0.97, TIMM: 1.05}
TIMM_OPTIONS = {"re_prob": 0.0, "color_jitter": 0.4, "interpolation": "random"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class BoxedPhotos(torch.utils.data.Dataset):
    """As timm's create_loader needs it: a transform to be set, and (image, target), an array for its fast collation."""

    def __init__(self, samples: list[data.Sample]):
        self.samples, self.transform = samples, None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, np.ndarray]:
        image = Image.open(self.samples[i].path).convert("RGB").crop(self.samples[i].boxes["bbox"])
        return self.transform(image), np.array(list(self.samples[i].labels.values()))


@app.command()
def compare(
    model: str = "eva02_tiny_patch14_224.mim_in22k",
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each way in a round.")] = 6,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    amp: Literal["auto", "fp16", "bf16", "off"] = "auto",
    device: str = "auto",
    threads: Annotated[int | None, typer.Option(min=1, show_default="torch's")] = None,
    workers: Annotated[int | None, typer.Option(min=0, show_default="one a core")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="As train.py's default; on GPUs slower.")
    ] = False,
) -> None:
    """Time a step of train.py fed by its loader, by a constant batch, and of a plain loop fed by timm's loader."""
    settings = Settings(
        batch_size=batch_size, amp=amp, device=device, threads=threads, deterministic=deterministic, seed=0
    )
    place, amp_dtype = set_up_torch(settings)
    workers = loading.default_workers(workers)
    warm = 2 + workers * 2 * (workers > 0)  # steps until the queue is full
    with tempfile.TemporaryDirectory() as folder:
        split = data.read_split(bench.make_dataset(Path(folder, "Photos"), batch_size * (warm + steps + 8)), "train")
        net = build_model(model, split.classes).to(place)
        photos = loading.TrainPhotos(split.samples, net.image_size, settings)
        loading.add_decoded(photos, photos.views, None, workers)
        training, images_timed = bench.Training(settings, net), steps * batch_size
        constant = torch.utils.data.default_collate([photos[1, i] for i in range(batch_size)])
        constant = constant[0].to(place), {label: values.to(place) for label, values in constant[1].items()}

        def from_photos() -> float:
            sampler = loading.EpochSampler(len(photos), batch_size, settings.seed)
            times = training.steps(loading.make_loader(photos, sampler, workers), warm + steps)
            return images_timed / (times[-1] - times[warm])

        def from_constant() -> float:
            times = training.steps(itertools.repeat(constant), 2 + steps)
            return images_timed / (times[-1] - times[2])

        def with_timm() -> float:
            times = plain_loop(net, split.samples, batch_size, warm + steps, amp_dtype, workers)
            return images_timed / (times[-1] - times[warm])

        rates = time_in_turns({OURS: from_photos, LIMIT: from_constant, TIMM: with_timm}, rounds)
    ratios = {way: [a / b for a, b in zip(rates[OURS], rates[way])] for way in rates}
    chip = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{model}, {net.image_size} px, batch {batch_size}, {amp_dtype or torch.float32}, {chip}"
    title += f", {'' if deterministic else 'not '}deterministic, {workers} workers; load {os.getloadavg()[0]:.1f}"
    rows = [[way, bench.spread(rates[way]), bench.spread(ratios[way], 3), str(AT_LEAST.get(way, ""))] for way in rates]
    show_table(title, ["", "images/s", "train.py over this", "at least"], rows)
    say(f"median of {rounds} rounds, smallest and largest")
    if missed := [way for way in AT_LEAST if statistics.median(ratios[way]) < AT_LEAST[way]]:
        raise ValueError(f"missed: {', '.join(missed)}")


def plain_loop(
    model: FashionModel,
    samples: list[data.Sample],
    batch_size: int,
    steps: int,
    amp_dtype: torch.dtype | None,
    workers: int,
) -> list[float]:
    """The loop that one writes first, on timm's loader; returns when each batch was there, and when one more was."""
    device, own, times = model.mean.device, timm.data.resolve_model_data_config(model.backbone), []
    options = TIMM_OPTIONS | {"num_workers": workers, "use_prefetcher": device.type == "cuda"}
    shape = (3, model.image_size, model.image_size)
    photos = BoxedPhotos(samples)
    loader = timm.data.create_loader(photos, shape, batch_size, True, mean=own["mean"], std=own["std"], **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.01)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    for images, targets in loader:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic())
        if len(times) > steps:
            break
        images, targets = images.to(device), targets.to(device)
        with torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            features = model.backbone(images)
            loss = sum(criterion(head(features), targets[:, i]) for i, head in enumerate(model.heads))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return times


def time_in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way returns in each round; every other round goes backwards."""
    values: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds):
        for way in list(ways)[:: 1 if i % 2 == 0 else -1]:
            values[way].append(ways[way]())
    return values


if __name__ == "__main__":
    run_app(app)
