"""The notes' experiments, and our recipe, as rows: run them over seeds, and see which differences are real.

    python experiments.py list
    python experiments.py run all --data Dataset --clean-data Dataset-rembg --seeds 3       # Dataset-rembg: preprocess.py writes it
    python experiments.py run 20240811_200032 repeat --data demo --seeds 3 -- --model test_vit --no-pretrained --epochs 4 --lr 1e-3
    python experiments.py table                                                             # of what was run, against the base

A row is a setting of train.py, which is started for every row and seed; what follows -- goes to each of them. Runs land in
runs/ROW-seedSEED-KEY/; one that is finished is not run again unless its flags, its data or the scripts changed, one that was
interrupted goes on. The table compares each row with the base that ran with the same flags behind --, seed by seed and image by image.
"""

import csv
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from scipy.special import stdtrit

from cli import misuse, note, run_app, say, show_table, whole_file

# ---------------------------------------------------------------- the rows


class Row(NamedTuple):
    name: str
    data: str  # raw (--data), clean (--clean-data) or both
    flags: str  # what it changes of the base's
    score: str  # the author's, on the competition's test set
    asks: str


BASE = "20240811_200032"
BASE_FLAGS = (  # the backbones here take 224 px by themselves
    "--model eva02_tiny_patch14_224.mim_in22k --loss ce --label-smoothing 0 --augment basic --crop-prob 1 --val-view bbox "
    "--epochs 300 --batch-size 256 --lr 5e-6 --weight-decay 0.01 --t-0 50 --t-mult 1 --eta-min 5e-7 --monitor loss --patience 50"
)
RESTARTS = "--t-0 10 --t-mult 2"
SMOOTH = f"--label-smoothing 0.2 {RESTARTS}"
BOTH_VIEWS = "--crop-prob 0.5 --val-view full"
MODERN = (
    "--label-smoothing 0.1 --t-0 30 --t-mult 2 --eta-min 5e-8 --crop-prob 0.7 --val-view learned --box-head "
    "--lr 5e-5 --layer-decay 0.9 --warmup-epochs 5 --ema 0.996 --drop-path 0.1"
)
ROWS = (
    Row(BASE, "raw", "", "0.498", "the base: EVA-02 Ti, cross-entropy, basic augmentation, boxed"),
    Row("20240813_212817", "raw", f"{RESTARTS} --augment randaugment", "0.474", "is RandAugment better than basic?"),
    Row("20240811_135831", "raw", "--val-view full", "0.473", "the base, validated on whole photos as the test is"),
    Row("20240814_crop", "raw", f"{RESTARTS} {BOTH_VIEWS}", "", "do both views in training help?"),
    Row("20240814_215539", "raw", f"{RESTARTS} {BOTH_VIEWS} --loss focal --focal-gamma 2", "", "does focal loss help the rare classes?"),
    Row("20240815_140358", "clean", f"{SMOOTH} {BOTH_VIEWS}", "0.472", "background removed, both views"),
    Row("20240815_182900", "clean", SMOOTH, "0.505", "does removing the background help?"),
    Row(
        "20240818_asymmetric",
        "clean",
        f"{RESTARTS} --loss asymmetric --asym-gamma-pos 1 --asym-gamma-neg 4 --label-smoothing 0.1",
        "",
        "does the asymmetric loss help?",
    ),
    Row("20240822_153056", "both", SMOOTH, "0.498", "do raw and background-free photos together help?"),
    Row("20240822_222251", "clean", f"{SMOOTH} --resize random-resized-crop", "0.4796", "RandomResizedCrop instead of squashing"),
    Row("20240823_190953", "clean", f"{SMOOTH} --cutmix Daily --cutmix Gender --cutmix Embellishment", "0.4567", "CutMix on every label, up to three pastes"),
    Row("20240825_cutmix_gender", "clean", f"{SMOOTH} --cutmix Gender", "no effect", "CutMix on the hardest label alone"),
    Row("20240826_223053", "clean", f"{SMOOTH} --epochs 1000", "", "1,000 epochs: restarts at 10, 30, 70, 150, 310, 630"),
    Row("20240828_181215", "clean", f"{SMOOTH} --eta-min 5e-8", "", "a lowest learning rate of lr / 100"),
    Row("20240831_192322", "clean", f"{SMOOTH} --crop-prob 0.7", "", "whole photos now and then, validated boxed"),
    Row("20240910_221015", "clean", "--label-smoothing 0.1 --t-0 20 --t-mult 2 --eta-min 5e-8", "0.504", "less smoothing, T_0 = 20"),
    Row("20240911_091050", "clean", "--label-smoothing 0.1 --t-0 30 --t-mult 2 --eta-min 5e-8", "0.5044", "less smoothing, T_0 = 30: the last entry"),
    Row("backbone_convnext", "raw", "--model convnext_femto.d1_in1k", "below EVA-02", "a ConvNeXt of 19 MB"),
    Row("backbone_mobilenet", "raw", "--model mobilenetv3_large_100.ra_in1k", "below EVA-02", "a MobileNet of 17 MB"),
    Row("repeat", "raw", "", 'differed "a lot"', "the base again: does it come out the same?"),
    Row("modern", "clean", MODERN, "", "ours, not the notes': README's recipe"),
)
FIRST_SEED = 1103  # of the seeds that all rows share: 1103, 1104, ...
OURS = ("--data", "--seed", "--resume")  # flags that are not for behind --
RUN_NAME = re.compile(r"-seed\d+-[0-9a-f]{8}$")

Flags = dict[str, list[str]]  # {"--lr": ["1e-3"], "--cutmix": ["Daily", "Gender"], "--class-weights": []}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def parse_flags(words: list[str]) -> Flags:
    """The flags of a command line with their values. Raises BadParameter for a word that belongs to none."""
    flags: Flags = {}
    for word in words:
        if word.startswith("--"):
            name, is_given, value = word.partition("=")
            flags.setdefault(name, []).extend([value] if is_given else [])
        elif not flags:
            raise misuse("--", f"{word} is no flag of train.py")
        else:
            flags[name].append(word)
    return flags


def merge_flags(row: Row, more: Flags) -> Flags:
    """The flags of a row's run: `more` wins over the row's own, but not over what the row is about.

    That is its backbone (and then no other one's --weights), and how many times as long as the base it trains.
    """
    base, own = parse_flags(BASE_FLAGS.split()), parse_flags(row.flags.split())
    flags = base | own | more
    if "--model" in own:
        flags["--model"] = own["--model"]
        flags.pop("--weights", None)
    if "--epochs" in own and "--epochs" in more:
        with suppress(ValueError, IndexError):  # train.py says what is wrong with it
            flags["--epochs"] = [str(max(1, round(int(more["--epochs"][-1]) * int(own["--epochs"][0]) / int(base["--epochs"][0]))))]
    flags.pop("--name", None)  # a part of the run's name
    return flags


def words_of(flags: Flags) -> list[str]:
    """The flags as words of a command line; one with several values is repeated."""
    return [word for name, values in flags.items() for word in ([name] if not values else [w for value in values for w in (name, value)])]


# ---------------------------------------------------------------- list


@app.command("list")
def list_rows() -> None:
    """List the rows: what each asks, the author's test score, and its flags."""
    say(f"every row: {BASE_FLAGS}")
    for row in ROWS:
        score = f" (author's test score: {row.score})" if row.score else ""
        data = {"raw": "--data RAW", "clean": "--data CLEAN", "both": "--data RAW --data CLEAN"}[row.data]
        say(f"{row.name:<24}{row.asks}{score}\n    {data} {row.flags}".rstrip())


# ---------------------------------------------------------------- run


@app.command()
def run(
    rows: Annotated[list[str], typer.Argument(help="Names of rows, or all. Flags of train.py for every row follow --.", metavar="ROW...|all [-- FLAGS]")],
    data: Annotated[str, typer.Option(help="Dataset folder, or `demo`.")] = "Dataset",
    clean_data: Annotated[str | None, typer.Option(help="The same without backgrounds (preprocess.py).", show_default="none")] = None,
    seeds: Annotated[int, typer.Option(help=f"How many seeds: {FIRST_SEED}, {FIRST_SEED + 1}, ...", min=1)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; run nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train rows over seeds, except what is finished."""
    behind = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    chosen, more = choose_rows(rows[: len(rows) - len(behind)]), parse_flags(behind)
    if taken := [flag for flag in OURS if flag in more]:
        raise misuse("--", f"{taken[0]} is for experiments.py: give {'--seeds' if taken[0] == '--seed' else '--data'} before the --")
    if "--fit-all" in more:
        raise misuse("--", "--fit-all holds nothing out: there would be nothing to compare")
    places = {"raw": data, "clean": clean_data}
    contents = {"raw": content_of("--data", data), "clean": clean_data and content_of("--clean-data", clean_data)}
    if clean_data is None and (needy := [row.name for row in chosen if row.data != "raw"]):
        raise misuse("--clean-data", f"{', '.join(needy)}: without backgrounds; python preprocess.py {data} OUT writes such a dataset")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the training that runs is ended too
    code, jobs, failed, finished = code_of_scripts(), [], [], 0
    for row in chosen:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            record = {"row": row.name, "more": dict(sorted(more.items())), "flags": merge_flags(row, more), "seed": seed, "code": code}
            kinds = ["raw", "clean"] if row.data == "both" else [row.data]
            record["data"] = [contents[kind] for kind in kinds]
            key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
            folder = Path("runs") / f"{(more.get('--name') or [row.name])[-1]}-seed{seed}-{key}"
            flags = {"--data": [places[kind] for kind in kinds], **record["flags"], "--seed": [str(seed)], "--name": [folder.name]}
            arguments = ["--resume", str(folder)] if (folder / "config.json").exists() else words_of(flags)
            jobs.append((folder, record, [sys.executable, str(Path(__file__).resolve().with_name("train.py")), *arguments]))
    for i, (folder, record, command) in enumerate(jobs, start=1):
        if (folder / "experiment.json").exists():
            finished += 1
            print(f"# finished before: {folder}") if dry_run else say(f"run {i} of {len(jobs)}: {folder} was finished before")
        elif dry_run:
            print(shlex.join(command))
        else:
            say(f"run {i} of {len(jobs)}: {folder}")
            with suppress(OSError):  # left empty by a training that was killed at once
                folder.rmdir()
            if start(command) == 0:
                with whole_file(folder / "experiment.json") as f:
                    f.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            else:
                failed.append(str(folder))
                note(f"{folder} failed; going on with the next")
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}")
    if not dry_run:
        say(f"{len(jobs)} runs are finished, {finished} of them before; next: python experiments.py table")


def choose_rows(names: list[str]) -> list[Row]:
    """The rows of these names. Raises BadParameter for unknown ones, with those that are close."""
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known and name != "all":
            close = [other for other in known if name and name in other] or difflib.get_close_matches(name, known, cutoff=0.4)
            raise misuse("ROW", f"there is no row {name!r}; " + (f"close: {', '.join(close[:5])}" if close else "python experiments.py list shows them"))
    if not names:
        raise misuse("ROW", "name the rows to run, or all")
    return list(ROWS) if "all" in names else [known[name] for name in dict.fromkeys(names)]


def content_of(flag: str, data: str) -> str:
    """What tells one dataset from another: its training and validation CSVs, and the names and sizes of their images."""
    if data == "demo":  # drawn by demo.py
        return data
    root, digest = Path(data), hashlib.sha256()
    if not root.is_dir():
        raise misuse(flag, f"{data} does not exist")
    for path in sorted([*root.glob("*_train.csv"), *root.glob("*_val.csv"), *root.glob("preprocess.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    for split in ("train", "val"):
        for folder, folders, files in os.walk(root / split):
            folders.sort()
            for file in sorted(files):
                digest.update(f"{file}\0{os.stat(os.path.join(folder, file)).st_size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def code_of_scripts() -> str:
    """The content of the scripts. This one is left out: what it does to a run are the flags, and a new row changes no other."""
    here = Path(__file__)
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(here.parent.glob("*.py")) if path != here)).hexdigest()


def start(command: list[str]) -> int:
    """Run a command to its end; its exit code. Where this script is stopped the command is too, and is waited for: train.py saves its state."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


# ---------------------------------------------------------------- what a run left


@dataclass
class Run:
    """A finished run: what was asked for, its accuracies by label, and of each validation image whether each label was right."""

    folder: Path
    row: str
    more: Flags
    flags: Flags
    seed: int
    code: str
    images: list[tuple]  # (name, labels) of each image, sorted
    labels: list[str]
    predicted: np.ndarray  # int (images, labels)
    right: np.ndarray  # bool (images, labels)
    best: dict[str, float]  # Top-1 of each label, and `mean`, at the best epoch
    last: dict[str, float]


def read_run(folder: Path) -> Run:
    """Read a run's files. Raises ValueError with what is wrong with them."""
    try:
        record = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
        if not any(row.name == record["row"] for row in ROWS):
            raise ValueError(f"there is no row {record['row']}")
        monitor = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]["monitor"]
        metrics = [{key: float(value) for key, value in row.items()} for row in read_rows(folder / "metrics.csv")]
        images = read_rows(folder / "val_predictions.csv")
        labels = [column for column in images[0] if f"{column}_predicted" in images[0]]
        images.sort(key=lambda row: (row["image_name"], *(row[label] for label in labels)))
        predicted = np.array([[int(row[f"{label}_predicted"]) for label in labels] for row in images])
        right = predicted == np.array([[int(row[label]) for label in labels] for row in images])
        column, sign = ("val_loss", -1) if monitor == "loss" else (f"val_{monitor}_mean", 1)
        best = max(metrics, key=lambda row: (sign * row[column], row.get("val_iou", 0)))
        scores = [{label: row[f"val_top1_{label}"] for label in (*labels, "mean")} for row in (best, metrics[-1])]
        if not np.allclose(right.mean(0), [scores[0][label] for label in labels], atol=1e-9):
            raise ValueError("val_predictions.csv is not of the best epoch in metrics.csv")
        keys = [(row["image_name"], *(row[label] for label in labels)) for row in images]
        asked = [record[key] for key in ("row", "more", "flags", "seed", "code")]
        return Run(folder, *asked, keys, labels, predicted, right, *scores)
    except (OSError, KeyError, TypeError, IndexError, ValueError, AttributeError, csv.Error) as error:
        raise ValueError(f"{folder} ({error if type(error) is ValueError else repr(error)})") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        return list(csv.DictReader(f, strict=True))


def read_runs() -> list[list[Run]]:
    """All finished experiments, those of a row and its flags together, by seed; of two with one seed the newer. Says what it leaves aside."""
    order = [row.name for row in ROWS]
    groups: dict[tuple[int, str], dict[int, Run]] = {}
    folders = sorted(path for path in Path("runs").glob("*") if RUN_NAME.search(path.name))
    finished = [folder for folder in folders if (folder / "experiment.json").exists()]
    if unfinished := [str(folder) for folder in folders if folder not in finished]:
        note(f"left aside, unfinished: {', '.join(unfinished)}; the same run command goes on with them")
    for folder in sorted(finished, key=lambda folder: (folder / "experiment.json").stat().st_mtime_ns):
        try:
            found = read_run(folder)
            groups.setdefault((order.index(found.row), json.dumps(found.more)), {})[found.seed] = found
        except ValueError as error:
            note(f"left aside: {error}")
    return [[group[seed] for seed in sorted(group)] for _, group in sorted(groups.items())]


# ---------------------------------------------------------------- comparing


def garment(image: str) -> str:
    """`1209/BO00001` of `1209/BO00001-2.jpg`: photos of one garment share it. Another name stands for itself."""
    return re.sub(r"([A-Za-z]\d+)-\d{1,2}(\.\w+)?$", r"\1", image)


def per_garment(images: list[str], differences: np.ndarray) -> np.ndarray:
    """Differences (images, seeds) as (garments, seeds): the sum over a garment's photos, times garments / images, so that the mean stays."""
    names, of = np.unique([garment(image) for image in images], return_inverse=True)
    sums = np.zeros((len(names), differences.shape[1]))
    np.add.at(sums, of, differences)
    return sums * len(names) / len(images)


def mean_squares(differences: np.ndarray) -> tuple[tuple[float, int], ...]:
    """(mean square, degrees of freedom) of units, seeds and residual of differences (units, seeds): the two-way analysis of variance."""
    units, seeds = differences.shape
    mean, of_units, of_seeds = differences.mean(), differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    residual = ((differences - of_units - of_seeds + mean) ** 2).sum()
    sums = (seeds * ((of_units - mean) ** 2).sum(), units - 1), (units * ((of_seeds - mean) ** 2).sum(), seeds - 1), (residual, (units - 1) * (seeds - 1))
    return tuple((float(total / df), df) for total, df in sums)


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """(mean, half the width of its 95 % interval, degrees of freedom) of paired differences (units, seeds), both drawn by chance.

    Crossed random effects: difference = mean + unit + seed + residual. The variance of the mean is the sum of the three components over
    their numbers, (MS_units + MS_seeds - MS_residual) / (units x seeds); a component below 0 counts as 0, as if its mean square were
    the residual's. Degrees of freedom by Satterthwaite (1946), from the mean squares as they are. All differences alike: half the width is 0.
    """
    squares = mean_squares(differences)
    of_units, of_seeds, residual = (square for square, _ in squares)
    variance = (max(of_units, residual) + max(of_seeds, residual) - residual) / differences.size
    if variance <= 1e-18:  # rounding
        return float(differences.mean()), 0.0, math.nan
    df = variance**2 / sum((square / differences.size) ** 2 / df for square, df in squares)
    return float(differences.mean()), float(stdtrit(df, 0.975) * math.sqrt(variance)), df


def compare(group: list[Run], base: list[Run]) -> dict:
    """The difference of a row to the base over the seeds that both have. Raises ValueError where they were validated on different images."""
    pairs = [(a, b) for a in group for b in base if a.seed == b.seed]
    first = base[0]
    for other in (*base, *group):
        if (other.images, other.labels) != (first.images, first.labels):
            raise ValueError(f"{other.folder} and {first.folder} were validated on different images or labels; move one of them out of runs/ and run it again")
    notes = []
    if len(pairs) < len(group):
        notes.append(f"{len(pairs)} seeds in common")
    if len({run.code for pair in pairs for run in pair}) > 1:
        notes.append("the scripts changed between these runs")
    if not pairs:
        return {"verdict": "too few seeds", "note": notes}
    differences = np.stack([a.right.mean(1) - b.right.mean(1) for a, b in pairs], axis=1)
    units = per_garment([name for name, *_ in first.images], differences)
    if all((a.predicted == b.predicted).all() for a, b in pairs):
        notes.append("every prediction is the same")
    found = {"garments": len(units), "difference": float(units.mean()), "exact": not differences.any(), "verdict": "not told apart", "note": notes}
    if len(pairs) < 3 or len(units) < 2:
        return found | {"verdict": "too few seeds" if len(pairs) < 3 else "too few images"}
    mean, half, df = interval(units)
    return found | {"low": mean - half, "high": mean + half, "df": df} | ({"verdict": "real"} if abs(mean) > half else {})


def find_base(group: list[Run], groups: list[list[Run]]) -> list[Run] | None:
    """The base with the same flags behind --; for the base itself the one with most of its flags, of those that had fewer."""
    mine = set(pairs_of(group[0].more))
    bases = {frozenset(pairs_of(other[0].more)): other for other in groups if other[0].row == BASE}
    if group[0].row != BASE:
        return bases.get(frozenset(mine))
    fewer = [flags for flags in bases if flags < mine]
    return bases[max(fewer, key=len)] if fewer else None


def pairs_of(flags: Flags) -> list[tuple[str, str]]:
    return [(name, value) for name, values in flags.items() for value in values or [""]]


def same_as(run: Run) -> str:
    """The first of the rows above a run's that its flags make equal to it: restarts that the run is too short for are no difference."""

    def effect(row: Row) -> dict:
        flags = merge_flags(row, run.more)
        with suppress(ValueError, IndexError):
            if int(flags["--t-0"][-1]) >= int(flags["--epochs"][-1]):
                flags |= {"--t-0": ["no restart"], "--t-mult": []}
        return {"data": row.data} | flags

    names = [row.name for row in ROWS]
    mine = ROWS[names.index(run.row)]
    for row in ROWS[: names.index(run.row)]:
        if effect(row) == effect(mine):
            exactly = merge_flags(row, run.more) == merge_flags(mine, run.more)
            return f"the same as {row.name}" + ("" if exactly else f": no restart in {run.flags['--epochs'][-1]} epochs")
    return ""


# ---------------------------------------------------------------- table


@app.command()
def table(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, every digit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare what has been run: accuracies over seeds, differences to the base with a 95 % interval, the author's scores."""
    if markdown and as_csv:
        raise misuse("--csv", "give --markdown or --csv")
    groups = read_runs()
    if not groups:
        raise ValueError("runs/ holds no finished experiment; python experiments.py run ROW starts one")
    results, refused = [], []
    for group in groups:
        base = find_base(group, groups)
        try:
            found = compare(group, base) if base else {"verdict": "the base" if group[0].row == BASE else "no base run with these flags"}
        except ValueError as error:
            refused.append(str(error))
            found = {"verdict": "refused"}
        fewer = [pair for pair in pairs_of(group[0].more) if base and pair not in pairs_of(base[0].more)]
        against = f"against the base without {' '.join(word for pair in fewer for word in pair if word)}" if fewer else ""
        notes = [*found.get("note", []), against, same_as(group[0])]
        results.append((group, found | {"note": "; ".join(filter(None, notes))}))
    if as_csv:
        print_csv(results)
    else:
        print_tables(results, print_markdown if markdown else show_table)
    if refused:
        raise ValueError("\n".join(refused))


def spread(group: list[Run], when: str, label: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds of an accuracy at the `best` or `last` epoch; no deviation (nan) of one seed."""
    values = [getattr(run, when)[label] for run in group]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def print_tables(results: list[tuple[list[Run], dict]], show) -> None:
    """For each set of flags behind -- two tables: the accuracies, and the differences."""
    for more in sorted({json.dumps(group[0].more) for group, _ in results}, key=lambda more: (len(pairs_of(json.loads(more))), more)):
        section = [(group, found) for group, found in results if json.dumps(group[0].more) == more]
        behind = shlex.join(words_of(json.loads(more))) or "the rows' own flags"
        labels = list(dict.fromkeys(label for group, _ in section for label in group[0].labels))
        columns = ["row", "seeds", *(f"{when} {label}" for when in ("best", "last") for label in ("mean", *labels))]
        cells = []
        for group, _ in section:
            shown = [spread(group, when, label) if label in group[0].best else None for when in ("best", "last") for label in ("mean", *labels)]
            cells.append([group[0].row, str(len(group)), *("" if s is None else f"{s[0]:.3f}" + ("" if math.isnan(s[1]) else f" ±{s[1]:.3f}") for s in shown)])
        show(f"validation Top-1, mean ± standard deviation over seeds, at the best and at the last epoch; {behind}", columns, cells)
        columns = ["row", "seeds", "garments", "best mean", "difference", "95 % interval", "verdict", "author's test", "note"]
        cells = []
        for group, found in section:
            score = next(row.score for row in ROWS if row.name == group[0].row)
            difference = "" if "difference" not in found else "0.000 exactly" if found["exact"] else f"{found['difference']:+.3f}"
            bounds = f"{found['low']:+.3f} to {found['high']:+.3f}" if "low" in found else ""
            mean = f"{spread(group, 'best', 'mean')[0]:.3f}"
            cells.append([group[0].row, str(len(group)), str(found.get("garments", "")), mean, difference, bounds, found["verdict"], score, found["note"]])
        show(f"difference to the base at the best epoch; {behind}", columns, cells)


def print_markdown(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"{title}\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    print()


def print_csv(results: list[tuple[list[Run], dict]]) -> None:
    labels = list(dict.fromkeys(label for group, _ in results for label in group[0].labels))
    measured = [(when, label) for when in ("best", "last") for label in ("mean", *labels)]
    compared = ["garments", "difference", "low", "high", "df", "verdict", "note"]
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["row", "flags", "seeds", *(f"{when}_{label}{kind}" for when, label in measured for kind in ("", "_sd")), *compared, "author_test"])
    for group, found in results:
        values = [v for when, label in measured for v in (spread(group, when, label) if label in group[0].best else ("", ""))]
        known = ["" if isinstance(v, float) and math.isnan(v) else v for v in [*values, *(found.get(key, "") for key in compared)]]
        score = next(row.score for row in ROWS if row.name == group[0].row)
        out.writerow([group[0].row, shlex.join(words_of(group[0].more)), len(group), *known, score])


if __name__ == "__main__":
    run_app(app)
