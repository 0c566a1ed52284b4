"""The checks that need a CUDA GPU, with the real scripts, in one command. Nothing is downloaded. Exit code 1 where one fails, 2 without a GPU.

    python benchmarks/gpu_check.py                                          # EVA-02 tiny without weights on the demo set; some minutes
    python benchmarks/gpu_check.py --model tf_efficientnet_lite0 --image-size 80 -- --box-head --crop-prob 0.7      # behind --: flags of train.py
    python benchmarks/gpu_check.py --device cpu --model test_vit --image-size 32 --epochs 2 --data demo       # tries the script itself

- the same command twice: the same metrics.csv (times aside) and the same weights;
- a run that is killed (kill -9) in its second epoch, then resumed: the same again;
- predict.py with its best.pt repeats the validation's answers (one image may differ);
- --amp auto, off, bf16 and fp16, as far as the GPU has them: losses are finite, the last validation loss is within 5 % of float32's;
- images/s of each in its last epoch, validation aside.
"""

import csv
import hashlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import typer

from cli import run_app, say, show_table
from model import read_checkpoint

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def call(folder: Path, script: str, *args: object) -> str:
    """Run one of our scripts in this folder; returns what it printed. Raises ValueError where it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(
            f"{script}.py {' '.join(map(str, args))}: exit code {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return done.stdout


def kill_in_second_epoch(folder: Path, run: Path, *args: object) -> None:
    """Start training, and kill it some steps after its first epoch."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, args), "--save-every", "0"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not (run / "metrics.csv").exists():
            time.sleep(0.05)
        if process.poll() is None:
            saved = (run / "last.pt").stat().st_mtime_ns
            while process.poll() is None and (run / "last.pt").stat().st_mtime_ns == saved:
                time.sleep(0.01)
        if process.poll() is not None:
            raise ValueError("train.py ended before it could be killed; give more --epochs")
        process.send_signal(signal.SIGKILL)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def bits(run: Path) -> str:
    """A digest of a run's numbers: metrics.csv without the times, and the weights of its last epoch."""
    digest = hashlib.sha256(
        repr([{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(run / "metrics.csv")]).encode()
    )
    for name, weights in sorted(read_checkpoint(run / "last.pt")["model"].items()):
        digest.update(name.encode() + weights.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def answers(path: Path, column: str) -> list[str]:
    return [row[column] for row in read_rows(path)]


@app.command()
def check(
    flags: Annotated[
        list[str] | None, typer.Argument(help="Behind --: further flags of train.py.", show_default=False)
    ] = None,
    data: str = "demo",
    backbone: Annotated[str, typer.Option("--model")] = "eva02_tiny_patch14_224.mim_in22k",
    epochs: Annotated[int, typer.Option(min=2)] = 4,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    image_size: Annotated[int | None, typer.Option(show_default="the backbone's")] = None,
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
    modes = [
        "auto",
        "off",
        *(["fp16"] if on_gpu else []),
        *(["bf16"] if not on_gpu or torch.cuda.get_device_capability(device) >= (8, 0) else []),
    ]
    settings = [
        "--data",
        data,
        "--model",
        backbone,
        "--no-pretrained",
        "--epochs",
        epochs,
        "--t-0",
        epochs,
        "--patience",
        epochs,
        "--lr",
        "1e-3",
    ]
    settings += [
        "--batch-size",
        batch_size,
        "--device",
        device,
        *(["--image-size", image_size] if image_size else []),
        *(flags or ()),
    ]
    failed, rows = [], []

    def judge(what: str, right: bool, more: str = "") -> None:
        say(f"{'passed' if right else 'FAILED'}: {what}{more}")
        if not right:
            failed.append(what)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs = folder / "runs"
        for mode in modes:
            out = call(folder, "train", *settings, "--amp", mode, "--name", mode)
            metrics = read_rows(runs / mode / "metrics.csv")
            last = [f"{float(metrics[-1][key]):.4f}" for key in ("train_loss", "val_loss", "val_top1_mean")]
            rows.append([mode, *re.findall(r"(\d+) images/s", out)[-1:], *last])
        call(folder, "train", *settings, "--name", "again")
        judge("the same command gives the same bits", bits(runs / "auto") == bits(runs / "again"))
        kill_in_second_epoch(folder, runs / "killed", *settings, "--name", "killed")
        call(folder, "train", "--resume", "runs/killed")
        judge("killed and resumed gives the same bits", bits(runs / "auto") == bits(runs / "killed"))
        call(folder, "predict", "runs/auto/best.pt", "--split", "val", "--device", device)
        written, validated = runs / "auto" / "predictions.csv", runs / "auto" / "val_predictions.csv"
        label = next(name for name in read_rows(validated)[0] if name.endswith("_predicted")).removesuffix("_predicted")
        first = read_rows(written)[0].keys() - {"image_name"}
        column = next(name for name in first if label.lower().startswith(name))
        differ = sum(
            a != b for a, b in zip(answers(written, column), answers(validated, f"{label}_predicted"), strict=True)
        )
        judge(
            "predict.py repeats the validation",
            differ <= 1,
            f" ({differ} of {len(answers(written, column))} answers of {label} differ)",
        )
    exact = float(rows[modes.index("off")][3])
    for mode, _, _, loss, _ in rows:
        judge(
            f"--amp {mode} trains as float32 does",
            abs(float(loss) / exact - 1) < 0.05,
            f" (validation loss {float(loss):.4f}, float32's {exact:.4f})",
        )
    chip = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    show_table(f"{backbone} on {chip}, {epochs} epochs", ["--amp", "images/s", "train loss", "val loss", "Top-1"], rows)
    if failed:
        raise ValueError(f"{len(failed)} checks failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_app(app)
