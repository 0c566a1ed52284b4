"""Training from photos against the same loop on a constant batch (the limit) and against timm's loader and a plain loop.

    python benchmarks/training.py                              # EVA02 tiny, 224 px, the precision of --amp auto: 5 minutes on two cores
    python benchmarks/training.py --batch-size 16 --rounds 2   # 1 minute

Photos are JPEGs of 600 x 800, cut to their boxes, `--augment basic`, from a warm cache. timm's way is its `create_loader` with the settings of
its training script, a random resized crop and a flip, which is less than `basic`. Every round times each once, forwards and backwards in turn,
from the step at which the loader's queue is full, with the loader at work behind it; ratios are of the same round. Exit code 1 where the
median ratio is below 0.97 of the limit or 1.05 times timm.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import timm
import torch
import typer
from PIL import Image

import augment
import data
import loading
import losses
import bench
from cache import add_cache
from cli import Stopped, run_app, say, show_table
from model import build_model, choose_amp, choose_device, parameter_groups
from train import START, train_one_epoch

OURS, LIMIT, TIMM = "train.py", "constant batch", "timm's loader"
AT_LEAST = {LIMIT: 0.97, TIMM: 1.05}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Boxed(torch.utils.data.Dataset):
    """What timm's create_loader wants: a transform to be set, and (image, target)."""

    def __init__(self, samples: list[data.Sample]):
        self.samples, self.transform = samples, None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int):
        image = Image.open(self.samples[i].path).convert("RGB").crop(self.samples[i].boxes["bbox"])
        return self.transform(image), torch.tensor(list(self.samples[i].labels.values()))


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
) -> None:
    """Time a step of train.py fed by its loader, by a constant batch, and of a plain loop fed by timm's loader."""
    torch.set_num_threads(threads or torch.get_num_threads())
    place, workers = choose_device(device), loading.default_workers(workers)
    amp_dtype = choose_amp(amp, place)
    warm = 2 + workers * 2 * (workers > 0)  # until the queue is full
    with tempfile.TemporaryDirectory() as folder:
        root = bench.make_dataset(Path(folder) / "Photos", batch_size * (warm + steps + 8))
        split = data.read_split(root, "train")
        net, size = build_model(model, split.classes)
        net.to(place)
        photos = loading.Photos(split.samples, size, "bbox", augment=augment.augmentation("basic"))
        add_cache([photos], [root], None, workers)
        criteria = {
            label: (partial(losses.cross_entropy, smoothing=0.1, class_weights=None), None) for label in split.classes
        }
        flags = SimpleNamespace(seed=0, cutmix=None, grad_accum=1, batch_size=batch_size, clip_grad=0, warmup_epochs=0)
        optimizer = torch.optim.AdamW(
            parameter_groups(net), lr=5e-6, weight_decay=0.01, fused=place.type in ("cpu", "cuda")
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1)
        scaler = torch.amp.GradScaler(place.type, enabled=amp_dtype is torch.float16)
        parts = {
            "model": net,
            "forward": net,
            "optimizer": optimizer,
            "schedule": schedule,
            "scaler": scaler,
            "teach": None,
        }

        def ours(batches: Iterable, skip: int) -> float:
            times = []

            def after_step(images: int) -> None:
                if place.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.monotonic())
                if len(times) > skip + steps:
                    raise Stopped

            order = loading.EpochBatches(len(photos), batch_size, 0)
            try:
                train_one_epoch(parts, batches, criteria, dict(START), order, flags, amp_dtype, after_step)
            except Stopped:
                return steps * batch_size / (times[-1] - times[skip])

        def from_photos() -> float:
            return ours(
                loading.batches(
                    loading.make_loader(photos, batch_size, workers, loading.EpochBatches(len(photos), batch_size, 0))
                ),
                warm,
            )

        constant = (torch.stack([photos[1, i][0] for i in range(batch_size)]).to(place), {})
        constant[1].update({label: torch.zeros(batch_size, dtype=torch.int64, device=place) for label in split.classes})

        def with_timm() -> float:
            how = {
                "re_prob": 0.0,
                "color_jitter": 0.4,
                "interpolation": "random",
                "num_workers": workers,
                "use_prefetcher": place.type == "cuda",
            }
            own = timm.data.resolve_model_data_config(net.backbone)
            loader = timm.data.create_loader(
                Boxed(split.samples), (3, size, size), batch_size, True, mean=own["mean"], std=own["std"], **how
            )
            plain = torch.optim.AdamW(net.parameters(), lr=5e-6, weight_decay=0.01)
            loss_of, begun, net_ = torch.nn.CrossEntropyLoss(label_smoothing=0.1), 0.0, net.train()
            for step, (images, targets) in enumerate(loader):
                images, targets = images.to(place), targets.to(place)
                with torch.autocast(place.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                    features = net_.backbone(images)
                    loss = sum(loss_of(head(features), targets[:, i]) for i, head in enumerate(net_.heads))
                plain.zero_grad()
                loss.backward()
                plain.step()
                if place.type == "cuda":
                    torch.cuda.synchronize()
                if step == warm:
                    begun = time.monotonic()
                if step == warm + steps:
                    return steps * batch_size / (time.monotonic() - begun)

        ways = {OURS: from_photos, LIMIT: lambda: ours(itertools.repeat(constant), 1), TIMM: with_timm}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(rounds):
            for way in list(ways)[:: 1 if i % 2 == 0 else -1]:
                rates[way].append(ways[way]())
    ratios = {way: [a / b for a, b in zip(rates[OURS], rates[way])] for way in ways}
    precision, load = amp_dtype or torch.float32, os.getloadavg()[0]
    title = f"{model}, {size} px, batch {batch_size}, {precision}, {place}, {torch.get_num_threads()} threads, {workers} workers; load {load:.1f}"
    rows = [
        [way, bench.spread(rates[way]), bench.spread(ratios[way], 3), f"{AT_LEAST[way]:.2f}" if way in AT_LEAST else ""]
        for way in ways
    ]
    show_table(title, ["", "images/s", "train.py over this", "at least"], rows)
    say(f"median of {rounds} rounds, smallest and largest")
    if missed := [way for way in AT_LEAST if statistics.median(ratios[way]) < AT_LEAST[way]]:
        raise ValueError(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    run_app(app)
