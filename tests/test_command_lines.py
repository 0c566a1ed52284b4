"""The command line of each script: answers that need no torch, help, and what it sets for the libraries."""

import json
import os
import platform
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
from conftest import ROOT

SCRIPTS = ("train", "predict", "preprocess", "entry", "experiments", "report", "demo", "data", "checkpoint")
MISUSE = {  # what the command line alone shows, and words of the answer
    "train --lr 0": "--lr: 0.0 is not above 0",
    "train --box-head": "--crop-prob 1",
    "train --image-size 8": "--image-size",
    "predict": "checkpoint",
    "predict best.pt photo.jpg --split val": "either a dataset and split, or photos",
    "predict best.pt --amp fast": "--amp",
    "preprocess demo out --background-color nosuch": "--background-color",
    "preprocess demo out --box-margin 0.1": "add --crop",
    "entry best.pt out --view some": "--view",
    "experiments run nosuch": "no row is called 'nosuch'",
    "report --nosuch": "--nosuch",
    "demo . --hard": "not an empty folder",
    "data --subtask 3": "--subtask",
    "checkpoint best.pt new.pt": "--export-dtype",
}
RUN_ALL = """
import contextlib, io, json, os, runpy, sys
for package in ("torch", "torchvision", "timm", "matplotlib"):
    sys.modules[package] = None  # importing it fails
sys.path.insert(0, os.getcwd())
answers = []
for line in json.loads(sys.argv[1]):
    script, *sys.argv[1:] = line.split()
    sys.argv[0] = f"{script}.py"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(f"{script}.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""
LIBRARIES = """
import os, resource, sys
sys.path.insert(0, os.getcwd())
import cli, data, demo, experiments, preprocess, settings

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [os.environ.get("GOMP_SPINCOUNT"), min(faults() for _ in range(3)) > 100]
cli.set_up_libraries()
print(*found, os.environ.get("GOMP_SPINCOUNT"), min(faults() for _ in range(3)) > 100)
"""


def python(code: str, *arguments: str, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP", "OMP_WAIT", "MALLOC_", "GLIBC"))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=clean | env).stdout


def test_help_and_misuse_need_no_torch():
    helps = [f"{script} --help" for script in SCRIPTS]
    answers = dict(zip([*helps, *MISUSE], json.loads(python(RUN_ALL, json.dumps([*helps, *MISUSE])))))
    for script in SCRIPTS:
        code, out, err = answers[f"{script} --help"]
        assert code == 0 and not err and f"Usage: {script}.py" in out
        examples = out.partition("Examples:")[2].splitlines()
        assert any(line.startswith(f" python {script}.py") for line in examples), out
        for before, line in pairwise(map(str.strip, examples)):  # a wrapped command could not be copied
            assert not line or line.startswith(("python ", "#")) or before.endswith("\\"), out
    for line, words in MISUSE.items():
        code, _, err = answers[line]
        assert code == 2 and words in err and err.count("\n") == 1, (line, err)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_libraries_are_set_up_where_the_user_has_not():
    """Importing sets nothing; memory that was freed is used again without page faults."""
    assert python(LIBRARIES).split() == ["None", "True", "1000", "False"]
    assert python(LIBRARIES, OMP_WAIT_POLICY="PASSIVE").split() == ["None", "True", "None", "False"]
    assert python(LIBRARIES, GOMP_SPINCOUNT="5", MALLOC_ARENA_MAX="2").split() == ["5", "True", "5", "True"]


STOPPED = """
import os, signal, sys, time, typer
sys.path.insert(0, os.getcwd())
import cli

def main() -> None:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(30)

app = typer.Typer()
app.command(context_settings={"allow_extra_args": True})(main)
cli.run_app(app)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_each_signal_that_stops_a_script_says_so(name):
    done = subprocess.run([sys.executable, "-c", STOPPED, name], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_ctrl_c_while_torch_is_imported(tmp_path):
    """It ends a script at once, without a traceback. A module in torch's place sends the signal in the import."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)")
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path)}, "stderr": subprocess.PIPE}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    process = subprocess.Popen([sys.executable, ROOT / "train.py"], text=True, **options)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == -signal.SIGINT
