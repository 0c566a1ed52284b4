"""The box head and the view `learned`: boxes move with the pixels, the head learns them, two looks are joined as the checkpoint says."""

import math
import shutil

import pytest
import torch
from conftest import TINY
from hypothesis import given, strategies as st
from PIL import Image
from test_train_predict import rows

import losses
from augment import augmentation
from data import BOX, read_split, relative_boxes
from loading import Photos, as_it_is, jittered
from model import (
    FIXED_LOOK,
    POSITIONS,
    box_of,
    build_model,
    choose_look,
    choose_margin,
    crops_of,
    join_looks,
    load_model,
    overlaps,
    read_checkpoint,
    score,
    score_boxes,
)
from photos import crop_box
from predict import predict_rows

HEAD = ["--box-head", "--crop-prob", "0.5"]


def pointing_at(boxes: torch.Tensor) -> torch.Tensor:
    """Logits of the box head that are sure of these boxes, as near as its positions come."""
    places = (torch.arange(POSITIONS) + 0.5) / POSITIONS
    return -2000 * (places - boxes[..., None]).square()


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_efficientnet",
        "tf_efficientnet_lite0",
        "eva02_tiny_patch14_224",
        "tiny_vit_5m_224",
        "convnext_atto",
    ],
)
def test_the_labels_see_what_they_see_without_the_head(name):
    size = 112
    torch.manual_seed(0)
    model, _ = build_model(name, {"a": 3, "b": 2}, size, box_head=True)
    plain, _ = build_model(name, {"a": 3, "b": 2}, size)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("box_head.")})
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        with_head, without = model.eval()(images), plain.eval()(images)
    assert list(with_head) == ["a", "b", BOX] and with_head[BOX].shape == (2, 4, POSITIONS)
    assert all(torch.equal(with_head[label], without[label]) for label in without)
    boxes, confidence = box_of(with_head[BOX])
    assert (boxes[:, :2] <= boxes[:, 2:]).all() and ((confidence >= 0) & (confidence <= 1)).all()


@given(st.lists(st.floats(0.02, 0.98), min_size=4, max_size=4, unique=True))
def test_a_sure_distribution_is_its_box(sides):
    (xmin, xmax), (ymin, ymax) = sorted(sides[:2]), sorted(sides[2:])
    truth = torch.tensor([[xmin, ymin, xmax, ymax]])
    boxes, confidence = box_of(pointing_at(truth))
    torch.testing.assert_close(boxes, truth, atol=0.01, rtol=0)
    assert confidence > 0.99


def test_an_unsure_distribution_has_no_confidence():
    assert box_of(torch.zeros(1, 4, POSITIONS))[1].item() == pytest.approx(8 / 40, abs=0.03)


def test_overlaps():
    a, b = (
        torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2]]),
        torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.5, 0.5, 0.6, 0.6]]),
    )
    assert overlaps(a, b).tolist() == pytest.approx([1 / 3, 0])
    assert score_boxes(a, torch.tensor([[0.0, 0.0, 0.5, 0.5], [math.nan] * 4])) == {
        "iou": 1,
        "iou_over_0.5": 1,
        "iou_over_0.8": 1,
    }


def test_the_loss_of_a_box_is_detrs_and_skips_what_is_unknown():
    a, b = (
        torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.4, 0.9]], requires_grad=True),
        torch.tensor([[0.2, 0.1, 0.5, 0.6], [math.nan] * 4]),
    )
    iou = 0.12 / (0.16 + 0.15 - 0.12)
    giou = iou - (0.2 - 0.19) / 0.2
    expected = 5 * 0.2 + 2 * (1 - giou)
    assert losses.box(a, b, reduction="none").tolist() == pytest.approx([expected, 0], abs=1e-5)
    loss = losses.box(a, b)
    assert loss.item() == pytest.approx(expected, abs=1e-5) and losses.total_weight(b) == 1
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient[0].abs().sum() > 0 and (gradient[1] == 0).all()
    assert losses.total_weight(torch.zeros(3, dtype=torch.int64)) == 3 and losses.total_weight(torch.zeros(0, 4)) == 0


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 50), st.integers(1, 50))
def test_a_crop_lies_in_the_photo_and_holds_a_pixel(sides, width, height):
    (xmin, xmax), (ymin, ymax) = sorted(sides[:2]), sorted(sides[2:])
    left, top, right, bottom = crop_box((xmin, ymin, xmax, ymax), (width, height))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert (
        left <= xmin * width + 0.5
        and right >= xmax * width - 0.5
        and top <= ymin * height + 0.5
        and bottom >= ymax * height - 0.5
    )


def test_whole_photos_carry_their_box_and_cut_ones_none(drawn):
    samples = read_split(drawn, "train").samples
    photos = Photos(samples, 64, "bbox", 0.5, augmentation("none"), seed=3, box_head=True)
    plain = Photos(samples, 64, "bbox", 0.5, augmentation("none"), seed=3)
    truth, whole = relative_boxes(samples, "bbox"), 0
    for i in range(len(samples)):
        image, labels = photos[1, i]
        assert (
            torch.equal(image, plain[1, i][0])
            and {label: n for label, n in labels.items() if label != BOX} == plain[1, i][1]
        )
        if labels[BOX].isfinite().all():
            whole += 1
            torch.testing.assert_close(labels[BOX], truth[i], atol=1e-5, rtol=0)
            assert torch.equal(image, Photos(samples, 64)[i][0])
        else:
            assert torch.equal(image, Photos(samples, 64, "bbox")[i][0])
    assert 8 < whole < 32
    assert BOX not in photos[0][1]  # validation


def test_boxes_follow_basic_augmentation(drawn):
    """A photo that is black but for its garment's box: the box that comes with the augmented photo is where the colour is."""
    samples = read_split(drawn, "train").samples[:1]
    box = samples[0].boxes["bbox"]

    def painted(sample):
        photo = Image.new("RGB", sample.size)
        photo.paste((0, 0, 255), box)
        return photo, sample.boxes

    photos, off = Photos(samples, 128, "bbox", 0.0, augmentation("basic"), seed=1, prepare=painted, box_head=True), []
    for epoch in range(60):
        image, labels = photos[epoch, 0]
        ys, xs = (image.amax(0) - image.amin(0) > 60).nonzero().T  # colours may be turned, black stays without any
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 128
        off.append((found - labels[BOX]).abs().max().item())
    # mirrored copies at the border and holes change what is found, now and then
    assert sorted(off)[45] < 0.03


def test_jitter_moves_the_sides_of_crops_by_its_share(drawn):
    box, size = (200, 100, 400, 500), (1000, 1000)
    torch.manual_seed(0)
    moved = torch.tensor([jittered(box, 0.05, size) for _ in range(4000)], dtype=torch.float32) - torch.tensor(box)
    assert moved.std(0).tolist() == pytest.approx([10, 20, 10, 20], rel=0.06)
    samples = read_split(drawn, "train").samples
    plain, shaken = (Photos(samples, 32, "bbox", 0.5, seed=3, box_jitter=share) for share in (0.0, 0.1))
    same = [torch.equal(plain[0, i][0], shaken[0, i][0]) for i in range(len(samples))]
    whole = [torch.equal(plain[0, i][0], Photos(samples, 32)[i][0]) for i in range(len(samples))]
    assert same == whole  # whole photos stay as they are


def test_what_the_second_look_sees(drawn):
    samples = read_split(drawn, "val").samples
    truth = relative_boxes(samples, "bbox")
    crops = crops_of(pointing_at(truth), 0.0)
    assert overlaps(crops, truth).min() > 0.9
    wide = crops_of(pointing_at(truth), 0.1)
    torch.testing.assert_close(
        wide,
        (crops + torch.cat([-0.1 * (crops[:, 2:] - crops[:, :2]), 0.1 * (crops[:, 2:] - crops[:, :2])], 1)).clamp(0, 1),
    )
    seen, boxed = Photos(samples, 64, crops=truth), Photos(samples, 64, "bbox")
    assert torch.equal(seen[0][0], boxed[0][0])  # the box itself is the view bbox
    assert choose_margin(pointing_at(truth), truth) == 0
    shrunk = torch.stack(
        [truth[:, i] + (0.1 if i < 2 else -0.1) * (truth[:, i % 2 + 2] - truth[:, i % 2]) for i in range(4)], 1
    )
    assert choose_margin(pointing_at(shrunk), truth) == 0.1
    assert choose_margin(pointing_at(truth), torch.full_like(truth, math.nan)) == FIXED_LOOK["margin"]


def test_looks_are_joined_and_chosen():
    n = 200
    generator = torch.Generator().manual_seed(0)
    targets = {"a": torch.randint(4, (n,), generator=generator)}
    right = 6 * torch.nn.functional.one_hot(targets["a"], 4).float()
    noise = torch.randn(n, 4, generator=generator)
    box = pointing_at(torch.tensor([[0.2, 0.2, 0.6, 0.6]]).repeat(n, 1))
    box[:20] = 0  # unsure
    first, second = {"a": right + noise, BOX: box}, {"a": torch.where(torch.arange(n)[:, None] < 20, -right, right)}
    look = choose_look(first, second, targets, 0.05)
    assert look["min_confidence"] > 0.3 and look["margin"] == 0.05
    joined = join_looks(first, second, look)
    assert score(joined, targets)["top1_a"] == 1 and score({"a": second["a"]}, targets)["top1_a"] == 0.9
    torch.testing.assert_close(joined["a"][:20], first["a"][:20].log_softmax(-1))
    expected = second["a"].log_softmax(-1) + look["view_weight"] * first["a"].log_softmax(-1)
    torch.testing.assert_close(joined["a"][20:], expected[20:])
    good = {"a": right}
    assert choose_look(first, good, targets, 0.0) == FIXED_LOOK | {
        "margin": 0.0
    }  # nothing to gain: no fallback, the fixed weight


def test_a_run_with_a_box_head(run, drawn, tmp_path):
    args = ["--data", drawn, *TINY, *HEAD, "--model", "test_efficientnet", "--image-size", 64, "--amp", "off"]
    done = run("train", *args, "--name", "a")
    assert done.code == 0, done.err
    assert "validation (learned)" in done.out and "boxes given (bbox)" in done.out and "mean IoU" in done.out
    saved = read_checkpoint("runs/a/best.pt")
    assert saved["data"]["view"] == "learned" and set(saved["learned"]) == set(FIXED_LOOK)
    history = rows("runs/a/metrics.csv")
    best = history[saved["epoch"] - 1]
    assert (
        float(best["val_iou"]) == saved["scores"]["iou"]
        and float(best["val_top1_mean"]) == saved["scores"]["top1_mean"]
    )
    size = (tmp_path / "runs/a/best.pt").stat().st_size
    assert f"best.pt {size / 1e6:.2f} MB" in done.out  # computed before the first step
    written = rows("runs/a/val_predictions.csv")
    for row, sample in zip(written, read_split(drawn, "val").samples):
        left, top, right, bottom = (int(row[f"Learned_{side}"]) for side in ("xmin", "ymin", "xmax", "ymax"))
        assert 0 <= left < right <= sample.size[0] and 0 <= top < bottom <= sample.size[1]
    again = run("train", *args, "--name", "b", "--workers", 2)
    assert again.code == 0, again.err
    assert all(
        torch.equal(a, b)
        for a, b in zip(saved["weights"].values(), read_checkpoint("runs/b/best.pt")["weights"].values())
    )
    assert (tmp_path / "runs/a/val_predictions.csv").read_bytes() == (
        tmp_path / "runs/b/val_predictions.csv"
    ).read_bytes()
    for split, views in (("val", 2), ("test", 1)):
        table = run("predict", "runs/a/best.pt", "--split", split, "--amp", "off")
        assert table.code == 0, table.err
        assert table.out.count("Top-1") == views  # with the boxes given beside it, where there are any
        if split == "val":
            top1 = [line.split()[1] for line in table.out.splitlines() if line.startswith("  mean")]
            assert top1 == [line.split()[1] for line in done.out.splitlines() if line.startswith("  mean")]
            assert top1[0] == f"{saved['scores']['top1_mean']:.4f}"
            assert f"mean IoU {saved['scores']['iou']:.3f}" in table.out
    pieces = run("train", *args, "--name", "c", "--grad-accum", 3, "--model", "test_vit")
    assert pieces.code == 0, pieces.err


def test_half_precision_scores_are_of_the_saved_weights(run, drawn):
    done = run("train", "--data", drawn, *TINY, *HEAD, "--amp", "off", "--name", "a", "--export-dtype", "fp16")
    assert done.code == 0, done.err
    saved = read_checkpoint("runs/a/best.pt")
    assert {"iou", "top1_mean"} <= set(saved["scores"]) and saved["weights"][
        "box_head.along_x.weight"
    ].dtype == torch.float16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--box-head"], "whole photo"),
        (["--box-head", "--crop-prob", 0.5, "--train-view", "mask"], "Mask_ columns"),
        ([*HEAD, "--cutmix", "joint"], "--cutmix"),
        ([*HEAD, "--resize", "random-resized-crop"], "--resize"),
        (["--val-view", "learned"], "add --box-head"),
    ],
)
def test_what_cannot_go_together_is_refused(run, drawn, flags, message):
    done = run("train", "--data", drawn, *TINY, *flags)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(("lr", "said"), [(5e-6, True), (5e-5, False)])
def test_a_rate_that_hardly_moves_a_new_head_is_said(run, drawn, lr, said):
    done = run("train", "--data", drawn, *TINY, "--box-head", "--crop-prob", 0.5, "--lr", lr, "--weights", "none.pth")
    assert done.code == 2 and "none.pth" in done.err and ("hardly moves the new box head" in done.out) == said


def test_without_boxes_there_is_no_head(run, drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "Bare")
    for split in ("train", "val"):
        path = tmp_path / "Bare" / f"Fashion-How24_sub1_{split}.csv"
        kept = [
            ",".join(cell for i, cell in enumerate(line.split(",")) if not 1 <= i <= 4)
            for line in path.read_text().splitlines()
        ]
        path.write_text("\n".join(kept) + "\n")
    done = run("train", "--data", "Bare", *TINY, *HEAD)
    assert done.code == 2 and "boxes" in done.err


def test_the_second_look_alone(run, drawn, tmp_path):
    assert run("train", "--data", drawn, *TINY, *HEAD, "--amp", "off", "--name", "a").code == 0
    for name, flags in (("sum", []), ("alone", ["--no-view-sum"]), ("first", ["--view", "full"])):
        done = run(
            "predict", "runs/a/best.pt", "--split", "val", "--amp", "off", "--probs", "--out", f"{name}.csv", *flags
        )
        assert done.code == 0, done.err
    p = {name: [float(row["daily_p0"]) for row in rows(f"{name}.csv")] for name in ("sum", "alone", "first")}
    weight = read_checkpoint("runs/a/best.pt")["learned"]["view_weight"]
    assert (p["sum"] == p["alone"]) == (weight == 0) and p["alone"] != p["first"]
    done = run("predict", "runs/a/best.pt", "--split", "val", "--no-view-sum", "--out", "alone.csv")
    assert ("--no-view-sum changes nothing" in done.out) == (
        weight == 0
    ) and "the earlier file of that name was replaced" in done.out


def test_a_photo_is_prepared_and_its_box_found_once(run, drawn):
    """Removing the background is by far the slowest part: the second look gets what the first one's photo became. No other look wants a box."""
    assert run("train", "--data", drawn, *TINY, *HEAD, "--amp", "off", "--name", "a").code == 0
    (model, saved), rows, prepared, boxes = load_model("runs/a/best.pt"), read_split(drawn, "test", {}), [], []

    def prepare(sample):
        prepared.append(sample.path)
        return as_it_is(sample)

    model.box_head.register_forward_hook(lambda head, maps, found: boxes.extend(found))
    plain, _ = predict_rows(model, saved, rows, "learned", workers=0)
    predict_rows(model, saved, rows, "full", workers=0)
    assert len(boxes) == len(rows.samples)
    logits, _ = predict_rows(model, saved, rows, "learned", prepare, workers=0)
    assert len(prepared) == len(rows.samples)
    assert all(torch.equal(plain[key], logits[key]) for key in plain)


def test_there_is_no_learned_view_without_the_head(run, drawn):
    assert run("train", "--data", drawn, *TINY, "--name", "a").code == 0
    done = run("predict", "runs/a/best.pt", "--view", "learned")
    assert done.code == 2 and "no box head" in done.err


@pytest.mark.parametrize("view", ["full", "bbox"])
def test_a_box_head_beside_another_validation_view(run, drawn, view):
    done = run(
        "train",
        "--data",
        drawn,
        *TINY,
        *HEAD,
        "--val-view",
        view,
        "--amp",
        "off",
        "--name",
        "a",
        "--export-dtype",
        "fp16",
    )
    assert done.code == 0, done.err
    assert f"validation ({view})" in done.out and not any(
        column.startswith("Learned_") for column in rows("runs/a/val_predictions.csv")[0]
    )
    assert read_checkpoint("runs/a/best.pt")["learned"] == FIXED_LOOK  # nothing chose another
    assert run("predict", "runs/a/best.pt", "--view", "learned").code == 0


def test_the_finest_map_has_places_enough_for_small_garments():
    """Lite0's maps have strides of 2 to 32: three in large images, one more in small ones; the head may be asked for some of the images alone."""
    strides = {
        size: build_model("tf_efficientnet_lite0", {"a": 3}, size, box_head=True)[0].levels for size in (80, 224)
    }
    assert strides == {80: [1, 2, 3, 4], 224: [2, 3, 4]}
    model, _ = build_model("test_efficientnet", {"a": 3}, 64, box_head=True)
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        whole, some, none = (
            model.eval()(images),
            model(images, torch.tensor([3, 1])),
            model(images, torch.zeros(0, dtype=torch.int64)),
        )
    torch.testing.assert_close(some[BOX], whole[BOX][[3, 1]])
    assert none[BOX].shape == (0, 4, POSITIONS) and all(
        torch.equal(out["a"], whole["a"]) for out in (some, none, model(images, False))
    )
