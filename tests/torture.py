"""Torture: runs killed at random moments and resumed, many processes against one; every run must end with the bits of an undisturbed one.

    python tests/torture.py kills --kills 25          # 25 kills in each of four settings; about 10 minutes on two cores
    python tests/torture.py same                      # workers 0, 1, 3; twice; an evaluation in mid-epoch: one hash each
    python tests/torture.py processes                 # torchrun with 2 and 3 processes against one
    python tests/torture.py damage --inputs 300       # damaged CSVs, images, checkpoints, config.json and preprocess.json
    python tests/torture.py memory                    # peak of 50 epochs against 5

This shows what a process's death does, not a power loss. Children are forked from this process, so that a run starts in no time.
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
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import typer
from hypothesis import HealthCheck, given, settings, strategies as st

import cli
import data
import demo
import loading
import model
import train

PHASES = ("start", "step", "validation", "checkpoint write", "CSV write", "end")
BASE = [
    "--no-pretrained",
    "--image-size",
    "32",
    "--batch-size",
    "10",
    "--epochs",
    "3",
    "--t-0",
    "2",
    "--lr",
    "1e-3",
    "--save-every",
    "0.02",
    "--threads",
    "1",
]
BASE += ["--no-pictures"]
SETTINGS = {  # 36 training photos: the last batch is short
    "dropout and drop path, bf16, CutMix": [
        "--model",
        "test_vit",
        "--amp",
        "bf16",
        "--cutmix",
        "Daily",
        "--cutmix",
        "Gender",
    ],
    "batch norm, float32, RandAugment": ["--model", "test_resnet", "--amp", "off", "--augment", "randaugment"],
    "dropout and drop path, float32, grad-accum": [
        "--model",
        "test_vit",
        "--amp",
        "off",
        "--grad-accum",
        "3",
        "--workers",
        "1",
    ],
    "batch norm, bf16, joint CutMix, RandomResizedCrop": [
        *("--model", "test_efficientnet", "--amp", "bf16"),
        *("--cutmix", "joint", "--resize", "random-resized-crop"),
    ],
}


# ---------------------------------------------------------------- a child: the real train.py with hooks


def child(arguments: list[str], status: int, kill_write: int = 0, half: bool = False) -> None:
    """Run train.py in this process. `status`: a file descriptor that says the phase; `kill_write`: die inside so many writes from now."""
    torch.set_num_threads(1)
    plain_create, writes = model._create, iter(range(1, 10**6))

    def create(name: str, pretrained: bool, **wanted: float) -> torch.nn.Module:
        dropout = {"drop_rate": 0.2, "proj_drop_rate": 0.1, "drop_path_rate": 0.2} if name == "test_vit" else {}
        return plain_create(name, pretrained, **wanted | dropout)

    def during(phase: str, function):
        def hooked(*args, **kwargs):
            os.pwrite(status, bytes([PHASES.index(phase)]), 0)
            try:
                return function(*args, **kwargs)
            finally:
                os.pwrite(status, bytes([PHASES.index("step")]), 0)

        return hooked

    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        """Called when a temporary file is written and not yet renamed."""
        if next(writes) == kill_write:
            if half:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        plain_fsync(descriptor)

    model._create, cli.os.fsync = create, fsync
    train.train_one_epoch = during("step", train.train_one_epoch)
    train.evaluate = during("validation", train.evaluate)
    train.save_checkpoint = during("checkpoint write", train.save_checkpoint)
    train.write_csv = during("CSV write", train.write_csv)
    train.write_predictions = during("CSV write", train.write_predictions)
    sys.argv = ["train.py", *arguments]
    cli.run_app(train.app)


class Run:
    """A forked child that runs train.py (or another script, without hooks), its exit code and what it said."""

    def __init__(self, arguments: list[str], script: str = "train", **hooks: object):
        self.status, self.output, self.code = tempfile.TemporaryFile(), tempfile.TemporaryFile(), None  # noqa: SIM115
        os.pwrite(self.status.fileno(), bytes([0]), 0)
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.dup2(self.output.fileno(), 1)
                os.dup2(self.output.fileno(), 2)
                sys.stdout, sys.stderr = (
                    os.fdopen(1, "w", closefd=False),
                    os.fdopen(2, "w", closefd=False),
                )  # pytest's are other files
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
    """Kill runs of one setting `kills` times, `per_run` times each, and resume them to the end. Returns kills by phase, runs, runs that agree.

    Every fourth kill or more is forced inside a write: half of these with the temporary file cut in two.
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
            while started.phase() == "start" and started.wait(0.002) is None:
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


# ---------------------------------------------------------------- one hash


def one_hash(work: Path, flags: list[str]) -> dict[str, str]:
    """The results of one setting: twice, at 1 and 3 workers, and with an evaluation in the middle of each epoch."""
    os.chdir(work)
    variants = {
        "workers 0": ["--workers", "0"],
        "again": ["--workers", "0"],
        "workers 1": ["--workers", "1"],
        "workers 3": ["--workers", "3"],
    }
    hashes = {}
    for i, (variant, more) in enumerate(variants.items()):
        run = Run(["--data", str(dataset(work)), *BASE, *flags, *more, "--name", f"same{i}"])
        if run.wait() != 0:
            raise SystemExit(run.said())
        hashes[variant] = result(work / f"runs/same{i}")
    plain = train.train_one_epoch

    def evaluating(parts, batches, criteria, state, order, flags, amp_dtype, after_step):
        """train_one_epoch, with an evaluation of the model after each second step."""
        split = data.read_split(dataset(work), "val", parts["model"].classes)
        loader = loading.make_loader(loading.Photos(split.samples, 32), 5, 0)

        def then(images: int) -> None:
            after_step(images)
            if state["step"] % 2:
                train.predict_logits(parts["model"], loading.batches(loader), torch.device("cpu"), amp_dtype)
                torch.rand(3), random.random()
                parts["model"].train()

        return plain(parts, batches, criteria, state, order, flags, amp_dtype, then)

    train.train_one_epoch = evaluating
    try:
        run = Run(["--data", str(dataset(work)), *BASE, *flags, "--workers", "0", "--name", "evaluated"])
    finally:
        train.train_one_epoch = plain
    if run.wait() != 0:
        raise SystemExit(run.said())
    hashes["an evaluation in mid-epoch"] = result(work / "runs/evaluated")
    shutil.rmtree(work / "runs")
    return hashes


# ---------------------------------------------------------------- one process or several


def watched(out: str, arguments: list[str]) -> None:
    """Run train.py as one of torchrun's processes; write a hash of each training image as it enters the model, and each step's losses."""
    shown, losses = [], []
    plain_forward, plain_epoch = model.FashionModel.forward, train.train_one_epoch

    def forward(self, images):
        if self.training:  # blank images stand in where a process has none
            shown.extend(
                hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in images.cpu() if image.any()
            )
        return plain_forward(self, images)

    def epoch(parts, batches, criteria, state, order, flags, amp_dtype, after_step):
        shown.clear()
        before = torch.zeros(2, len(criteria))

        def then(images: int) -> None:
            nonlocal before
            difference, before = state["totals"] - before, state["totals"].clone()
            losses.append({"images": list(shown), "loss": (difference[0] / difference[1]).sum().item()})
            shown.clear()
            after_step(images)

        return plain_epoch(parts, batches, criteria, state, order, flags, amp_dtype, then)

    model.FashionModel.forward, train.train_one_epoch = forward, epoch
    sys.argv = ["train.py", *arguments]
    try:
        cli.run_app(train.app)
    finally:
        Path(f"{out}.{os.environ.get('RANK', 0)}").write_text(json.dumps(losses))


def processes_agree(work: Path, flags: list[str], counts: list[int]) -> dict[int, tuple[bool, float, bool]]:
    """For each number of processes against one: whether every step shows the same images, the largest relative difference of a
    step's loss, and whether the last validation is the same."""
    os.chdir(work)
    steps, tables = {}, {}
    for count in [1, *counts]:
        arguments = [
            "watched",
            f"steps{count}",
            "--data",
            str(dataset(work)),
            "--workers",
            "0",
            *BASE,
            *flags,
            "--name",
            f"processes{count}",
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, __file__, *arguments], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        ranks = [json.loads((work / f"steps{count}.{rank}").read_text()) for rank in range(count)]
        steps[count] = [
            ([image for rank in ranks for image in rank[i]["images"]], ranks[0][i]["loss"])
            for i in range(len(ranks[0]))
        ]
        tables[count] = (work / f"runs/processes{count}/metrics.csv").read_text().splitlines()[-1].split(",")[4:-1]
    shutil.rmtree(work / "runs")
    outcome = {}
    for count in counts:
        same = [a[0] for a in steps[count]] == [a[0] for a in steps[1]]
        difference = max(abs(a[1] - b[1]) / abs(b[1]) for a, b in zip(steps[count][:20], steps[1][:20]))
        outcome[count] = same, difference, tables[count] == tables[1]
    return outcome


# ---------------------------------------------------------------- damage


def damaged_inputs(work: Path, inputs: int) -> Counter:
    """Damage a file, start a script on it: it must end within 10 s, without a traceback, with exit code 0 only if its result is whole.

    Returns how often each (kind of file, exit code) came about. Raises AssertionError for anything else.
    """
    os.chdir(work)
    clean, outcomes = dataset(work), Counter()
    flags = ["--data", str(clean), "--workers", "0", *BASE, "--model", "test_vit", "--epochs", "1"]
    assert Run([*flags, "--name", "trained"]).wait() == 0
    processed = work / "Processed"
    shutil.copytree(clean, processed)
    for split in data.SPLITS:
        table = data.read_table(clean, split, {})
        rows = [[*cells, "10", "10", "90", "90"] for cells, _ in table.rows]
        cli.write_csv(processed / table.csv.name, [*table.header, *data.BOX_COLUMNS["mask"]], rows)
    treatment = {
        "rembg_model": "u2netp",
        "background_color": [0, 0, 0],
        "keep_background": False,
        "crop": "none",
        "box_margin": 0.0,
    }
    record = {
        "preparation": treatment | {"checksum": "md5:0", "weights_bytes": 4574861},
        "subtask": 1,
        "unfinished": [],
    }
    (processed / "preprocess.json").write_text(json.dumps(record, indent=2))
    photo = f"val/{data.read_split(clean, 'val').samples[3].name}"
    predict = [
        "trial/run/best.pt",
        "--data",
        "trial/data",
        "--split",
        "val",
        "--workers",
        "0",
        "--out",
        "trial/out.csv",
    ]
    targets = {  # which file, and what reads it
        "CSV": ("data/Fashion-How24_sub1_val.csv", "predict", predict),
        "training CSV": ("data/Fashion-How24_sub1_train.csv", "data", ["trial/data"]),
        "image": (f"data/{photo}", "predict", predict),
        "checkpoint": ("run/best.pt", "predict", predict),
        "last.pt": ("run/last.pt", "train", ["--resume", "trial/run", "--epochs", "2"]),
        "config.json": ("run/config.json", "train", ["--resume", "trial/run", "--epochs", "2"]),
        "preprocess.json": (
            "processed/preprocess.json",
            "predict",
            [*predict[:2], "trial/processed", *predict[3:], "--view", "mask"],
        ),
    }
    outside = set(work.rglob("*"))

    @settings(
        max_examples=inputs, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(draw=st.data())
    def damage(draw) -> None:
        kind = draw.draw(st.sampled_from(list(targets)))
        if sum(n for (done, _), n in outcomes.items() if done == kind) > inputs // 4:
            kind = min(targets, key=lambda one: sum(n for (done, _), n in outcomes.items() if done == one))
        name, script, arguments = targets[kind]
        for source, folder in ((clean, "data"), (processed, "processed"), (work / "runs/trained", "run")):
            shutil.copytree(source, work / "trial" / folder, copy_function=os.link)
        path = work / "trial" / name
        content = bytearray(path.read_bytes())
        path.unlink()  # a hard link
        place, how = (
            draw.draw(st.integers(0, len(content) - 1)),
            draw.draw(st.sampled_from(["flip", "cut", "insert", "text", "number", "empty"])),
        )
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
        if (
            sum(outcomes.values()) % 25 == 24
        ):  # now and then through the real command, whose imports take most of the time
            done = subprocess.run(
                [sys.executable, ROOT / f"{script}.py", *arguments], capture_output=True, text=True, timeout=60
            )
            code, said = done.returncode, done.stdout + done.stderr
        else:
            run = Run(arguments, script)
            code, said = run.wait(10), run.said()
        try:
            assert code in (0, 1, 2), f"{kind} ({how}): exit code {code}\n{said}"
            assert "Traceback" not in said, f"{kind} ({how}):\n{said}"
            assert code == 0 or "error:" in said, f"{kind} ({how}): no message\n{said}"
            if code == 0 and script == "predict":
                assert len((work / "trial/out.csv").read_text().splitlines()) == 17, (
                    f"{kind} ({how}): not all photos predicted"
                )
            assert {path for path in work.rglob("*") if not path.is_relative_to(work / "trial")} == outside, (
                f"{kind}: written outside"
            )
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
        print(
            f"{name}: {sum(phases.values())} kills of {runs} runs, {agreeing} runs end with the undisturbed run's bits ({time.monotonic() - began:.0f} s)"
        )
        for phase, n in phases.most_common():
            print(f"  {phase:28s} {n:3d} {'#' * n}", flush=True)
    raise SystemExit(int(wrong > 0))


@app.command()
def same() -> None:
    """One hash at any number of workers, run twice, and with an evaluation in mid-epoch; exit code 1 otherwise."""
    wrong = 0
    for name, flags in SETTINGS.items():
        with tempfile.TemporaryDirectory() as work:
            hashes = one_hash(
                Path(work), [flag for i, flag in enumerate(flags) if "--workers" not in flags[max(i - 1, 0) : i + 1]]
            )
        wrong += len(set(hashes.values())) > 1
        print(name, *(f"  {value[:16]}  {variant}" for variant, value in hashes.items()), sep="\n", flush=True)
    raise SystemExit(int(wrong > 0))


@app.command()
def processes() -> None:
    """torchrun with 2 and 3 processes against one; exit code 1 where the images differ or the losses by more than 1e-5."""
    flags = [
        "--model",
        "test_vit",
        "--amp",
        "off",
        "--cutmix",
        "Daily",
        "--cutmix",
        "Gender",
        "--epochs",
        "6",
        "--grad-accum",
        "2",
    ]
    with tempfile.TemporaryDirectory() as work:
        outcome = processes_agree(Path(work), flags, [2, 3])
    for count, (images, difference, table) in outcome.items():
        shown, end = ("equal" if images else "DIFFER"), ("equal" if table else "differs")
        print(
            f"{count} processes: images {shown} in every step, losses of 20 steps within {difference:.1e}, last validation {end}"
        )
    raise SystemExit(int(any(not images or difference > 1e-5 for images, difference, _ in outcome.values())))


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
            flags = [
                "--data",
                str(dataset(Path(work))),
                "--workers",
                "0",
                *BASE,
                *next(iter(SETTINGS.values())),
                "--epochs",
                str(epochs),
            ]
            run = Run([*flags, "--name", f"run{epochs}", "--save-every", "1000"])
            assert run.wait(600) == 0, run.said()
            peaks[epochs] = run.usage.ru_maxrss / 1024
    print(f"peak memory: {peaks[5]:.0f} MiB in 5 epochs, {peaks[50]:.0f} MiB in 50: {peaks[50] / peaks[5] - 1:+.1%}")
    raise SystemExit(int(peaks[50] > 1.02 * peaks[5]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["watched"]:
        watched(sys.argv[2], sys.argv[3:])
    app()
