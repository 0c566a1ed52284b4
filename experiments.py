"""The notes' experiments as rows: trains them over seeds, and tells real differences from chance.

    python experiments.py run all --data Dataset --clean-data Dataset-rembg    # after preprocess.py
    python experiments.py run repeat --data demo -- --model test_vit \\
        --no-pretrained --epochs 4 --lr 1e-3
    python experiments.py table                                       # finished rows against the base
    python experiments.py compare runs/plain-seed* runs/mixed-seed*   # other runs of train.py against the first

A row is a set of flags of train.py; flags behind -- go to every run. A run is written to runs/ROW-seedSEED-KEY/, where
KEY is a hash of flags and data. A finished run is skipped, an interrupted one resumes.
"""

import csv
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from cli import NONE, OFF, Debug, atomic_write, command, examples, note, run_app, say, show_table, usage_error
from data import find_dataset, garment, join_splits, read_preparation, read_splits
from settings import read_config

# ---------------------------------------------------------------- the rows


class Row(NamedTuple):
    name: str
    data: str  # raw (--data), clean (--clean-data) or raw+clean
    flags: str  # what it changes of BASE_FLAGS
    author_test: str  # the author's score on the competition's test set
    question: str


BASE = "20240811_200032"
BASE_FLAGS = (  # the backbones here take 224 px by default
    "--model eva02_tiny_patch14_224.mim_in22k --loss ce --label-smoothing 0 --augment basic --crop-prob 1 "
    "--val-view bbox --epochs 300 --batch-size 256 --lr 5e-6 --weight-decay 0.01 --t-0 50 --t-mult 1 --eta-min 5e-7 "
    "--monitor loss --patience 50"
)
T10 = "--t-0 10 --t-mult 2"
T20, T30 = "--t-0 20 --t-mult 2 --eta-min 5e-8", "--t-0 30 --t-mult 2 --eta-min 5e-8"
LS01, LS02 = "--label-smoothing 0.1", f"--label-smoothing 0.2 {T10}"
BOTH_VIEWS = "--crop-prob 0.5 --val-view full"
FOCAL, ASYMMETRIC = "--loss focal --focal-gamma 2", "--loss asymmetric --asym-gamma-pos 1 --asym-gamma-neg 4"
CUTMIX = "--cutmix Daily --cutmix Gender --cutmix Embellishment"
MODERN = (
    f"{LS01} {T30} --crop-prob 0.7 --val-view learned --box-head "
    "--lr 5e-5 --layer-decay 0.9 --warmup-epochs 5 --ema 0.996 --drop-path 0.1"
)
WIDE = "--model tiny_vit_21m_224.dist_in22k --export-dtype int8"
ROWS = (
    Row(BASE, "raw", "", "0.498", "the base: EVA-02 Ti, cross-entropy, basic augmentation, boxed"),
    Row("20240813_212817", "raw", f"{T10} --augment randaugment", "0.474", "is RandAugment better than basic?"),
    Row("20240811_135831", "raw", "--val-view full", "0.473", "the base, validated on full photos as the test is"),
    Row("20240814_crop", "raw", f"{T10} {BOTH_VIEWS}", "", "do both views in training help?"),
    Row("20240814_215539", "raw", f"{T10} {BOTH_VIEWS} {FOCAL}", "", "does focal loss help the rare classes?"),
    Row("20240815_140358", "clean", f"{LS02} {BOTH_VIEWS}", "0.472", "background removed, both views"),
    Row("20240815_182900", "clean", LS02, "0.505", "does removing the background help?"),
    Row("20240818_asymmetric", "clean", f"{T10} {ASYMMETRIC} {LS01}", "", "does the asymmetric loss help?"),
    Row("20240822_153056", "raw+clean", LS02, "0.498", "do raw and background-free photos together help?"),
    Row("20240822_222251", "clean", f"{LS02} --resize random-resized-crop", "0.4796", "RandomResizedCrop, not squash"),
    Row("20240823_190953", "clean", f"{LS02} {CUTMIX}", "0.4567", "CutMix on every label, up to three pastes"),
    Row("20240825_cutmix_gender", "clean", f"{LS02} --cutmix Gender", "no effect", "CutMix on the hardest label alone"),
    Row("20240826_223053", "clean", f"{LS02} --epochs 1000", "", "1,000 epochs: restarts at 10, 30, 70, 150, 310, 630"),
    Row("20240828_181215", "clean", f"{LS02} --eta-min 5e-8", "", "a lowest learning rate of lr / 100"),
    Row("20240831_192322", "clean", f"{LS02} --crop-prob 0.7", "", "some full photos in training, validated boxed"),
    Row("20240910_221015", "clean", f"{LS01} {T20}", "0.504", "less smoothing, T_0 = 20"),
    Row("20240911_091050", "clean", f"{LS01} {T30}", "0.5044", "less smoothing, T_0 = 30: the last entry"),
    Row("backbone_convnext", "raw", "--model convnext_femto.d1_in1k", "below EVA-02", "a ConvNeXt of 19 MB"),
    Row("backbone_mobilenet", "raw", "--model mobilenetv3_large_100.ra_in1k", "below EVA-02", "a MobileNet of 17 MB"),
    Row("repeat", "raw", "", 'differed "a lot"', "the base again: is it the same?"),
    Row("modern", "clean", MODERN, "", "ours, not the notes': the recipe of docs/guide.md"),
    Row("wide", "raw", f"{WIDE} {MODERN}", "", "ours: modern on raw photos, four times the model in int8"),
)
NAMED = {row.name: row for row in ROWS}
FIRST_SEED = 1103
NOT_BEHIND = {"--data", "--seed", "--name", "--resume", "--fit-all", "--help"}  # of train.py, not behind --
Flags = dict[str, list[str]]  # {"--lr": ["1e-3"], "--cutmix": ["Daily", "Gender"], "--class-weights": []}
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown.", **OFF)]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV with every digit.", **OFF)]
Folders = Annotated[list[Path], typer.Argument(help="Folders; NAME-seed1, NAME-seed2, ... are one.", metavar="RUN...")]
SAME = "every prediction is the same"
NO_SETTINGS = {"seed", "name", "resume", "workers", "debug", "save_every", "cache", "pictures", "threads"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, epilog=examples(__doc__))


def parse_flags(words: list[str]) -> Flags:
    """The flags of a command line with their values. Raises BadParameter for a value without a flag."""
    flags: Flags = {}
    for word in words:
        if word.startswith("--"):
            name, *values = word.split("=", 1)
        elif flags:
            values = [word]
        else:
            raise usage_error("--", f"{word} is no flag of train.py")
        flags.setdefault(name, []).extend(values)
    return flags


def words_of(flags: Flags) -> list[str]:
    """The flags as words of a command line; a flag with several values is repeated."""
    words = []
    for flag, values in flags.items():
        words += chain.from_iterable((flag, value) for value in values) if values else [flag]
    return words


def merge_flags(row: Row, more: Flags) -> Flags:
    """The flags of a row's run. `more` replaces the row's own, except its backbone; its epochs keep their ratio."""
    base, own = parse_flags(BASE_FLAGS.split()), parse_flags(row.flags.split())
    flags = base | own | more
    if "--model" in own:
        flags["--model"] = own["--model"]
        flags.pop("--weights", None)  # they are of another backbone
    if "--epochs" in own and more.get("--epochs", ["?"])[-1].isdecimal():
        epochs = int(more["--epochs"][-1]) * int(own["--epochs"][0]) / int(base["--epochs"][0])
        flags["--epochs"] = [str(max(1, round(epochs)))]
    return flags


@app.command("list")
def list_rows() -> None:
    """List the rows: the question each answers, the author's test score, and its flags."""
    say(f"every row: {BASE_FLAGS}")
    for row in ROWS:
        score = f" (author's test score: {row.author_test})" if row.author_test else ""
        say(f"{row.name:<24}{row.question}{score}\n    {row.data} data {row.flags}".rstrip())


# ---------------------------------------------------------------- run


@app.command()
def run(
    rows: Annotated[list[str], typer.Argument(help="Rows, or `all`.", metavar="ROW...|all [-- FLAGS OF TRAIN.PY]")],
    data: Annotated[str, typer.Option(help="Dataset folder, or `demo`.")] = "Dataset",
    clean_data: Annotated[str | None, typer.Option(help="The same without backgrounds.", **NONE)] = None,
    seeds: Annotated[int, typer.Option(help=f"How many seeds: {FIRST_SEED}, {FIRST_SEED + 1}, ...", min=1)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; run nothing.", **OFF)] = False,
    debug: Debug = False,
) -> None:
    """Train rows over seeds; finished runs are skipped, interrupted ones resume."""
    behind = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    names, more = rows[: len(rows) - len(behind)], dict(sorted(parse_flags(behind).items()))
    for flag in NOT_BEHIND & more.keys():
        raise usage_error("--", f"{flag} cannot stand behind it; --data and --seeds stand before it")
    if unknown := [name for name in names if name not in (*NAMED, "all")]:
        raise usage_error("ROW", f"no row is called {unknown[0]!r}; {command('experiments.py', 'list')} prints them")
    chosen = ROWS if "all" in names else [NAMED[name] for name in dict.fromkeys(names)]
    if not chosen:
        raise usage_error("ROW", "name the rows to run, or all")
    datasets = {"raw": [data], "clean": [clean_data], "raw+clean": [data, clean_data]}
    if clean_data is None and (on_clean := [row.name for row in chosen if row.data != "raw"]):
        remedy = f"{command('preprocess.py', data, 'OUT')} writes one"
        raise usage_error("--clean-data", f"needed for {', '.join(on_clean)}; {remedy}")
    subtask = 2 if more.get("--subtask") == ["2"] else 1
    contents = {data: content_of(data, subtask, "--data")}
    if clean_data is not None:
        contents[clean_data] = content_of(clean_data, subtask, "--clean-data")

    runs, failed = list(product(chosen, range(FIRST_SEED, FIRST_SEED + seeds))), []
    for i, (row, seed) in enumerate(runs, start=1):
        flags, paths = merge_flags(row, more), datasets[row.data]
        hashes = [contents[path] for path in paths]
        record = {"row": row.name, "more": more, "flags": flags, "seed": seed, "data": hashes}
        key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
        folder = Path("runs") / f"{row.name}-seed{seed}-{key}"
        words = words_of({"--data": paths, **flags, "--seed": [str(seed)], "--name": [folder.name]})
        if (folder / "config.json").exists():
            words = ["--resume", str(folder), *words_of({"--data": paths})]  # they may have been moved
        words = [sys.executable, str(Path(__file__).resolve().with_name("train.py")), *words]
        is_finished = (folder / "experiment.json").exists()
        if is_finished or dry_run:
            print(f"# finished before: {folder}" if is_finished else shlex.join(words), flush=True)
            continue
        say(f"run {i} of {len(runs)}: {folder}")
        if start(words) != 0:
            failed.append(str(folder))
            continue
        record |= {"raw": contents[data], "commit": read_config(folder).get("commit")}
        with atomic_write(folder / "experiment.json") as f:
            f.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    if not dry_run:
        say(f"{len(runs)} runs are finished; next: {command('experiments.py', 'table')}")


def content_of(data: str, subtask: int, flag: str) -> str:
    """A hash of a dataset's training and validation: of its CSVs, and of its photos' names and sizes in bytes."""
    if data == "demo":  # drawn by demo.py
        return data
    root = find_dataset(data, subtask, flag)
    with redirect_stdout(sys.stderr):  # its notes: --dry-run prints commands alone
        splits = read_splits([root], subtask)
    content = join_splits(splits).fingerprint + json.dumps(read_preparation(root))
    return hashlib.sha256(content.encode()).hexdigest()


def start(words: list[str]) -> int:
    """Run a command line to its end and return its exit code. An interruption ends the command too."""
    process = subprocess.Popen(words)
    try:
        return process.wait()
    finally:
        process.terminate()  # where it has not ended: train.py saves its state
        process.wait()


# ---------------------------------------------------------------- table and compare


@dataclass
class Run:
    """What train.py left in a folder; of the validation images, those with at least one known label."""

    folder: Path
    row: str  # "" where `run` did not start it
    more: Flags  # the flags behind --
    seed: int
    commit: str | None
    flags: Flags  # all flags of the experiment; {} where `run` did not start it
    data: list[str]  # hashes of the datasets; [] where `run` did not start it
    raw: str | None  # the hash of --data, for rows without backgrounds too; None where `run` did not start it
    settings: dict  # of config.json, with the fingerprint of the data
    epochs: int  # that it has
    images: list[tuple[str, ...]]  # sorted: (name, true class of each label)
    predicted: np.ndarray  # str (images, labels)
    correct: np.ndarray  # float64 (images, labels): 1, 0, or NaN where the true class is not known
    accuracies: dict[str, float]  # Top-1: best_mean, best_LABEL, ..., last_mean, last_LABEL, ...


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        return list(csv.DictReader(f, strict=True))


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises ValueError where one of its files is missing or damaged."""
    try:
        path = folder / "experiment.json"
        record = json.loads(path.read_bytes()) if path.exists() else {"row": "", "more": {}}
        config, metrics = read_config(folder), read_csv(folder / "metrics.csv")
        settings = config["settings"] | {"data": config.get("data")}
        rows = read_csv(folder / "val_predictions.csv")
        labels = [label for label in rows[0] if any(row[label] and row.get(f"{label}_predicted") for row in rows)]
        rows = [row for row in rows if any(row[label] for label in labels)]
        rows.sort(key=itemgetter("image_name", *labels))
        truth = np.array([[row[label] for label in labels] for row in rows])
        predicted = np.array([[row[f"{label}_predicted"] for label in labels] for row in rows])
        correct = np.where(truth == "", np.nan, truth == predicted)
        top1 = np.nanmean(correct, axis=0)
        accuracies = {"best_mean": top1.mean()} | {f"best_{label}": top1[i] for i, label in enumerate(labels)}
        accuracies |= {f"last_{label}": float(metrics[-1][f"val_top1_{label}"]) for label in ("mean", *labels)}
        row, more, seed, commit = record["row"], record["more"], settings["seed"], config.get("commit")
        flags, data, raw, epochs = record.get("flags", {}), record.get("data", []), record.get("raw"), len(metrics)
        images = [(row["image_name"], *classes) for row, classes in zip(rows, truth.tolist())]
        return Run(
            folder, row, more, seed, commit, flags, data, raw, settings, epochs, images, predicted, correct, accuracies
        )
    except Exception as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"no {Path(error.filename).name}" if missing else f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is no complete run of train.py with validation ({reason})") from None


def read_experiments() -> list[list[Run]]:
    """The finished experiments in runs/ by row, flags, data and seed; of two alike the newer. Notes what it leaves."""
    groups: dict[tuple[int, str], dict[int, Run]] = {}
    for path in sorted(Path("runs").glob("*/experiment.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            found = read_run(path.parent)
            for key, to in (("epochs", "{} epochs"), ("patience", "--patience {}")):
                value, flag = found.settings.get(key), found.flags.get(f"--{key}")
                if value and flag and int(flag[-1]) != value:
                    raise ValueError(f"{found.folder} was resumed to {to.format(value)} since")
            if found.row not in NAMED:
                raise ValueError(f"{found.folder} is of {found.row!r}, which is no row any more")
            setting = (list(NAMED).index(found.row), json.dumps([found.more, found.data]))
            groups.setdefault(setting, {})[found.seed] = found
        except ValueError as error:
            note(f"left aside: {error}")
    return [list(runs.values()) for _, runs in sorted(groups.items())]


def per_photo(correct: np.ndarray) -> np.ndarray:
    """(images, labels) -> (images,), whose mean is `best_mean`: labels count alike, however few photos have them."""
    known = (~np.isnan(correct)).mean(axis=0)
    return np.nansum(correct / known, axis=1) / len(known)


def per_garment(images: list[str], differences: np.ndarray) -> np.ndarray:
    """Differences (images, seeds) as (garments, seeds): sums over a garment's photos, scaled so that the mean stays."""
    names, index = np.unique([garment(image) for image in images], return_inverse=True)
    sums = np.zeros((len(names), differences.shape[1]))
    np.add.at(sums, index, differences)
    return sums * len(names) / len(images)


def mean_squares(differences: np.ndarray) -> tuple[tuple[float, int], ...]:
    """(mean square, degrees of freedom) of units, seeds and residual: the two-way analysis of variance."""
    units, seeds = differences.shape
    mean = differences.mean()
    of_units, of_seeds = differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    residual = ((differences - of_units - of_seeds + mean) ** 2).sum()
    sums = (seeds * ((of_units - mean) ** 2).sum(), units * ((of_seeds - mean) ** 2).sum(), residual)
    freedom = (units - 1, seeds - 1, (units - 1) * (seeds - 1))
    return tuple((float(total / df), df) for total, df in zip(sums, freedom))


def interval(differences: np.ndarray) -> tuple[float, float, float | None]:
    """(mean, half-width of its 95 % interval, degrees of freedom) of paired differences (units, seeds).

    Crossed random effects: difference = mean + unit + seed + residual. The variance of the mean is
    (MS_units + MS_seeds - MS_residual) / (units x seeds); a negative component counts as 0. Degrees of freedom by
    Satterthwaite (1946). Where all differences are equal, the half-width is 0 and the degrees are None.
    """
    from scipy.special import stdtrit  # takes longer to import than all else here

    squares = mean_squares(differences)
    of_units, of_seeds, residual = (square for square, _ in squares)
    variance = (max(of_units, residual) + max(of_seeds, residual) - residual) / differences.size
    if variance <= 1e-18:  # rounding
        return float(differences.mean()), 0.0, None
    df = variance**2 / sum((square / differences.size) ** 2 / df for square, df in squares)
    return float(differences.mean()), float(stdtrit(df, 0.975) * math.sqrt(variance)), df


@dataclass
class Line:
    """What the table says of runs that differ in their seed alone. The fields are the columns of its CSV."""

    row: str
    flags: str
    seeds: int
    accuracies: dict[str, float | None]  # means over the seeds; COLUMN_sd: their standard deviations
    garments: int | None = None
    difference: float | None = None  # to the reference at the best epoch
    low: float | None = None  # the 95 % interval
    high: float | None = None
    df: float | None = None  # its degrees of freedom
    verdict: str = ""
    note: str = ""
    author_test: str | None = None  # None where the lines are no rows


def new_line(name: str, flags: Flags, runs: list[Run]) -> Line:
    """A line with the accuracies of runs, before they are compared."""
    accuracies = {}
    for column in runs[0].accuracies:
        values = [run.accuracies[column] for run in runs]
        accuracies[column] = float(np.mean(values))
        accuracies[f"{column}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Line(name, shlex.join(words_of(flags)), len(runs), accuracies)


def check_images(runs: list[Run]) -> None:
    """Raises ValueError where runs were validated on different images."""
    first = runs[0]
    for other in runs:
        if (other.images, list(other.accuracies)) != (first.images, list(first.accuracies)):
            raise ValueError(f"{other.folder} and {first.folder} were validated on different images or labels")


def compare_runs(line: Line, runs: list[Run], reference: list[Run]) -> None:
    """Fill `line` with the difference of `runs` to `reference`. Raises ValueError where the images differ."""
    check_images([*reference, *runs])
    pairs = [(run, other) for run in runs for other in reference if run.seed == other.seed]
    pairs.sort(key=lambda pair: pair[0].seed)
    notes = [f"{len(pairs)} seeds in common"] if len(pairs) < len(runs) else []
    if len({run.commit for pair in pairs for run in pair}) > 1:
        notes.append("the commits differ")
    if pairs:
        if all((run.predicted == other.predicted).all() for run, other in pairs):
            notes.append(SAME)
        differences = [per_photo(run.correct) - per_photo(other.correct) for run, other in pairs]
        units = per_garment([name for name, *_ in runs[0].images], np.stack(differences, axis=1))
        line.garments, line.difference = len(units), float(units.mean())
    line.note, line.verdict = "; ".join(notes), "too few seeds"
    if len(pairs) >= 3:
        mean, half, line.df = interval(units)
        line.low, line.high = mean - half, mean + half
        line.verdict = "real" if abs(mean) > half else "not told apart"


def compare_to_base(line: Line, runs: list[Run], groups: list[list[Run]]) -> None:
    """Compare a row with the base under its flags behind --, a base with the base under most, but not all, of them."""
    more = runs[0].more
    bases = [group for group in groups if group[0].row == BASE and group[0].raw == runs[0].raw]
    if line.row == BASE:
        bases = [base for base in bases if base[0].more.items() < more.items()]
    else:
        bases = [base for base in bases if base[0].more == more]
    if not bases:
        line.verdict = "the base" if line.row == BASE else "no base run with these flags"
        return
    base = max(bases, key=lambda base: len(base[0].more))
    compare_runs(line, runs, base)
    if line.row == BASE:
        added = {flag: values for flag, values in more.items() if flag not in base[0].more}
        against = f"against the base without {' '.join(words_of(added))}"
        line.note = "; ".join(filter(None, [line.note, against]))


@app.command()
def table(markdown: Markdown = False, as_csv: AsCsv = False, debug: Debug = False) -> None:
    """Compare finished rows with the base: accuracies over seeds, differences with a 95 % interval, author's scores."""
    groups, lines, refused = read_experiments(), [], []
    if not groups:
        raise ValueError(f"runs/ holds no finished experiment; {command('experiments.py', 'run', 'ROW')} starts one")
    for runs in groups:
        line = new_line(runs[0].row, runs[0].more, runs)
        line.author_test = NAMED[line.row].author_test
        lines.append(line)
        try:
            compare_to_base(line, runs, groups)
        except ValueError as error:
            line.verdict = "refused"
            refused.append(f"{error}; move one of them out of runs/ and run it again")
    print_lines(lines, "the base", markdown, as_csv)
    if refused:
        raise ValueError("\n".join(refused))


@app.command()
def compare(folders: Folders, markdown: Markdown = False, as_csv: AsCsv = False, debug: Debug = False) -> None:
    """Compare runs of train.py, or groups of them over seeds, with the first of them."""
    groups: dict[str, list[Run]] = {}
    try:
        for folder in dict.fromkeys(folders):
            found = read_run(folder)
            name = re.sub(r"-seed\d+(-[0-9a-f]{8})?$", "", str(folder))
            runs = groups.setdefault(" ".join([name, *words_of(found.more)]), [])
            if equal := [run.folder for run in runs if run.seed == found.seed]:
                raise ValueError(f"{equal[0]} and {folder} have one --seed, {found.seed}; give one of them")
            runs.append(found)
        lines = [new_line(name, {}, runs) for name, runs in groups.items()]
        lines[0].verdict = "the first"
        check_images(groups[lines[0].row])
        for line in lines[1:]:
            compare_runs(line, groups[line.row], groups[lines[0].row])
        for line in lines:
            line.note = "; ".join(filter(None, [line.note, *remarks(groups[line.row])]))
    except ValueError as error:
        raise usage_error("RUN", error) from None
    print_lines(lines, lines[0].row, markdown, as_csv)


def remarks(runs: list[Run]) -> list[str]:
    """What a mean over these runs hides: settings that differ beside the seed, runs that have not all epochs."""
    notes = []
    for run in runs:
        if run.epochs < run.settings.get("epochs", 0):
            notes.append(f"{run.folder.name} has {run.epochs} of {run.settings['epochs']} epochs")
    keys = [key for key in runs[0].settings if key not in NO_SETTINGS and all(key in run.settings for run in runs)]
    differ = [key for key in keys if len({str(run.settings[key]) for run in runs}) > 1]
    return notes + ([f"these differ: {', '.join(differ)}"] if differ else [])


def print_lines(lines: list[Line], reference: str, markdown: bool, as_csv: bool) -> None:
    """Print CSV, or two tables for each set of flags behind --: accuracies, and differences to the reference."""
    columns = list(dict.fromkeys(chain.from_iterable(line.accuracies for line in lines)))
    if as_csv:
        row, flags, seeds, _, *others = Line.__dataclass_fields__
        columns = [row, flags, seeds, *columns, *others]
        out = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        out.writeheader()
        out.writerows(vars(line) | line.accuracies for line in lines)
        return
    show = print_markdown if markdown else show_table
    columns = [column for column in columns if not column.endswith("_sd")]
    scores = ["row", "seeds", *(column.replace("_", " ", 1) for column in columns)]
    measures = ["row", "seeds", "garments", "best mean", "difference", "95 % interval", "verdict", "note"]
    if lines[0].author_test is not None:
        measures.insert(-1, "author's test")
    for flags in sorted({line.flags for line in lines}):
        suffix, accuracies, differences = f"; {flags}" if flags else "", [], []
        for line in [line for line in lines if line.flags == flags]:
            name, found = [line.row, str(line.seeds)], line.accuracies
            cells = [cell(found.get(column)) + cell(found.get(f"{column}_sd"), " ±{:.3f}") for column in columns]
            accuracies.append([*name, *cells])
            difference = "0.000 exactly" if SAME in line.note else cell(line.difference, "{:+.3f}")
            bounds = cell(line.low, "{:+.3f}") + cell(line.high, " to {:+.3f}")
            author = [] if line.author_test is None else [line.author_test]
            cells = [cell(line.garments, "{}"), cell(found["best_mean"]), difference, bounds, line.verdict]
            differences.append([*name, *cells, *author, line.note])
        title = f"validation Top-1, mean ± standard deviation over seeds, at the best and at the last epoch{suffix}"
        show(title, scores, accuracies)
        show(f"difference to {reference} at the best epoch{suffix}", measures, differences)


def cell(value: float | None, form: str = "{:.3f}") -> str:
    return "" if value is None else form.format(value)


def print_markdown(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"{title}\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    print()


if __name__ == "__main__":
    run_app(app)
