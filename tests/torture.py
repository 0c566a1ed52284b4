"""Torture: runs killed at random moments and resumed; each must end with the bits of an undisturbed one.

    python tests/torture.py kills --kills 25      # 25 kills in each of four settings; about 10 minutes on two cores
    python tests/torture.py builds --kills 10     # killed while the cache is built, then two runs that start together
    python tests/torture.py same                  # workers 0, 1, 3; twice; an evaluation in mid-epoch: one hash each
    python tests/torture.py damage --inputs 300   # damaged CSVs, photos, checkpoints, config.json, preprocess.json
    python tests/torture.py starts --count 200    # runs of two epochs, stopped by random signals, all end whole
    python tests/torture.py memory                # peak of 50 epochs against 5

This shows what a process's death does, not a power loss. Children are forked from this process: a run starts at once.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import typer
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import checkpoint
import cli
import data
import demo
import evaluate
import loading
import model
import train
from loading import EvalPhotos, make_eval_loader

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)
PHASES = ("start", "decoding", "step", "validation", "checkpoint write", "CSV write", "end")
BASE = "--no-pretrained --image-size 32 --batch-size 10 --epochs 3 --t-0 2 --lr 1e-3 --threads 1 --save-every 0.02"
BASE = [*BASE.split(), "--no-pictures"]
SETTINGS = {  # 36 training photos: the last batch is short
    "dropout and drop path, bf16, CutMix": "--model test_vit --amp bf16 --cutmix Daily --cutmix Gender",
    "batch norm, float32, RandAugment": "--model test_resnet --amp off --augment randaugment",
    "dropout and drop path, float32, grad-accum": "--model test_vit --amp off --grad-accum 3 --workers 1",
    "batch norm, bf16, joint CutMix, RandomResizedCrop": (
        "--model test_efficientnet --amp bf16 --cutmix joint --resize random-resized-crop"
    ),
}
SETTINGS = {name: flags.split() for name, flags in SETTINGS.items()}


# ---------------------------------------------------------------- a child: the real train.py with hooks


def child(arguments: list[str], status: int, kill_write: int = 0, half: bool = False, kill_view: int = 0) -> None:
    """Run train.py in this process, which writes its phase into the file descriptor `status`.

    `kill_write`: die inside this write from now, `half`: with the temporary file cut in two; `kill_view`: die when so
    many views of photos were made.
    """
    torch.set_num_threads(1)
    create, fsync, view_pixels = model._create, os.fsync, loading.view_pixels
    writes, views = count(1), count(1)

    def with_dropout(name: str, pretrained: bool, **options: float) -> torch.nn.Module:
        dropout = {"drop_rate": 0.2, "proj_drop_rate": 0.1, "drop_path_rate": 0.2} if name == "test_vit" else {}
        return create(name, pretrained, **options | dropout)

    def during(phase: str, function: Callable, after: str = "step") -> Callable:
        def hooked(*args, **kwargs):
            os.pwrite(status, bytes([PHASES.index(phase)]), 0)
            try:
                return function(*args, **kwargs)
            finally:
                os.pwrite(status, bytes([PHASES.index(after)]), 0)

        return hooked

    def fsync_or_die(descriptor: int) -> None:
        """Called when a temporary file is written and not yet renamed."""
        if next(writes) == kill_write:
            if half:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def view_or_die(*args) -> torch.Tensor:
        if next(views) == kill_view:
            os.kill(os.getpid(), signal.SIGKILL)
        return view_pixels(*args)

    model._create, os.fsync, loading.view_pixels = with_dropout, fsync_or_die, view_or_die
    loading.write_views = during("decoding", loading.write_views, after="start")
    train.train_one_epoch = during("step", train.train_one_epoch)
    train.validate = during("validation", train.validate)
    checkpoint.save = during("checkpoint write", checkpoint.save)
    cli.write_csv = during("CSV write", cli.write_csv)
    evaluate.write_predictions = during("CSV write", evaluate.write_predictions)
    sys.argv = ["train.py", *arguments]
    cli.run_app(train.app)


class Run:
    """A forked child that runs train.py (or another script, without hooks), its exit code and what it said.

    `before` is called in the child first.
    """

    def __init__(self, arguments: list[str], script: str = "train", before: Callable = lambda: None, **hooks: object):
        self.status, self.output, self.code = tempfile.TemporaryFile(), tempfile.TemporaryFile(), None  # noqa: SIM115
        os.pwrite(self.status.fileno(), bytes([0]), 0)
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.dup2(self.output.fileno(), 1)
                os.dup2(self.output.fileno(), 2)
                # pytest's are other files
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                before()
                if script == "train":
                    child(arguments, self.status.fileno(), **hooks)
                sys.argv = [f"{script}.py", *arguments]
                cli.run_app(importlib.import_module(script).app)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def phase(self) -> str:
        return PHASES[os.pread(self.status.fileno(), 1, 0)[0]]

    def wait(self, seconds: float = 120) -> int | None:
        """The exit code (negative: the signal), None while it runs after so many seconds."""
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            pid, status, self.usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return self.code

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


def result(run: Path) -> str:
    """A hash of best.pt's tensors and of metrics.csv without its column of seconds."""
    digest = hashlib.sha256()
    for key, tensor in torch.load(run / "best.pt", weights_only=True)["weights"].items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    for line in (run / "metrics.csv").read_text().splitlines():
        digest.update(line.rpartition(",")[0].encode())
    return digest.hexdigest()


def dataset(folder: Path) -> Path:
    data = folder / "Data"
    if not data.exists():
        demo.draw(data, 36, 16, 4, seed=11, processes=1)
    return data


# ---------------------------------------------------------------- kills


def killed_runs(
    work: Path, name: str, flags: list[str], kills: int, seed: int, per_run: int = 5
) -> tuple[Counter, int, int]:
    """Kill runs of one setting `kills` times, `per_run` times each, and resume them to the end.

    Returns kills by phase, runs, runs that agree. Every fourth kill or more is forced inside a write, half of these
    with the temporary file cut in two.
    """
    rng, arguments = random.Random(f"{name} {seed}"), ["--data", str(dataset(work)), "--workers", "0", *BASE, *flags]
    os.chdir(work)
    undisturbed = Run([*arguments, "--name", "undisturbed"])
    began = time.monotonic()
    if undisturbed.wait() != 0:
        raise SystemExit(undisturbed.said())
    seconds = time.monotonic() - began
    expected, phases, runs, agreeing = result(work / "runs/undisturbed"), Counter(), 0, 0
    while sum(phases.values()) < kills:
        run, runs = work / f"runs/killed{runs}", runs + 1
        command = [*arguments, "--name", run.name]
        for _ in range(min(per_run, kills - sum(phases.values()))):
            in_write = rng.random() < 0.3
            started = Run(command, kill_write=rng.randint(2, 12) if in_write else 0, half=rng.random() < 0.5)
            while started.phase() in ("start", "decoding") and started.wait(0.002) is None:
                pass
            if in_write:
                code = started.wait()
            else:
                code = started.wait(rng.uniform(0, 0.7 * seconds))
                if code is None:
                    phase = started.phase()
                    os.kill(started.pid, signal.SIGKILL)
                    code = started.wait()
            if code == -signal.SIGKILL:
                phases[f"{started.phase()} (forced)" if in_write else phase] += 1
            elif code != 0:
                raise SystemExit(f"{name}: exit code {code}\n{started.said()}")
            if (run / "config.json").exists():
                command = ["--resume", str(run), "--workers", str(rng.choice([0, 0, 1]))]
            else:
                shutil.rmtree(run, ignore_errors=True)  # killed before its folder held anything
            if code == 0:
                break
        last = Run(command)
        if last.wait() != 0:
            raise SystemExit(f"{name}: cannot go on\n{last.said()}")
        agreeing += result(run) == expected
        leftovers = [path.name for path in run.iterdir() if path.name.startswith(".")]
        if leftovers:
            raise SystemExit(f"{name}: left behind: {leftovers}")
    shutil.rmtree(work / "runs")
    return phases, runs, agreeing


def killed_builds(work: Path, kills: int, seed: int) -> int:
    """Kill a run while it builds the cache, then start two runs together; returns after how many kills all was right.

    Right: each file of pixels is the undisturbed build's, byte for byte, or not there, and both runs end with the bits
    of a run without a cache, after decoding each missing view once.
    """
    rng, cache = random.Random(seed), dataset(work) / ".cache"
    os.chdir(work)
    arguments = ["--data", str(dataset(work)), "--workers", "2", *BASE, "--model", "test_resnet", "--amp", "off"]
    arguments += ["--epochs", "1", "--crop-prob", "0.5"]
    for name, place in (("uncached", "off"), ("undisturbed", "undisturbed")):
        run = Run([*arguments, "--cache", place, "--name", name])
        if run.wait() != 0:
            raise SystemExit(run.said())
    expected = result(work / "runs/uncached")
    pixels = files_of(work / "undisturbed")
    if result(work / "runs/undisturbed") != expected or len(pixels) != 3:
        raise SystemExit("an undisturbed build is wrong")
    n_views, right = 36 + 36 + 16, 0
    for _ in range(kills):
        shutil.rmtree(cache, ignore_errors=True)
        at = rng.randint(1, n_views + 30)
        moment = {"kill_view": at} if at <= n_views else {"kill_write": 1 + at % 3, "half": rng.random() < 0.5}
        killed = Run([*arguments, "--name", "killed"], **moment)
        if killed.wait() != -signal.SIGKILL or killed.phase() not in ("start", "decoding"):
            raise SystemExit(f"{moment}: not killed in the build\n{killed.said()}")
        left = files_of(cache)
        both = [Run([*arguments, "--name", name]) for name in ("first", "second")]
        ended = [run.wait() for run in both]
        lines = [line for run in both for line in run.said().splitlines()]
        agree = all(result(work / "runs" / name) == expected for name in ("first", "second"))
        whole = all(pixels[name] == content for name, content in left.items()) and files_of(cache) == pixels
        once = sum(line.startswith("decoding ") for line in lines) == len(pixels) - len(left)
        right += whole and once and ended == [0, 0] and agree
        shutil.rmtree(work / "runs")
    return right


def files_of(cache: Path) -> dict[str, bytes]:
    """The files of a cache that a run would read."""
    return {path.name: path.read_bytes() for path in cache.rglob("*.pixels")}


# ---------------------------------------------------------------- starts and stops


def stopped_runs(work: Path, n: int, seed: int) -> Counter:
    """Start a run of two epochs `n` times, each stopped by a random signal at a random moment, or resumed to its end.

    Returns how often each (signal, exit code) came about. Each run ends with the bits of an undisturbed one.
    """
    rng, ends = random.Random(seed), Counter()
    arguments = ["--data", str(dataset(work)), *BASE, *next(iter(SETTINGS.values())), "--epochs", "2"]
    os.chdir(work)
    began = time.monotonic()
    undisturbed = Run([*arguments, "--workers", "0", "--name", "undisturbed"])
    if undisturbed.wait() != 0:
        raise SystemExit(undisturbed.said())
    seconds, run, runs = time.monotonic() - began, work / "runs/run0", 0
    for _ in range(n):
        resumes = (run / "config.json").exists()
        command = ["--resume", str(run)] if resumes else [*arguments, "--name", run.name]
        started, number = Run([*command, "--workers", str(rng.choice([0, 0, 1]))]), rng.choice(STOPS)
        if started.wait(rng.uniform(0, seconds)) is None:
            os.kill(started.pid, number)
        code = started.wait(30)
        if code not in (0, 130, -number):  # before the first step a signal acts as it does on any program
            raise SystemExit(f"{signal.Signals(number).name}: exit code {code} (None: over 30 s)\n{started.said()}")
        ends[signal.Signals(number).name if code else "none", code] += 1
        if code == 0:
            if result(run) != result(work / "runs/undisturbed"):
                raise SystemExit(f"{run} ended with other bits")
            run, runs = work / f"runs/run{runs + 1}", runs + 1
        elif not (run / "config.json").exists():
            shutil.rmtree(run, ignore_errors=True)
    return ends


# ---------------------------------------------------------------- one hash


def one_hash(work: Path, flags: list[str]) -> dict[str, str]:
    """The results of one setting: twice, at 1 and 3 workers, and with an evaluation in the middle of each epoch."""
    os.chdir(work)
    workers = {"workers 0": "0", "again": "0", "workers 1": "1", "workers 3": "3"}
    hashes = {}
    for i, (variant, n) in enumerate(workers.items()):
        run = Run(["--data", str(dataset(work)), *BASE, *flags, "--workers", n, "--name", f"same{i}"])
        if run.wait() != 0:
            raise SystemExit(run.said())
        hashes[variant] = result(work / f"runs/same{i}")
    plain = train.after_step

    def evaluating(settings, state, recent, run) -> None:
        """after_step, with an evaluation of the model after each second step."""
        plain(settings, state, recent, run)
        if state.step % 2:
            samples = data.read_split(dataset(work), "val", state.model.classes).samples
            loader = make_eval_loader(EvalPhotos(samples, 32, "full"), 5, 0)
            evaluate.predict_split(state.model, loader, "full", run.amp_dtype)
            torch.rand(3), random.random()
            state.model.train()

    train.after_step = evaluating
    try:
        run = Run(["--data", str(dataset(work)), *BASE, *flags, "--workers", "0", "--name", "evaluated"])
    finally:
        train.after_step = plain
    if run.wait() != 0:
        raise SystemExit(run.said())
    hashes["an evaluation in mid-epoch"] = result(work / "runs/evaluated")
    shutil.rmtree(work / "runs")
    return hashes


# ---------------------------------------------------------------- damage


def damaged_inputs(work: Path, inputs: int) -> Counter:
    """Damage a file, start a script on it.

    It must end within 10 s, without a traceback, and with exit code 0 only where its result is whole. Returns how often
    each (kind of file, exit code) came about. Raises AssertionError for anything else.
    """
    os.chdir(work)
    clean, outcomes = dataset(work), Counter()
    flags = ["--data", str(clean), "--workers", "0", *BASE, "--model", "test_vit", "--epochs", "1"]
    assert Run([*flags, "--name", "trained"]).wait() == 0
    processed = work / "Processed"
    shutil.copytree(clean, processed)
    for split in data.SPLITS:
        header, table = data.read_table(clean, split, {})
        rows = [[*cells, "10", "10", "90", "90"] for cells, _ in table]
        cli.write_csv(processed / data.csv_name(split), [*header, *data.BOX_COLUMNS["mask"]], rows)
    treatment = {"rembg_model": "u2netp", "background_color": [0, 0, 0], "keep_background": False, "crop": "none"}
    treatment |= {"box_margin": 0.0, "checksum": "sha256:0", "weights_bytes": 4574861}
    record = {"preparation": treatment, "subtask": 1, "unfinished": []}
    (processed / "preprocess.json").write_text(json.dumps(record, indent=2))
    photo = f"val/{data.read_split(clean, 'val').samples[3].name}"
    predict = ["trial/run/best.pt", "--data", "trial/data", "--split", "val", "--workers", "0"]
    predict += ["--out", "trial/out.csv"]
    mask = ["--data", "trial/processed", "--view", "mask"]  # the last --data counts
    targets = {  # which file, and what reads it
        "CSV": ("data/Fashion-How24_sub1_val.csv", "predict", predict),
        "training CSV": ("data/Fashion-How24_sub1_train.csv", "data", ["trial/data"]),
        "image": (f"data/{photo}", "predict", predict),
        "checkpoint": ("run/best.pt", "predict", predict),
        "last.pt": ("run/last.pt", "train", ["--resume", "trial/run", "--epochs", "2"]),
        "config.json": ("run/config.json", "train", ["--resume", "trial/run", "--epochs", "2"]),
        "preprocess.json": ("processed/preprocess.json", "predict", [*predict, *mask]),
    }
    outside = set(work.rglob("*"))

    @hypothesis_settings(
        max_examples=inputs, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(draw=st.data())
    def damage(draw) -> None:
        kind = draw.draw(st.sampled_from(list(targets)))
        if sum(n for (done, _), n in outcomes.items() if done == kind) > inputs // 4:
            kind = min(targets, key=lambda one: sum(n for (done, _), n in outcomes.items() if done == one))
        name, script, arguments = targets[kind]
        shutil.rmtree(work / "trial", ignore_errors=True)  # of a trial that hypothesis gave up while it drew
        for source, folder in ((clean, "data"), (processed, "processed"), (work / "runs/trained", "run")):
            shutil.copytree(source, work / "trial" / folder, copy_function=os.link)
        path = work / "trial" / name
        content = bytearray(path.read_bytes())
        path.unlink()  # a hard link
        place = draw.draw(st.integers(0, len(content) - 1))
        how = draw.draw(st.sampled_from(["flip", "cut", "insert", "text", "number", "empty"]))
        if how == "flip":
            content[place] ^= 1 << draw.draw(st.integers(0, 7))
        elif how == "cut":
            del content[place:]
        elif how == "insert":
            content[place:place] = draw.draw(st.binary(min_size=1, max_size=40))
        elif how == "text":
            content[place : place + 8] = draw.draw(st.text(max_size=12)).encode("utf-8", "surrogatepass")
        elif how == "number":
            odd = ["1e999", "-1", "99999999999999999999", "NaN", "null", "[]", "../../x", "{}", '"']
            content[place : place + 3] = draw.draw(st.sampled_from(odd)).encode()
        else:
            content.clear()
        path.write_bytes(content)
        run = None
        if sum(outcomes.values()) % 25 == 24:  # the real command now and then: its imports take most of the time
            command = [sys.executable, ROOT / f"{script}.py", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            code, said = done.returncode, done.stdout + done.stderr
        else:
            run = Run(arguments, script)
            code, said = run.wait(10), run.said()
        try:
            assert code in (0, 1, 2), f"{kind} ({how}): exit code {code}\n{said}"
            assert "Traceback" not in said, f"{kind} ({how}):\n{said}"
            assert code == 0 or "error:" in said, f"{kind} ({how}): no message\n{said}"
            if code == 0 and script == "predict":
                lines = (work / "trial/out.csv").read_text().splitlines()
                asked = len(content.strip().splitlines()) if kind == "CSV" else 17  # a CSV may be cut at a row's end
                assert len(lines) == asked, f"{kind} ({how}): not all photos predicted"
            written = {path for path in work.rglob("*") if not path.is_relative_to(work / "trial")}
            assert written == outside, f"{kind}: written outside: {sorted(map(str, written ^ outside))[:5]}"
        finally:
            if code is None and run:
                os.kill(run.pid, signal.SIGKILL)
            shutil.rmtree(work / "trial")
        outcomes[kind, code] += 1

    damage()
    return outcomes


# ---------------------------------------------------------------- the command line

app = typer.Typer(add_completion=False)


@app.command()
def kills(kills: Annotated[int, typer.Option(help="Kills in each setting.")] = 25, seed: int = 0) -> None:
    """Kill and resume runs of four settings; exit code 1 where one ends with other bits."""
    wrong = 0
    for name, flags in SETTINGS.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            phases, runs, agreeing = killed_runs(Path(work), name, flags, kills, seed)
        wrong += runs - agreeing
        took = f"{time.monotonic() - began:.0f} s"
        same = f"{agreeing} runs end with the undisturbed run's bits ({took})"
        print(f"{name}: {sum(phases.values())} kills of {runs} runs, {same}")
        for phase, n in phases.most_common():
            print(f"  {phase:28s} {n:3d} {'#' * n}", flush=True)
    raise SystemExit(int(wrong > 0))


@app.command()
def builds(kills: Annotated[int, typer.Option(help="Kills while the cache is built.")] = 10, seed: int = 0) -> None:
    """Kill runs while they build the cache; exit code 1 where a pixel or a bit is wrong afterwards."""
    with tempfile.TemporaryDirectory() as work:
        right = killed_builds(Path(work), kills, seed)
    print(f"{kills} kills while the cache was built, then two runs at once: after {right} all files and bits are right")
    raise SystemExit(int(right < kills))


@app.command()
def starts(count: Annotated[int, typer.Option(help="Starts.")] = 200, seed: int = 0) -> None:
    """Start a run again and again, and stop it by signals; prints how often each signal ended in which exit code."""
    with tempfile.TemporaryDirectory() as work:
        ends = stopped_runs(Path(work), count, seed)
    for (number, code), n in sorted(ends.items()):
        print(f"{number:8s} exit code {code:4d}: {n:3d}")
    print(f"{sum(ends.values())} starts: each ended within 30 s, each finished run with the undisturbed run's bits")


@app.command()
def same() -> None:
    """One hash at any number of workers, run twice, and with an evaluation in mid-epoch; exit code 1 otherwise."""
    wrong = 0
    for name, flags in SETTINGS.items():
        with tempfile.TemporaryDirectory() as work:
            hashes = one_hash(Path(work), flags)  # the last --workers counts
        wrong += len(set(hashes.values())) > 1
        print(name, *(f"  {value[:16]}  {variant}" for variant, value in hashes.items()), sep="\n", flush=True)
    raise SystemExit(int(wrong > 0))


@app.command()
def damage(inputs: Annotated[int, typer.Option(help="How many damaged files.")] = 300) -> None:
    """Damage input files of all kinds; prints how often each kind ended with which exit code."""
    with tempfile.TemporaryDirectory() as work:
        outcomes = damaged_inputs(Path(work), inputs)
    for kind in sorted({kind for kind, _ in outcomes}):
        print(f"{kind:16s}", *(f"exit code {code}: {outcomes[kind, code]:3d}  " for code in (0, 1, 2)))
    print(f"{sum(outcomes.values())} inputs: no traceback, none over 10 s, nothing written elsewhere")


@app.command()
def memory() -> None:
    """The peak memory of 50 epochs against that of 5."""
    peaks = {}
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        for epochs in (5, 50):
            flags = ["--data", str(dataset(Path(work))), "--workers", "0", *BASE, *next(iter(SETTINGS.values()))]
            flags += ["--epochs", str(epochs)]
            run = Run([*flags, "--name", f"run{epochs}", "--save-every", "1000"])
            assert run.wait(600) == 0, run.said()
            peaks[epochs] = run.usage.ru_maxrss / 1024
    print(f"peak memory: {peaks[5]:.0f} MiB in 5 epochs, {peaks[50]:.0f} MiB in 50: {peaks[50] / peaks[5] - 1:+.1%}")
    raise SystemExit(int(peaks[50] > 1.02 * peaks[5]))


if __name__ == "__main__":
    app()
