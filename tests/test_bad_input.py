"""Bad input: one clear line that names the file, row or flag; the right exit code; nothing written; no traceback."""

import io
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_script
from PIL import Image

import model
from checkpoint import FORMAT, _read_tensors, new_checkpoint, save
from data import Sample, Split
from model import build_model
from settings import Settings

TRAIN_CSV = "Fashion-How24_sub1_train.csv"


@pytest.fixture
def dataset(drawn, tmp_path) -> Path:
    folder = tmp_path / "Data set"
    shutil.copytree(drawn, folder)
    return folder


def edit(dataset: Path, line: int, change, name: str = TRAIN_CSV) -> str:
    """Change the cells of a line (the header is line 1); returns the line's image_name before the change."""
    lines = (dataset / name).read_text().splitlines()
    cells = lines[line - 1].split(",")
    image_name = cells[0]
    change(cells)
    lines[line - 1] = ",".join(cells)
    (dataset / name).write_text("\n".join(lines) + "\n")
    return image_name


def refused(run, dataset, *args, code=1, says=()):
    """Training is refused with this exit code and one `error:`, which holds every word of `says`.

    Nothing is written but what could be decoded.
    """

    def files() -> list[Path]:
        return sorted(path for path in dataset.rglob("*") if ".cache" not in path.parts)

    before = files() if dataset.exists() else None
    done = run("train", "--data", dataset, *TINY, *args)
    assert done.code == code, done.err
    assert done.err.count("error:") == 1 and "Traceback" not in done.err, done.err
    for word in says:
        assert str(word) in done.err, done.err
    assert not Path("runs").exists()
    assert before is None or files() == before
    return done


def setter(i, value):
    return lambda cells: cells.__setitem__(i, value)


def test_no_dataset(run, tmp_path):
    done = refused(
        run, tmp_path / "Nowhere", code=2, says=["Nowhere", "Fashion-How24_sub1_train.csv", "train/", "--data demo"]
    )
    assert len(done.err.strip().splitlines()) == 1
    (tmp_path / "empty").mkdir()
    refused(run, tmp_path / "empty", code=2, says=["empty", "--data demo"])
    done = run("train", *TINY)
    assert done.code == 2 and "--data Dataset" in done.err


def test_a_split_is_missing(run, dataset):
    (dataset / TRAIN_CSV).unlink()
    refused(run, dataset, code=2, says=[TRAIN_CSV])


def test_class_weights_need_two_classes(run, dataset):
    for line in range(2, 42):
        edit(dataset, line, setter(7, "1"))
    refused(run, dataset, "--class-weights", code=2, says=["--class-weights", "Embellishment"])


def test_cutmix_of_no_label(run, dataset):
    refused(
        run,
        dataset,
        "--cutmix",
        "gender",
        code=2,
        says=["--cutmix", "gender", "Daily, Gender, Embellishment, or joint"],
    )
    refused(run, dataset, "--cutmix", "Gender", "--cutmix", "Gender", code=2, says=["--cutmix", "twice"])
    refused(run, dataset, "--cutmix", "joint", "--cutmix", "Gender", code=2, says=["--cutmix", "joint"])


def test_images_that_are_none_are_reported_together(run, dataset):
    (dataset / "train" / "text.jpg").write_text("no image")
    (dataset / "train" / "empty.png").write_bytes(b"")
    (dataset / "train" / "folder.jpg").mkdir()
    os.mkfifo(dataset / "train" / "pipe.jpg")
    for line, name in ((2, "text.jpg"), (3, "empty.png"), (4, "gone.jpg"), (5, "folder.jpg"), (6, "pipe.jpg"), (7, "")):
        edit(dataset, line, setter(0, name))
    refused(run, dataset, says=["6 of 40 rows", *(f"line {n}" for n in range(2, 8)), "text.jpg", "gone.jpg"])


def test_a_truncated_image_stops_the_run_with_its_row(run, dataset):
    name = edit(dataset, 5, lambda cells: None)
    path = dataset / "train" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for flags in (["--workers", 0], ["--workers", 1], ["--cache", "off"], ["--cache", "off", "--workers", 1]):
        done = refused(run, dataset, *flags, says=[f"{TRAIN_CSV}, line 5", name, "damaged"])
        assert len(done.err.strip().splitlines()) == 1 and ("--all" in done.err) == ("off" in flags)


@pytest.mark.parametrize("debug", [pytest.param([], marks=pytest.mark.slow), ["--debug"]])
def test_a_run_that_fails_ends_whatever_its_decoding_processes_do(shell, dataset, debug):
    path = dataset / "train" / edit(dataset, 5, lambda cells: None)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # a process that does not end is a failure here
    done = shell("train", "--data", dataset, *TINY, "--cache", "off", "--workers", 2, *debug)
    assert done.returncode == 1 and "line 5" in done.stderr and ("Traceback" in done.stderr) == bool(debug)


def test_a_bomb_of_pixels(run, dataset):
    name = edit(dataset, 5, setter(0, "huge.png")) and "huge.png"
    Image.new("1", (20_000, 10_001)).save(dataset / "train" / name)
    refused(run, dataset, says=["line 5", "20000 x 10001", "200,000,000"])


FLAGS = """--crop-prob 1.5, --crop-prob nan, --epochs 0, --lr nan, --lr 0, --lr -1, --lr inf, --batch-size 0,
--grad-accum 17, --t-0 0, --eta-min 1, --label-smoothing 2, --max-mb 0.1, --model no_such_model, --model hf-hub:a/b,
--name ../x, --name , --device nonsense, --amp fp16, --workers -1, --seed -1, --monitor f1, --image-size 8,
--weights none.pth, --loss mse"""


@pytest.mark.parametrize(("flag", "value"), [re.sub("^[ \n]", "", part).split(" ") for part in FLAGS.split(",")])
def test_a_flag_out_of_range(run, drawn, flag, value):
    if flag == "--amp" and torch.cuda.is_available():
        pytest.skip("fp16 is allowed on CUDA")
    done = refused(run, drawn, flag, value, code=2, says=["" if flag in ("--weights", "--max-mb") else flag])
    assert len(done.err.strip().splitlines()) == 1


def test_an_unknown_model_lists_close_ones(run, drawn):
    done = refused(run, drawn, "--model", "eva02_tiny_patch14", code=2, says=["eva02_tiny_patch14_224"])
    assert "close" in done.err


def test_an_image_size_that_the_backbone_refuses(run, drawn):
    refused(run, drawn, "--model", "levit_128", "--image-size", "100", code=2, says=["levit_128", "--image-size"])


def test_a_download_that_fails_names_the_offline_ways(run, drawn, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = run("train", "--data", drawn, "--model", "test_vit2", "--image-size", "32")
    assert done.code == 1 and "--weights FILE" in done.err and "--no-pretrained" in done.err
    assert not Path("runs").exists()


def test_a_failed_look_up_leaves_other_downloads_of_the_process_alone(monkeypatch):
    import huggingface_hub

    def no_network(*args):
        raise OSError("no such name")

    def create(name, pretrained, **options):
        seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        return plain(name, False, **options)

    seen, plain = [], model._create
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model, "_create", create)
    build_model("test_vit2", {"Daily": ("0", "1")}, pretrained=True)
    assert seen == [True] and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_run_name_that_exists(run, drawn, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    done = run("train", "--data", drawn, *TINY, "--name", "a")
    assert done.code == 2 and "runs/a exists" in done.err and not any((tmp_path / "runs" / "a").iterdir())


def test_a_loss_that_is_not_finite_names_step_and_head(run, drawn):
    flags = ["--lr", "1e30", "--batch-size", 8, "--model", "test_resnet"]
    refused(run, drawn, *flags, says=["not finite", "epoch 1, step", "--lr"])


@pytest.mark.parametrize("flags", [["--batch-size", 1], ["--batch-size", 16, "--grad-accum", 16]])
def test_one_image_alone_under_batch_norm(run, drawn, flags):
    refused(run, drawn, "--model", "test_resnet", *flags, code=2, says=["--batch-size", "one image"])


@pytest.mark.parametrize("flags", [["--batch-size", 39], ["--batch-size", 11, "--grad-accum", 5]])
def test_a_last_image_alone_is_left_out_under_batch_norm(run, drawn, flags):
    done = run("train", "--data", drawn, *TINY, "--model", "test_resnet", *flags, "--epochs", 1)
    assert done.code == 0, done.err


def test_boxes_that_are_not_finite_name_the_flags(run, drawn):
    flags = ["--box-head", "--crop-prob", "0.7", "--batch-size", 64, "--lr", "1e7", "--model", "test_resnet"]
    refused(run, drawn, *flags, says=["not finite", "--lr"])


def test_one_image_alone_without_batch_norm(run, drawn):
    done = run("train", "--data", drawn, *TINY, "--batch-size", 1, "--epochs", 1)
    assert done.code == 0, done.err


# ---------------------------------------------------------------- checkpoints and weights


@pytest.fixture(scope="module")
def checkpoint(drawn, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    assert run_script(folder, "train", "--data", drawn, *TINY, "--epochs", "1", "--name", "a") == 0
    return (folder / "runs" / "a" / "best.pt").read_bytes()


class Code:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def with_code() -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "weights": Code()}, buffer)
    return buffer.getvalue()


def flipped(content: bytes, where: float) -> bytes:
    changed = bytearray(content)
    changed[int(len(changed) * where)] ^= 4
    return bytes(changed)


def as_folder(content: bytes) -> bytes:
    """Of a tensor in the archive's directory, the bit that stands for a folder: torch reads none of its bytes then."""
    changed = bytearray(content)
    changed[content.rindex(b"archive/data/3") - 46 + 38] ^= 16
    return bytes(changed)


def with_fields(content: bytes, **changed: object) -> bytes:
    return saved(torch.load(io.BytesIO(content), weights_only=True) | changed)


def n_classes(**sizes: int) -> dict[str, tuple[str, ...]]:
    return {label: tuple(map(str, range(n))) for label, n in sizes.items()}


DAMAGES = {
    "text": lambda c: b"hello",
    "empty": lambda c: b"",
    "half": lambda c: c[: len(c) // 2],
    "last bytes gone": lambda c: c[:-30],
    "a flipped bit": lambda c: flipped(c, 0.5),
    "another flipped bit": lambda c: flipped(c, 0.8),
    "a flipped bit that makes a tensor a folder": lambda c: as_folder(c),
    "code": lambda c: with_code(),
    "bare pickled code": lambda c: pickle.dumps(Code()),
    "another program's": lambda c: saved({"state_dict": {"a": torch.zeros(2)}}),
    "a list": lambda c: saved([1, 2]),
    "too little": lambda c: saved({"format": FORMAT, "weights": {}, "classes": {"Daily": ("0", "1")}}),
    "another version's": lambda c: with_fields(c, format="fashion-attributes 1"),
    "compressed": lambda c: compressed(c),
    "heads that are numbers": lambda c: with_fields(c, classes={"Daily": 10**9, "Gender": 5, "Embellishment": 3}),
    "thousands of heads": lambda c: with_fields(c, classes=n_classes(**{f"l{i}": 9 for i in range(5000)})),
    "heads of other sizes": lambda c: with_fields(c, classes=n_classes(Daily=7, Gender=5, Embellishment=3)),
    "a monstrous image": lambda c: with_fields(c, image_size=10**6),
    "a strange backbone": lambda c: with_fields(c, backbone="hf-hub:a/b"),
    "a box head that is not there": lambda c: with_fields(c, box_head=True),
    "two means": lambda c: with_fields(c, mean=[0.5, 0.5]),
}


def saved(it) -> bytes:
    buffer = io.BytesIO()
    torch.save(it, buffer)
    return buffer.getvalue()


def compressed(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as a, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    return out.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_none(run, checkpoint, tmp_path, damage):
    (tmp_path / "bad.pt").write_bytes(DAMAGES[damage](checkpoint))
    done = run("predict", "bad.pt")
    assert done.code == 1 and "bad.pt" in done.err and "Traceback" not in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert {p.name for p in tmp_path.iterdir()} == {"bad.pt"}


def test_an_archive_that_was_packed_again_with_its_folders_is_read(tmp_path):
    (tmp_path / "whole.pth").write_bytes(saved({"a": torch.ones(3)}))
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "again.pth", "w") as again:
        again.mkdir("archive")
        for entry in whole.infolist():
            again.writestr(entry.filename, whole.read(entry))
    assert torch.equal(_read_tensors(tmp_path / "again.pth")["a"], torch.ones(3))


@pytest.mark.parametrize("damage", ["text", "half", "a flipped bit", "code", "a list", "too little"])
def test_weights_that_are_none(run, drawn, checkpoint, tmp_path, damage):
    for name in ("bad.pth", "bad.safetensors"):
        (tmp_path / name).write_bytes(DAMAGES[damage](checkpoint))
        refused(run, drawn, "--weights", name, says=[name])
    assert not (tmp_path / "was_run").exists()


def test_predict_flags(run, checkpoint, drawn, tmp_path):
    (tmp_path / "best.pt").write_bytes(checkpoint)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("x.jpg")
    Path("none").mkdir()
    Path("last.pt").write_bytes(saved({"format": FORMAT, "model": {}}))
    os.mkfifo("pipe.jpg")
    for args, code, says in [
        (["none.pt"], 2, "none.pt"),
        (["none"], 2, "'none' is a directory"),
        (["last.pt"], 1, "for train.py --resume"),
        (["best.pt", "x.jpg", "--data", drawn], 2, "--data"),
        (["best.pt", "gone.jpg"], 2, "gone.jpg"),
        (["best.pt", "none"], 1, "no images"),
        (["best.pt", "--out", "nowhere/p.csv"], 2, "--out"),
        (["best.pt", "--out", "best.pt"], 2, "--out"),
        (["best.pt", "x.jpg", "--out", "./x.jpg"], 2, "--out"),
        (["best.pt", "--device", "meta"], 2, "--device"),
        (["best.pt", "pipe.jpg"], 2, "pipe.jpg"),
        (["best.pt", "--data", "Nowhere"], 2, "Nowhere"),
        (["best.pt", "--split", "exam"], 2, "--split"),
        (["best.pt", "x.jpg", "--out", "pipe.jpg"], 2, "--out"),
        (["best.pt", "x.jpg", "--out", "a.png", "--picture", "./a.png"], 2, "--picture"),
        (["best.pt", "--batch-size", "0"], 2, "--batch-size"),
        ([], 2, "CHECKPOINT"),
    ]:
        done = run("predict", *args)
        assert done.code == code and says.lower() in done.err.lower() and "Traceback" not in done.err, (args, done.err)
        assert not Path("predictions.csv").exists() and not Path("nowhere").exists()


def test_a_photo_that_cannot_be_read_is_left_out_at_the_end(run, checkpoint, tmp_path):
    (tmp_path / "best.pt").write_bytes(checkpoint)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("x.jpg")
    Path("broken.jpg").write_bytes(Path("x.jpg").read_bytes()[:300])
    done = run("predict", "best.pt", "x.jpg", "broken.jpg")
    assert done.code == 1 and "broken.jpg" in done.err and "left out" in done.err and "Traceback" not in done.err
    names = [line.split(",")[0] for line in Path("predictions.csv").read_text().splitlines()]
    assert names == ["image_name", "x.jpg"]


@pytest.mark.parametrize(
    "flag, name, content",
    [
        ("--picture", "mine.png", None),
        ("--out", "Fashion-How24_sub1_train.csv", "image_name,BBox_xmin,class\n"),
        ("--out", "val_predictions.csv", "image_name,class,class_predicted,class_p0\n"),
        ("--out", "last.pt", "PK\0\3"),
    ],
)
def test_what_predict_did_not_write_is_not_replaced(run, class_checkpoint, flag, name, content):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("x.jpg")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("mine.png")
    if content:
        Path(name).write_text(content)
    before = Path(name).read_bytes()
    done = run("predict", class_checkpoint, "x.jpg", flag, name)
    assert done.code == 2 and f"{name} exists" in done.err and Path(name).read_bytes() == before
    Path("p.csv").touch()  # as mktemp does
    for more in ("--probs", "--names"):  # its own files are
        done = run("predict", class_checkpoint, "x.jpg", more, "--out", "p.csv", "--picture", "drawn.png")
        assert done.code == 0, done.err


@pytest.fixture
def class_checkpoint(tmp_path):
    """Of a model with the label `class`, whose columns are spelt alike in datasets and predictions."""
    model = build_model("test_vit", {"class": ("a", "b")}, 32)
    rows = Split(Path(), [Sample("x", "x", "x", Path(), {}, {"class": 0})], model.classes, ("class",), "")
    save(new_checkpoint(Settings(model="test_vit"), model, rows, "full", None).content(), tmp_path / "best.pt")
    return "best.pt"


def test_an_output_in_a_folder_that_cannot_be_written(run, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "best.pt").write_bytes(checkpoint)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("x.jpg")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **how: Path(path) != Path("shut") and allowed(path, mode))
    Path("shut").mkdir()
    done = run("predict", "best.pt", "x.jpg", "--out", "shut/p.csv")
    assert done.code == 2 and "shut cannot be written" in done.err and not Path("shut/p.csv").exists()


def test_a_flag_that_removes_nothing_is_refused(run, checkpoint, tmp_path):
    (tmp_path / "best.pt").write_bytes(checkpoint)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("x.jpg")
    done = run("predict", "best.pt", "x.jpg", "--rembg-model", "u2netp")
    assert done.code == 2 and "--rembg-model" in done.err and "--background remove" in done.err


@pytest.mark.parametrize("flags", [[], ["--picture", "a.png"]])
def test_where_no_photo_can_be_read_the_earlier_answers_stay(run, checkpoint, tmp_path, flags):
    (tmp_path / "best.pt").write_bytes(checkpoint)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("x.jpg")
    assert run("predict", "best.pt", "x.jpg").code == 0
    earlier = Path("predictions.csv").read_text()
    Image.effect_noise((90, 90), 80).save("noise.jpg")
    Path("broken.jpg").write_bytes(Path("noise.jpg").read_bytes()[:2000])
    done = run("predict", "best.pt", "broken.jpg", *flags)
    assert done.code == 1 and "no photo could be predicted" in done.err and "broken.jpg" in done.err
    assert Path("predictions.csv").read_text() == earlier and not Path("a.png").exists()


def test_a_folder_with_photos_that_cannot_be_read(run, checkpoint, drawn, tmp_path):
    """The others are answered; what is left out is named."""
    (tmp_path / "best.pt").write_bytes(checkpoint)
    photos = sorted((drawn / "test").rglob("*.jpg"))[:3]
    (tmp_path / "mine").mkdir()
    for name, photo in zip(("a.jpg", "b.jpg", "broken.jpg"), photos, strict=True):
        shutil.copy(photo, tmp_path / "mine" / name)
    broken = tmp_path / "mine" / "broken.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    (tmp_path / "mine" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    done = run("predict", "best.pt", "mine", "--workers", 0)
    assert done.code == 1 and done.err.count("error:") == 1 and "Traceback" not in done.err, done.err
    assert "broken.jpg" in done.err and "phone.heic" in done.err
    names = [line.split(",")[0] for line in Path("predictions.csv").read_text().splitlines()]
    assert names == ["image_name", "mine/a.jpg", "mine/b.jpg"]


def test_a_last_pt_is_no_weights(run, drawn, checkpoint, tmp_path):
    (tmp_path / "last.pt").write_bytes(saved({"format": FORMAT, "model": {}}))
    refused(run, drawn, "--weights", "last.pt", says=["last.pt is for train.py --resume"])


def test_what_fits_is_said_where_best_pt_is_too_large(run, drawn):
    done = run("train", "--data", drawn, *TINY, "--max-mb", 0.5)
    assert done.code == 2 and re.search(r"--export-dtype (int8|fp16) takes 0\.\d+ MB", done.err)


def test_an_error_of_an_edit_names_its_place(run, drawn, monkeypatch):
    monkeypatch.setattr("evaluate.score", lambda logits, targets: [][0])
    done = run("train", "--data", drawn, *TINY)
    assert done.code == 1 and re.search(r"IndexError: list index.* \(train.py, line \d+; --debug", done.err), done.err
    monkeypatch.setattr("loading.view_pixels", lambda *args: [][0])
    done = run("train", "--data", drawn, *TINY, "--workers", 1, "--cache", "off")  # in a loading process
    assert done.code == 1 and re.search(r"IndexError: list index.* \(loading.py, line \d+; --debug", done.err), done.err
