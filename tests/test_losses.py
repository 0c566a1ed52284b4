"""The losses against independent references: torch's cross-entropy, timm's asymmetric loss, formulas written out, gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossSingleLabel

from losses import asymmetric, cross_entropy, focal, total_weight

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
def test_pieces_of_a_batch_sum_to_its_mean(batch, loss):
    logits, y, w = batch
    whole = loss(logits, y, class_weights=w)
    pieces = sum(loss(a, b, class_weights=w, reduction="sum") for a, b in zip(logits.split(7), y.split(7)))
    torch.testing.assert_close(pieces / total_weight(y, w), whole)


def test_a_perfect_and_a_uniform_answer():
    assert focal(torch.tensor([[50.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(0, abs=1e-12)
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([3])).item() == pytest.approx(math.log(4))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
