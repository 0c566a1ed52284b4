"""Where people run it: little shared memory, cgroups, no home, schedulers' signals, other programs' weights."""

import argparse
import ctypes
import dataclasses
import errno
import fcntl
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torture
from conftest import ROOT, TINY

import cli
import demo
import loading
import train
from checkpoint import load_weights, read
from cli import StopSignals
from model import build_model
from settings import Settings

ROOT_ALONE = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="only root may mount, change its user, or make a cgroup"
)
CLASSES = {"Daily": ("0", "1")}


def small_shared_memory(size: str) -> None:
    """Mount a small /dev/shm, as a container has it, that this process alone sees."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        os._exit(77)
    for command in ("mount --make-rprivate /", f"mount -t tmpfs -o size={size} tmpfs /dev/shm"):
        if subprocess.run(command.split()).returncode:
            os._exit(77)


def start(drawn: Path, *flags: str, before=lambda: None) -> torture.Run:
    return torture.Run(["--data", str(drawn), *TINY, "--epochs", "1", "--t-0", "1", *flags], before=before)


def start_long(drawn: Path, *flags: str, before=lambda: None) -> torture.Run:
    """A run with two loading processes, in its steps."""
    long = ["--workers", "2", "--epochs", "1000", "--patience", "1000", "--name", "long"]
    run = start(drawn, *long, *flags, before=before)
    while not Path("runs/long/metrics.csv").exists() and run.wait(0.02) is None:
        pass
    if run.code == 77:
        pytest.skip("this machine lets nobody mount")
    assert run.code is None, run.said()
    return run


def loading_processes(run: torture.Run) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


# ---------------------------------------------------------------- shared memory, loading processes


@ROOT_ALONE
@pytest.mark.parametrize("size, instead", [("100k", "no"), ("2m", "5")])
def test_little_shared_memory_means_fewer_loading_processes(tmp_path, drawn, monkeypatch, size, instead):
    monkeypatch.chdir(tmp_path)
    run = start(drawn, "--workers", "9", before=lambda: small_shared_memory(size))
    if run.wait() == 77:
        pytest.skip("this machine lets nobody mount")
    notes = [line for line in run.said().splitlines() if "shared memory" in line]
    assert run.code == 0 and len(notes) == 1, run.said()
    assert f"{instead} loading processes in the place of 9; docker run --shm-size 2g" in notes[0]


@ROOT_ALONE
def test_shared_memory_that_another_program_fills_ends_the_run_in_one_line(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = start_long(drawn, before=lambda: small_shared_memory("8m"))
    with open(f"/proc/{run.pid}/root/dev/shm/other", "wb") as file:
        for _ in range(3000):  # again and again: what the run's batches held is free for a moment
            with suppress(OSError):
                while True:
                    os.write(file.fileno(), bytes(4096))
            if run.wait(0.02) is not None:
                break
    assert run.code == 1, run.said()
    assert cli.LOADER_DIED in run.said() and "Traceback" not in run.said()


def test_training_in_a_thread_of_another_program(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"model": "test_resnet", "pretrained": False, "image_size": 32, "epochs": 1, "t_0": 1, "lr": 1e-3}
    settings = Settings(data=str(drawn), batch_size=16, workers=2, pictures=False, name="a", **options)
    thread = threading.Thread(target=train.train, args=[settings])
    with multiprocessing.Pool(1) as pool:
        thread.start()
        thread.join()
        assert Path("runs/a/best.pt").exists()
        waiting, failing = pool.apply_async(time.sleep, [10]), dataclasses.replace(settings, name="b", lr=1e30)
        with pytest.raises(ValueError, match="not finite"):
            train.train(failing)
        with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError, match="not finite"):
            threads.submit(train.train, failing).result()
        waiting.get(timeout=20)  # an error ends the loading processes alone


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_loading_processes_that_die_or_hang(tmp_path, drawn, monkeypatch, number):
    """Killed, they end the run. They ignore other signals; where they hang, a signal still saves and ends the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "GRACE", 1)
    run = start_long(drawn)
    workers = loading_processes(run)
    assert len(workers) == 4
    try:
        if number == signal.SIGKILL:
            os.kill(workers[0], number)
            assert run.wait(60) == 1 and cli.LOADER_DIED in run.said(), run.said()
        else:
            for worker in workers:
                os.kill(worker, number)
                os.kill(worker, signal.SIGSTOP)
            os.kill(run.pid, number)
            assert run.wait(30) == 130 and "to continue: " in run.said(), run.said()
            assert read("runs/long/last.pt")["epoch"] > 0
        assert "Traceback" not in run.said()
    finally:
        for pid in (run.pid, *workers):
            if os.path.exists(f"/proc/{pid}"):
                os.kill(pid, signal.SIGKILL)


def test_silent_loading_processes_end_the_run(monkeypatch):
    monkeypatch.setattr(cli, "SILENT", 1)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="gave nothing"), StopSignals() as signals:
        next(signals.waiting_for(iter(lambda: time.sleep(30), 0)))
    assert time.monotonic() - began < 10


def test_a_process_that_may_start_none_loads_by_itself():
    with multiprocessing.Pool(1) as pool:
        assert pool.apply(loading.default_workers, [None]) == 0 and pool.apply(loading.default_workers, [2]) == 2


def test_outside_of_it_and_in_a_thread_the_batches_come_without_alarms():
    for signals in (StopSignals(), ThreadPoolExecutor(1).submit(StopSignals().__enter__).result()):
        left = (signal.alarm(0) for _ in range(2))  # seconds to an alarm while a batch is waited for
        assert list(signals.waiting_for(left)) == [0, 0]


def test_a_signal_gives_a_slow_batch_some_time(monkeypatch):
    monkeypatch.setattr(cli, "GRACE", 3)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR1]).start()
    with StopSignals() as signals:
        slow = signals.waiting_for(time.sleep(1) or "batch" for _ in range(1))
        assert next(slow) == "batch" and signals.received


def test_a_loading_process_s_error_has_no_traceback(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(*args):
        raise KeyError("my own augmentation")

    monkeypatch.setattr(loading.TrainPhotos, "read", broken)
    run = start(drawn, "--workers", "1")
    assert run.wait() == 1
    errors = run.said().partition("error: ")[2].splitlines()
    assert len(errors) == 1 and errors[0].startswith("KeyError: 'my own augmentation'")


def test_few_open_files(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = start(drawn, "--workers", "8", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    assert run.wait() == 0, run.said()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods(tmp_path, drawn, method):
    script = f"import multiprocessing as m; m.set_start_method('{method}'); import cli, train; cli.run_app(train.app)"
    command = [sys.executable, "-c", script, "--data", str(drawn), *TINY, "--workers", "1", "--box-head"]
    command += ["--crop-prob", "0.5", "--model", "test_resnet", "--name", "other"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr


# ---------------------------------------------------------------- CPU limits


def in_child(check) -> None:
    """Assert that a function is true in a forked process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_follow_the_affinity():
    one = min(os.sched_getaffinity(0))
    in_child(lambda: os.sched_setaffinity(0, {one}) or loading.cpu_cores() == loading.default_workers(None) == 1)


@pytest.mark.parametrize(
    "file, content, cores",
    [
        ("cpu.max", "150000 100000", 2),
        ("cpu.max", "max 100000", 4),
        ("cpu/cpu.cfs_quota_us", "50000", 1),
        ("cpu/cpu.cfs_quota_us", "-1", 4),
        ("other", "", 4),
    ],
)
def test_cores_follow_the_container(tmp_path, monkeypatch, file, content, cores):
    """Limits of both versions of cgroups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / file).write_text(content + "\n")
    assert loading.cpu_cores(tmp_path) == cores


def test_processes_and_threads_follow_the_cores(monkeypatch):
    monkeypatch.setattr(loading, "cpu_cores", lambda: 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        train.set_up_torch(Settings(device="cpu"))
        assert loading.default_workers(None) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- places


@ROOT_ALONE
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here")
@pytest.mark.parametrize("home", [[], ["HOME=/"]])
def test_no_home_and_a_read_only_dataset(tmp_path, drawn, home):
    """As a user that the machine does not know, who may read everything and write into one folder."""
    os.chown(tmp_path, 12345, 12345)
    cap = "+dac_read_search"
    user = f"setpriv --reuid 12345 --regid 12345 --clear-groups --inh-caps {cap} --ambient-caps {cap}".split()
    user += ["env", "-u", "HOME", "-u", "XDG_CACHE_HOME", *home, sys.executable, str(ROOT / "train.py")]

    def call(*flags: str, folder: Path = tmp_path) -> subprocess.CompletedProcess:
        return subprocess.run([*user, *flags], cwd=folder, capture_output=True, text=True)

    done = call("--data", str(drawn), *TINY, "--pictures", "--epochs", "1", "--name", "x")
    assert done.returncode == 0 and "note: no cache (" in done.stdout, done.stdout + done.stderr
    assert "pictures: " in done.stdout
    done = call("--data", "demo", *TINY)
    assert done.returncode == 1 and "XDG_CACHE_HOME=DIR" in done.stderr and len(done.stderr.splitlines()) == 1
    done = call("--data", str(drawn), *TINY, "--cache", "off", folder=drawn)
    assert done.returncode == 1 and done.stderr.startswith("error: runs/ cannot be written here"), done.stderr


def test_no_home_names_the_variable(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OSError, match="XDG_CACHE_HOME=DIR"):
        demo.cached()


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_runs_that_cannot_be_written(run, drawn, kind):
    Path("runs").write_text("") if kind == "file" else Path("runs").symlink_to("/nowhere/runs")
    done = run("train", "--data", drawn, *TINY)
    assert done.code == 1 and done.err.startswith("error: runs/ cannot be written here (") and done.err.count("\n") == 1


def test_a_disk_without_locks(run, drawn, tmp_path, monkeypatch):
    """As some clusters' network disks."""

    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    data = shutil.copytree(drawn, tmp_path / "Data", ignore=shutil.ignore_patterns(".cache"))
    done = run("train", "--data", data, *TINY)
    assert done.code == 0 and (data / ".cache").exists(), done.err


# ---------------------------------------------------------------- started together, notebooks


def test_runs_of_one_second_have_names_of_their_own(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def same_second() -> None:
        import checkpoint

        class Clock(checkpoint.datetime):
            @classmethod
            def now(cls) -> "Clock":
                return cls(2024, 8, 11, 20, 0, 32)

        checkpoint.datetime = Clock

    runs = [start(drawn, before=same_second) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    names = {line.partition(":")[0] for run in runs for line in run.said().splitlines() if " px, best.pt" in line}
    assert names == {f"runs/20240811_200032{suffix}" for suffix in ("", "-2", "-3")}
    assert all((tmp_path / name / "best.pt").exists() for name in names)


def test_one_of_two_runs_gets_a_name(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [start(drawn, "--name", "taken") for _ in range(2)]
    assert sorted(run.wait() for run in runs) == [0, 2]
    refused = next(run.said() for run in runs if run.code == 2)
    assert "runs/taken exists; choose another --name, or continue it: --resume runs/taken" in refused


@pytest.mark.slow
def test_a_notebook_s_environment(tmp_path, drawn):
    """A backend that is not installed here, no display, no locale, no stdin, another folder."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "OMP_NUM_THREADS") if key in os.environ}
    environment = kept | {"MPLBACKEND": "module://no_such.backend"}
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(drawn), *TINY, "--pictures", "--name", "x"]
    command = ["sh", "-c", f"{shlex.join(command)} <&- >&- 2>&-"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "runs/x/curves.png").exists(), done.stdout + done.stderr


def test_nobody_reads_the_output(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def close() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        sys.stdout = os.fdopen(1, "w", closefd=False)

    run = start(drawn, "--name", "x", before=close)
    assert run.wait() == 0 and Path("runs/x/best.pt").exists(), run.said()


def test_another_folder_and_commands_to_paste(run, drawn, tmp_path, monkeypatch):
    shutil.copytree(drawn, tmp_path / "my photos")
    done = run("train", "--data", "my photos", *TINY, "--epochs", "1", "--name", "run #1")
    words = shlex.split(done.out.splitlines()[-1].removeprefix("next: "), comments=True)
    assert words == ["python", "predict.py", "runs/run #1/best.pt"] and done.code == 0
    for other in ("", "/elsewhere/ipykernel_launcher.py"):  # a notebook's
        monkeypatch.setattr(sys, "argv", [other])
        assert cli.command("predict.py", "a b") == f"python {ROOT / 'predict.py'} 'a b'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("train", "--resume", "../runs/run #1", "--epochs", "2").code == 0
    assert run("predict", "../runs/run #1/best.pt", "--workers", "0").code == 0
    (tmp_path / "my photos").rename(tmp_path / "moved")
    done = run("train", "--resume", "../runs/run #1", "--epochs", "3")
    assert done.code == 2 and "does not exist (where it was moved, --data says its new place)" in done.err
    assert run("train", "--resume", "../runs/run #1", "--epochs", "3", "--data", tmp_path / "moved").code == 0


# ---------------------------------------------------------------- other programs' weights

OTHERS = {  # what a file holds, of the tensors of a backbone
    "timm's train.py": lambda weights: {"state_dict": weights, "args": argparse.Namespace(lr=0.1, model="x")},
    "numpy scalars": lambda weights: {"model": weights, "best": np.float64(0.5), "epoch": np.int64(3)},
    "DDP": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "a compiled model in DDP": lambda weights: {f"module._orig_mod.{key}": value for key, value in weights.items()},
    "Lightning": lambda weights: {"state_dict": {f"model.net.{key}": value for key, value in weights.items()}},
    "EMA beside": lambda weights: {
        "net": {key: value + 1 for key, value in weights.items()},
        "ema_state": weights,
        "optimizer": {"state": {}, "param_groups": []},
    },
    "AveragedModel": lambda weights: (
        {f"module.{key}": value for key, value in weights.items()} | {"n_averaged": torch.tensor(3)}
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_other_programs(tmp_path, capsys, kind):
    source = build_model("test_vit", CLASSES, 32).backbone.state_dict()
    torch.save(OTHERS[kind](source), tmp_path / "w.pth")
    model = build_model("test_vit", CLASSES, 32)
    load_weights(model, tmp_path / "w.pth", "test_vit")
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source[key]), key
    assert ("stay random" in capsys.readouterr().out) is False


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {}, "model": Evil()}, r"holds a \w+.mkdir, which is no tensor"),
        ({"epoch": 3, "history": [1]}, r"no table of tensors by name \(keys epoch, history\)"),
        ([1, 2], r"no table of tensors by name \(list\)"),
    ],
)
def test_files_without_weights_say_what_they_hold(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(build_model("test_vit", CLASSES, 32), "w.pth", "test_vit")
    assert "torch.save(model.state_dict(), FILE)" in str(error.value) and not Path("ran").exists()


def test_a_stranger_s_names_are_not_guessed(tmp_path):
    """A file of another architecture has some names that end alike."""
    source = build_model("test_vit", CLASSES, 32).backbone.state_dict()
    torch.save({f"other.{key}": value for key, value in list(source.items())[:3]}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="none of its 3 tensors fits"):
        load_weights(build_model("test_vit", CLASSES, 32), tmp_path / "w.pth", "test_vit")
