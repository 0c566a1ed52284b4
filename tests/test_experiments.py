"""The rows are the notes'; they run, are skipped and resume; the statistics agree with references worked out apart."""

import csv
import io
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
import typer
from conftest import ROOT, TINY
from hypothesis import given, settings, strategies as st
from PIL import Image

import experiments
import train
from checkpoint import megabytes, new_checkpoint
from data import Split
from experiments import (
    BASE,
    NAMED,
    ROWS,
    garment,
    interval,
    merge_flags,
    parse_flags,
    per_garment,
    words_of,
)
from model import build_model, parameter_groups
from settings import Settings

# ---------------------------------------------------------------- the rows

NOTES = """
20240811_200032        raw    ce         0    50 1 5e-7  1    bbox  0.498
20240813_212817        raw    ce         0    10 2 5e-7  1    bbox  0.474   --augment randaugment
20240811_135831        raw    ce         0    50 1 5e-7  1    full  0.473
20240814_crop          raw    ce         0    10 2 5e-7  0.5  full  -
20240814_215539        raw    focal      0    10 2 5e-7  0.5  full  -       --focal-gamma 2
20240815_140358        clean  ce         0.2  10 2 5e-7  0.5  full  0.472
20240815_182900        clean  ce         0.2  10 2 5e-7  1    bbox  0.505
20240818_asymmetric    clean  asymmetric 0.1  10 2 5e-7  1    bbox  -       --asym-gamma-pos 1 --asym-gamma-neg 4
20240822_153056        raw+clean ce        0.2  10 2 5e-7  1    bbox  0.498
20240822_222251        clean  ce         0.2  10 2 5e-7  1    bbox  0.4796  --resize random-resized-crop
20240823_190953  clean  ce  0.2  10 2 5e-7  1  bbox  0.4567  --cutmix Daily --cutmix Gender --cutmix Embellishment
20240825_cutmix_gender clean  ce         0.2  10 2 5e-7  1    bbox  no      --cutmix Gender
20240826_223053        clean  ce         0.2  10 2 5e-7  1    bbox  -       --epochs 1000
20240828_181215        clean  ce         0.2  10 2 5e-8  1    bbox  -
20240831_192322        clean  ce         0.2  10 2 5e-7  0.7  bbox  -
20240910_221015        clean  ce         0.1  20 2 5e-8  1    bbox  0.504
20240911_091050        clean  ce         0.1  30 2 5e-8  1    bbox  0.5044
backbone_convnext      raw    ce         0    50 1 5e-7  1    bbox  below
backbone_mobilenet     raw    ce         0    50 1 5e-7  1    bbox  below
repeat                 raw    ce         0    50 1 5e-7  1    bbox  differed
""".strip().splitlines()


def parsed(words):
    """The settings that train.py would train with: its own parser, choices and bounds."""
    command = typer.main.get_command(train.app)
    params = command.make_context("train", ["--data", "x", *words]).params
    return params | {"cutmix": list(params["cutmix"] or [])}


@pytest.mark.parametrize("line", NOTES, ids=lambda line: line.split()[0])
def test_a_row_is_the_notes(line):
    name, data, loss, smoothing, t_0, t_mult, eta_min, crop_prob, view, score, *more = line.split()
    row = NAMED[name]
    flags = parsed(words_of(merge_flags(row, {})))
    expected = {
        "loss": loss,
        "label_smoothing": float(smoothing),
        "t_0": int(t_0),
        "t_mult": int(t_mult),
        "eta_min": float(eta_min),
    }
    expected |= {
        "crop_prob": float(crop_prob),
        "val_view": view,
        "batch_size": 256,
        "epochs": 300,
        "lr": 5e-6,
        "weight_decay": 0.01,
    }
    expected |= {
        "monitor": "loss",
        "patience": 50,
        "train_view": "bbox",
        "model": "eva02_tiny_patch14_224.mim_in22k",
        "pretrained": True,
        "amp": "auto",
    }
    expected |= {
        "augment": "basic",
        "resize": "squash",
        "cutmix": [],
        "class_weights": False,
        "focal_gamma": 2,
        "image_size": None,
        "grad_accum": 1,
    }
    own = parsed([*words_of(merge_flags(row, {})), *more])  # what the table adds, said once more, changes nothing
    expected["epochs"] = own["epochs"]
    for key in {"augment", "resize"} & own.keys():
        if f"--{key}" in more:
            expected[key] = more[more.index(f"--{key}") + 1]
    if "--cutmix" in more:
        expected["cutmix"] = more[1::2]
    if "--asym-gamma-pos" in more:
        expected |= {"asym_gamma_pos": 1, "asym_gamma_neg": 4}
    if "backbone" in name:
        expected["model"] = flags["model"]
        assert name.split("_")[1] in flags["model"] and timm.is_model(flags["model"].split(".")[0])
    assert {key: flags[key] for key in expected} == expected
    for flag in more[::2]:
        assert flag in merge_flags(row, {})
    assert (
        row.data == data
        and row.author_test.startswith("" if score == "-" else score)
        and bool(row.author_test) == (score != "-")
    )
    assert timm.get_pretrained_cfg(flags["model"]).input_size == (3, 224, 224)


def test_modern_is_ours():
    row = NAMED["modern"]
    flags = parsed(words_of(merge_flags(row, {})))
    assert "ours" in row.question and not row.author_test and row.data == "clean"
    assert (
        flags["lr"],
        flags["layer_decay"],
        flags["warmup_epochs"],
        flags["ema"],
        flags["drop_path"],
        flags["box_head"],
    ) == (5e-5, 0.9, 5, 0.996, 0.1, True)


def test_wide_is_modern_on_raw_photos_with_another_backbone_in_int8():
    modern, wide = (parsed(words_of(merge_flags(NAMED[name], {}))) for name in ("modern", "wide"))
    assert {key for key in wide if wide[key] != modern[key]} == {"model", "export_dtype"}
    assert wide["export_dtype"] == "int8" and NAMED["wide"].data == "raw"


@pytest.mark.slow
def test_wide_fits_without_a_remover():
    flags = Settings(**parsed(words_of(merge_flags(NAMED["wide"], {}))))
    classes = {"Daily": tuple("012345"), "Gender": tuple("01234"), "Embellishment": tuple("012")}
    model = build_model(flags.model, classes, drop_path=flags.drop_path, box_head=True)
    assert len(parameter_groups(model, flags.lr, flags.layer_decay)) > 10
    best = new_checkpoint(flags, model, Split(Path(), [], classes, (), ""), "learned", None)
    assert 25 - 4.57 < megabytes(best) <= 25  # u2netp has no room beside it


def test_every_row_is_there_once_and_listed(run):
    assert [row.name for row in ROWS] == [*(line.split()[0] for line in NOTES), "modern", "wide"]
    done = run("experiments", "list")
    assert done.code == 0
    for row in ROWS:
        assert f"\n{row.name:<24}" in done.out and row.question in done.out and row.flags in done.out


def test_what_follows_the_dashes_wins_but_not_over_the_subject():
    more = parse_flags(
        shlex.split("--model test_vit --weights w.pt --no-pretrained --epochs 30 --lr=1e-3 --crop-prob 0.2")
    )
    base = merge_flags(NAMED[BASE], more)
    assert (
        base["--model"] == ["test_vit"]
        and base["--weights"] == ["w.pt"]
        and base["--epochs"] == ["30"]
        and base["--lr"] == ["1e-3"]
    )
    assert base["--crop-prob"] == ["0.2"] and base["--no-pretrained"] == []
    convnext = merge_flags(NAMED["backbone_convnext"], more)
    assert "convnext" in convnext["--model"][0] and "--weights" not in convnext and convnext["--epochs"] == ["30"]
    assert merge_flags(NAMED["20240826_223053"], more)["--epochs"] == ["100"]
    assert merge_flags(NAMED["20240826_223053"], parse_flags(["--epochs", "4"]))["--epochs"] == ["13"]
    assert merge_flags(NAMED["20240826_223053"], parse_flags(["--epochs", "x"]))["--epochs"] == ["x"]
    cutmix = merge_flags(NAMED["20240823_190953"], parse_flags(["--cutmix", "Category"]))
    assert words_of(cutmix).count("--cutmix") == 1 and cutmix["--cutmix"] == ["Category"]


# ---------------------------------------------------------------- running


@pytest.fixture
def stub(monkeypatch):
    """Leaves a run's folder as train.py would; `commands` holds the command lines, `fails` names rows."""

    def start(command):
        stub.commands.append(command)
        resumed = "--resume" in command
        folder = (
            Path(command[command.index("--resume") + 1])
            if resumed
            else Path("runs") / command[command.index("--name") + 1]
        )
        if any(name in folder.name for name in stub.fails):
            return 1
        assert folder.exists() == resumed
        leave(folder.name)
        return 0

    stub.commands, stub.fails = [], []
    monkeypatch.setattr(experiments, "start", start)
    return stub


def leave(
    name,
    right=None,
    more=None,
    row=None,
    seed=1103,
    images=None,
    labels=("Daily", "Gender"),
    last=None,
    commit="c",
    truth=1,
    data=(),
    raw=None,
    settings=(),
):
    """A run's files; experiment.json where `row` is given. `right`: bool (images, labels); a wrong prediction is 9."""
    folder = Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    right = np.array([[True] * len(labels)] * 4 if right is None else right, dtype=bool)
    images = images or [f"1209/BO{i // 2:05d}-{i % 2 + 1}.jpg" for i in range(len(right))]
    config = {"settings": {"monitor": "loss", "seed": seed, **dict(settings)}, "commit": commit}
    (folder / "config.json").write_text(json.dumps(config))
    best = {f"val_top1_{label}": right[:, i].mean() for i, label in enumerate(labels)} | {"val_top1_mean": right.mean()}
    end = dict.fromkeys(best, 0.25 if last is None else last)
    with open(folder / "metrics.csv", "w") as f:
        out = csv.DictWriter(f, ["epoch", "val_loss", *best])
        out.writeheader()
        out.writerows(
            [
                {"epoch": 1, "val_loss": 2.5, **end},
                {"epoch": 2, "val_loss": 0.5, **best},
                {"epoch": 3, "val_loss": 0.75, **end},
            ]
        )
    with open(folder / "val_predictions.csv", "w") as f:
        out = csv.writer(f)
        out.writerow(
            ["image_name", *(column for label in labels for column in (label, f"{label}_predicted", f"{label}_p0"))]
        )
        for image, correct in zip(images, right):
            out.writerow([image, *(cell for ok in correct for cell in (truth, truth if ok else 9, 0.5))])
    if row:
        record = {
            "row": row,
            "more": more or {},
            "flags": merge_flags(NAMED[row], more or {}),
            "seed": seed,
            "data": list(data),
            "raw": raw or next(iter(data), None),
            "commit": commit,
        }
        (folder / "experiment.json").write_text(json.dumps(record))
    return folder


def test_finished_runs_are_skipped_unless_something_changed(run, stub, drawn, tmp_path):
    folder = tmp_path / "My data"
    shutil.copytree(drawn, folder)

    def started(*args):
        stub.commands.clear()
        done = run("experiments", "run", *args)
        assert done.code == 0, done.err
        return len(stub.commands)

    args = [BASE, "repeat", "--data", "My data", "--seeds", 2]
    assert started(*args) == 4 and started(*args) == 0
    assert started(*args, "--", "--lr", "1e-3") == 4 and started(*args, "--", "--lr=1e-3") == 0  # other flags
    assert started(BASE, "--data", folder, "--seeds", 3) == 1  # the same data by another path; one more seed
    victim = next((folder / "train").rglob("*.jpg"))
    victim.write_bytes(victim.read_bytes() + b"\0")
    assert started(*args) == 4 and started(*args) == 0  # other images
    path = folder / "Fashion-How24_sub1_val.csv"
    path.write_text(path.read_text().replace(",1\n", ",2\n", 1))
    assert started(*args) == 4  # other labels
    assert started("20240815_182900", "--data", folder, "--clean-data", drawn, "--seeds", 1) == 1
    assert started("20240815_182900", "--data", folder, "--clean-data", folder, "--seeds", 1) == 1


def test_torch_is_not_imported():
    code = "import sys, experiments; sys.exit(bool({'torch', 'scipy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_dry_run_prints_commands_alone(run, tmp_path):
    for i in range(40):
        path = tmp_path / "Photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    done = run("experiments", "run", "repeat", "--data", "Photos", "--seeds", 1, "--dry-run")
    assert done.code == 0 and len(done.out.splitlines()) == 1 and "no validation" in done.err


def test_commands_share_their_seeds_and_take_the_rows_data(run, stub, drawn):
    for name in ("Raw", "Clean"):
        shutil.copytree(drawn, name)
    done = run("experiments", "run", "all", "--data", "Raw", "--clean-data", "Clean", "--seeds", 2)
    assert done.code == 0 and len(stub.commands) == 44
    seeds, data = {}, {}
    for command in stub.commands:
        words = parse_flags(command[2:])
        row = re.match(r"(\w+)-seed", words["--name"][0])[1]
        seeds.setdefault(row, []).append(words["--seed"])
        data[row] = words["--data"]
    assert list(seeds) == [row.name for row in ROWS] and all(s == [["1103"], ["1104"]] for s in seeds.values())
    for row in ROWS:
        assert data[row.name] == {"raw": ["Raw"], "clean": ["Clean"], "raw+clean": ["Raw", "Clean"]}[row.data]


def test_one_that_fails_stops_no_other_and_is_gone_on_with(run, stub, drawn):
    shutil.copytree(drawn, "Raw")
    stub.fails = ["repeat-seed1103"]
    args = ["repeat", BASE, "repeat", "--data", "Raw", "--seeds", 2]
    done = run("experiments", "run", *args)
    assert done.code == 1 and len(stub.commands) == 4
    assert "1 of 4 runs failed: runs/repeat-seed1103-" in done.err
    record = json.loads(next(Path("runs").glob("repeat-seed1104-*/experiment.json")).read_text())
    assert (record["row"], record["seed"], record["commit"]) == ("repeat", 1104, "c")
    stub.fails = []
    failed = Path("runs") / parse_flags(stub.commands[0][2:])["--name"][0]
    failed.mkdir()
    (failed / "config.json").write_text("{}")  # what a training leaves that was killed
    dry = run("experiments", "run", *args, "--dry-run")
    lines = dry.out.splitlines()
    assert dry.code == 0 and sum(line.startswith("# finished before: runs/") for line in lines) == 3 and len(lines) == 4
    assert shlex.split(lines[0])[2:] == ["--resume", str(failed), "--data", "Raw"]
    stub.commands.clear()
    assert run("experiments", "run", *args).code == 0
    assert (
        len(stub.commands) == 1
        and stub.commands[0][2:] == ["--resume", str(failed), "--data", "Raw"]
        and (failed / "experiment.json").exists()
    )


@pytest.mark.parametrize(
    "args, says",
    [
        (["repaet"], ["'repaet'", "experiments.py list"]),
        (["repeat", "20240815_182900"], ["--clean-data", "20240815_182900", "preprocess.py"]),
        (["all"], ["--clean-data"]),
        (["repeat", "--data", "nowhere"], ["--data", "nowhere does not exist"]),
        (["repeat", "--clean-data", "nowhere"], ["--clean-data nowhere does not exist"]),
        (["repeat", "--seeds", "0"], ["--seeds"]),
        (["repeat", "--", "--seed", "5"], ["--seed cannot stand behind it", "--seeds stand before it"]),
        (["repeat", "--", "--fit-all"], ["--fit-all cannot stand behind it"]),
        (["repeat", "--", "--data", "demo"], ["--data cannot stand behind it", "--data and --seeds stand before it"]),
        (["repeat", "--", "--resume", "runs/a"], ["--resume cannot stand behind it"]),
        (["repeat", "--", "--name", "a"], ["--name cannot stand behind it"]),
        (["repeat", "--", "lr", "5"], ["lr is no flag"]),
        (["--", "--lr", "5"], ["rows to run"]),
    ],
)
def test_bad_input(run, stub, args, says):
    args = args if "--data" in args else ["--data", "demo", *args]
    done = run("experiments", "run", *args)
    assert done.code == 2 and done.err.count("error:") == 1 and not stub.commands and not Path("runs").exists()
    for word in says:
        assert word in done.err, done.err


# ---------------------------------------------------------------- statistics


def reference(d):
    """The interval by sums written out, from the components of variance."""
    units, seeds = len(d), len(d[0])
    mean = sum(map(sum, d)) / units / seeds
    of_units = [sum(row) / seeds for row in d]
    of_seeds = [sum(row[s] for row in d) / units for s in range(seeds)]
    ms_u = seeds * sum((x - mean) ** 2 for x in of_units) / (units - 1)
    ms_s = units * sum((x - mean) ** 2 for x in of_seeds) / (seeds - 1)
    df_r = (units - 1) * (seeds - 1)
    ms_r = sum((d[u][s] - of_units[u] - of_seeds[s] + mean) ** 2 for u in range(units) for s in range(seeds)) / df_r
    component_u, component_s = (ms_u - ms_r) / seeds, (ms_s - ms_r) / units
    variance = max(component_u, 0) / units + max(component_s, 0) / seeds + ms_r / units / seeds
    share = units * seeds
    df = variance**2 / (
        (ms_u / share) ** 2 / (units - 1) + (ms_s / share) ** 2 / (seeds - 1) + (ms_r / share) ** 2 / df_r
    )
    return mean, scipy.stats.t.ppf(0.975, df) * math.sqrt(variance), df


@settings(deadline=None, max_examples=150)
@given(
    units=st.integers(2, 30),
    seeds=st.integers(3, 6),
    scales=st.tuples(*[st.sampled_from([0.0, 0.2, 1.0, 5.0])] * 2),
    seed=st.integers(0, 10**6),
)
def test_the_interval_is_the_formula(units, seeds, scales, seed):
    rng = np.random.default_rng(seed)
    d = (
        rng.normal(size=(units, seeds))
        + scales[0] * rng.normal(size=(units, 1))
        + scales[1] * rng.normal(size=(1, seeds))
        + 0.3
    )
    assert interval(d) == pytest.approx(reference(d.tolist()), rel=1e-6)
    mean, half, _ = interval(d)
    assert interval(-2 * d)[:2] == pytest.approx((-2 * mean, 2 * half))
    assert interval(d[::-1, ::-1])[:2] == pytest.approx((mean, half))


def test_the_interval_in_the_cases_that_have_a_name():
    rng = np.random.default_rng(3)
    only_images = np.repeat(
        rng.normal(size=(40, 1)), 3, axis=1
    )  # seeds change nothing: a paired t-test over the images
    mean, half, df = interval(only_images)
    low, high = scipy.stats.ttest_1samp(only_images[:, 0], 0).confidence_interval(0.95)
    assert (mean - half, mean + half, df) == pytest.approx((low, high, 39))
    only_seeds = np.repeat(rng.normal(size=(1, 4)), 50, axis=0)  # images change nothing: a t-test over the seeds
    mean, half, df = interval(only_seeds)
    low, high = scipy.stats.ttest_1samp(only_seeds[0], 0).confidence_interval(0.95)
    assert (mean - half, mean + half, df) == pytest.approx((low, high, 3))
    assert interval(np.zeros((5, 3)))[:2] == (0, 0) and interval(np.full((5, 3), 0.2))[:2] == (pytest.approx(0.2), 0)


def test_photos_of_a_garment_are_one_unit():
    assert garment("1209/BO00001-1.jpg") == garment("1209/BO00001-2.jpg") == "1209/BO00001"
    assert garment("2COAT 2019/co0036-1.png") == "2COAT 2019/co0036" and garment("1906/BO00001-1.jpg") != garment(
        "1209/BO00001-1.jpg"
    )
    for name in ("00012.png", "2019-05-12.jpg", "IMG-1234.jpg", "a-1/b.jpg"):
        assert garment(name) == name
    images = ["a1-1.jpg", "b2-1.jpg", "a1-2.jpg", "c3.jpg"]
    d = np.array([[1.0, 0], [2, 4], [5, 0], [0, 1]])
    units = per_garment(images, d)
    assert sorted(map(tuple, units.tolist())) == sorted([(6 * 3 / 4, 0), (2 * 3 / 4, 3), (0, 3 / 4)])
    assert units.mean(0) == pytest.approx(d.mean(0))


# ---------------------------------------------------------------- the table


def found_rows(run, *args):
    done = run("experiments", "table", "--csv", *args)
    return {
        (row["row"], row["flags"]): row for row in csv.DictReader(io.StringIO(done.out[done.out.find("row,flags") :]))
    }, done


def draws(rng, n, share):
    return rng.random((n, 2)) < share


def test_verdicts(run):
    rng = np.random.default_rng(0)
    base = draws(rng, 300, 0.5)
    for seed in (1103, 1104, 1105):
        right = base ^ (rng.random(base.shape) < 0.1)
        leave(f"{BASE}-seed{seed}-00000000", right, row=BASE, seed=seed)
        leave(f"repeat-seed{seed}-00000000", right, row="repeat", seed=seed)
        leave(
            f"20240813_212817-seed{seed}-00000000",
            right ^ (rng.random(base.shape) < 0.1),
            row="20240813_212817",
            seed=seed,
        )
        leave(
            f"20240815_182900-seed{seed}-00000000",
            right | (rng.random(base.shape) < 0.4),
            row="20240815_182900",
            seed=seed,
        )
        if seed < 1105:
            leave(
                f"20240814_crop-seed{seed}-00000000",
                right | (rng.random(base.shape) < 0.4),
                row="20240814_crop",
                seed=seed,
            )
    rows, done = found_rows(run)
    assert done.code == 0, done.err
    verdicts = {row: found["verdict"] for (row, _), found in rows.items()}
    assert verdicts == {
        BASE: "the base",
        "repeat": "not told apart",
        "20240813_212817": "not told apart",
        "20240815_182900": "real",
        "20240814_crop": "too few seeds",
    }
    same, better = rows["repeat", ""], rows["20240815_182900", ""]
    assert (
        float(same["difference"]) == float(same["low"]) == float(same["high"]) == 0
        and "every prediction is the same" in same["note"]
    )
    assert same["garments"] == "150"
    assert float(better["low"]) > 0 and float(better["low"]) < float(better["difference"]) < float(better["high"])
    shown = run("experiments", "table").out
    assert re.search(r"repeat +3 +150 +0\.\d+ +0\.000 exactly +\+0\.000 to \+0\.000 +not told apart", shown)
    assert "author's test" in shown and "0.505" in shown


def test_accuracies_are_over_seeds_at_the_best_and_the_last_epoch(run):
    shares, lasts = (0.25, 0.5, 1.0), (0.1, 0.2, 0.6)
    for i, (share, last) in enumerate(zip(shares, lasts)):
        right = np.stack([np.arange(8) < 8 * share, np.arange(8) < 4], axis=1)
        leave(f"{BASE}-seed{1103 + i}-00000000", right, row=BASE, seed=1103 + i, last=last)
    rows, _ = found_rows(run)
    row = rows[BASE, ""]
    assert float(row["best_Daily"]) == pytest.approx(np.mean(shares)) and float(row["best_Daily_sd"]) == pytest.approx(
        np.std(shares, ddof=1)
    )
    assert float(row["best_mean"]) == pytest.approx((np.mean(shares) + 0.5) / 2) and float(row["best_Gender_sd"]) == 0
    assert (
        float(row["last_mean"]) == pytest.approx(0.3)
        and float(row["last_mean_sd"]) == pytest.approx(np.std(lasts, ddof=1))
        and row["seeds"] == "3"
    )
    markdown = run("experiments", "table", "--markdown").out
    assert (
        "| row | seeds | best mean | best Daily | best Gender | last mean |" in markdown
        and f"| {BASE} | 3 | 0.542 ±0.191 | 0.583 ±0.382 |" in markdown
    )


def test_runs_on_different_images_are_not_compared(run):
    for seed in (1103, 1104, 1105):
        leave(f"{BASE}-seed{seed}-00000000", row=BASE, seed=seed)
        leave(
            f"repeat-seed{seed}-00000000",
            row="repeat",
            seed=seed,
            images=["a", "b", "c", "d"] if seed == 1104 else None,
        )
        leave(f"20240814_crop-seed{seed}-00000000", row="20240814_crop", seed=seed, labels=("Daily", "Color"))
        leave(f"20240815_182900-seed{seed}-00000000", row="20240815_182900", seed=seed)
    rows, done = found_rows(run)
    assert done.code == 1 and "Traceback" not in done.err
    assert (
        f"runs/repeat-seed1104-00000000 and runs/{BASE}-seed1103-00000000 were validated on different images"
        in done.err
    )
    assert f"runs/20240814_crop-seed1103-00000000 and runs/{BASE}-seed1103-00000000" in done.err
    assert (
        rows["repeat", ""]["verdict"] == rows["20240814_crop", ""]["verdict"] == "refused"
        and rows["repeat", ""]["difference"] == ""
    )
    assert rows["20240815_182900", ""]["verdict"] == "not told apart"


def test_classes_are_words_and_an_empty_cell_is_not_known(run):
    """Of six photos the last has no known label; of the first, only Gender is known."""
    rng = np.random.default_rng(1)
    expected = []
    for seed in (1103, 1104, 1105):
        means = []
        for row in (BASE, "repeat"):
            right = rng.random((6, 2)) < 0.5
            folder = leave(f"{row}-seed{seed}-00000000", right, row=row, seed=seed, truth="rain coat")
            path = folder / "val_predictions.csv"
            lines = path.read_text().splitlines()
            assert lines[1].split(",")[1] == lines[6].split(",")[4] == "rain coat"
            lines[1] = lines[1].replace("rain coat", "", 1)
            lines[6] = ",".join([lines[6].split(",")[0], "", "rain coat", "0.5", "", "rain coat", "0.5"])
            path.write_text("\n".join(lines))
            right = right.astype(float)
            right[0, 0] = right[5] = np.nan
            means.append(np.nansum(right[:5] / [4 / 5, 1], axis=1) / 2)  # Daily: known in four of five
        expected.append(means[1] - means[0])
    rows, done = found_rows(run)
    assert done.code == 0 and "Warning" not in done.err
    repeat = rows["repeat", ""]
    units = per_garment([f"1209/BO{i // 2:05d}-{i % 2 + 1}.jpg" for i in range(5)], np.stack(expected, axis=1))
    mean, half, _ = interval(units)
    assert (float(repeat["difference"]), float(repeat["low"])) == pytest.approx((mean, mean - half))
    assert repeat["garments"] == "3"
    best = [float(rows[row, ""]["best_mean"]) for row in (BASE, "repeat")]
    assert float(repeat["difference"]) == pytest.approx(best[1] - best[0])


def test_runs_on_other_data_are_not_seeds_of_one_setting(run):
    for seed in (1103, 1104, 1105):
        leave(f"{BASE}-seed{seed}-00000000", row=BASE, seed=seed, data=["A"])
        leave(f"repeat-seed{seed}-00000000", row="repeat", seed=seed, data=["A"])
    leave("repeat-seed1103-11111111", row="repeat", data=["B"])
    done = run("experiments", "table", "--csv")
    found = [line.split(",") for line in done.out.splitlines() if line.startswith("repeat,")]
    assert [line[2] for line in found] == ["3", "1"] and "no base run with these flags" in done.out.splitlines()[-1]
    leave("b-seed1")
    leave("b-seed2", seed=2, images=["a", "b", "c", "d"])
    done = run("experiments", "compare", "runs/b-seed1", "runs/b-seed2")
    assert done.code == 2 and "runs/b-seed2 and runs/b-seed1 were validated on different images" in done.err


def test_a_row_without_backgrounds_is_compared_with_the_base_of_its_own_photos(run):
    for seed in (1103, 1104, 1105):
        leave(f"{BASE}-seed{seed}-a", row=BASE, seed=seed, data=["A"], raw="A", right=[[True, True]] * 4)
        leave(f"{BASE}-seed{seed}-b", row=BASE, seed=seed, data=["B"], raw="B", right=[[True, False]] * 4)
        for key, of in (("c", "A"), ("d", "B")):
            name = f"20240815_182900-seed{seed}-{key}"
            leave(name, row="20240815_182900", seed=seed, data=[f"{of}-clean"], raw=of, right=[[True, True]] * 4)
    out = run("experiments", "table", "--csv").out
    found = [row for row in csv.DictReader(io.StringIO(out)) if row["row"] == "20240815_182900"]
    assert sorted(float(row["difference"]) for row in found) == [0.0, 0.5]


@pytest.mark.parametrize("key, says", [("epochs", "4 epochs"), ("patience", "--patience 4")])
def test_an_experiment_that_was_resumed_with_more_is_left_aside(run, key, says):
    for seed in (1103, 1104):
        value = 4 if seed == 1104 else 3
        leave(f"{BASE}-seed{seed}-0", row=BASE, seed=seed, more={f"--{key}": ["3"]}, settings={key: value})
    done = run("experiments", "table", "--csv")
    assert f"left aside: runs/{BASE}-seed1104-0 was resumed to {says} since" in done.out
    (row,) = csv.DictReader(io.StringIO(done.out[done.out.index("row,flags") :]))
    assert row["seeds"] == "1"
    done = run("experiments", "compare", f"runs/{BASE}-seed1103-0", f"runs/{BASE}-seed1104-0")
    assert done.code == 0, done.err


def test_compare_says_what_a_mean_hides(run):
    names = [leave(f"a-seed{seed}", seed=seed, settings={"lr": 0.1, "epochs": 3}) for seed in (1, 2)]
    names += [leave(f"b-seed{seed}", seed=seed, settings={"lr": seed / 10, "epochs": 400}) for seed in (1, 2)]
    done = run("experiments", "compare", *names, "--csv")
    first, second = csv.DictReader(io.StringIO(done.out))
    assert first["note"] == ""
    assert "b-seed1 has 3 of 400 epochs" in second["note"] and second["note"].endswith("these differ: lr")


def test_photos_are_paired_by_name_whatever_their_order(run):
    right = np.array([[1, 1], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0]])
    images = [f"{c}.jpg" for c in "abcdef"]
    for seed in (1103, 1104, 1105):
        leave(f"{BASE}-seed{seed}-00000000", right, row=BASE, seed=seed, images=images)
        leave(f"repeat-seed{seed}-00000000", right[::-1], row="repeat", seed=seed, images=images[::-1])
    rows, _ = found_rows(run)
    assert "every prediction is the same" in rows["repeat", ""]["note"] and rows["repeat", ""]["garments"] == "6"


def test_the_base_is_the_one_with_the_same_flags(run):
    small = {"--epochs": ["4"], "--lr": ["1e-3"]}
    for seed in (1103, 1104, 1105):
        for key, row, more in (
            ("0", BASE, {}),
            ("1", BASE, small),
            ("2", BASE, {"--cutmix": ["joint"], **small}),
            ("3", "20240910_221015", small),
            ("4", "20240911_091050", small),
            ("5", "20240911_091050", {}),
            ("6", "20240815_182900", {"--epochs": ["8"]}),
        ):
            leave(f"{row}-seed{seed}-{key * 8}", row=row, more=more, seed=seed, commit="other" if key == "5" else "c")
    rows, done = found_rows(run)
    assert done.code == 0 and len(rows) == 7
    assert rows[BASE, ""]["verdict"] == "the base"
    assert (
        rows[BASE, "--epochs 4 --lr 1e-3"]["note"]
        == "every prediction is the same; against the base without --epochs 4 --lr 1e-3"
    )
    assert rows[BASE, "--cutmix joint --epochs 4 --lr 1e-3"]["note"].endswith("against the base without --cutmix joint")
    assert rows["20240815_182900", "--epochs 8"]["verdict"] == "no base run with these flags"
    assert "the commits differ" in rows["20240911_091050", ""]["note"]


def test_half_written_runs_are_left_aside(run):
    assert run("experiments", "table").code == 1
    for seed in (1103, 1104, 1105):
        leave(f"{BASE}-seed{seed}-00000000", row=BASE, seed=seed)
        leave(f"repeat-seed{seed}-00000000", row="repeat", seed=seed)
    leave("repeat-seed1106-00000000")  # unfinished
    Path("runs/repeat-seed1107-00000000").mkdir()
    Path("runs/20240811_120000").mkdir()  # of train.py alone
    broken = {
        "metrics.csv": "epoch,val_loss\n1",
        "val_predictions.csv": 'image_name,Daily,Daily_predicted\n"a.jpg,1',
        "config.json": "{}",
        "experiment.json": "[]",
    }
    for i, (name, text) in enumerate(broken.items()):
        (leave(f"20240814_crop-seed{i}-00000000", row="20240814_crop", seed=i) / name).write_text(text)
    gone = leave("20240814_crop-seed8-00000000", row="20240814_crop", seed=8)
    (gone / "val_predictions.csv").unlink()
    rows, done = found_rows(run)
    assert done.code == 0, done.err
    assert {row for row, _ in rows} == {BASE, "repeat"} and rows["repeat", ""]["seeds"] == "3"
    assert "20240811_120000" not in done.out
    for i in (0, 1, 2, 3, 8):
        assert f"left aside: runs/20240814_crop-seed{i}-00000000" in done.out


# ---------------------------------------------------------------- compare


def test_compare_says_what_the_table_says(run):
    rng = np.random.default_rng(0)
    base = draws(rng, 300, 0.5)
    runs = {"plain": [], "wide": []}
    for seed in (1103, 1104, 1105):
        right = base ^ (rng.random(base.shape) < 0.1)
        better = right | (rng.random(base.shape) < 0.4)
        for name, row, values in (("plain", BASE, right), ("wide", "20240815_182900", better)):
            leave(f"{row}-seed{seed}-00000000", values, row=row, seed=seed)
            runs[name].append(leave(f"{name}-seed{seed}", values, seed=seed))
    table = found_rows(run)[0]["20240815_182900", ""]
    done = run("experiments", "compare", *runs["plain"], *reversed(runs["wide"]), "--csv")
    assert done.code == 0, done.err
    first, second = csv.DictReader(io.StringIO(done.out))
    assert (first["row"], first["verdict"], second["row"]) == ("runs/plain", "the first", "runs/wide")
    for column in table.keys() - {"row", "author_test"}:
        assert second[column] == table[column], column
    assert second["verdict"] == "real"
    out = run("experiments", "compare", *runs["plain"], *runs["wide"]).out
    assert "difference to runs/plain at the best epoch" in out and "author's test" not in out
    assert re.search(r"runs/wide +3 +150 +0\.\d+ +\+0\.\d+ +\+0\.\d+ to \+0\.\d+ +real", out)


def test_compare_tells_the_flags_of_rows_apart(run):
    names = []
    for seed in (1103, 1104, 1105):
        names.append(leave(f"{BASE}-seed{seed}-0000000{seed % 10}", row=BASE, seed=seed))
        names.append(leave(f"{BASE}-seed{seed}-1000000{seed % 10}", row=BASE, seed=seed, more={"--lr": ["1e-3"]}))
    out = run("experiments", "compare", *names, "--markdown").out
    assert re.search(rf"\| runs/{BASE} --lr 1e-3 \| 3 \| 2 \| .* not told apart \|", out), out
    assert f"difference to runs/{BASE} at the best epoch" in out


def test_compare_takes_single_runs_by_the_seed_of_their_settings(run):
    a, b, c = (leave(name, seed=seed) for name, seed in (("a", 1103), ("b-seed7", 1103), ("c", 5)))
    done = run("experiments", "compare", a, b, c, a, "--csv")
    assert done.code == 0, done.err
    _, second, third = csv.DictReader(io.StringIO(done.out))
    assert second["difference"] == "0.0" and second["verdict"] == third["verdict"] == "too few seeds"
    assert third["difference"] == "" and third["note"] == "0 seeds in common"


def test_compare_refuses_in_one_line(run):
    a, other = leave("a", images=list("abcd")), leave("other", images=list("abce"))
    twice = leave("a-seed1"), leave("a-seed2")
    fit_all = leave("fit_all")
    (fit_all / "val_predictions.csv").unlink()
    for args, says in (
        ((a, other), "runs/other and runs/a were validated on different images"),
        ((a, *twice), "runs/a-seed1 have one --seed, 1103"),
        ((a, "runs/none"), "runs/none is no complete run"),
        ((a, fit_all), "val_predictions.csv"),
    ):
        done = run("experiments", "compare", *args)
        assert done.code == 2 and done.err.count("\n") == 1 and says in done.err and not done.out, done


# ---------------------------------------------------------------- the whole of it


@pytest.mark.slow
def test_a_row_run_twice_by_the_real_script_is_the_same_exactly(run, drawn, tmp_path):
    """Trains for real: the base by a pasted command, the repeat by `run`; then the table."""
    more = [word for word in TINY if word not in ("--patience", "1")]
    args = ["experiments", "run", BASE, "repeat", "--data", drawn, "--seeds", 1]
    dry = run(*args, "--dry-run", "--", *more)
    assert dry.code == 0 and not Path("runs").exists()
    pasted = subprocess.run(
        dry.out.splitlines()[0], shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert pasted.returncode == 0, pasted.stderr
    done = run(*args, "--", *more)
    assert done.code == 0 and "is finished after 2 epochs; nothing was changed" in done.out, done.err
    assert "2 runs are finished" in done.out and run(*args, "--", *more).out.count("# finished before: runs/") == 2
    out = run("experiments", "table").out
    assert re.search(r"repeat +1 +\d+ +0\.\d+ +0\.000 exactly +too few seeds .*every prediction is the same", out), out


def test_an_interrupted_run_ends_its_training(tmp_path, drawn):
    """SIGTERM to experiments.py alone: the command it started ends too, and nothing counts as finished."""
    shutil.copytree(drawn, tmp_path / "Raw")
    (tmp_path / "train.py").write_text("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(100)\n")
    for name in ("experiments.py", "cli.py", "data.py", "photos.py", "settings.py"):
        shutil.copy(ROOT / name, tmp_path)
    process = subprocess.Popen([sys.executable, "experiments.py", "run", "repeat", "--data", "Raw"], cwd=tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists() and not list(tmp_path.rglob("experiment.json"))
