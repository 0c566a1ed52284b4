"""The checks that need a CUDA GPU, with the real scripts, in one command. Nothing is downloaded.

    python benchmarks/gpu_check.py      # EVA-02 tiny without weights on the demo set: some minutes
    python benchmarks/gpu_check.py --model tf_efficientnet_lite0 --image-size 80 -- --layer-decay 0.9    # more flags
    python benchmarks/gpu_check.py --device cpu --model test_vit --image-size 32 --data Small    # tries this script

Three settings: `boxed` (the defaults), `learned` (box head, --export-dtype fp16, EMA) and `mixed` (CutMix, a teacher,
--amp fp16, micro-batches, --export-dtype int8). For each
- the same command twice gives the same metrics.csv (times aside) and the same weights;
- a run that is killed (kill -9) in its second epoch and resumed gives the same again;
- predict.py repeats the validation: of each label at most one answer differs.
Of `boxed` also: torchrun with one process gives the same bits; with --amp off, fp16 and bf16, as far as the GPU has
them, the last validation loss is within 5 % of float32's. images/s are in benchmarks/training.py.

Exit code 1 where a check fails, 2 without a GPU.
"""

import csv
import hashlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import typer

from checkpoint import load_model, read
from cli import run_app, say, show_table

SETTINGS = {  # flags of train.py, beside those of all runs
    "boxed": [],
    "learned": ["--box-head", "--crop-prob", "0.7", "--export-dtype", "fp16", "--ema", "0.9"],
    "mixed": ["--cutmix", "joint", "--teacher", "runs/boxed/best.pt", "--grad-accum", "2", "--export-dtype", "int8"],
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Checks:
    """Runs of the scripts in a folder, and the checks on them so far."""

    folder: Path
    flags: list[str]  # of all runs
    device: str
    rows: list[list[str]] = field(default_factory=list)  # check, result, more
    began: float = field(default_factory=time.monotonic)

    def check(self, what: str, test: Callable[[], tuple[bool, str]]) -> None:
        """Add and print a check's result; an error in it is a failure, and the other checks go on."""
        try:
            right, more = test()
        except (ValueError, OSError) as error:
            right, more = False, str(error)
        self.rows.append([what, "passed" if right else "FAILED", more])
        say(f"{time.monotonic() - self.began:4.0f} s  {'passed' if right else 'FAILED'}  {what}  {more}")

    def start(self, *command: object) -> subprocess.Popen:
        text = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=self.folder, **text)

    def call(self, *command: object) -> None:
        """Run Python. Raises ValueError with the last line of what went wrong."""
        with self.start(*command) as process:
            errors = process.communicate()[1]
        if process.returncode:
            script = next(Path(part).name for part in map(str, command) if part.endswith(".py"))
            raise ValueError(f"{script}: {last_line(errors) or f'exit code {process.returncode}'}")

    def train(self, name: str, *flags: str) -> None:
        self.call(ROOT / "train.py", *self.flags, *flags, "--name", name)

    def kill_and_resume(self, name: str, *flags: str) -> None:
        """Train, kill the process some steps after its first epoch, and resume."""
        run = self.folder / "runs" / name
        last = run / "last.pt"
        with self.start(ROOT / "train.py", *self.flags, *flags, "--name", name, "--save-every", 0) as process:

            def wait(until: Callable[[], bool]) -> None:
                while not until():
                    if process.poll() is not None:
                        reason = last_line(process.stderr.read())
                        raise ValueError(f"train.py ended before it could be killed; give more --epochs. {reason}")
                    time.sleep(0.005)

            wait((run / "metrics.csv").exists)
            for _ in range(3):  # the state after the epoch, and two within the next
                saved = last.stat().st_mtime_ns
                wait(lambda saved=saved: last.stat().st_mtime_ns != saved)
            process.send_signal(signal.SIGKILL)
        if read(last)["epoch"] != 1:
            raise ValueError("train.py was not killed in its second epoch; give a smaller --batch-size")
        self.call(ROOT / "train.py", "--resume", f"runs/{name}")

    def bits(self, name: str) -> str:
        """A digest of a run's numbers: metrics.csv without the times, the weights of last.pt and of best.pt."""
        run = self.folder / "runs" / name
        metrics = [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(run)]
        digest, state = hashlib.sha256(repr(metrics).encode()), read(run / "last.pt")
        for weights in (state["model"], state["ema"] or {}, read(run / "best.pt")["weights"]):
            for key, value in sorted(weights.items()):
                digest.update(key.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def same_bits(self, first: str, second: str) -> tuple[bool, str]:
        one, two = self.bits(first), self.bits(second)
        return one == two, f"{one[:8]}, {two[:8]}"

    def repeats(self, name: str) -> tuple[bool, str]:
        """Whether predict.py gives the answers of the best epoch's validation, which best.pt's weights gave."""
        run = self.folder / "runs" / name
        self.call(ROOT / "predict.py", f"runs/{name}/best.pt", "--split", "val", "--probs", "--device", self.device)
        validated, predicted = read_rows(run, "val_predictions.csv"), read_rows(run, "predictions.csv")
        columns = list(predicted[0])[1:]  # of each label its column; then the probabilities, column_p0, ...
        labels = [key.removesuffix("_predicted") for key in validated[0] if key.endswith("_predicted")]
        pairs, differ, furthest = list(zip(validated, predicted, strict=True)), [], 0.0
        for label, column in zip(labels, columns):
            differ.append(sum(one[f"{label}_predicted"] != two[column] for one, two in pairs))
            for p in (key.removeprefix(column) for key in columns if key.startswith(f"{column}_p")):
                furthest = max([furthest, *(abs(float(one[label + p]) - float(two[column + p])) for one, two in pairs)])
        answers = f"{', '.join(map(str, differ))} of {len(pairs)} answers differ"
        return max(differ) <= 1, f"{answers}; probabilities by at most {furthest:.1e}"


def last_line(text: str) -> str:
    """What a script says last of what went wrong; torchrun prints its own report after that."""
    lines = [line for line in text.splitlines() if line.strip()]
    return ([""] + lines + [line for line in lines if line.startswith("error:")])[-1]


def read_rows(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def exported(run: Path) -> tuple[bool, str]:
    """Whether best.pt holds fp16 alone, and a model can be made of it."""
    load_model(run / "best.pt")
    dtypes = {value.dtype for value in read(run / "best.pt")["weights"].values() if value.is_floating_point()}
    size = (run / "best.pt").stat().st_size / 1e6
    return dtypes == {torch.float16}, f"{', '.join(map(str, dtypes))}, {size:.2f} MB"


@app.command()
def check(
    flags: Annotated[
        list[str] | None, typer.Argument(help="Behind --: further flags of train.py.", show_default=False)
    ] = None,
    data: str = "demo",
    backbone: Annotated[str, typer.Option("--model")] = "eva02_tiny_patch14_224.mim_in22k",
    epochs: Annotated[int, typer.Option(min=2)] = 2,
    batch_size: Annotated[int, typer.Option(min=4)] = 128,
    image_size: Annotated[int | None, typer.Option(show_default="the backbone's")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, after the four of --amp.", min=1)] = 3,
    workers: Annotated[int, typer.Option(help="Loading processes of each run.", min=0)] = 4,
    device: Annotated[
        str, typer.Option(help="cuda, cuda:1, ...; cpu tries this script where there is no GPU.")
    ] = "cuda",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run all checks on one GPU."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        say("no CUDA GPU here: nothing was checked")
        raise typer.Exit(2)
    modes = ["off", *(["fp16"] if on_gpu else [])]
    modes += ["bf16"] if not on_gpu or torch.cuda.get_device_capability(device) >= (8, 0) else []
    settings = ["--model", backbone, "--no-pretrained", "--no-pictures", "--lr", "1e-3", "--workers", workers]
    settings += ["--data", data if data == "demo" else os.path.abspath(data), "--device", device]
    settings += ["--epochs", epochs, "--t-0", epochs, "--patience", epochs, "--batch-size", batch_size]
    settings += [*(["--image-size", image_size] if image_size else []), *(flags or ())]
    kinds = SETTINGS | {"mixed": [*SETTINGS["mixed"], "--amp", "fp16" if on_gpu else "bf16"]}
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(folder), settings, device)
        compare_precisions(checks, modes)
        with ThreadPoolExecutor(jobs) as pool:
            tasks = [pool.submit(check_bits, checks, kind, kinds[kind]) for kind in kinds]
            tasks.append(pool.submit(check_torchrun, checks))
            for task in tasks:
                task.result()
        checks.check("learned: --export-dtype fp16", lambda: exported(checks.folder / "runs" / "learned"))
    chip = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    seconds = time.monotonic() - checks.began
    title = f"{backbone} on {chip}, torch {torch.__version__}, {epochs} epochs; {seconds:.0f} s"
    show_table(title, ["check", "result", ""], [[*row[:2], row[2][:90]] for row in checks.rows])
    if failed := [what for what, result, _ in checks.rows if result == "FAILED"]:
        raise ValueError(f"{len(failed)} checks failed: {'; '.join(failed)}")


def compare_precisions(checks: Checks, modes: list[str]) -> None:
    """Train `boxed` with --amp auto, and with each mode, one run at a time, for the seconds that an epoch takes."""
    losses: dict[str, float] = {}

    def trains(mode: str) -> tuple[bool, str]:
        name = "boxed" if mode == "auto" else mode
        checks.train(name, "--amp", mode)
        last = read_rows(checks.folder / "runs" / name)[-1]
        losses[mode] = float(last["val_loss"])
        figures = (
            f"losses {float(last['train_loss']):.4f}, {losses[mode]:.4f}, Top-1 {float(last['val_top1_mean']):.4f}"
        )
        return math.isfinite(losses[mode]), f"{figures}, last epoch {last['seconds']} s"

    def close(mode: str) -> tuple[bool, str]:
        if mode not in losses or "off" not in losses:
            raise ValueError("a run failed")
        ratio = losses[mode] / losses["off"]
        return abs(ratio - 1) < 0.05, f"validation loss / float32's: {ratio:.4f}"

    for mode in ("auto", *modes):
        checks.check(f"boxed: trains with --amp {mode}", lambda mode=mode: trains(mode))
    for mode in ("auto", *modes[1:]):
        checks.check(f"boxed: --amp {mode} as float32", lambda mode=mode: close(mode))


def check_bits(checks: Checks, kind: str, flags: list[str]) -> None:
    def twice() -> tuple[bool, str]:
        if kind != "boxed":  # that run is there
            checks.train(kind, *flags)
        checks.train(f"{kind}-again", *flags)
        return checks.same_bits(kind, f"{kind}-again")

    def killed() -> tuple[bool, str]:
        checks.kill_and_resume(f"{kind}-killed", *flags)
        return checks.same_bits(kind, f"{kind}-killed")

    checks.check(f"{kind}: the same bits twice", twice)
    checks.check(f"{kind}: kill -9 and resume, the same bits", killed)
    checks.check(f"{kind}: predict.py repeats the validation", lambda: checks.repeats(kind))


def check_torchrun(checks: Checks) -> None:
    def one_process() -> tuple[bool, str]:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
        checks.call(*torchrun, ROOT / "train.py", *checks.flags, "--name", "torchrun")
        return checks.same_bits("boxed", "torchrun")

    checks.check("boxed: torchrun with one process, the same bits", one_process)


if __name__ == "__main__":
    run_app(app)
