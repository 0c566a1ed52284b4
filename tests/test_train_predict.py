"""The real scripts end to end: train, resume, predict; what is written, and that the numbers repeat."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import checkpoint
import cli
import evaluate
import train as train_script
from checkpoint import load_model, read
from data import CLASS_NAMES, Sample
from evaluate import Prediction
from loading import EpochSampler
from model import FashionModel
from predict import predictions_table, prepare_once
from settings import Settings

RUN_FILES = {"config.json", "metrics.csv", "best.pt", "last.pt", "val_predictions.csv"}


def rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def metrics(run_folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run_folder / "metrics.csv")]


def weights(run_folder):
    return read(run_folder / "best.pt")["weights"]


def same_run(a, b):
    assert metrics(a) == metrics(b)
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))
    assert (a / "val_predictions.csv").read_bytes() == (b / "val_predictions.csv").read_bytes()


def table(out):
    return [line.split() for line in out.splitlines() if re.fullmatch(r"\s+\w+\s+[\d.]+\s+[\d.]+", line)]


@pytest.fixture(scope="session")
def trained(drawn, tmp_path_factory):
    """A finished run of the real script in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(drawn), *TINY, "--name", "a", "--amp", "off"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "a", done.stdout


def test_a_run_writes_its_files_and_prints_its_table(trained):
    run_folder, out = trained
    assert {p.name for p in run_folder.iterdir()} == RUN_FILES
    assert {p.name for p in run_folder.parent.parent.iterdir()} == {"runs"}
    assert "\x1b" not in out
    history = rows(run_folder / "metrics.csv")
    assert list(history[0]) == [
        "epoch", "lr", "train_loss", "val_loss", "val_top1_Daily", "val_acsa_Daily", "val_top1_Gender",
        "val_acsa_Gender", "val_top1_Embellishment", "val_acsa_Embellishment", "val_top1_mean", "val_acsa_mean",
        "seconds",
    ]  # fmt: skip
    assert [r["epoch"] for r in history] == ["1", "2"]
    best = max(history, key=lambda r: float(r["val_top1_mean"]))
    assert table(out)[-1] == ["mean", f"{float(best['val_top1_mean']):.4f}", f"{float(best['val_acsa_mean']):.4f}"]
    size = (run_folder / "best.pt").stat().st_size
    assert f"best.pt: {size / 1e6:.2f} MB of at most 25 MB" in out
    assert len(re.findall(r"^epoch \d/2 .* s\b", out, re.M)) == 2
    config = json.loads((run_folder / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-3 and config["settings"]["seed"] == 1103
    assert config["versions"]["torch"] == torch.__version__


def test_val_predictions_hold_the_best_epochs_numbers(trained, drawn):
    run_folder, _ = trained
    written = rows(run_folder / "val_predictions.csv")
    truth = rows(drawn / "Fashion-How24_sub1_val.csv")
    assert [r["image_name"] for r in written] == [r["image_name"] for r in truth]
    assert [r["Daily"] for r in written] == [r["Daily"] for r in truth]
    top1 = sum(r["Daily"] == r["Daily_predicted"] for r in written) / len(written)
    best = max(rows(run_folder / "metrics.csv"), key=lambda r: float(r["val_top1_mean"]))
    assert float(best["val_top1_Daily"]) == top1
    assert sum(float(written[0][f"Gender_p{c}"]) for c in range(5)) == pytest.approx(1)


def test_predicting_the_validation_split_repeats_trainings_numbers(trained, run):
    run_folder, out = trained
    done = run("predict", run_folder / "best.pt", "--split", "val", "--amp", "off", "--out", "p.csv", "--workers", 1)
    assert done.code == 0, done.err
    assert table(done.out) == table(out)
    _, saved = load_model(run_folder / "best.pt")
    assert [r["daily"] for r in rows("p.csv")] == [
        r["Daily_predicted"] for r in rows(run_folder / "val_predictions.csv")
    ]
    assert saved.scores["top1_mean"] == max(float(r["val_top1_mean"]) for r in rows(run_folder / "metrics.csv"))


@pytest.mark.parametrize("model", [pytest.param("tiny_vit_5m_224", marks=pytest.mark.slow), "test_resnet"])
def test_prediction_repeats_the_table_in_trainings_precision(run, drawn, tmp_path, model):
    """TinyViT keeps attention biases between calls: a stale copy of them would show here."""
    flags = ["--model", model, "--image-size", 64, "--augment", "none", "--amp", "bf16"]
    args = ["--data", drawn, *TINY, *flags, "--name", "a"]
    done = run("train", *args)
    assert done.code == 0, done.err
    again = run("predict", "runs/a/best.pt", "--split", "val", "--probs", "--workers", 0)
    assert again.code == 0 and table(again.out) == table(done.out)
    ours, theirs = (rows(tmp_path / "runs" / "a" / name)[0] for name in ("predictions.csv", "val_predictions.csv"))
    assert float(ours["daily_p0"]) == pytest.approx(float(theirs["Daily_p0"]), rel=1e-6)


def test_predicting_by_the_checkpoint_alone(trained, run, drawn, tmp_path):
    shutil.copy(trained[0] / "best.pt", tmp_path / "best.pt")
    done = run("predict", "best.pt")
    assert done.code == 0, done.err
    assert "the test split" in done.out and "sees whole photos" in done.out
    written = rows("predictions.csv")
    assert list(written[0]) == ["image_name", "daily", "gender", "embel"]
    assert [r["image_name"] for r in written] == [r["image_name"] for r in rows(drawn / "Fashion-How24_sub1_test.csv")]
    assert {r["daily"] for r in written} <= set("012345")


def test_probabilities_and_names(trained, run, drawn):
    flags = ["--data", drawn, *["--split", "test", "--out", "p.csv", "--probs", "--names"]]
    done = run("predict", trained[0] / "best.pt", *flags)
    assert done.code == 0, done.err
    for row in rows("p.csv"):
        p = [float(row[f"embel_p{c}"]) for c in range(3)]
        assert sum(p) == pytest.approx(1) and p.index(max(p)) == int(row["embel"])
        assert row["embel_name"] == ("none", "point", "lots")[int(row["embel"])]


@pytest.mark.slow
def test_a_photo_whose_name_is_no_utf8(trained, shell, tmp_path):
    """As from a zip file made in Korea, on a strict terminal."""
    name = "옷.png".encode("cp949")
    Image.new("RGB", (60, 80)).save(os.fsencode(tmp_path) + b"/" + name)
    flags = [os.fsdecode(name), "--out", "p.csv", "--workers", 0]
    done = shell("predict", trained[0] / "best.pt", *flags, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0 and "answers" in done.stdout, done.stderr


def test_columns_that_would_be_there_twice(drawn):
    rows = SimpleNamespace(samples=[SimpleNamespace(name="a.jpg")])
    classes = {"Size": ("0", "1"), "Size_name": ("0", "1")}
    prediction = Prediction({label: torch.zeros(1, 2) for label in classes}, {})
    assert list(predictions_table(rows, prediction, classes)) == ["image_name", "size", "size_name"]
    with pytest.raises(ValueError, match="size_name twice"):
        predictions_table(rows, prediction, classes, names=True)


def test_predicting_image_files_and_folders(trained, run, tmp_path):
    (tmp_path / "photos" / "한글 폴더").mkdir(parents=True)
    Image.new("RGB", (60, 80), "red").save(tmp_path / "photos" / "a b.jpg")
    Image.new("RGBA", (60, 80), (0, 255, 0, 0)).save(tmp_path / "photos" / "한글 폴더" / "옷.png")
    Image.new("L", (30, 20)).save(tmp_path / "one.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    done = run("predict", trained[0] / "best.pt", "photos", "one.png", "--out", "p.csv")
    assert done.code == 0, done.err
    written = rows("p.csv")
    assert [r["image_name"] for r in written] == ["photos/a b.jpg", "photos/한글 폴더/옷.png", "one.png"]
    for row in written:  # few photos' answers are shown too
        shown = next(line for line in done.out.splitlines() if line.strip().startswith(row["image_name"]))
        for label, column in (("Daily", "daily"), ("Gender", "gender"), ("Embellishment", "embel")):
            assert re.search(rf" {CLASS_NAMES[label][int(row[column])]} [01]\.\d\d", shown), shown


def test_the_same_bits_again_with_other_workers(trained, run, drawn, tmp_path):
    done = run("train", "--data", drawn, *TINY, "--name", "b", "--amp", "off", "--workers", 2)
    assert done.code == 0, done.err
    same_run(trained[0], tmp_path / "runs" / "b")


def test_a_resumed_run_ends_with_the_same_bits(run, drawn, tmp_path, monkeypatch):
    flags = "--epochs 4 --patience 9 --crop-prob 0.5 --val-view full --amp off --model test_resnet"
    args = ["--data", drawn, *TINY, *flags.split()]
    assert run("train", *args, "--name", "whole").code == 0
    save, count = checkpoint.save, 0

    def interrupted(content, path):
        nonlocal count
        save(content, path)
        count += path.name == "last.pt"
        if count == 2 and path.name == "best.pt":  # in epoch 3: best.pt is new already, last.pt is not
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    monkeypatch.setattr(train_script, "MONITORS", {"top1": ("epoch", 1)})  # every epoch is the best
    stopped = run("train", *args, "--name", "cut")
    assert stopped.code == 130 and "--resume" in stopped.out and "Traceback" not in stopped.err
    assert len(metrics(tmp_path / "runs" / "cut")) == 2
    monkeypatch.setattr(checkpoint, "save", save)
    done = run("train", "--resume", "runs/cut", "--workers", 1)
    assert done.code == 0, done.err
    assert metrics(tmp_path / "runs" / "cut") == metrics(tmp_path / "runs" / "whole")
    a, b = (read(tmp_path / "runs" / name / "last.pt")["model"] for name in ("cut", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_stop_while_photos_are_waited_for_keeps_the_losses(run, drawn, tmp_path, monkeypatch):
    whole, real = cli.StopSignals.waiting_for, []

    def stop_at_the_third(self, batches):
        for i, batch in enumerate(whole(self, batches)):
            if i == 2 and not real:
                real.append(i)
                raise cli.Stopped
            yield batch

    monkeypatch.setattr(cli.StopSignals, "waiting_for", stop_at_the_third)
    assert run("train", "--data", drawn, *TINY, "--name", "a").code == 130
    assert run("train", "--resume", "runs/a").code == 0
    assert run("train", "--data", drawn, *TINY, "--name", "b").code == 0
    same_run(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


def test_what_an_epoch_wrote_stays_where_last_pt_cannot_be_written(run, drawn, tmp_path, monkeypatch):
    def full(path, *args):
        raise OSError("the disk is full")

    monkeypatch.setattr("checkpoint.save_last", full)
    done = run("train", "--data", drawn, *TINY, "--name", "a")
    assert done.code == 1 and "the disk is full" in done.err
    assert {path.name for path in (tmp_path / "runs" / "a").iterdir()} == RUN_FILES - {"last.pt"}


def test_a_run_killed_in_its_first_epoch_starts_again(trained, run, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    shutil.copy(trained[0] / "config.json", tmp_path / "runs" / "a")
    done = run("train", "--resume", "runs/a")
    assert done.code == 0 and "starts again" in done.out, done.err
    same_run(trained[0], tmp_path / "runs" / "a")


def test_a_run_killed_before_its_first_state_starts_from_its_weights_again(trained, run, drawn, tmp_path):
    still = ["--lr", 1e-12, "--eta-min", 1e-13, "--epochs", 1, "--amp", "off", "--weights", trained[0] / "best.pt"]
    assert run("train", "--data", drawn, *TINY, *still, "--name", "a").code == 0
    once = weights(tmp_path / "runs" / "a")
    for file in RUN_FILES - {"config.json"}:
        (tmp_path / "runs" / "a" / file).unlink()
    done = run("train", "--resume", "runs/a")
    assert done.code == 0 and "starts again" in done.out, done.err
    assert all(torch.equal(once[key], value) for key, value in weights(tmp_path / "runs" / "a").items())


def test_resume_refuses_what_changed_and_leaves_what_is_finished(trained, run, drawn, tmp_path):
    shutil.copytree(trained[0], tmp_path / "runs" / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "runs" / "a").iterdir()}
    refused = run("train", "--resume", "runs/a", "--lr", "0.5")
    assert refused.code == 2 and "--lr" in refused.err and "0.001" in refused.err
    assert run("train", "--resume", "runs/a", "--epochs", 1).code == 2
    done = run("train", "--resume", "runs/a")
    assert done.code == 0 and "finished" in done.out
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "runs" / "a").iterdir()}
    missing = run("train", "--resume", "runs/none")
    assert missing.code == 2 and "runs/none" in missing.err
    other = tmp_path / "Other"
    shutil.copytree(drawn, other)
    text = (other / "Fashion-How24_sub1_val.csv").read_text()
    (other / "Fashion-How24_sub1_val.csv").write_text(text.replace(",1\n", ",2\n", 1))
    changed = run("train", "--resume", "runs/a", "--data", other, "--epochs", 3)
    assert changed.code == 1 and "not those" in changed.err


def test_resume_with_more_epochs_goes_on(trained, run, drawn, tmp_path):
    assert run("train", "--data", drawn, *TINY, "--patience", 9, "--amp", "off", "--name", "a").code == 0
    moved = tmp_path / "Moved"
    shutil.copytree(drawn, moved)
    done = run("train", "--resume", "runs/a", "--epochs", 3, "--data", moved)
    assert done.code == 0, done.err
    assert "the learning rate restarts in epoch 3" in done.out
    assert [r["epoch"] for r in rows("runs/a/metrics.csv")] == ["1", "2", "3"]
    assert metrics(tmp_path / "runs" / "a")[:2] == metrics(trained[0])


def test_a_resumed_run_is_the_run_that_was_started(run, drawn, tmp_path):
    assert run("train", "--data", drawn, *TINY, "--epochs", 1, "--name", "first").code == 0
    shutil.copy("runs/first/best.pt", "w.pt")
    done = run("train", "--data", drawn, *TINY, "--epochs", 1, "--patience", 9, "--weights", "w.pt", "--name", "a")
    assert done.code == 0, done.err
    (tmp_path / "w.pt").unlink()  # it has done its work
    config = (tmp_path / "runs" / "a" / "config.json").read_text()
    damaged = [config.replace('"t_0": 2', '"t_0": 0'), config.replace('"epochs": 1', '"epochs": Infinity')]
    damaged += [config.replace('"monitor": "top1"', '"monitor": null')]
    for broken in ("", "[]", "{}", '{"settings": 3}', *damaged):
        assert broken != config
        (tmp_path / "runs" / "a" / "config.json").write_text(broken)
        refused = run("train", "--resume", "runs/a", "--epochs", 2)
        assert refused.code == 1 and "config.json is damaged" in refused.err
    (tmp_path / "runs" / "a" / "config.json").write_text(config.replace('\n  "threads": ', '\n  "threads": 9'))
    (tmp_path / "runs" / "a" / "best.pt").rename("kept.pt")
    assert "best.pt is gone" in run("train", "--resume", "runs/a", "--epochs", 2).err
    (tmp_path / "kept.pt").rename(tmp_path / "runs" / "a" / "best.pt")
    done = run("train", "--resume", "runs/a", "--epochs", 2)
    assert done.code == 0 and "started with other threads" in done.out
    assert len(metrics(tmp_path / "runs" / "a")) == 2


def test_grad_accum_takes_the_same_step(run, drawn, tmp_path):
    args = ["--data", drawn, *TINY, "--epochs", 1, "--amp", "off"]
    losses = {}
    for parts in (1, 3):
        assert run("train", *args, "--grad-accum", parts, "--name", f"g{parts}").code == 0
        losses[parts] = float(metrics(tmp_path / "runs" / f"g{parts}")[0]["train_loss"])
        weights_of = weights(tmp_path / "runs" / f"g{parts}")
        losses[f"w{parts}"] = torch.cat([v.flatten() for v in weights_of.values()])
    assert losses[1] == pytest.approx(losses[3], rel=1e-5)
    # AdamW's first steps turn the rounding of gradients near zero into whole steps: the mean decides, not the largest
    assert (losses["w1"] - losses["w3"]).abs().mean() < 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17])
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("smallest", [1, 2])
def test_micro_batches_hold_each_image_once(n, parts, smallest):
    slices = list(train_script.micro_batches(n, parts, smallest))
    assert [i for part in slices for i in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= min(smallest, n) and len(sizes) <= parts


def test_batch_norm_never_trains_on_one_image(run, drawn, tmp_path):
    args = ["--data", drawn, *TINY, "--model", "test_resnet", "--epochs", 1]
    refused = run("train", *args, "--batch-size", 1)
    assert refused.code == 2 and "--batch-size" in refused.err and "batch norm" in refused.err
    assert run("train", *args, "--batch-size", 8, "--grad-accum", 5).code == 0
    seen = []

    def record(module, inputs):
        if isinstance(module, torch.nn.BatchNorm2d) and module.training:
            seen.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    try:  # 40 photos in batches of 13, the last of one photo, which is left out
        done = run("train", *args, "--batch-size", 13, "--grad-accum", 6, "--name", "a")
    finally:
        hook.remove()
    assert done.code == 0, done.err
    assert seen and set(seen) == {2, 3}
    assert run("train", "--data", drawn, *TINY, "--epochs", 1, "--batch-size", 1, "--name", "one").code == 0


@pytest.mark.parametrize("loss", ["ce", "focal", "asymmetric"])
def test_cutmix_trains_with_every_loss_and_does_not_see_the_micro_batches(run, drawn, tmp_path, loss):
    args = ["--data", drawn, *TINY, "--epochs", 1, "--amp", "off", "--augment", "none", "--loss", loss]
    joint = ["--cutmix", "joint"]
    each = ["--cutmix", "Daily", "--cutmix", "Gender", "--cutmix", "Embellishment"]
    variants = {
        "plain": ["--class-weights"],
        "joint": [*joint, "--class-weights"],
        "three": [*each, "--class-weights"],
        "unweighted": joint,
        "accumulated": [*joint, "--grad-accum", 3],
    }
    losses = {}
    for name, more in variants.items():
        done = run("train", *args, *more, "--name", name)
        assert done.code == 0, done.err
        losses[name] = float(metrics(tmp_path / "runs" / name)[0]["train_loss"])
    assert losses["unweighted"] == pytest.approx(losses["accumulated"], rel=1e-5)
    assert losses["three"] != pytest.approx(losses["joint"], rel=1e-3)
    assert losses["plain"] != pytest.approx(losses["joint"], rel=1e-3)


def test_the_learning_rate_is_a_cosine_with_restarts_at_30_and_90(run, drawn, tmp_path, monkeypatch):
    """150 epochs of the real script with nothing to learn in them."""
    zeros = {label: torch.zeros(20, n) for label, n in {"Daily": 6, "Gender": 5, "Embellishment": 3}.items()}
    nothing = Prediction(zeros, {label: torch.zeros(20, dtype=torch.int64) for label in zeros}, None, {})
    save = checkpoint.save
    monkeypatch.setattr(train_script, "train_one_epoch", lambda settings, state, *args: state.optimizer.step() or 0.0)
    monkeypatch.setattr(train_script, "validate", lambda *args: nothing)
    monkeypatch.setattr(checkpoint, "save", lambda content, path: path.name == "last.pt" or save(content, path))
    flags = ["--epochs", 150, "--patience", 150, "--lr", 5e-6, "--t-0", 30, "--t-mult", 2, "--eta-min", 5e-8]
    flags += ["--name", "lr"]
    done = run("train", "--data", drawn, *TINY, *flags)
    assert done.code == 0, done.err
    rates = [float(row["lr"]) for row in metrics(tmp_path / "runs" / "lr")]
    assert len(rates) == 150
    for epoch, lr in enumerate(rates):
        start, length = (0, 30) if epoch < 30 else (30, 60) if epoch < 90 else (90, 120)
        assert lr == pytest.approx(
            5e-8 + (5e-6 - 5e-8) * (1 + math.cos(math.pi * (epoch - start) / length)) / 2, rel=1e-9
        )
    assert rates[0] == rates[30] == rates[90] == 5e-6 and min(rates) == rates[89] == pytest.approx(
        5e-8 + 4.95e-6 * 6.852e-4, rel=1e-3
    )


@pytest.mark.parametrize("loss", ["focal", "asymmetric"])
def test_every_loss_trains_and_any_label_column_works(run, drawn, tmp_path, loss):
    folder = tmp_path / "Color"
    shutil.copytree(drawn, folder)
    for split in ("train", "val", "test"):
        path = folder / f"Fashion-How24_sub1_{split}.csv"
        kept = [row | {"fit.type": str((i * 7) % 4)} for i, row in enumerate(rows(path))]
        header = [k for k in kept[0] if k not in ("Daily", "Gender", "Embellishment")]
        path.write_text(
            "\n".join([",".join(header), *(",".join(r[k] for k in header) for r in kept)]), encoding="utf-8-sig"
        )
    done = run("train", "--data", folder, *TINY, "--epochs", 1, "--loss", loss, "--name", "c")
    assert done.code == 0, done.err
    assert "val_top1_fit.type" in metrics(tmp_path / "runs" / "c")[0]
    done = run("predict", "runs/c/best.pt")
    assert done.code == 0 and list(rows("runs/c/predictions.csv")[0]) == ["image_name", "fit.type"]


def test_weights_of_a_best_pt_bring_backbone_and_heads(trained, run, drawn, tmp_path):
    still = ["--lr", 1e-12, "--eta-min", 1e-13, "--epochs", 1, "--amp", "off"]
    done = run("train", "--data", drawn, *TINY, *still, "--weights", trained[0] / "best.pt", "--name", "w")
    assert done.code == 0, done.err
    given, ours = weights(trained[0]), weights(tmp_path / "runs" / "w")
    assert all((given[k] - ours[k]).abs().max() < 1e-6 for k in given)
    other = run("train", "--data", drawn, *TINY, "--model", "test_resnet", "--weights", trained[0] / "best.pt")
    assert other.code == 1 and "test_resnet" in other.err


def test_notes_on_what_costs_a_day(run, drawn):
    done = run("train", "--data", drawn, *TINY, *["--epochs", "1", "--t-0", "5", "--lr", "1e-5"])
    assert done.code == 0, done.err
    assert "--t-0 5 is longer than 1 epochs" in done.out and "from scratch 1e-3 to 4e-3 are usual" in done.out


def test_a_dataset_without_boxes_trains_on_whole_photos(run, drawn, tmp_path):
    folder = tmp_path / "Plain"
    shutil.copytree(drawn, folder)
    for split in ("train", "val"):
        path = folder / f"Fashion-How24_sub1_{split}.csv"
        kept = rows(path)
        header = [k for k in kept[0] if not k.startswith("BBox")]
        path.write_text(
            "\n".join([",".join(header), *(",".join(r[k] for k in header) for r in kept)]), encoding="cp949"
        )
    done = run("train", "--data", folder, *TINY, "--epochs", 1, "--name", "a")
    assert done.code == 0, done.err
    assert "training has no boxes" in done.out and "(full)" in done.out
    done = run("train", "--data", folder, *TINY, "--epochs", 1, "--val-view", "bbox", "--name", "b")
    assert done.code == 0 and "validation has no boxes" in done.out and "(full)" in done.out, done.err


def test_threads_subtask_and_monitor(run, drawn, tmp_path):
    folder = tmp_path / "Colours"
    shutil.copytree(drawn, folder)
    for path in folder.glob("*.csv"):
        path.rename(path.with_name(path.name.replace("sub1", "sub2")))
    flags = ["--data", folder, *TINY, "--subtask", 2]
    before = torch.get_num_threads()
    try:  # one epoch: two threads that share a core mostly wait
        done = run("train", *flags, "--epochs", 1, "--threads", 2, "--name", "t")
        assert done.code == 0, done.err
        config = json.loads((tmp_path / "runs" / "t" / "config.json").read_text())
        assert torch.get_num_threads() == 2 == config["threads"]
    finally:
        torch.set_num_threads(before)
    done = run("train", *flags, "--epochs", 4, "--monitor", "loss", "--lr", 0.03, "--name", "s")
    assert done.code == 0, done.err
    lowest = min(metrics(tmp_path / "runs" / "s"), key=lambda row: float(row["val_loss"]))
    assert read(tmp_path / "runs" / "s" / "best.pt")["epoch"] == int(lowest["epoch"])
    assert run("predict", "runs/s/best.pt").code == 0  # finds the sub2 CSV again
    assert run("train", "--data", drawn, *TINY, "--subtask", 2).code == 2


def test_photos_of_one_path_are_prepared_each_by_itself(tmp_path):
    colors = {"a": (255, 0, 0), "b": (0, 255, 0)}
    samples = [Sample(name, "photo.jpg", name, Path(), {}, {}, (4, 4)) for name in colors]
    for sample in samples * 2:  # in both looks
        photo, _ = prepare_once(sample, lambda of: (Image.new("RGB", (4, 4), colors[of.name]), {}), tmp_path)
        assert photo.getpixel((0, 0)) == colors[sample.name]


def test_early_stopping(run, drawn, tmp_path):
    flags = ["--epochs", "10000000", "--lr", "1e-12", "--eta-min", "0", "--patience", "2", "--name", "e"]
    done = run("train", "--data", drawn, *TINY, *flags)
    assert done.code == 0, done.err
    assert "stopped early" in done.out and len(metrics(tmp_path / "runs" / "e")) == 3
    assert re.search(r"note: about \d+ days on this CPU", done.out)
    assert len(re.findall(r"about \d+ days to epoch 10000000; Ctrl-C and --resume", done.out)) == 1
    again = run("train", "--resume", "runs/e")
    assert "is finished after 3 epochs (no better top1 for --patience 2)" in again.out
    assert run("train", "--resume", "runs/e", "--patience", 4).code == 0
    assert run("train", "--data", drawn, *TINY, *flags[:-4], "--patience", 4, "--name", "undisturbed").code == 0
    assert len(metrics(tmp_path / "runs" / "e")) == 5
    same_run(tmp_path / "runs" / "e", tmp_path / "runs" / "undisturbed")


def test_help_has_panels_and_defaults(run, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    done = run("train", "--help")
    panels = ("Data", "Model", "Loss", "Optimisation", "Run")
    for word in (*panels, "[default: 5e-06]", "[default: eva02_tiny_patch14_224.mim_in22k]"):
        assert word in done.out, word
    for script in ("predict", "data", "demo"):
        assert run(script, "--help").code == 0


# ---------------------------------------------------------------- settings that act


def test_the_validation_loss_is_that_of_the_written_probabilities(trained):
    run_folder, _ = trained
    written = rows(run_folder / "val_predictions.csv")
    best = max(rows(run_folder / "metrics.csv"), key=lambda row: float(row["val_top1_mean"]))
    loss = 0.0
    for label, names in CLASS_NAMES.items():
        if label in written[0]:
            p = torch.tensor([[float(row[f"{label}_p{c}"]) for c in range(len(names))] for row in written])
            truth = torch.tensor([int(row[label]) for row in written])
            loss += torch.nn.functional.cross_entropy(p.log(), truth, label_smoothing=0.1).item()
    assert float(best["val_loss"]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("monitor", "best"), [("top1", 3), ("acsa", 1), ("loss", 2)])
def test_the_monitor_picks_the_best_epoch(run, drawn, monkeypatch, monitor, best):
    scores = iter([(0.1, 0.9, 3.0), (0.2, 0.5, 1.0), (0.3, 0.1, 2.0)])
    monkeypatch.setattr(evaluate, "score", lambda *args: dict(zip(("top1_mean", "acsa_mean", "loss"), next(scores))))
    monkeypatch.setattr(train_script, "finish", lambda *args: None)
    done = run("train", "--data", drawn, *TINY, "--epochs", 3, "--patience", 9, "--monitor", monitor, "--name", "a")
    assert done.code == 0, done.err
    assert read("runs/a/best.pt")["epoch"] == best


def test_a_worse_epoch_after_a_resume_leaves_best_pt(run, drawn, monkeypatch):
    monkeypatch.setattr(train_script, "MONITORS", {"top1": ("epoch", -1)})  # the first epoch is the best
    assert run("train", "--data", drawn, *TINY, "--epochs", 1, "--patience", 9, "--name", "a").code == 0
    assert run("train", "--resume", "runs/a", "--epochs", 2).code == 0
    assert read("runs/a/best.pt")["epoch"] == 1


def test_weight_decay_reaches_the_optimiser(run, drawn, monkeypatch):
    step, seen = torch.optim.AdamW.step, set()

    def watched(self, *args, **kwargs):
        seen.update(group["weight_decay"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert run("train", "--data", drawn, *TINY, "--epochs", 1, "--weight-decay", 0.2).code == 0
    assert seen == {0.2}


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("off", None)])
def test_training_runs_in_the_precision_asked_for(run, drawn, monkeypatch, amp, dtype):
    forward, seen = FashionModel.forward, set()

    def watched(self, images, **options):
        if self.training:
            seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return forward(self, images, **options)

    monkeypatch.setattr(FashionModel, "forward", watched)
    assert run("train", "--data", drawn, *TINY, "--epochs", 1, "--amp", amp).code == 0
    assert seen == {dtype}


def test_the_seed_decides_order_first_weights_and_steps(run, drawn, monkeypatch):
    orders = [list(EpochSampler(40, 16, seed)) for seed in (1, 2)]
    assert orders[0] != orders[1]
    first = []
    for seed in (1, 2):
        still = ["--epochs", 1, "--lr", 1e-12, "--eta-min", 0, "--seed", seed, "--name", seed]
        assert run("train", "--data", drawn, *TINY, *still).code == 0
        first.append(read(f"runs/{seed}/last.pt")["model"]["heads.0.weight"])
    assert (first[0] - first[1]).abs().max() > 1e-3
    keys, seeds = list(itertools.product((0, 1), (1, 2), (0, 1, 5), (1, 2, 7), ("step", "cutmix"))), set()
    for rank, seed, epoch, step, purpose in keys:
        monkeypatch.setattr(train_script, "rank", lambda rank=rank: rank)
        seeds.add(train_script.step_seed(Settings(seed=seed), SimpleNamespace(epoch=epoch, step=step), purpose))
    assert len(seeds) == len(keys)


def test_scores_of_your_own_may_be_tensors(run, drawn, monkeypatch):
    score = evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda *args: score(*args) | {"own": torch.tensor(0.5)})
    monkeypatch.setattr(train_script, "finish", lambda *args: None)
    assert run("train", "--data", drawn, *TINY, "--epochs", 1, "--name", "a").code == 0
    assert load_model("runs/a/best.pt")[1].scores["own"] == 0.5 and rows("runs/a/metrics.csv")[0]["val_own"] == "0.5"


def test_another_scheduler_goes_on_from_its_own_rate(run, drawn, monkeypatch):
    """The loop writes the warmed-up rate into the groups, from which most of torch's schedulers go on."""
    other = torch.optim.lr_scheduler.CosineAnnealingLR
    monkeypatch.setattr(train_script, "CosineAnnealingWarmRestarts", lambda optimizer, *args: other(optimizer, 6))
    flags = ["--epochs", 4, "--warmup-epochs", 2, "--patience", 9, "--name", "a"]
    assert run("train", "--data", drawn, *TINY, *flags).code == 0
    rates = [float(row["lr"]) for row in rows("runs/a/metrics.csv")]
    assert rates[2:] == pytest.approx([1e-3 * (1 + math.cos(math.pi * e / 6)) / 2 for e in (2, 3)])


def test_prediction_leaves_another_task_out(run, drawn, monkeypatch):
    forward = FashionModel.forward
    monkeypatch.setattr(
        FashionModel,
        "forward",
        lambda self, images, **options: (
            forward(self, images, **options) | ({} if self.training else {"aspect": images.float()})
        ),
    )
    assert run("train", "--data", drawn, *TINY, "--epochs", 1, "--name", "a").code == 0
    assert run("predict", "runs/a/best.pt", "--split", "val").code == 0
