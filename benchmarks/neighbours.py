"""Training alone on the machine, beside a busy process, and beside a second training: what suits OpenMP's threads then.

    python benchmarks/neighbours.py                                          # hours; --rounds 1: one
    python benchmarks/neighbours.py --network small --seconds 2 --rounds 1   # to try it

A waiting thread of OpenMP spins; where another program has its core, the thread that it waits for does not get on. Each
rate is of a process of its own that trains as train.py does, from photos in a warm cache; the second training is one
with the same setting. Every other round goes backwards. In brackets: over the best quiet rate of that network.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import run_app, say, show_table

# Trains for `seconds` behind the first steps, which the loader's queue feeds, and prints images/s; with "on" it says so
# at its first step and goes on, so that it is a neighbour.
TRAIN = f"""
import itertools, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import bench, data, loading, torch
from model import build_model
from settings import Settings

folder, name, size, augment, batch, seconds, threads, workers, on = sys.argv[1:]
size, batch, seconds, threads, workers = map(int, (size, batch, seconds, threads, workers))
torch.set_num_threads(threads or torch.get_num_threads())
workers = loading.default_workers(None if workers < 0 else workers)
settings = Settings(batch_size=batch, augment=augment, lr=1e-3, epochs=1)
samples = data.read_split(Path(folder), "train").samples
photos = loading.TrainPhotos(samples, size, settings)
loading.add_decoded(photos, photos.views, None, 2)  # the first process decodes for all
training = bench.Training(settings, build_model(name, bench.CLASSES, size))
loader = loading.make_loader(photos, loading.EpochSampler(len(photos), batch, 0), workers)
times, warm = [], 2 + 2 * workers

def batches():
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        times.append(time.monotonic())
        if on == "on" and len(times) == 2:
            print(0, flush=True)
        if on != "on" and len(times) > warm + 2 and times[-1] - times[warm] > seconds:
            return
        yield batch

training.steps(batches(), 10**9)
print(batch * (len(times) - 1 - warm) / (times[-1] - times[warm]), flush=True)
"""
BUSY = "print(0, flush=True)\nwhile True: pass"
NEIGHBOURS = ("quiet", "busy process", "second training")


class Network(NamedTuple):
    model: str
    size: int
    augment: str


class Setting(NamedTuple):
    env: dict[str, str]
    threads: int = 0  # torch's
    workers: int = -1  # train.py's


NETWORKS = {
    "small": Network("test_resnet", 64, "none"),
    "lite0": Network("tf_efficientnet_lite0", 160, "basic"),
    "eva02": Network("eva02_tiny_patch14_224.mim_in22k", 224, "basic"),
}
SETTINGS = {
    "spin 300,000 (OpenMP's own)": Setting({"GOMP_SPINCOUNT": "300000"}),
    "spin 100,000": Setting({"GOMP_SPINCOUNT": "100000"}),
    "spin 10,000": Setting({"GOMP_SPINCOUNT": "10000"}),
    "spin 1,000": Setting({"GOMP_SPINCOUNT": "1000"}),
    "spin 100": Setting({"GOMP_SPINCOUNT": "100"}),
    "passive": Setting({"OMP_WAIT_POLICY": "PASSIVE"}),
    "spin 1,000, 1 loading process": Setting({"GOMP_SPINCOUNT": "1000"}, workers=1),
    "--threads 1": Setting({}, threads=1),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@contextmanager
def process(env: dict[str, str], *command: object) -> Iterator[subprocess.Popen]:
    """A Python process, ended with those that it started."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-c", *map(str, command)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean | env, start_new_session=True)
    try:
        yield started
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def first_number(started: subprocess.Popen) -> str:
    """The first line of a process that is a number. What comes before it are notes."""
    for line in started.stdout:
        if line.strip().replace(".", "", 1).isdecimal():
            return line
    raise ValueError("a training failed; its message is above")


def rate(folder: Path, network: Network, setting: Setting, neighbour: str, batch_size: int, seconds: int) -> float:
    """Images/s of a training beside a neighbour."""
    flags = [folder, *network, batch_size, seconds, setting.threads, setting.workers]
    beside = {"quiet": ("print(0)",), "busy process": (BUSY,), "second training": (TRAIN, *flags, "on")}[neighbour]
    with process(setting.env, *beside) as other:
        first_number(other)  # it is at work
        with process(setting.env, TRAIN, *flags, "once") as training:
            return float(first_number(training))


@app.command()
def measure(
    network: Annotated[list[str] | None, typer.Option(help=f"{', '.join(NETWORKS)}; repeats.")] = None,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    seconds: Annotated[int, typer.Option(help="Timed of each training, at least two steps.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure each setting of OpenMP's threads beside each neighbour."""
    import bench  # torch takes seconds to import

    with tempfile.TemporaryDirectory() as folder:
        for name in network or NETWORKS:
            net = NETWORKS[name]
            photos = bench.make_dataset(Path(folder, name), batch_size * 200)
            ways = [(setting, neighbour) for setting in SETTINGS for neighbour in NEIGHBOURS]
            rates: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
            for i in range(rounds):
                for setting, neighbour in ways[:: 1 if i % 2 == 0 else -1]:
                    found = rate(photos, net, SETTINGS[setting], neighbour, batch_size, seconds)
                    rates[setting, neighbour].append(found)
            medians = {way: statistics.median(of_way) for way, of_way in rates.items()}
            best = max(median for (_, neighbour), median in medians.items() if neighbour == "quiet")
            rows = []
            for setting in SETTINGS:
                cells = [(bench.spread(rates[setting, n]), medians[setting, n] / best) for n in NEIGHBOURS]
                rows.append([setting, *(f"{spread} [{ratio:.2f}]" for spread, ratio in cells)])
            title = f"{net.model}, {net.size} px, batch {batch_size}: images/s; load {os.getloadavg()[0]:.1f}"
            show_table(title, ["", *NEIGHBOURS], rows)
    say(f"median of {rounds} rounds, smallest and largest [over the best quiet rate]")


if __name__ == "__main__":
    run_app(app)
