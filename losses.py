"""The losses of one head: cross-entropy with smoothing, focal, asymmetric (single-label form), learning from a teacher; and that of a box.

The first three take `logits` (N, C) and `targets`, either class indices (N,) or class probabilities (N, C). The loss under probabilities
is the expected loss under indices (sum over c of t_c times the loss of class c), so an index and its one-hot form agree and
mixed images need no second definition. Half-precision logits are raised to float32, float64 stays float64.

With class weights w the mean is that of torch.nn.functional.cross_entropy under indices: the sum of the samples' weighted
losses over the sum of w[target]. `total_weight` gives that divisor; a batch that is split into pieces sums the pieces'
losses (`reduction="sum"`) and divides by the total weight of the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss


def _prepare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, C) in float32 or float64 and the targets as probabilities (N, C) of the same dtype."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if targets.ndim == logits.ndim - 1:
        targets = F.one_hot(targets, logits.shape[-1])
    elif targets.shape != logits.shape:
        raise ValueError(
            f"targets have the shape {tuple(targets.shape)}; for logits {tuple(logits.shape)} give indices (N,) or probabilities (N, C)"
        )
    return F.log_softmax(logits, dim=-1), targets.to(logits.dtype)


def _smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Szegedy et al. 2016, section 7: (1 - smoothing) of the target, the rest spread evenly over all classes."""
    return targets if smoothing == 0 else targets * (1 - smoothing) + smoothing / targets.shape[-1]


def _reduce(losses: Tensor, targets: Tensor, class_weights: Tensor | None, reduction: str) -> Tensor:
    """Reduce the samples' losses (N,): "none", "sum", or "mean" over the weight of their unsmoothed targets (N, C)."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / total_weight(targets, class_weights)
    raise ValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')


def total_weight(targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The divisor of a weighted mean, a scalar: the sum of the weights of the targets (indices (N,) or probabilities (N, C)).

    Without weights their number, rows of NaN (no box) aside.
    """
    if class_weights is None:
        return (
            targets.reshape(len(targets), -1).isfinite().all(-1).sum().float()
            if len(targets)
            else torch.zeros((), device=targets.device)
        )
    return class_weights[targets].sum() if targets.ndim == 1 else (targets * class_weights).sum()


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy with label smoothing (Szegedy et al. 2016). `class_weights`: (C,) or None."""
    log_p, targets = _prepare(logits, targets)
    losses = -_smooth(targets, smoothing) * log_p
    losses = losses if class_weights is None else losses * class_weights.to(losses)
    return _reduce(losses.sum(-1), targets, class_weights, reduction)


def focal(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, class_weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Focal loss in its softmax form, -w (1 - p)^gamma log p of the target class (Lin et al. 2017, eq. 4 and 5). `class_weights`: (C,) or None."""
    log_p, targets = _prepare(logits, targets)
    losses = -targets * _power_of_one_minus_p(log_p, gamma) * log_p
    losses = losses if class_weights is None else losses * class_weights.to(losses)
    return _reduce(losses.sum(-1), targets, class_weights, reduction)


def asymmetric(
    logits: Tensor,
    targets: Tensor,
    gamma_pos: float = 1.0,
    gamma_neg: float = 4.0,
    smoothing: float = 0.1,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Asymmetric loss in its single-label form (Ridnik et al. 2021, eq. 5, on a softmax; timm's AsymmetricLossSingleLabel).

    Under index y: -sum over c of s_c f_c log p_c, where s is the smoothed target, f_y = (1 - p_y)^gamma_pos, and
    f_c = p_c^gamma_neg for the other classes. Focusing looks at the unsmoothed target. `class_weights`: (C,) or None;
    a weight acts on its class's term, as in cross-entropy.
    """
    log_p, targets = _prepare(logits, targets)
    as_target = -_power_of_one_minus_p(log_p, gamma_pos) * log_p
    as_other = -torch.exp(gamma_neg * log_p) * log_p
    off = smoothing / log_p.shape[-1]
    losses = targets * (1 - smoothing + off) * as_target + (1 - targets) * off * as_other
    losses = losses if class_weights is None else losses * class_weights.to(losses)
    return _reduce(losses.sum(-1), targets, class_weights, reduction)


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, reduction: str = "mean") -> Tensor:
    """T^2 KL(teacher || student) of the softmaxes at temperature T; T^2 keeps the size of the gradient (Hinton et al. 2015, section 2).

    `teacher_logits`: (N, C), which get no gradient.
    """
    half = (torch.float16, torch.bfloat16)
    log_p, log_q = (
        F.log_softmax((x.float() if x.dtype in half else x) / temperature, dim=-1)
        for x in (logits, teacher_logits.detach())
    )
    return _reduce(temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1), log_q, None, reduction)


def _power_of_one_minus_p(log_p: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma from log p. 1 - p is kept above zero, where the derivative of a power below one has no value."""
    return (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny).pow(gamma)


def box(boxes: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """5 L1 + 2 (1 - GIoU), the loss of boxes in Carion et al. 2020 (DETR, section 3.1 and A.3).

    `boxes`, `targets`: float32 (N, 4), xmin, ymin, xmax, ymax in 0..1 of the image; a row of NaN in `targets` has no box and counts nothing.
    """
    known = targets.isfinite().all(-1, keepdim=True)
    goals = torch.where(known, targets, boxes.detach())  # no box: nothing to learn, and no NaN in the gradient either
    losses = 5 * (boxes - goals).abs().sum(-1) + 2 * generalized_box_iou_loss(boxes, goals)
    return _reduce(losses * known[:, 0], targets, None, reduction)
