"""The pictures of a run: they show what was, nothing in them overlaps, and the heat is where the model looks."""

import itertools
import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from test_train_predict import RUN_FILES, rows

import cli
import data
import loading
import report
import train as train_script
from model import FashionModel
from settings import Settings, restart_epochs

PICTURED = [*TINY[:-1], "--batch-size", "24", "--crop-prob", "0.5", "--cutmix", "Gender", "--cutmix", "Embellishment"]
PICTURES = ("curves.png", "confusion.png", "inputs.png", "mistakes.png", "looks.png")
CLASSES = {"Daily": tuple("012345"), "Gender": tuple("01234"), "Embellishment": tuple("012")}


@pytest.fixture(scope="module")
def pictured(drawn, tmp_path_factory):
    """A finished run, what it printed, the images that the model received first, and the figure of inputs.png."""
    folder, received, figures = tmp_path_factory.mktemp("pictured"), [], []

    def forward(net, images, labels_only=False, plain=FashionModel.forward):
        if net.training and images.any():
            received.extend(images.clone())
        return plain(net, images, labels_only)

    def inputs(*given, plain=report.inputs):
        figures.append(plain(*given))
        return figures[0]

    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.chdir(folder)
        patch.setattr(FashionModel, "forward", forward)
        patch.setattr(report, "inputs", inputs)
        patch.setattr(sys, "argv", ["train.py", "--data", str(drawn), *PICTURED, "--name", "a b"])
        patch.setattr(cli.console, "print", lambda text, **how: said.append(str(text)))
        with pytest.raises(SystemExit) as stop:
            cli.run_app(train_script.app)
    assert stop.value.code == 0
    return SimpleNamespace(folder=folder / "runs" / "a b", said=said, received=received, inputs=figures[0])


@pytest.fixture
def copy(pictured, tmp_path):
    return shutil.copytree(pictured.folder, tmp_path / "runs" / "copy")


def answers_of(names, classes=CLASSES, seed=0):
    """Random answers."""
    generator = torch.Generator().manual_seed(seed)
    truth, predicted = (
        {label: torch.randint(len(of), (len(names),), generator=generator) for label, of in classes.items()}
        for _ in range(2)
    )
    confidence = {label: torch.rand(len(names), generator=generator) for label in classes}
    return report.Answers(names, truth, predicted, confidence, [{}] * len(names))


def nothing_overlaps(figure):
    """Draws the figure; all of its texts lie inside it, and no two over each other."""
    FigureCanvasAgg(figure).draw()
    ticks, drawn = set(), set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            ticks |= {text for tick in axis.get_major_ticks() for text in (tick.label1, tick.label2)}
            drawn |= {text for tick in axis._update_ticks() for text in (tick.label1, tick.label2)}
    texts = {t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()} - (ticks - drawn)
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or up <= 1.5, (one, other)


def test_a_run_ends_with_its_pictures(pictured):
    assert {p.name for p in pictured.folder.iterdir()} == RUN_FILES | set(PICTURES)
    for name in PICTURES:
        with Image.open(pictured.folder / name) as picture:
            assert picture.format == "PNG" and 300 < picture.width < 2000 and 300 < picture.height < 2500
            rgba = np.asarray(picture.convert("RGBA"))
        assert (rgba[..., 3] == 255).all() and (rgba[0] == 255).all()  # opaque, with a white margin
        assert rgba[..., :3].min() < 60  # and something on it
    assert any("heat inside the garment's box: 0." in line for line in pictured.said)
    assert any(PICTURES[4] in line for line in pictured.said)


def test_every_column_and_key_is_described(pictured):
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    columns = {column for name in ("metrics.csv", "val_predictions.csv") for column in rows(pictured.folder / name)[0]}
    columns = {re.sub(r"_p\d+$", "_p0", re.sub("Daily|Gender|Embellishment", "LABEL", column)) for column in columns}
    keys = json.loads((pictured.folder / "config.json").read_text()).keys()
    assert [name for name in columns | keys if f"`{name}`" not in text] == []


def test_the_inputs_are_the_pixels_that_the_model_received(pictured):
    with Image.open(pictured.folder / "inputs.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    assert len(pictured.inputs.axes) == 24
    for ax, image in zip(pictured.inputs.axes, pictured.received):
        places = ax.transData.transform(np.stack([x.ravel(), y.ravel()], axis=1)).astype(int)  # from the lower left
        shown = sheet[len(sheet) - 1 - places[:, 1], places[:, 0]].reshape(32, 32, 3)
        assert np.array_equal(shown, image.permute(1, 2, 0).numpy())


def test_the_view_named_is_the_view_seen(drawn):
    samples = data.read_split(drawn, "train").samples
    photos = loading.TrainPhotos(samples, 32, Settings(crop_prob=0.5, seed=3, augment="none"))
    views = [photos.draw(2, i)[2] for i in range(40)]
    assert 8 < views.count("bbox") < 32
    for i, view in enumerate(views):
        assert torch.equal(photos[2, i][0], loading.EvalPhotos(samples, 32, view)[i, None][0])


def test_mistakes_are_the_most_confident_errors(pictured, drawn):
    answers = report.read_answers(pictured.folder / "val_predictions.csv", CLASSES)
    written = rows(pictured.folder / "val_predictions.csv")
    for label in CLASSES:
        errors = report.most_confident_errors(answers, label)
        assert [sure for _, sure in errors] == sorted((sure for _, sure in errors), reverse=True)
        wrong = {i for i, row in enumerate(written) if row[label] != row[f"{label}_predicted"]}
        assert wrong and {i for i, _ in errors} == wrong
        for i, sure in errors:
            assert sure == pytest.approx(max(float(written[i][f"{label}_p{c}"]) for c in CLASSES[label]))
    unknown = report.most_confident_errors(answers, "Daily")[0][0]
    answers.truth["Daily"][unknown] = -1
    assert unknown not in dict(report.most_confident_errors(answers, "Daily"))
    counts = [text.get_text() for text in report.confusion(answers, CLASSES).axes[0].texts]
    assert sum(int(text.split("\n")[0]) for text in counts) == len(written) - 1
    answers.learned = [{"learned": (5, 5, 60, 70)}] * len(written)
    split = data.read_split(drawn, "val", CLASSES)
    texts = [t.get_text() for t in report.mistakes(answers, split).findobj(Text)]
    assert "given box" in texts and "predicted box" in texts and "mask box" not in texts
    answers.names = answers.names[::-1]
    with pytest.raises(ValueError, match="does not hold the photos"):
        report.mistakes(answers, split)


def test_confusion_counts_rows_and_scores(pictured):
    answers = report.read_answers(pictured.folder / "val_predictions.csv", CLASSES)
    figure = report.confusion(answers, CLASSES)
    best = max(rows(pictured.folder / "metrics.csv"), key=lambda row: float(row["val_top1_mean"]))
    for ax, label in zip(figure.axes, CLASSES):
        counts = [text.get_text().split("\n") for text in ax.texts]
        assert sum(int(count) for count, _ in counts) == len(answers.names) == 20
        title = f"{label}\nTop-1 {float(best[f'val_top1_{label}']):.4f}, ACSA {float(best[f'val_acsa_{label}']):.4f}"
        assert ax.get_title(loc="left") == title
        assert [tick.get_text() for tick in ax.get_yticklabels()] == list(data.CLASS_NAMES[label])


@pytest.mark.parametrize("kind", ["class token", "averaged tokens", "convolutional"])
def test_the_heat_is_where_the_garment_is(kind):
    """The colour of a square on noise is its class: once learned, the heat lies on the square."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=0)
    if kind != "convolutional":
        backbone = timm.create_model(
            "test_vit", num_classes=0, img_size=96, global_pool="token" if kind == "class token" else "avg"
        )
    net = FashionModel(
        backbone, backbone.num_features, {"Daily": tuple("abc"), "Gender": tuple("abc")}, (0.5,) * 3, (0.25,) * 3
    )
    size, side = 96, 48 if kind == "convolutional" else 32  # pixels

    def draw(n):
        images, kinds = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8), torch.randint(0, 3, (n,))
        places = 16 * torch.randint(0, (size - side) // 16 + 1, (n, 2))
        for image, color, (y, x) in zip(images, kinds, places.tolist()):
            image[:, y : y + side, x : x + side] = 0
            image[color, y : y + side, x : x + side] = 255
        return images, kinds, [(x, y, x + side, y + side) for y, x in places.tolist()]

    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(40):
        images, kinds, _ = draw(12)
        logits = net.train()(images)
        loss = sum(torch.nn.functional.cross_entropy(values, kinds) for values in logits.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    images, kinds, boxes = draw(16)
    found = report.heat_maps(net, images)
    again = net.eval()(images)
    for label, (heat, logits) in found.items():
        assert torch.allclose(logits, again[label], atol=1e-4) and (logits.argmax(-1) == kinds).float().mean() > 0.8
        assert heat.shape == (16, size, size) and heat.isfinite().all() and heat.min() >= 0 and heat.max() <= 1
        assert (heat.flatten(1).std(1) > 0.01).all()
    inside, chance = report.heat_inside(found, boxes)
    assert chance == pytest.approx((side / size) ** 2) and inside > 1.5 * chance, (inside, chance)


@pytest.mark.slow
def test_names_of_any_kind_draw_without_warnings_and_overlaps(drawn, monkeypatch, capsys):
    long = tuple(f"a class with quite a long name $_{c}" for c in range(6))
    monkeypatch.setitem(data.CLASS_NAMES, "Daily", long)
    monkeypatch.setitem(data.CLASS_NAMES, "Gender", ("한글 이름",) * 5)
    odd = [
        "봄 코트 2019/한글이름-1.jpg",
        "$x^2$_{.jpg",
        "\udcff\n.jpg",
        "a" * 300 + ".jpg",
        "_hidden.png",
        "\U0001f457.jpg",
    ]
    split = data.read_split(drawn, "val", CLASSES)
    samples = [replace(sample, name=odd[i % len(odd)]) for i, sample in enumerate(split.samples)]
    split = replace(split, samples=samples)
    answers = answers_of([sample.name for sample in samples])
    settings = Settings(batch_size=8, seed=1, cutmix=["joint"], t_0=2, t_mult=2, crop_prob=0.5)
    photos = loading.TrainPhotos(samples, 48, settings)
    net = FashionModel(timm.create_model("test_resnet", num_classes=0), 96, CLASSES, (0.5,) * 3, (0.25,) * 3)
    top1 = [f"val_top1_{label}" for label in (*CLASSES, "스타일", "mean")]
    metrics = {key: np.linspace(0.2, 0.9, 9) for key in ("lr", "train_loss", "val_loss", *top1)}
    metrics["epoch"] = np.arange(1.0, 10)
    runs = [report.Run("runs/" + name, settings, metrics, 4) for name in odd[1:]]
    many = {
        label: tuple(map(str, range(n))) for label, n in {"Color": 19, "Daily": 6, "fit.type": 2, "many": 32}.items()
    }
    saved = SimpleNamespace(image_size=48, view="bbox", resize="squash")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with report.drawing():
            nothing_overlaps(report.mistakes(answers, split))
            nothing_overlaps(report.inputs(photos, settings, CLASSES))
            nothing_overlaps(report.confusion(answers, CLASSES))
            nothing_overlaps(report.confusion(answers_of(odd * 9, many), many))
            nothing_overlaps(report.looks(net, saved, split, answers))
            nothing_overlaps(report.curves(runs[:1]))
            nothing_overlaps(report.curves(runs))
    if {font.name for font in font_manager.fontManager.ttflist}.isdisjoint(report.HANGUL_FONTS):
        assert "NanumGothic" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_picture_of_predictions(pictured, drawn, run, tmp_path, split):
    data_flags = ["--data", drawn, "--split", split, "--out", "p.csv", "--workers", 0]
    done = run("predict", pictured.folder / "best.pt", *data_flags, "--picture", "answers.png")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000  # eight photos a row
        rgba = np.asarray(picture.convert("RGBA"))
    assert (rgba[..., 3] == 255).all() and (rgba[0] == 255).all() and rgba[..., :3].min() < 60
    assert len(rows(tmp_path / "p.csv")) == 20
    refused = run("predict", pictured.folder / "best.pt", *data_flags, "--picture", "answers.jpg")
    assert refused.code == 2 and "answers.jpg: its name should end in .png" in refused.err


def test_curves_show_the_best_epoch_and_the_restarts(pictured, copy, run):
    read = report.read_run(copy)
    read.settings = replace(read.settings, t_0=2, t_mult=2)
    read.metrics = {key: np.resize(values, 9) for key, values in read.metrics.items()} | {"epoch": np.arange(1.0, 10)}
    assert list(islice(restart_epochs(read.settings), 3)) == [3, 7, 15]
    with report.drawing():
        figure = report.curves([read])
        loss, accuracy, rate = figure.axes
        assert [line.get_label() for line in accuracy.lines[:4]] == ["Daily", "Gender", "Embellishment", "mean"]
        for ax in (loss, accuracy, rate):
            starts = {line.get_xdata()[0] for line in ax.lines}
            assert {3, 7, read.best_epoch} <= starts and 15 not in starts
    done = run("report", pictured.folder, copy)
    assert done.code == 0 and "compare.png" in done.out, done.err
    assert {p.name for p in copy.iterdir()} == RUN_FILES | set(PICTURES)
    (pictured.folder / "compare.png").unlink()
    done = run("report", pictured.folder, copy, "--data", "demo")
    assert done.code == 2 and "--data" in done.err and not (pictured.folder / "compare.png").exists()


def test_a_run_without_validation_has_the_other_pictures(copy, run):
    table = rows(copy / "metrics.csv")
    cli.write_csv(
        copy / "metrics.csv",
        list(table[0]),
        [["" if key.startswith("val_") else value for key, value in row.items()] for row in table],
    )
    for name in ("val_predictions.csv", *PICTURES):
        (copy / name).unlink()
    done = run("report", copy)
    assert done.code == 0 and "pictures: " in done.out and "confusion.png" not in done.out, done.err
    assert {"curves.png", "inputs.png", "looks.png"} == {p.name for p in copy.glob("*.png")}


def test_a_damaged_run_is_one_line(copy, run, tmp_path):
    assert run("report", tmp_path).code == 2 and run("report").code == 2
    damaged = {"config.json": "{}", "metrics.csv": "epoch,lr\n1", "best.pt": "x"}
    damaged["val_predictions.csv"] = "image_name,Daily\na.jpg,9"
    for name, text in damaged.items():
        whole = (copy / name).read_bytes()
        (copy / name).write_text(text)
        done = run("report", copy)
        assert done.code == 1 and done.err.count("\n") == 1, done.err
        assert name in done.err and "Traceback" not in done.err, done.err
        (copy / name).unlink()
        if name != "val_predictions.csv":
            assert run("report", copy).code == 2
        (copy / name).write_bytes(whole)
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("Demo", "Gone"))
    done = run("report", copy)
    assert done.code == 2 and "Gone" in done.err


def test_the_pictures_of_data_that_were_moved(copy, drawn, run, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["data"] = ["/before"]
    (copy / "config.json").write_text(json.dumps(config))
    done = run("report", copy)
    assert done.code == 2 and "--data says its new place" in done.err
    done = run("report", copy, "--data", drawn)
    assert done.code == 0 and "looks.png" in done.out, done.err


def test_a_picture_that_fails_leaves_the_others(copy, run, monkeypatch):
    def fail(*given):
        raise RuntimeError("an edit")

    monkeypatch.setattr(report, "mistakes", fail)
    done = run("report", copy)
    assert done.code == 1 and "mistakes.png could not be drawn (RuntimeError: an edit)" in done.err
    assert f"pictures: {copy}/curves.png, inputs.png, confusion.png, looks.png" in done.out


def test_a_failure_of_drawing_fails_no_run(run, drawn, tmp_path, monkeypatch):
    def fail(*given):
        raise RuntimeError("no room")

    monkeypatch.setattr(report, "draw_pictures", fail)
    done = run("train", "--data", drawn, *PICTURED, "--epochs", 1, "--name", "a")
    assert done.code == 0 and "RuntimeError: no room" in done.out and "python report.py runs/a" in done.out
    assert not list((tmp_path / "runs" / "a").glob("*.png"))


def test_rows_of_the_confusion_matrix_are_the_truth():
    truth, predicted, sure = ({label: torch.tensor([c]) for label in CLASSES} for c in (0, 2, 0.5))
    (text,) = report.confusion(report.Answers(["a"], truth, predicted, sure, [{}]), CLASSES).axes[0].texts
    assert text.get_position() == (2, 0)  # x is predicted, y true


def test_a_run_in_its_first_epoch_has_no_pictures_yet(copy, run):
    (copy / "metrics.csv").unlink()
    done = run("report", copy)
    assert done.code == 2 and "has no finished epoch yet" in done.err
