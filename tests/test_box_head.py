"""The box head and the view `learned`: boxes move with the pixels, the head learns them, two looks are joined."""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import typer
from conftest import TINY
from hypothesis import given, strategies as st
from PIL import Image
from test_train_predict import rows

import loading
from benchmarks.gap import iou_with
from checkpoint import load_model, new_checkpoint, read
from data import BOX, read_split
from evaluate import grow_boxes, join_looks, predict_split, score, score_boxes
from loading import EvalPhotos, TrainPhotos, loose_crop, make_eval_loader, part_around, read_photo, relative_boxes
from losses import box_loss
from model import POSITIONS, box_from_logits, build_model
from photos import box_iou, box_size, crop_box, load_photo, placement, to_image, view_pixels
from predict import choose_treatment, predict_rows
from settings import Settings

HEAD = ["--box-head", "--crop-prob", "0.5"]
SIDES = ("xmin", "ymin", "xmax", "ymax")


def pointing_at(boxes: torch.Tensor) -> torch.Tensor:
    """Logits of the box head that are sure of these boxes, as near as its positions come."""
    places = (torch.arange(POSITIONS) + 0.5) / POSITIONS
    return -2000 * (places - boxes[..., None]).square()


BACKBONES = "test_vit test_efficientnet tf_efficientnet_lite0 eva02_tiny_patch14_224 tiny_vit_5m_224 convnext_atto"


@pytest.mark.parametrize("name", BACKBONES.split())
def test_the_labels_see_what_they_see_without_the_head(name):
    size = 112
    torch.manual_seed(0)
    classes = {"a": ("0", "1", "2"), "b": ("0", "1")}
    model, plain = build_model(name, classes, size, box_head=True), build_model(name, classes, size)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("box_head.")})
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        with_head, without, labels = model.eval()(images), plain.eval()(images), model(images, labels_only=True)
    assert list(with_head) == ["a", "b", BOX] and with_head[BOX].shape == (2, 4, POSITIONS)
    assert list(labels) == ["a", "b"]
    assert all(torch.equal(with_head[label], without[label]) for label in without)
    assert all(torch.equal(labels[label], without[label]) for label in without)
    boxes = box_from_logits(with_head[BOX])
    assert (boxes[:, :2] <= boxes[:, 2:]).all()


@given(st.lists(st.floats(0.02, 0.98), min_size=4, max_size=4, unique=True))
def test_a_sure_distribution_is_its_box(sides):
    (xmin, xmax), (ymin, ymax) = sorted(sides[:2]), sorted(sides[2:])
    truth = torch.tensor([[xmin, ymin, xmax, ymax]])
    torch.testing.assert_close(box_from_logits(pointing_at(truth)), truth, atol=0.01, rtol=0)


def test_iou():
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2]])
    b = torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.5, 0.5, 0.6, 0.6]])
    assert box_iou(a, b).tolist() == pytest.approx([1 / 3, 0])
    known = torch.tensor([[0.0, 0.0, 0.5, 0.5], [math.nan] * 4])
    assert score_boxes(a, known) == {"iou": 1, "iou_over_0.5": 1, "iou_over_0.8": 1}
    assert score_boxes(a, torch.full((2, 4), math.nan)) == {}


def test_the_loss_of_a_box_is_detrs_and_skips_what_is_unknown():
    a = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.4, 0.9]], requires_grad=True)
    b = torch.tensor([[0.2, 0.1, 0.5, 0.6], [math.nan] * 4])
    iou = 0.12 / (0.16 + 0.15 - 0.12)
    giou = iou - (0.2 - 0.19) / 0.2
    expected = 5 * 0.2 + 2 * (1 - giou)
    loss = box_loss(a, b)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient[0].abs().sum() > 0 and (gradient[1] == 0).all()
    loss = box_loss(a, torch.full((2, 4), math.nan))
    assert loss.item() == 0 and (torch.autograd.grad(loss, a)[0] == 0).all()


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 50), st.integers(1, 50))
def test_a_crop_lies_in_the_photo_and_holds_a_pixel(sides, width, height):
    (xmin, xmax), (ymin, ymax) = sorted(sides[:2]), sorted(sides[2:])
    left, top, right, bottom = crop_box((xmin, ymin, xmax, ymax), (width, height))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert left <= xmin * width + 0.5 and right >= xmax * width - 0.5
    assert top <= ymin * height + 0.5 and bottom >= ymax * height - 0.5


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_training_images_carry_the_box_of_what_they_show(drawn, monkeypatch, resize):
    """A photo that is black but for its garment's box: loose crops, whole photos and parts show it where it is said."""
    samples = read_split(drawn, "train").samples
    monkeypatch.setattr(loading, "read_photo", painted)
    settings = Settings(crop_prob=0.5, augment="none", resize=resize, seed=3, box_head=True)
    photos, shares = TrainPhotos(samples, 128, settings), {"bbox": [], "full": []}
    for i in range(len(samples)):
        image, targets, view = photos.draw(1, i)
        box = targets[BOX]
        torch.testing.assert_close(coloured(image), box, atol=0.02, rtol=0)
        shares[view].append((box[2:] - box[:2]).prod().item())
    crops, others = shares["bbox"], shares["full"]
    assert 8 < len(crops) < 32 and len({*crops}) > 3 and len({*others}) > 4
    assert sum(crops) / len(crops) > 1.3 * sum(others) / len(others)


def test_a_loose_crop_and_a_part_lie_in_the_photo():
    torch.manual_seed(0)
    box, photo = (10, 20, 50, 90), (60, 100)
    crops, parts = ([draw(box, photo) for _ in range(400)] for draw in (loose_crop, part_around))
    low, high = zip(*((min(sides), max(sides)) for sides in zip(*crops)))
    assert low == (0, 0, 46, 83) and high == (14, 27, 60, 100)  # within a tenth of the sides in, and the photo
    assert 150 < parts.count((0, 0, *photo)) < 250
    assert all(a <= b for part in parts for a, b in zip(part[:2] + box[2:], box[:2] + part[2:]))
    assert all(part[0] >= 0 and part[1] >= 0 and part[2] <= 60 and part[3] <= 100 for part in parts)


def painted(sample) -> Image.Image:
    photo = Image.new("RGB", sample.size)
    photo.paste((0, 0, 255), sample.boxes["bbox"])
    return photo


def coloured(image: torch.Tensor) -> torch.Tensor:
    """The box of what is not grey, in 0..1."""
    ys, xs = (image.amax(0) - image.amin(0) > 60).nonzero().T
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / image.shape[-1]


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_boxes_follow_basic_augmentation(drawn, monkeypatch, resize):
    """A photo that is black but for its garment's box: the box of the augmented image is where the colour is."""
    samples = read_split(drawn, "train").samples[:1]
    monkeypatch.setattr(loading, "read_photo", painted)
    photos, off = TrainPhotos(samples, 128, Settings(crop_prob=0.0, resize=resize, seed=1, box_head=True)), []
    for epoch in range(60):
        image, targets = photos[epoch, 0]
        off.append((coloured(image) - targets[BOX]).abs().max().item())  # colours may be turned, black stays black
    # mirrored copies at the border and holes change what is found, now and then
    assert sorted(off)[45] < 0.03


# ---------------------------------------------------------------- two looks


def test_boxes_are_grown_within_the_photo():
    boxes = torch.tensor([[0.4, 0.2, 0.6, 0.8], [0.0, 0.01, 1.0, 0.99]])
    by_x, by_y = 0.05 * 0.2, 0.05 * 0.6
    expected = torch.tensor([[0.4 - by_x, 0.2 - by_y, 0.6 + by_x, 0.8 + by_y], [0, 0, 1, 1]])
    torch.testing.assert_close(grow_boxes(boxes), expected)


def test_looks_are_joined():
    n = 200
    generator = torch.Generator().manual_seed(0)
    targets = {"a": torch.randint(4, (n,), generator=generator)}
    right = 6 * torch.nn.functional.one_hot(targets["a"], 4).float()
    first, second = {"a": right + torch.randn(n, 4, generator=generator)}, {"a": right}
    expected = second["a"].log_softmax(-1) + 0.5 * first["a"].log_softmax(-1)
    joined = join_looks(first, second)
    torch.testing.assert_close(joined["a"], expected)
    assert score(joined, targets)["top1_a"] == 1


class Pointing(torch.nn.Module):
    """In the place of a model: its box logits are sure of the given boxes, image after image; keeps what it sees."""

    def __init__(self, boxes: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.classes = {"Daily": ("0", "1", "2")}
        self.boxes, self.seen = boxes, []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        start = sum(len(part) for part in self.seen)
        self.seen.append(images)
        boxes = pointing_at(self.boxes[start : start + len(images)])
        return {"Daily": images.float().mean((2, 3)), BOX: boxes}


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_what_two_looks_see(drawn, resize):
    """The second look sees the first one's box, grown, of the photo, and mends it."""
    samples = read_split(drawn, "val").samples
    truth = relative_boxes(samples, "bbox")
    sizes = [sample.size for sample in samples]
    crops = [crop_box(box, size) for box, size in zip(grow_boxes(truth).tolist(), sizes)]
    half = torch.tensor([[0.0, 0.0, 0.5, 1.0]]).repeat(len(samples), 1)  # of what the second look sees
    looks = (
        to_image(truth, placement(sizes, 64, resize)),
        to_image(half, placement([*map(box_size, crops)], 64, resize)),
    )
    model = Pointing(torch.cat(looks))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread predicts: photo after photo
    try:
        loader = make_eval_loader(EvalPhotos(samples, 64, "learned", resize), 8, 0)
        prediction = predict_split(model, loader, "learned")
    finally:
        torch.set_num_threads(threads)
    expected = [(crop[0], crop[1], (crop[0] + crop[2]) / 2, crop[3]) for crop in crops]
    assert box_iou(prediction.boxes, torch.tensor(expected) / torch.tensor(sizes).repeat(1, 2)).min() > 0.9
    assert prediction.problems == {}
    first, second = torch.cat(model.seen).split(len(samples))
    for i, (sample, crop) in enumerate(zip(samples, crops)):
        photo = load_photo(sample.path)
        assert torch.equal(first[i], view_pixels(photo, None, 64, resize))
        seen = view_pixels(photo, crop, 64, resize)
        assert (second[i].float() - seen.float()).abs().mean() < 8  # the distribution over positions is not exact
    looks = ({"Daily": images.float().mean((2, 3))} for images in (first, second))
    torch.testing.assert_close(prediction.logits["Daily"], join_looks(*looks)["Daily"])


def test_the_box_itself_is_the_view_bbox(drawn):
    samples = read_split(drawn, "val").samples
    seen = EvalPhotos(samples, 64, "learned")[0, relative_boxes(samples, "bbox")[0].tolist()]
    assert torch.equal(seen[0], EvalPhotos(samples, 64, "bbox")[0, None][0])


# ---------------------------------------------------------------- the scripts


def test_a_run_with_a_box_head(run, drawn, tmp_path):
    args = ["--data", drawn, *TINY, *HEAD, "--model", "test_efficientnet", "--image-size", 64, "--amp", "off"]
    done = run("train", *args, "--name", "a")
    assert done.code == 0, done.err
    assert "validation (learned)" in done.out and "boxes given (bbox)" in done.out and "mean IoU" in done.out
    saved = read("runs/a/best.pt")
    assert saved["view"] == "learned" and saved["box_head"]
    model, split = load_model("runs/a/best.pt")[0], read_split(drawn, "val")
    foreseen = new_checkpoint(Settings(box_head=True), model, split, "learned", None)
    assert foreseen.scores.keys() == saved["scores"].keys()  # its size decides before training
    history = rows("runs/a/metrics.csv")
    best = history[saved["epoch"] - 1]
    assert float(best["val_iou"]) == saved["scores"]["iou"]
    assert float(best["val_top1_mean"]) == saved["scores"]["top1_mean"]
    size = (tmp_path / "runs/a/best.pt").stat().st_size
    assert f"best.pt {size / 1e6:.2f} MB" in done.out  # computed before the first step
    written = rows("runs/a/val_predictions.csv")
    for row, sample in zip(written, read_split(drawn, "val").samples):
        left, top, right, bottom = (int(row[f"Learned_{side}"]) for side in SIDES)
        assert 0 <= left < right <= sample.size[0] and 0 <= top < bottom <= sample.size[1]
    again = run("train", *args, "--name", "b", "--workers", 2)
    assert again.code == 0, again.err
    weights = read("runs/b/best.pt")["weights"]
    assert all(torch.equal(value, weights[key]) for key, value in saved["weights"].items())
    predictions = [(tmp_path / "runs" / name / "val_predictions.csv").read_bytes() for name in "ab"]
    assert predictions[0] == predictions[1]
    for split, views in (("val", 2), ("test", 1)):
        table = run("predict", "runs/a/best.pt", "--split", split, "--amp", "off")
        assert table.code == 0, table.err
        assert table.out.count("Top-1") == views  # with the boxes given beside it, where there are any
        if split == "val":
            top1 = [line.split()[1] for line in table.out.splitlines() if line.startswith("  mean")]
            assert top1 == [line.split()[1] for line in done.out.splitlines() if line.startswith("  mean")]
            assert top1[0] == f"{saved['scores']['top1_mean']:.4f}"
            assert f"mean IoU {saved['scores']['iou']:.3f}" in table.out
    accumulated = run("train", *args, "--name", "c", "--grad-accum", 3, "--model", "test_vit")
    assert accumulated.code == 0, accumulated.err


@pytest.mark.parametrize("pretrained", [True, False])
def test_batch_norms_of_a_pretrained_backbone_keep_their_statistics_from_a_quarter_on(run, drawn, pretrained):
    torch.save(build_model("test_efficientnet", {"a": ("x", "y")}, 32).backbone.state_dict(), "backbone.pt")
    start = ["--weights", "backbone.pt"] if pretrained else []
    flags = [*TINY, *HEAD, "--model", "test_efficientnet", "--t-0", 4, "--patience", 9, "--name", "a", *start]
    found = []
    for args in (["--data", drawn, *flags, "--epochs", 1], ["--resume", "runs/a", "--epochs", 2]):
        done = run("train", *args)
        assert done.code == 0, done.err
        state = read("runs/a/last.pt")["model"]
        found.append({key: value for key, value in state.items() if key.endswith(("running_mean", "running_var"))})
    same = [torch.equal(value, found[1][key]) for key, value in found[0].items()]
    assert same and all(same) if pretrained else not any(same)
    first = torch.load("backbone.pt", weights_only=True)["bn1.running_mean"]
    assert not torch.equal(first, found[0]["backbone.bn1.running_mean"])  # before, they are those of the batches


def test_the_levels_of_a_plain_transformer():
    assert build_model("vit_tiny_patch16_224", {"a": ("x", "y")}, 32, box_head=True).levels == [7, 11]


def test_boxes_of_letterboxed_photos_are_in_pixels_of_the_photos(run, drawn):
    flags = ["--resize", "letterbox", "--model", "test_efficientnet", "--image-size", 64, "--amp", "off"]
    done = run("train", "--data", drawn, *TINY, *HEAD, *flags, "--name", "a")
    assert done.code == 0, done.err
    samples = read_split(drawn, "val").samples
    written = [[int(row[f"Learned_{side}"]) for side in SIDES] for row in rows("runs/a/val_predictions.csv")]
    given = [sample.boxes["bbox"] for sample in samples]
    iou = box_iou(torch.tensor(written).float(), torch.tensor(given).float()).mean().item()
    assert iou == pytest.approx(read("runs/a/best.pt")["scores"]["iou"], abs=0.01)  # but for the rounding to pixels
    table = run("predict", "runs/a/best.pt", "--split", "val", "--amp", "off")
    assert f"mean IoU {read('runs/a/best.pt')['scores']['iou']:.3f}" in table.out


def test_half_precision_scores_are_of_the_saved_weights(run, drawn):
    done = run("train", "--data", drawn, *TINY, *HEAD, "--amp", "off", "--name", "a", "--export-dtype", "fp16")
    assert done.code == 0, done.err
    saved = read("runs/a/best.pt")
    assert {"iou", "top1_mean"} <= set(saved["scores"])
    assert saved["weights"]["box_head.along_x.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--box-head"], "uncropped photos"),
        (["--box-head", "--crop-prob", 0.5, "--train-view", "mask"], "Mask_ columns"),
        ([*HEAD, "--cutmix", "joint"], "--cutmix"),
        ([*HEAD, "--resize", "random-resized-crop"], "--resize"),
        (["--val-view", "learned"], "add --box-head"),
    ],
)
def test_what_cannot_go_together_is_refused(run, drawn, flags, message):
    done = run("train", "--data", drawn, *TINY, *flags)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_without_boxes_there_is_no_head(run, drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "Bare")
    for split in ("train", "val"):
        path = tmp_path / "Bare" / f"Fashion-How24_sub1_{split}.csv"
        lines = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text("".join(",".join([cells[0], *cells[5:]]) + "\n" for cells in lines))
    done = run("train", "--data", "Bare", *TINY, *HEAD)
    assert done.code == 2 and "boxes" in done.err


def test_the_predicted_boxes_are_written_when_asked(run, drawn):
    assert run("train", "--data", drawn, *TINY, *HEAD, "--amp", "off", "--name", "a").code == 0
    done = run("predict", "runs/a/best.pt", "--split", "val", "--amp", "off", "--boxes", "--out", "p.csv")
    assert done.code == 0, done.err
    columns = [f"Learned_{side}" for side in SIDES]
    boxes = [
        [[row[column] for column in columns] for row in rows(file)] for file in ("p.csv", "runs/a/val_predictions.csv")
    ]
    assert boxes[0] == boxes[1]
    refused = run("predict", "runs/a/best.pt", "--split", "val", "--boxes", "--view", "full")
    assert refused.code == 2 and "--boxes" in refused.err and "--box-head" in refused.err


def test_the_benchmark_scores_written_boxes_by_photo(tmp_path):
    (tmp_path / "given.csv").write_text("image_name,xmin,ymin,xmax,ymax\na.jpg,0,0,10,10\nb.jpg,0,0,10,20\n")
    columns = ",".join(f"Learned_{side}" for side in SIDES)
    (tmp_path / "found.csv").write_text(f"image_name,daily,{columns}\nb.jpg,1,0,0,10,10\na.jpg,1,0,0,10,10\n")
    assert iou_with(tmp_path / "given.csv", tmp_path / "found.csv").tolist() == [1, 0.5]


def test_a_first_look_alone_is_the_view_full(run, drawn):
    assert run("train", "--data", drawn, *TINY, *HEAD, "--amp", "off", "--name", "a").code == 0
    answers = []
    for flags in ([], ["--view", "full"]):
        done = run("predict", "runs/a/best.pt", "--split", "val", "--amp", "off", "--probs", "--out", "p.csv", *flags)
        assert done.code == 0, done.err
        answers.append([float(row["daily_p0"]) for row in rows("p.csv")])
    assert answers[0] != answers[1]
    assert "the earlier file of that name was replaced" in done.out


BOXES = ((0, 0, 20, 20), (10, 10, 40, 40))


def test_a_photo_is_prepared_and_its_box_found_once(run, drawn):
    """Removing the background is by far the slowest part: the second look gets what the first one's photo became.

    No other look computes the box.
    """
    assert run("train", "--data", drawn, *TINY, *HEAD, "--amp", "off", "--name", "a").code == 0
    (model, saved), split, prepared, boxes = load_model("runs/a/best.pt"), read_split(drawn, "test", {}), [], []

    def prepare(sample):
        prepared.append(sample.path)
        return read_photo(sample), sample.boxes

    model.box_head.register_forward_hook(lambda head, maps, found: boxes.extend(found))
    plain = predict_rows(model, saved, split, "learned", workers=0)
    predict_rows(model, saved, split, "full", workers=0)
    assert len(boxes) == 2 * len(split.samples)  # each of two looks; none of one
    prediction = predict_rows(model, saved, split, "learned", prepare, workers=0)
    assert len(prepared) == len(split.samples)
    twice = replace(split, samples=[replace(split.samples[0], boxes={"bbox": box}) for box in BOXES])
    predict_rows(model, saved, twice, "learned", prepare, workers=0)
    assert len(prepared) == len(split.samples) + 2  # two garments of one photo are prepared by their boxes
    assert all(torch.equal(plain.logits[key], prediction.logits[key]) for key in plain.logits)


def test_letterboxed_photos_that_are_cropped_on_the_fly_are_not_looked_at_twice(drawn):
    """A box in the crop would be taken for one in the photo."""
    model = build_model("test_vit", {"Daily": tuple("012345")}, 32, box_head=True)
    preparation = {"crop": "mask", "keep_background": True, "rembg_model": "u2netp", "background_color": [0, 0, 0]}
    saved = new_checkpoint(
        Settings(box_head=True, resize="letterbox"), model, read_split(drawn, "val"), "learned", preparation
    )
    with pytest.raises(typer.BadParameter, match=r"preprocess\.py cropped"):
        choose_treatment(saved, read_split(drawn, "test", model.classes))
    assert choose_treatment(saved, read_split(drawn, "test", model.classes), "full") == ("full", preparation)
    assert choose_treatment(replace(saved, resize="squash"), read_split(drawn, "test", model.classes))[0] == "learned"


def test_boxes_are_scored_against_those_that_training_saw(run, drawn, tmp_path):
    data = shutil.copytree(drawn, tmp_path / "Data")
    for split in ("train", "val"):
        path = data / f"Fashion-How24_sub1_{split}.csv"
        header, *lines = path.read_text().splitlines()
        text = [f"{header},Mask_xmin,Mask_ymin,Mask_xmax,Mask_ymax", *(f"{line},0,0,40,50" for line in lines)]
        path.write_text("\n".join(text) + "\n")
    done = run("train", "--data", data, *TINY, *HEAD, "--train-view", "mask", "--amp", "off", "--name", "a")
    trained = re.search(r"predicted boxes: mean IoU .*", done.out)[0]
    assert done.code == 0 and read("runs/a/best.pt")["train_view"] == "mask"
    assert trained in run("predict", "runs/a/best.pt", "--split", "val").out


def test_there_is_no_learned_view_without_the_head(run, drawn):
    assert run("train", "--data", drawn, *TINY, "--name", "a").code == 0
    done = run("predict", "runs/a/best.pt", "--view", "learned")
    assert done.code == 2 and "no box head" in done.err


@pytest.mark.parametrize("view", ["full", "bbox"])
def test_a_box_head_beside_another_validation_view(run, drawn, view):
    flags = ["--val-view", view, "--amp", "off", "--export-dtype", "fp16"]
    done = run("train", "--data", drawn, *TINY, *HEAD, *flags, "--name", "a")
    assert done.code == 0, done.err
    assert f"validation ({view})" in done.out
    assert not any(column.startswith("Learned_") for column in rows("runs/a/val_predictions.csv")[0])
    assert run("predict", "runs/a/best.pt", "--view", "learned").code == 0


def test_the_finest_map_has_places_enough_for_small_garments():
    """Lite0's maps have strides of 2 to 32: three in large images, one more in small ones."""
    classes = {"a": ("0", "1", "2")}
    models = {size: build_model("tf_efficientnet_lite0", classes, size, box_head=True) for size in (80, 224)}
    assert {size: model.levels for size, model in models.items()} == {80: [1, 2, 3, 4], 224: [2, 3, 4]}
