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
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from scipy.special import stdtrit

from cli import misuse, note, run_app, say, show_table, whole_file

# ---------------------------------------------------------------- the rows


class Row(NamedTuple):
    name: str
    data: str  # raw (--data), clean (--clean-data) or raw+clean
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
LESS = "--label-smoothing 0.1"
BOTH_VIEWS = "--crop-prob 0.5 --val-view full"
MODERN = (
    f"{LESS} --t-0 30 --t-mult 2 --eta-min 5e-8 --crop-prob 0.7 --val-view learned --box-head "
    "--lr 5e-5 --layer-decay 0.9 --warmup-epochs 5 --ema 0.996 --drop-path 0.1"
)
ROWS = (
    Row(BASE, "raw", "", "0.498", "the base: EVA-02 Ti, cross-entropy, basic augmentation, boxed"),
    Row("20240813_212817", "raw", f"{RESTARTS} --augment randaugment", "0.474", "is RandAugment better than basic?"),
    Row("20240811_135831", "raw", "--val-view full", "0.473", "the base, validated on whole photos as the test is"),
    Row("20240814_crop", "raw", f"{RESTARTS} {BOTH_VIEWS}", "", "do both views in training help?"),
    Row(
        "20240814_215539",
        "raw",
        f"{RESTARTS} {BOTH_VIEWS} --loss focal --focal-gamma 2",
        "",
        "does focal loss help the rare classes?",
    ),
    Row("20240815_140358", "clean", f"{SMOOTH} {BOTH_VIEWS}", "0.472", "background removed, both views"),
    Row("20240815_182900", "clean", SMOOTH, "0.505", "does removing the background help?"),
    Row(
        "20240818_asymmetric",
        "clean",
        f"{RESTARTS} --loss asymmetric --asym-gamma-pos 1 --asym-gamma-neg 4 {LESS}",
        "",
        "does the asymmetric loss help?",
    ),
    Row("20240822_153056", "raw+clean", SMOOTH, "0.498", "do raw and background-free photos together help?"),
    Row(
        "20240822_222251",
        "clean",
        f"{SMOOTH} --resize random-resized-crop",
        "0.4796",
        "RandomResizedCrop instead of squashing",
    ),
    Row(
        "20240823_190953",
        "clean",
        f"{SMOOTH} --cutmix Daily --cutmix Gender --cutmix Embellishment",
        "0.4567",
        "CutMix on every label, up to three pastes",
    ),
    Row(
        "20240825_cutmix_gender", "clean", f"{SMOOTH} --cutmix Gender", "no effect", "CutMix on the hardest label alone"
    ),
    Row(
        "20240826_223053", "clean", f"{SMOOTH} --epochs 1000", "", "1,000 epochs: restarts at 10, 30, 70, 150, 310, 630"
    ),
    Row("20240828_181215", "clean", f"{SMOOTH} --eta-min 5e-8", "", "a lowest learning rate of lr / 100"),
    Row("20240831_192322", "clean", f"{SMOOTH} --crop-prob 0.7", "", "whole photos now and then, validated boxed"),
    Row("20240910_221015", "clean", f"{LESS} --t-0 20 --t-mult 2 --eta-min 5e-8", "0.504", "less smoothing, T_0 = 20"),
    Row(
        "20240911_091050",
        "clean",
        f"{LESS} --t-0 30 --t-mult 2 --eta-min 5e-8",
        "0.5044",
        "less smoothing, T_0 = 30: the last entry",
    ),
    Row("backbone_convnext", "raw", "--model convnext_femto.d1_in1k", "below EVA-02", "a ConvNeXt of 19 MB"),
    Row("backbone_mobilenet", "raw", "--model mobilenetv3_large_100.ra_in1k", "below EVA-02", "a MobileNet of 17 MB"),
    Row("repeat", "raw", "", 'differed "a lot"', "the base again: does it come out the same?"),
    Row("modern", "clean", MODERN, "", "ours, not the notes': README's recipe"),
)
NAMED = {row.name: row for row in ROWS}
FIRST_SEED = 1103  # of the seeds that all rows share: 1103, 1104, ...
OURS = {  # flags that are not for behind --, and why
    "--data": "give --data before the --",
    "--seed": "give --seeds before the --",
    "--resume": "a row that was stopped goes on by itself",
    "--fit-all": "it holds nothing out: there would be nothing to compare",
}
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
            flags["--epochs"] = [
                str(max(1, round(int(more["--epochs"][-1]) * int(own["--epochs"][0]) / int(base["--epochs"][0]))))
            ]
    flags.pop("--name", None)  # a part of the run's name
    return flags


def pairs_of(flags: Flags) -> list[tuple[str, ...]]:
    """Each flag with each of its values, ("--lr", "1e-3"), or alone, ("--class-weights",)."""
    return [pair for name, values in flags.items() for pair in ([(name, value) for value in values] or [(name,)])]


def words_of(flags: Flags) -> list[str]:
    """The flags as words of a command line; one with several values is repeated."""
    return [word for pair in pairs_of(flags) for word in pair]


# ---------------------------------------------------------------- list


@app.command("list")
def list_rows() -> None:
    """List the rows: what each asks, the author's test score, and its flags."""
    say(f"every row: {BASE_FLAGS}")
    for row in ROWS:
        score = f" (author's test score: {row.score})" if row.score else ""
        data = [f"--data {kind.upper()}" for kind in row.data.split("+")]
        say(f"{row.name:<24}{row.asks}{score}\n    {' '.join([*data, row.flags])}".rstrip())


# ---------------------------------------------------------------- run


@app.command()
def run(
    rows: Annotated[
        list[str],
        typer.Argument(
            help="Names of rows, or all. Flags of train.py for every row follow --.", metavar="ROW...|all [-- FLAGS]"
        ),
    ],
    data: Annotated[str, typer.Option(help="Dataset folder, or `demo`.")] = "Dataset",
    clean_data: Annotated[
        str | None, typer.Option(help="The same without backgrounds (preprocess.py).", show_default="none")
    ] = None,
    seeds: Annotated[int, typer.Option(help=f"How many seeds: {FIRST_SEED}, {FIRST_SEED + 1}, ...", min=1)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; run nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train rows over seeds, except what is finished."""
    behind = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    chosen, more = choose_rows(rows[: len(rows) - len(behind)]), parse_flags(behind)
    if taken := [flag for flag in OURS if flag in more]:
        raise misuse("--", f"{taken[0]} cannot stand behind it: {OURS[taken[0]]}")
    datasets = {
        "raw": (data, content_of("--data", data)),
        "clean": (clean_data, clean_data and content_of("--clean-data", clean_data)),
    }
    if clean_data is None and (needy := [row.name for row in chosen if row.data != "raw"]):
        raise misuse(
            "--clean-data",
            f"{', '.join(needy)}: without backgrounds; python preprocess.py {data} OUT writes such a dataset",
        )

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the training that runs is ended too
    code, failed, finished = code_of_scripts(), [], 0
    runs = [(row, seed) for row in chosen for seed in range(FIRST_SEED, FIRST_SEED + seeds)]
    for i, (row, seed) in enumerate(runs, start=1):
        seen = [datasets[kind] for kind in row.data.split("+")]
        record = {
            "row": row.name,
            "more": dict(sorted(more.items())),
            "flags": merge_flags(row, more),
            "seed": seed,
            "code": code,
        }
        record["data"] = [content for _, content in seen]
        key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
        folder = Path("runs") / f"{(more.get('--name') or [row.name])[-1]}-seed{seed}-{key}"
        flags = {
            "--data": [place for place, _ in seen],
            **record["flags"],
            "--seed": [str(seed)],
            "--name": [folder.name],
        }
        arguments = ["--resume", str(folder)] if (folder / "config.json").exists() else words_of(flags)
        command = [sys.executable, str(Path(__file__).resolve().with_name("train.py")), *arguments]
        if (folder / "experiment.json").exists():
            finished += 1
            print(f"# finished before: {folder}") if dry_run else say(
                f"run {i} of {len(runs)}: {folder} was finished before"
            )
        elif dry_run:
            print(shlex.join(command))
        else:
            say(f"run {i} of {len(runs)}: {folder}")
            with suppress(OSError):  # left empty by a training that was killed at once
                folder.rmdir()
            if start(command) == 0:
                with whole_file(folder / "experiment.json") as f:
                    f.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            else:
                failed.append(str(folder))
                note(f"{folder} failed; going on with the next")
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    if not dry_run:
        say(f"{len(runs)} runs are finished, {finished} of them before; next: python experiments.py table")


def choose_rows(names: list[str]) -> list[Row]:
    """The rows of these names. Raises BadParameter for unknown ones, with those that are close."""
    for name in names:
        if name not in NAMED and name != "all":
            close = [other for other in NAMED if name and name in other] or difflib.get_close_matches(
                name, NAMED, cutoff=0.4
            )
            raise misuse(
                "ROW",
                f"there is no row {name!r}; "
                + (f"close: {', '.join(close[:5])}" if close else "python experiments.py list shows them"),
            )
    if not names:
        raise misuse("ROW", "name the rows to run, or all")
    return list(ROWS) if "all" in names else [NAMED[name] for name in dict.fromkeys(names)]


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
                digest.update(
                    f"{file}\0{os.stat(os.path.join(folder, file)).st_size}\0".encode(errors="surrogateescape")
                )
    return digest.hexdigest()


def code_of_scripts() -> str:
    """The content of the scripts. This one is left out: what it does to a run are the flags, and a new row changes no other."""
    here = Path(__file__)
    return hashlib.sha256(
        b"".join(path.name.encode() + path.read_bytes() for path in sorted(here.parent.glob("*.py")) if path != here)
    ).hexdigest()


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
    seed: int
    code: str
    images: list[tuple]  # (name, labels) of each image, sorted
    labels: list[str]
    predicted: np.ndarray  # int (images, labels)
    right: np.ndarray  # bool (images, labels)
    best: dict[str, float]  # Top-1, `mean` and of each label, at the best epoch
    last: dict[str, float]


def read_run(folder: Path) -> Run:
    """Read a run's files. Raises ValueError with what is wrong with them."""
    try:
        record = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
        if record["row"] not in NAMED:
            raise ValueError(f"there is no row {record['row']}")
        monitor = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]["monitor"]
        metrics = [{key: float(value) for key, value in row.items()} for row in read_rows(folder / "metrics.csv")]
        column, sign = ("val_loss", -1) if monitor == "loss" else (f"val_{monitor}_mean", 1)
        best = max(metrics, key=lambda row: (sign * row[column], row.get("val_iou", 0)))
        rows = read_rows(folder / "val_predictions.csv")
        labels = [column for column in rows[0] if f"{column}_predicted" in rows[0]]
        image_of = itemgetter("image_name", *labels)
        rows.sort(key=image_of)
        predicted = np.array([[int(row[f"{label}_predicted"]) for label in labels] for row in rows])
        right = predicted == np.array([[int(row[label]) for label in labels] for row in rows])
        scores = [{label: row[f"val_top1_{label}"] for label in ("mean", *labels)} for row in (best, metrics[-1])]
        if not np.allclose(right.mean(0), [scores[0][label] for label in labels], atol=1e-9):
            raise ValueError("val_predictions.csv is not of the best epoch in metrics.csv")
        asked = [record[key] for key in ("row", "more", "seed", "code")]
        return Run(folder, *asked, [image_of(row) for row in rows], labels, predicted, right, *scores)
    except (OSError, KeyError, TypeError, IndexError, ValueError, AttributeError, csv.Error) as error:
        raise ValueError(f"{folder} ({error if type(error) is ValueError else repr(error)})") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        return list(csv.DictReader(f, strict=True))


def read_runs() -> list[list[Run]]:
    """All finished experiments, those of a row and its flags together, by seed; of two with one seed the newer. Says what it leaves aside."""
    order = list(NAMED)
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
    mean, of_units, of_seeds = (
        differences.mean(),
        differences.mean(1, keepdims=True),
        differences.mean(0, keepdims=True),
    )
    residual = ((differences - of_units - of_seeds + mean) ** 2).sum()
    sums = (
        (seeds * ((of_units - mean) ** 2).sum(), units - 1),
        (units * ((of_seeds - mean) ** 2).sum(), seeds - 1),
        (residual, (units - 1) * (seeds - 1)),
    )
    return tuple((float(total / df), df) for total, df in sums)


def interval(differences: np.ndarray) -> tuple[float, float, float | None]:
    """(mean, half the width of its 95 % interval, degrees of freedom) of paired differences (units, seeds), both drawn by chance.

    Crossed random effects: difference = mean + unit + seed + residual. The variance of the mean is the sum of the three components over
    their numbers, (MS_units + MS_seeds - MS_residual) / (units x seeds); a component below 0 counts as 0, as if its mean square were
    the residual's. Degrees of freedom by Satterthwaite (1946), from the mean squares as they are. All differences alike: half the width is 0, without any.
    """
    squares = mean_squares(differences)
    of_units, of_seeds, residual = (square for square, _ in squares)
    variance = (max(of_units, residual) + max(of_seeds, residual) - residual) / differences.size
    if variance <= 1e-18:  # rounding
        return float(differences.mean()), 0.0, None
    df = variance**2 / sum((square / differences.size) ** 2 / df for square, df in squares)
    return float(differences.mean()), float(stdtrit(df, 0.975) * math.sqrt(variance)), df


def compare(group: list[Run], base: list[Run]) -> dict:
    """The difference of a row to the base over the seeds that both have; `refused` is why there is none where they were validated on different images."""
    pairs = [(a, b) for a in group for b in base if a.seed == b.seed]
    first = base[0]
    for other in (*base, *group):
        if (other.images, other.labels) != (first.images, first.labels):
            why = f"{other.folder} and {first.folder} were validated on different images or labels; move one of them out of runs/ and run it again"
            return {"verdict": "refused", "refused": why}
    notes = []
    if len(pairs) < len(group):
        notes.append(f"{len(pairs)} seeds in common")
    if len({run.code for pair in pairs for run in pair}) > 1:
        notes.append("the scripts changed between these runs")
    if not pairs:
        return {"verdict": "too few seeds", "notes": notes}
    differences = np.stack([a.right.mean(1) - b.right.mean(1) for a, b in pairs], axis=1)
    units = per_garment([name for name, *_ in first.images], differences)
    if all((a.predicted == b.predicted).all() for a, b in pairs):
        notes.append("every prediction is the same")
    found = {"garments": len(units), "difference": float(units.mean()), "exact": not differences.any(), "notes": notes}
    if len(pairs) < 3 or len(units) < 2:
        return found | {"verdict": "too few seeds" if len(pairs) < 3 else "too few images"}
    mean, half, df = interval(units)
    return found | {
        "low": mean - half,
        "high": mean + half,
        "df": df,
        "verdict": "real" if abs(mean) > half else "not told apart",
    }


def find_base(group: list[Run], groups: list[list[Run]]) -> list[Run] | None:
    """The base with the same flags behind --; for the base itself the one with most of its flags, of those that had fewer."""
    mine, is_base = set(pairs_of(group[0].more)), group[0].row == BASE
    bases = {frozenset(pairs_of(other[0].more)): other for other in groups if other[0].row == BASE}
    fitting = [flags for flags in bases if (flags < mine if is_base else flags == mine)]
    return bases[max(fitting, key=len)] if fitting else None


def same_as(row: Row, more: Flags) -> str:
    """The first of the rows above this one that the flags make equal to it, but for the cosine's slope where a run is too short for a restart."""

    def effect(row: Row) -> dict:
        flags = merge_flags(row, more)
        with suppress(ValueError, IndexError):
            if int(flags["--t-0"][-1]) >= int(flags["--epochs"][-1]):
                flags |= {"--t-0": ["no restart"], "--t-mult": []}
        return {"data": row.data} | flags

    mine = merge_flags(row, more)
    for other in ROWS[: ROWS.index(row)]:
        if effect(other) == effect(row):
            why = (
                ""
                if merge_flags(other, more) == mine
                else f": no restart in {mine['--epochs'][-1]} epochs, only another slope"
            )
            return f"the same as {other.name}{why}"
    return ""


def summarise(group: list[Run], base: list[Run] | None) -> dict:
    """All that the table says of a row: a line of its CSV by the columns, without those that have no value here; and what only sorts and formats it."""
    row, more = NAMED[group[0].row], group[0].more
    line = {
        "row": row.name,
        "flags": shlex.join(words_of(more)),
        "seeds": len(group),
        "author_test": row.score,
        "more": more,
        "labels": [*group[0].best],
    }
    for when in ("best", "last"):
        for label in line["labels"]:
            values = [getattr(run, when)[label] for run in group]
            line[f"{when}_{label}"] = float(np.mean(values))
            if len(values) > 1:
                line[f"{when}_{label}_sd"] = float(np.std(values, ddof=1))
    found = (
        compare(group, base)
        if base
        else {"verdict": "the base" if row.name == BASE else "no base run with these flags"}
    )
    fewer = [pair for pair in pairs_of(more) if base and pair not in pairs_of(base[0].more)]
    against = f"against the base without {' '.join(word for pair in fewer for word in pair)}" if fewer else ""
    return line | found | {"note": "; ".join(filter(None, [*found.get("notes", []), against, same_as(row, more)]))}


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
    lines = [summarise(group, find_base(group, groups)) for group in groups]
    if as_csv:
        print_csv(lines)
    else:
        print_tables(lines, print_markdown if markdown else show_table)
    if refused := [line["refused"] for line in lines if "refused" in line]:
        raise ValueError("\n".join(refused))


def accuracy_columns(lines: list[dict]) -> list[str]:
    labels = dict.fromkeys(label for line in lines for label in line["labels"])
    return [f"{when}_{label}" for when in ("best", "last") for label in labels]


def shown(line: dict, column: str, text: str = "{:.3f}") -> str:
    return text.format(line[column]) if column in line else ""


def print_tables(lines: list[dict], show) -> None:
    """For each set of flags behind -- two tables: the accuracies, and the differences."""
    lines = sorted(lines, key=lambda line: (len(pairs_of(line["more"])), line["flags"]))
    for flags, of_flags in groupby(lines, key=itemgetter("flags")):
        section, behind = list(of_flags), flags or "the rows' own flags"
        columns, accuracies, differences = accuracy_columns(section), [], []
        for line in section:
            whose = [line["row"], str(line["seeds"])]
            accuracies.append(
                [*whose, *(shown(line, column) + shown(line, f"{column}_sd", " ±{:.3f}") for column in columns)]
            )
            difference = "0.000 exactly" if line.get("exact") else shown(line, "difference", "{:+.3f}")
            bounds = shown(line, "low", "{:+.3f}") + shown(line, "high", " to {:+.3f}")
            measured = [shown(line, "garments", "{}"), shown(line, "best_mean"), difference, bounds]
            differences.append([*whose, *measured, line["verdict"], line["author_test"], line["note"]])
        title = "validation Top-1, mean ± standard deviation over seeds, at the best and at the last epoch"
        show(f"{title}; {behind}", ["row", "seeds", *(column.replace("_", " ", 1) for column in columns)], accuracies)
        columns = [
            "row",
            "seeds",
            "garments",
            "best mean",
            "difference",
            "95 % interval",
            "verdict",
            "author's test",
            "note",
        ]
        show(f"difference to the base at the best epoch; {behind}", columns, differences)


def print_markdown(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"{title}\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    print()


def print_csv(lines: list[dict]) -> None:
    accuracies = [name for column in accuracy_columns(lines) for name in (column, f"{column}_sd")]
    columns = [
        "row",
        "flags",
        "seeds",
        *accuracies,
        "garments",
        "difference",
        "low",
        "high",
        "df",
        "verdict",
        "note",
        "author_test",
    ]
    out = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
    out.writeheader()
    out.writerows(lines)


if __name__ == "__main__":
    run_app(app)
