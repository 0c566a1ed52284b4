"""preprocess.py beside ONNX Runtime's own inference (the limit), rembg's folder command and a session for each photo.

    python -m venv rembg && rembg/bin/pip install 'rembg[cpu,cli]'          # of its own: its packages replace ours
    python benchmarks/preprocess.py --rembg rembg/bin/rembg --model u2netp  # 6 minutes on two cores; u2net: 12
    python benchmarks/preprocess.py --memory                                # 500 photos: 2 minutes; u2net: 4

Takes 40 JPEGs of 600 x 800 cut from scikit-image's pictures. Every round times each way once, forwards and backwards in
turn, and compares within itself, so that other work on the machine affects all alike; it says how much of that there
was, and compares CPU time too. Imports and the start of a session are left out: preprocess.py is timed from the first
photo to the last (`make_photos`); from `rembg p` the time is subtracted that it needs for an empty folder; the limit is
inference alone, at the fastest of some layouts of sessions and threads. A session for each photo is the notes' way; its
start is included. All but the limit read and write files. Exit code 1 where a bound is missed: 0.90 of the limit with
u2netp, 0.95 with others, 4 times the notes' way; with --memory at most 5 % more anonymous memory at 500 photos than at
100.
"""

import csv
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import onnxruntime
import rembg
import skimage.data
import typer
from PIL import Image, ImageEnhance, ImageOps

import preprocess
from cli import note, run_app, say, show_table, usage_error
from data import csv_name
from loading import default_workers

PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
SIZE = 600, 800
OURS, RUNS_REMBG, NOTES = "preprocess.py", "rembg p", "a session a photo"
LIMIT = {"u2netp": 0.90}  # of the limit; of any other model LIMIT_OTHERS, since its inference takes more of the time
LIMIT_OTHERS, TIMES_NOTES = 0.95, 4.0
MANY, GROWTH = 500, 1.05

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def make_photos(root: Path, n: int) -> None:
    """A dataset of one split: `n` JPEGs cut from the pictures (place, size, side, brightness vary), with a CSV."""
    draw = random.Random(0)
    folder = Path(skimage.data.__file__).parent
    pictures = [Image.open(folder / name).convert("RGB") for name in PICTURES]
    (root / "train").mkdir(parents=True)
    for i in range(n):
        picture = pictures[i % len(pictures)]
        height = draw.uniform(0.6, 1) * min(picture.height, picture.width * SIZE[1] / SIZE[0])
        width = height * SIZE[0] / SIZE[1]
        x, y = draw.uniform(0, picture.width - width), draw.uniform(0, picture.height - height)
        photo = picture.resize(SIZE, Image.Resampling.BICUBIC, (x, y, x + width, y + height))
        photo = ImageEnhance.Brightness(ImageOps.mirror(photo) if draw.random() < 0.5 else photo).enhance(
            draw.uniform(0.7, 1.2)
        )
        photo.save(root / "train" / f"{i:03d}.jpg", quality=90)
    with open(root / csv_name("train"), "w", newline="") as file:
        csv.writer(file).writerows([["image_name"], *([f"{i:03d}.jpg"] for i in range(n))])


def run_ours(root: Path, out: Path, model: str) -> Callable[[], None]:
    """What preprocess.py does once its session is there; each call begins with a new output folder."""
    settings = {"rembg_model": model, "background_color": [0, 0, 0], "keep_background": False}
    settings |= {"crop": "none", "box_margin": 0.0}
    remover = preprocess.Remover(model)
    remover.idle.append(remover.start())
    _, photos, _ = preprocess.read_photos(root, ["train"], 1)

    def run() -> None:
        folder = Path(tempfile.mkdtemp(dir=out))
        make = partial(preprocess.make_photo, folder, settings, remover)
        if problems := preprocess.make_photos(folder, photos, {}, make, default_workers(None)):
            raise ValueError(f"preprocess.py failed: {problems[0]}")

    return run


def run_inference(photos: list[Path], sessions: list[onnxruntime.InferenceSession]) -> Callable[[], None]:
    """Inference alone, with one caller for each item of `sessions` (several may share one)."""
    shape = 1, 3, 320, 320
    pictures = [np.asarray(Image.open(path).resize(shape[2:]), np.float32) for path in photos]
    inputs = [((pixels / 255 - 0.45) / 0.225).transpose(2, 0, 1).reshape(shape) for pixels in pictures]
    name = sessions[0].get_inputs()[0].name
    free: SimpleQueue = SimpleQueue()
    for session in sessions:
        free.put(session)

    def infer(pixels: np.ndarray) -> None:
        session = free.get()
        session.run(None, {name: pixels})
        free.put(session)

    def run() -> None:
        with ThreadPoolExecutor(len(sessions)) as pool:
            list(pool.map(infer, inputs))

    return run


def layouts(model: str, cores: int) -> dict[str, list[onnxruntime.InferenceSession]]:
    """Ways to spread inferences over the cores: a session for each caller."""

    def session(threads: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        return rembg.new_session(model, sess_opts=options).inner_session

    return {
        f"inference: 1 session of {cores} threads": [session(cores)],
        f"inference: 1 session of {cores} threads, {cores} callers": [session(cores)] * cores,
        f"inference: 1 session of 1 thread, {cores} callers": [session(1)] * cores,
        f"inference: {cores} sessions of 1 thread": [session(1) for _ in range(cores)],
    }


def run_rembg(command: str, photos: Path, out: Path, model: str) -> None:
    """`rembg p -m MODEL PHOTOS OUT`, with a new folder in OUT."""
    folder = Path(tempfile.mkdtemp(dir=out))
    try:
        result = subprocess.run([command, "p", "-m", model, str(photos), str(folder)], capture_output=True, text=True)
        made, reason = (
            len(list(folder.iterdir())),
            f"exit code {result.returncode}\n{result.stdout}{result.stderr}",
        )  # it prints errors and goes on
    except OSError as error:
        made, reason = -1, str(error)
    if made < len(list(photos.iterdir())) or result.returncode:
        raise usage_error("--rembg", f"{command} p does not work: {reason.strip().splitlines()[-1]}")


def run_notes(photos: list[Path], out: Path, model: str) -> None:
    """`rembg.remove` with a session for each photo; on black, as a JPEG, which takes less time than a PNG."""
    for path in photos:
        result = rembg.remove(Image.open(path), session=rembg.new_session(model), bgcolor=(0, 0, 0, 255))
        result.convert("RGB").save(out / path.name, quality=95)


def all_cpu() -> float:
    """CPU seconds that the whole machine has worked since its start; Linux only."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_cpu() -> float:
    """CPU seconds of this process and the ones it has started and seen end."""
    return sum(os.times()[:4])


def anonymous_memory() -> float:
    """MB of this process's memory that no file stands behind; Linux only."""
    return next(
        int(line.split()[1]) / 1000
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


@app.command()
def benchmark(
    model: Annotated[
        str,
        typer.Option(
            help="u2netp, u2net, or another of rembg's models; its weights where rembg looks for them (U2NET_HOME)."
        ),
    ] = "u2netp",
    photos: Annotated[int, typer.Option(min=2, help="Photos a round.")] = 40,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    rembg: Annotated[str, typer.Option(help="The rembg command to compare with, installed with its [cli].")] = "rembg",
    memory: Annotated[
        bool, typer.Option("--memory", help=f"See instead whether memory stays flat over {MANY} photos.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)  # rembg would hold its own sessions to it
    preprocess.find_weights(model)
    with tempfile.TemporaryDirectory() as work:
        root, out = Path(work, "photos"), Path(work, "out")
        out.mkdir()
        make_photos(root, MANY if memory else photos)
        held = watch_memory(root, out, model) if memory else compare(root, out, model, rounds, rembg)
    raise typer.Exit(0 if held else 1)


def compare(root: Path, out: Path, model: str, rounds: int, rembg_command: str) -> bool:
    """Time all ways, print the table; returns whether the bounds hold."""
    cores = default_workers(None)
    paths = sorted((root / "train").iterdir())
    empty = root / "empty"
    empty.mkdir()
    inferences = {name: run_inference(paths, sessions) for name, sessions in layouts(model, cores).items()}
    ways = inferences | {
        OURS: run_ours(root, out, model),
        "start": partial(run_rembg, rembg_command, empty, out, model),
        RUNS_REMBG: partial(run_rembg, rembg_command, root / "train", out, model),
        NOTES: partial(run_notes, paths, out, model),
    }
    for name in ("start", *inferences, OURS):  # the first time takes longer
        ways[name]()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    busy = []
    load = f"load average before {os.getloadavg()[0]:.1f}"
    say(f"{model}, {len(paths)} photos of {SIZE[0]} x {SIZE[1]}, {cores} cores, {rounds} rounds; {load}")
    for i in range(rounds):
        for name in list(ways)[:: 1 if i % 2 == 0 else -1]:
            start, own, load = time.perf_counter(), own_cpu(), all_cpu()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(own_cpu() - own)
            busy.append((all_cpu() - load - cpu[name][-1]) / seconds[name][-1] / cores)
        others = 100 * statistics.mean(busy[-len(ways) :])
        say(f"round {i + 1} of {rounds}: other processes took {others:.0f} % of the cores")
    for taken in (seconds, cpu):
        taken[RUNS_REMBG] = [whole - start for whole, start in zip(taken[RUNS_REMBG], taken.pop("start"))]

    limit = min(inferences, key=lambda name: statistics.median(seconds[name]))
    bounds = {limit: LIMIT.get(model, LIMIT_OTHERS), NOTES: TIMES_NOTES}
    rows, held = [], True
    for name in seconds:
        rates = [len(paths) / t for t in seconds[name]]
        ratios = [t / ours for t, ours in zip(seconds[name], seconds[OURS])]  # within a round
        kept = statistics.median(ratios) >= bounds.get(name, 0)
        held = held and kept
        bound = f">= {bounds[name]:.2f}: {'holds' if kept else 'missed'}" if name in bounds else ""
        by_cpu = [t / ours for t, ours in zip(cpu[name], cpu[OURS])]
        cells = [f"{statistics.median(x):.2f}  ({min(x):.2f} to {max(x):.2f})" for x in (rates, ratios, by_cpu)]
        work = f"{1000 * statistics.median(cpu[name]) / len(paths):.0f}"
        rows.append(
            [
                name + (" (the limit)" if name == limit else ""),
                cells[0],
                work,
                *([""] * 3 if name == OURS else [*cells[1:], bound]),
            ]
        )
    show_table(
        "median (lowest to highest)",
        ["way", "photos/s", "CPU ms/photo", "preprocess.py / it", "the same by CPU time", "bound"],
        rows,
    )
    if statistics.mean(busy) > 0.1:
        note("the machine is not quiet: photos/s and their ratios say little; CPU time is less touched by other work")
    return held


def watch_memory(root: Path, out: Path, model: str) -> bool:
    """Print the most anonymous memory around every hundredth photo; returns whether it stays flat."""
    seen: list[float] = []
    prepare_photo = preprocess.prepare_photo

    def prepare(*args) -> tuple:
        result = prepare_photo(*args)
        seen.append(anonymous_memory())
        return result

    preprocess.prepare_photo = prepare
    run_ours(root, out, model)()
    most = {n: max(seen[n - 50 : n]) for n in range(100, MANY + 1, 100)}
    show_table(
        f"anonymous memory with {model}",
        ["photos", "MB (most of the last 50 photos)"],
        [[str(n), f"{mb:.0f}"] for n, mb in most.items()],
    )
    held = most[MANY] <= GROWTH * most[100]
    say(f"{MANY} photos / 100 photos: {most[MANY] / most[100]:.3f}, bound <= {GROWTH}: {'holds' if held else 'missed'}")
    return held


if __name__ == "__main__":
    run_app(app)
