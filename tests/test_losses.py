"""The losses against independent references: torch's cross-entropy, timm's asymmetric loss, formulas, gradcheck."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from timm.loss import AsymmetricLossSingleLabel
from torchvision.ops import generalized_box_iou

from data import BOX, Sample, Split
from losses import MultiHeadLoss, asymmetric, box_loss, cross_entropy, distillation, focal
from model import POSITIONS, box_from_logits
from settings import Settings

N, C = 64, 6
ALL = [
    lambda *a, **k: cross_entropy(*a, smoothing=0.2, **k),
    lambda *a, **k: focal(*a, gamma=2.0, **k),
    lambda *a, **k: focal(*a, gamma=0.5, **k),
    lambda *a, **k: asymmetric(*a, **k),
    lambda *a, **k: asymmetric(*a, gamma_pos=0.3, gamma_neg=0.0, **k),
]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(N, C, generator=g, dtype=torch.float64) * 3,
        torch.randint(C, (N,), generator=g),
        torch.rand(C, generator=g, dtype=torch.float64) + 0.1,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(batch, smoothing, weighted):
    logits, y, w = batch
    w = w if weighted else None
    for reduction in ("mean", "sum", "none"):
        ours = cross_entropy(logits, y, smoothing=smoothing, class_weights=w, reduction=reduction)
        torch.testing.assert_close(
            ours, F.cross_entropy(logits, y, weight=w, label_smoothing=smoothing, reduction=reduction)
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_without_focusing_is_cross_entropy(batch, weighted):
    logits, y, w = batch
    w = w if weighted else None
    torch.testing.assert_close(focal(logits, y, gamma=0, class_weights=w), F.cross_entropy(logits, y, weight=w))


def test_focal_is_the_papers_formula(batch):
    logits, y, w = batch
    p = logits.softmax(-1)[torch.arange(N), y]
    expected = (-w[y] * (1 - p) ** 2 * p.log()).sum() / w[y].sum()
    torch.testing.assert_close(focal(logits, y, gamma=2, class_weights=w), expected)


@pytest.mark.parametrize("gammas", [(1, 4), (0, 0), (2, 1)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_asymmetric_is_timms(batch, gammas, smoothing):
    logits, y, _ = batch
    reference = AsymmetricLossSingleLabel(gamma_pos=gammas[0], gamma_neg=gammas[1], eps=smoothing)(logits, y)
    torch.testing.assert_close(asymmetric(logits, y, *gammas, smoothing=smoothing), reference)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("weighted", [False, True])
def test_an_index_and_its_one_hot_agree(batch, loss, weighted):
    logits, y, w = batch
    w = w if weighted else None
    one_hot = F.one_hot(y, C).double()
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            loss(logits, y, class_weights=w, reduction=reduction),
            loss(logits, one_hot, class_weights=w, reduction=reduction),
        )


@pytest.mark.parametrize("loss", ALL)
def test_mixed_targets_mix_the_losses(batch, loss):
    logits, y, w = batch
    other = y.roll(1)
    mixed = 0.3 * F.one_hot(y, C).double() + 0.7 * F.one_hot(other, C).double()
    expected = 0.3 * loss(logits, y, class_weights=w, reduction="sum") + 0.7 * loss(
        logits, other, class_weights=w, reduction="sum"
    )
    torch.testing.assert_close(loss(logits, mixed, class_weights=w, reduction="sum"), expected)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(batch, loss, soft, weighted):
    logits, y, w = (t[:5].clone() if t.ndim == 2 or t.dtype == torch.int64 else t for t in batch)
    targets = torch.softmax(torch.arange(5 * C, dtype=torch.float64).reshape(5, C).cos(), -1) if soft else y
    assert torch.autograd.gradcheck(
        lambda x: loss(x, targets, class_weights=w if weighted else None), logits.requires_grad_()
    )


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_stay_finite(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    for y in ([0, 1, 2], [1, 0, 0], [2, 2, 1]):
        value = loss(logits, torch.tensor(y))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite() and gradient.isfinite().all(), (y, value, gradient)


@pytest.mark.parametrize("loss", ALL)
def test_precision_of_the_result(batch, loss):
    logits, y, w = batch
    assert loss(logits, y).dtype == torch.float64
    assert loss(logits.float(), y).dtype == torch.float32
    for half in (torch.float16, torch.bfloat16):
        low = logits.to(half)
        assert loss(low, y, class_weights=w.float()).dtype == torch.float32
        torch.testing.assert_close(loss(low, y), loss(low.float(), y), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ALL)
def test_sums_over_parts_of_a_batch_make_its_mean(batch, loss):
    logits, y, w = batch
    sums = sum(loss(a, b, class_weights=w, reduction="sum") for a, b in zip(logits.split(7), y.split(7)))
    torch.testing.assert_close(sums / w[y].sum(), loss(logits, y, class_weights=w))


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_unknown_classes_add_nothing(batch, loss, soft, weighted):
    """-1, and as probabilities a row of zeros: also with smoothing."""
    logits, y, w = batch
    w = w if weighted else None
    known = torch.arange(N) % 3 > 0
    targets = torch.where(known, y, -1)
    if soft:
        targets = F.one_hot(y, C).double() * known[:, None]
    logits.requires_grad_()
    for reduction in ("mean", "sum"):
        ours = loss(logits, targets, class_weights=w, reduction=reduction)
        torch.testing.assert_close(ours, loss(logits[known], y[known], class_weights=w, reduction=reduction))
    (gradient,) = torch.autograd.grad(ours, logits)
    assert not gradient[~known].any() and gradient[known].any()
    assert not loss(logits, targets, class_weights=w, reduction="none")[~known].any()


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("weighted", [False, True])
def test_without_any_target_the_loss_is_zero_with_a_gradient_of_zeros(batch, loss, weighted):
    logits, _, w = batch
    logits.requires_grad_()
    for targets in (torch.full((N,), -1), torch.zeros(N, C)):
        value = loss(logits, targets, class_weights=w if weighted else None)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == 0 and not gradient.any()


# ---------------------------------------------------------------- boxes


def test_the_loss_of_boxes_is_the_papers_formula():
    g = torch.Generator().manual_seed(0)
    boxes, targets = (torch.rand(5, 4, generator=g).sort(-1).values for _ in range(2))
    giou = generalized_box_iou(boxes, targets).diagonal()
    expected = (5 * (boxes - targets).abs().sum(-1) + 2 * (1 - giou)).mean()
    torch.testing.assert_close(box_loss(boxes, targets), expected)
    assert box_loss(boxes, boxes).item() == pytest.approx(0, abs=1e-5)


def test_boxes_that_are_not_known_add_nothing():
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]], requires_grad=True)
    targets = torch.tensor([[0.2, 0.1, 0.6, 0.5], [math.nan] * 4])
    loss = box_loss(boxes, targets)
    torch.testing.assert_close(loss, box_loss(boxes[:1], targets[:1]))
    (gradient,) = torch.autograd.grad(loss, boxes)
    assert gradient[0].any() and not gradient[1].any()
    loss = box_loss(boxes, torch.full((2, 4), math.nan))
    (gradient,) = torch.autograd.grad(loss, boxes)
    assert loss.item() == 0 and not gradient.any()


# ---------------------------------------------------------------- the heads' losses together


CLASSES = {"Daily": ("0", "1", "2"), "Gender": ("0", "1")}


def split_of(*rows: tuple[int, int]) -> Split:
    """Rows of the classes of Daily and Gender."""
    samples = [Sample("a", "a", "a", Path("a.csv"), {}, {"Daily": a, "Gender": b}) for a, b in rows]
    return Split(Path("a.csv"), samples, CLASSES, tuple(CLASSES), "")


SPLIT = split_of((0, 0), (0, 1), (1, 0), (2, -1))


def heads(n: int, box: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    logits = {label: torch.randn(n, len(names), generator=g, requires_grad=True) for label, names in CLASSES.items()}
    return logits | ({BOX: torch.randn(n, 4, POSITIONS, generator=g, requires_grad=True)} if box else {})


@pytest.mark.parametrize("name", ["ce", "focal", "asymmetric"])
def test_each_head_has_its_loss(name):
    losses = {
        "ce": lambda *a: cross_entropy(*a, smoothing=0.3),
        "focal": lambda *a: focal(*a, gamma=1.5),
        "asymmetric": lambda *a: asymmetric(*a, gamma_pos=2.0, gamma_neg=3.0, smoothing=0.3),
    }
    gammas = {"focal_gamma": 1.5, "asym_gamma_pos": 2.0, "asym_gamma_neg": 3.0}
    criterion = MultiHeadLoss(Settings(loss=name, label_smoothing=0.3, **gammas), SPLIT)
    logits, targets = heads(4), {"Daily": torch.tensor([0, 2, 1, -1]), "Gender": torch.tensor([1, 0, -1, -1])}
    ours = criterion(logits, targets)
    assert list(ours) == list(CLASSES)
    for label in CLASSES:
        torch.testing.assert_close(ours[label], losses[name](logits[label], targets[label]))


def test_class_weights_are_one_minus_the_frequencies_among_known_rows():
    criterion = MultiHeadLoss(Settings(class_weights=True, label_smoothing=0.0), SPLIT)
    logits, targets = heads(4), {"Daily": torch.tensor([0, 2, 1, 0]), "Gender": torch.tensor([1, 0, 1, 0])}
    ours = criterion(logits, targets)
    daily, gender = torch.tensor([1 / 2, 3 / 4, 3 / 4]), torch.tensor([1 / 3, 2 / 3])
    torch.testing.assert_close(ours["Daily"], F.cross_entropy(logits["Daily"], targets["Daily"], daily))
    torch.testing.assert_close(ours["Gender"], F.cross_entropy(logits["Gender"], targets["Gender"], gender))
    with pytest.raises(typer.BadParameter, match="Gender"):
        MultiHeadLoss(Settings(class_weights=True), split_of((0, 1), (1, 1)))


def test_the_teacher_has_its_share_of_the_labels_and_none_of_the_box():
    criterion = MultiHeadLoss(Settings(box_head=True, crop_prob=0.7, distill_weight=0.25), SPLIT)
    logits, targets = heads(2, box=True), {"Daily": torch.tensor([0, 2]), "Gender": torch.tensor([1, 0])}
    targets[BOX] = torch.tensor([[0.1, 0.1, 0.5, 0.5], [math.nan] * 4])
    teacher = {label: values.detach().flip(0) for label, values in heads(2).items()}
    hard, both = criterion(logits, targets), criterion(logits, targets, teacher)
    assert set(hard) == set(both) == {*CLASSES, BOX}
    for label in CLASSES:
        soft = distillation(logits[label], teacher[label], 4.0)
        torch.testing.assert_close(both[label], 0.75 * hard[label] + 0.25 * soft)
    assert hard[BOX] == both[BOX]
    torch.testing.assert_close(hard[BOX], box_loss(box_from_logits(logits[BOX]), targets[BOX]))


@pytest.mark.parametrize("name", ["ce", "focal", "asymmetric"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_head_without_a_target_adds_zero_with_a_gradient(name, weighted):
    """In several processes each parameter needs a gradient in each step."""
    settings = Settings(loss=name, class_weights=weighted, box_head=True, crop_prob=0.7)
    logits = heads(2, box=True)
    targets = {"Daily": torch.tensor([0, 2]), "Gender": torch.tensor([-1, -1]), BOX: torch.full((2, 4), math.nan)}
    losses = MultiHeadLoss(settings, SPLIT)(logits, targets)
    assert losses["Gender"].item() == losses[BOX].item() == 0 < losses["Daily"].item()
    sum(losses.values()).backward()
    assert logits["Daily"].grad.any()
    for head in ("Gender", BOX):
        assert logits[head].grad is not None and not logits[head].grad.any()


# ---------------------------------------------------------------- edges


def test_a_perfect_and_a_uniform_answer():
    assert focal(torch.tensor([[50.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(0, abs=1e-12)
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([3])).item() == pytest.approx(math.log(4))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
