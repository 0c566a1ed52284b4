"""The same bits: repeated, interrupted anywhere, in several processes. A small torture; tests/torture.py is the large one."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torture
from conftest import TINY

import cli
import loading
import model
import train

NAME, FLAGS = next(iter(torture.SETTINGS.items()))


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phases, runs, agreeing = torture.killed_runs(tmp_path, NAME, FLAGS, kills=4, seed=1, per_run=4)
    assert sum(phases.values()) == 4 and runs == agreeing


@pytest.mark.slow
def test_workers_and_evaluations_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(set(torture.one_hash(tmp_path, FLAGS).values())) == 1


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--model",
        "test_vit",
        "--amp",
        "off",
        "--cutmix",
        "Daily",
        "--cutmix",
        "Gender",
        "--grad-accum",
        "2",
        "--batch-size",
        "7",
    ]
    flags += ["--layer-decay", "0.8", "--warmup-epochs", "1", "--clip-grad", "1", "--ema", "0.9"]
    ((images, difference, table),) = torture.processes_agree(tmp_path, flags, [2]).values()
    assert images and table and difference < 1e-5


@pytest.mark.parametrize("n", range(12))
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_a_partition(n, world):
    shares = [range(n)[loading.share_of(n, rank, world)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_interrupted_epoch_goes_on_without_what_was_used():
    order = loading.EpochBatches(23, 5, seed=3)
    order.epoch = 2
    whole = list(order)
    order.done = 3
    assert list(order) == whole[3:] and len(order) == 2


def started(tmp_path, *flags: str) -> torture.Run:
    run = torture.Run(
        [
            "--data",
            str(torture.dataset(tmp_path)),
            "--workers",
            "1",
            *torture.BASE,
            *FLAGS,
            "--epochs",
            "60",
            "--name",
            "stopped",
            *flags,
        ]
    )
    while run.phase() == "start" and run.wait(0.01) is None:
        pass
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_saved_at_the_next_step(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    run = started(tmp_path, "--save-every", "1000")
    os.kill(run.pid, number)
    assert run.wait() == 130, run.said()
    assert "to go on: python train.py --resume runs/stopped" in run.said() and "Traceback" not in run.said()
    saved = model.read_checkpoint("runs/stopped/last.pt")
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


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    model.save_checkpoint({"format": model.FORMAT, "a": torch.ones(3)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            model.save_checkpoint({"a": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_deterministic_is_said(run, drawn, monkeypatch):
    plain, calls = model.FashionModel.forward, []

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append(torch.is_deterministic_algorithms_warn_only_enabled())
            if torch.are_deterministic_algorithms_enabled() and not calls[-1]:
                raise RuntimeError("wild_backward does not have a deterministic implementation")
            return gradient

    monkeypatch.setattr(
        model.FashionModel,
        "forward",
        lambda self, images: {k: Refusing.apply(v) for k, v in plain(self, images).items()},
    )
    done = run("train", "--data", drawn, *TINY, "--epochs", "1")
    assert (
        done.code == 0
        and "not everything here can be deterministic (wild_backward)" in done.out
        and calls[0] is False
        and calls[-1] is True
    )
    done = run("train", "--data", drawn, *TINY, "--epochs", "1", "--no-deterministic", "--name", "wild")
    assert done.code == 0 and "deterministic (" not in done.out and not torch.are_deterministic_algorithms_enabled()


def test_config_says_what_decides_the_bits(run, drawn):
    assert run("train", "--data", drawn, *TINY, "--epochs", "1", "--name", "a").code == 0
    config = json.loads(Path("runs/a/config.json").read_text())
    assert (
        config["settings"]["deterministic"] is True
        and config["processes"] == 1
        and {"threads", "device", "commit", "versions", "data"} <= set(config)
    )


def test_a_second_stop_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), cli.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after Ctrl-C: not a second Ctrl-C
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert train.StopSignals is cli.StopSignals
