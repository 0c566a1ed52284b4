"""The same bits: repeated, interrupted anywhere, in several processes. tests/torture.py is the large torture."""

import csv
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torture
from conftest import ROOT, TINY

import cli
import loading
import model
from checkpoint import FORMAT, read, save

NAME, FLAGS = next(iter(torture.SETTINGS.items()))


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phases, runs, agreeing = torture.killed_runs(tmp_path, NAME, FLAGS, kills=4, seed=1, per_run=4)
    assert sum(phases.values()) == 4 and runs == agreeing


@pytest.mark.slow
def test_workers_and_evaluations_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(set(torture.one_hash(tmp_path, FLAGS).values())) == 1


# ---------------------------------------------------------------- the order of an epoch


@pytest.mark.parametrize("n", range(12))
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("min_part", [1, 2])
def test_processes_share_each_batch_equally(n, world_size, min_part):
    batch_size = 2 * world_size
    samplers = [loading.EpochSampler(n, batch_size, 3, rank, world_size, min_part) for rank in range(world_size)]
    single = loading.EpochSampler(n, batch_size, 3)
    for sampler in (*samplers, single):
        sampler.epoch = 2
    parts, batches = [list(sampler) for sampler in samplers], list(single)
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == len(samplers[0])
    for step, of_ranks in enumerate(zip(*parts)):
        assert len({len(part) for part in of_ranks}) == 1 and len(of_ranks[0]) >= min_part
        together = [item for part in of_ranks for item in part]  # of a short last batch some photos are left out
        assert together == batches[step][: len(together)] and len(batches[step]) - len(together) < world_size
    assert sum(map(len, parts[0])) == samplers[0].part_images
    left_out = n - sum(len(part) for of_rank in parts for part in of_rank)
    assert 0 <= left_out < max(world_size, min_part * world_size)


def test_an_interrupted_epoch_goes_on_without_what_was_used():
    sampler = loading.EpochSampler(23, 5, seed=3)
    sampler.epoch = 2
    complete = list(sampler)
    sampler.skip = 3
    assert list(sampler) == complete[3:] and len(sampler) == 2


# ---------------------------------------------------------------- stops


def started(tmp_path, *flags: str) -> torture.Run:
    data = ["--data", str(torture.dataset(tmp_path)), "--workers", "1"]
    run = torture.Run([*data, *torture.BASE, *FLAGS, "--epochs", "60", "--name", "stopped", *flags])
    while run.phase() in ("start", "decoding") and run.wait(0.01) is None:
        pass
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_saved_at_the_next_step(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    run = started(tmp_path, "--save-every", "1000")
    os.kill(run.pid, number)
    assert run.wait() == 130, run.said()
    assert "to continue: python train.py --resume runs/stopped" in run.said() and "Traceback" not in run.said()
    saved = read("runs/stopped/last.pt")
    assert saved["epoch"] > 0 or saved["step"] > 0


def test_a_second_process_on_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = started(tmp_path)
    second = torture.Run(["--resume", "runs/stopped"])
    try:
        assert second.wait() == 1 and "another process is writing into runs/stopped" in second.said()
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()


def test_a_second_stop_signal_stops_at_once():
    went_on = []
    with pytest.raises(KeyboardInterrupt), cli.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after Ctrl-C: not a second Ctrl-C
        time.sleep(0.01)
        went_on.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert went_on


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save({"format": FORMAT, "a": torch.ones(3)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            save({"a": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- what cannot repeat, and what is recorded


def test_what_cannot_be_deterministic_is_said_once(run, drawn, monkeypatch):
    plain = model.FashionModel.forward

    def forward(self, images, **options):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # torch has no deterministic one
        return plain(self, images, **options)

    monkeypatch.setattr(model.FashionModel, "forward", forward)
    done = run("train", "--data", drawn, *TINY, "--epochs", "1")
    notes = [line for line in done.out.splitlines() if "put_ " in line]
    assert done.code == 0 and len(notes) == 1 and notes[0].startswith("note: put_ does not have a deterministic")
    done = run("train", "--data", drawn, *TINY, "--epochs", "1", "--no-deterministic", "--name", "wild")
    assert done.code == 0 and "put_" not in done.out and not torch.are_deterministic_algorithms_enabled()


def test_config_says_what_decides_the_bits(run, drawn):
    assert run("train", "--data", drawn, *TINY, "--epochs", "1", "--name", "a").code == 0
    config = json.loads(Path("runs/a/config.json").read_text())
    assert config["settings"]["deterministic"] is True and config["processes"] == 1
    assert {"threads", "device", "commit", "versions", "data"} <= set(config)


# ---------------------------------------------------------------- several processes


def processes(monkeypatch, n: int, arguments: list[str]) -> list[torture.Run]:
    """Start train.py in n processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    with monkeypatch.context() as patch:
        for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": n}.items():
            patch.setenv(key, str(value))
        for rank in range(n):
            patch.setenv("RANK", str(rank))
            patch.setenv("LOCAL_RANK", str(rank))
            runs.append(torture.Run(arguments))
    return runs


def ended(runs: list[torture.Run], code: int = 0) -> list[str]:
    """What each process said."""
    codes = [run.wait() for run in runs]
    for run in runs:
        if run.code is None:
            os.kill(run.pid, signal.SIGKILL)
    assert codes == [code] * len(runs), "\n".join(run.said() for run in runs)
    return [run.said() for run in runs]


def rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


# 36 photos to train on and 16 to validate, in batches of 10, the last one short, or in three full ones of 12.
TWO = "--model test_vit --amp off --batch-size 10 --ema 0.9 --grad-accum 2 --box-head --crop-prob 0.6"
THREE = "--model test_resnet --amp off --batch-size 12 --cutmix Daily --clip-grad 1 --class-weights"
SEVERAL = [(2, TWO), pytest.param(3, THREE, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("n", "flags"), SEVERAL)
def test_several_processes_train_stop_and_resume(tmp_path, monkeypatch, n, flags):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(torture.dataset(tmp_path)), "--workers", "0", *torture.BASE, *flags.split()]
    arguments += ["--save-every", "1000", "--epochs", "5", "--patience", "99"]
    first, *others = ended(processes(monkeypatch, n, [*arguments, "--name", "undisturbed"]))
    assert f"{n} processes" in first and first.count("\nepoch 1/5 ") == 1
    assert "epoch " not in "".join(others) and "runs/" not in "".join(others)
    assert json.loads(Path("runs/undisturbed/config.json").read_text())["processes"] == n

    # every photo is validated once, in order, and one process gives the same answers
    truth = rows(next(torture.dataset(tmp_path).glob("*_val.csv")))
    written = rows("runs/undisturbed/val_predictions.csv")
    assert [row["image_name"] for row in written] == [row["image_name"] for row in truth]
    predict = ["runs/undisturbed/best.pt", "--split", "val", "--workers", "0", "--probs", "--out", "p.csv"]
    predicted = torture.Run(predict, "predict")
    assert predicted.wait() == 0, predicted.said()
    best = read("runs/undisturbed/best.pt")
    assert [row["daily"] for row in rows("p.csv")] == [row["Daily_predicted"] for row in written]
    p = [[float(row[column]) for row in of] for of, column in ((rows("p.csv"), "daily_p0"), (written, "Daily_p0"))]
    assert p[0] == pytest.approx(p[1], rel=1e-4)
    right = sum(row["Daily"] == row["Daily_predicted"] for row in written)
    assert best["scores"]["top1_Daily"] == right / len(truth)

    runs = processes(monkeypatch, n, [*arguments, "--name", "stopped"])
    while not Path("runs/stopped/last.pt").exists() and runs[0].wait(0.01) is None:
        pass
    os.kill(runs[-1].pid, signal.SIGTERM)  # one is enough: the others hear of it
    said = ended(runs, 130)
    assert "to continue: python train.py --resume runs/stopped" in said[0] and "Traceback" not in "".join(said)
    assert read("runs/stopped/last.pt")["epoch"] < 5
    ended(processes(monkeypatch, n, ["--resume", "runs/stopped"]))
    assert torture.result(Path("runs/stopped")) == torture.result(Path("runs/undisturbed"))


def test_processes_that_do_not_divide_the_batch_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(torture.dataset(tmp_path)), *torture.BASE, "--model", "test_vit"]
    said = ended(processes(monkeypatch, 3, arguments), 2)
    assert "--batch-size" in said[0] and "10 is not a multiple of the 3 processes" in said[0]
    assert not Path("runs").exists()


@pytest.mark.slow
def test_torchrun_trains_stops_and_resumes(tmp_path, drawn):
    """The real command."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(ROOT / "train.py")]
    flags = ["--data", str(drawn), *TINY, "--epochs", "40", "--patience", "99", "--name", "a"]
    run = subprocess.Popen(
        [*command, *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "runs/a/last.pt").exists() and run.poll() is None:
        time.sleep(0.02)
    run.terminate()
    said, _ = run.communicate(timeout=120)
    last = read(tmp_path / "runs/a/last.pt")
    assert 0 < last["epoch"] < 40, said
    resume = ["--resume", "runs/a"]
    done = subprocess.run([*command, *resume], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nepoch 40/40") == 1 and len(rows(tmp_path / "runs/a/metrics.csv")) == 40
