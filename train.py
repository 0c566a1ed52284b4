"""Train a classifier of garment attributes: one backbone, a linear head a label.

    python train.py --data demo --no-pretrained --model test_resnet \\
        --image-size 64 --augment none --box-head --crop-prob 0.7 \\
        --epochs 8 --t-0 8 --lr 4e-3 --batch-size 32 --threads 1    # the built-in set
    python train.py --box-head --crop-prob 0.7 --lr 5e-5            # the organisers' Dataset/: start here
    python train.py --loss focal --crop-prob 0.7                    # the same, boxed: weaker on photos without boxes
    python train.py --resume runs/NAME                              # continue, or with more --epochs or --patience

Writes runs/NAME/: config.json, metrics.csv, best.pt (to predict with and to send in), last.pt (to resume from),
val_predictions.csv and pictures. The defaults are those of another author's notes; they suit a GPU and 11,058 photos.
"""

import copy
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import typer

import cli
from cli import Stopped, console, note, progress, say, usage_error
from settings import Settings, SettingsCommand, checked_settings, choose_view, data_fingerprint, learning_rate


class TrainCommand(SettingsCommand):
    def invoke(self, ctx: typer.Context) -> None:
        train(super().invoke(ctx))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=TrainCommand, epilog=cli.examples(__doc__))(Settings)

if __name__ == "__main__":
    cli.answer_early(app)  # torch takes seconds to import

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.utils.data import DataLoader

import checkpoint as checkpoints
import evaluate
import loading
from augment import check_cutmix, cutmix
from checkpoint import Checkpoint
from data import Split, find_dataset, note_doubts, read_preparation, read_splits
from evaluate import Prediction, rank, world_size
from loading import EvalPhotos, TrainPhotos, derive_seed
from losses import MultiHeadLoss
from model import FashionModel, build_model, choose_amp, choose_device, parameter_groups, set_deterministic, update_ema

MONITORS = {"top1": ("val_top1_mean", 1), "acsa": ("val_acsa_mean", 1), "loss": ("val_loss", -1)}  # column, sign
CHECK_EVERY = 20  # steps between two checks of the losses, each of which waits for the device

Weights = dict[str, Tensor]  # by name, as best.pt holds them


@dataclass
class TrainState:
    """What last.pt holds: all that it takes to resume."""

    model: FashionModel
    ema: FashionModel | None
    optimizer: torch.optim.AdamW
    scheduler: CosineAnnealingWarmRestarts
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished of the next one
    loss_sum: float = 0.0  # over the images of these steps, in all processes
    seconds: float = 0.0  # that these steps took
    best_epoch: int = 0
    best_score: float = -math.inf
    metrics: list[dict] = field(default_factory=list)

    def state_dict(self) -> dict:
        return {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        for name, value in vars(self).items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


@dataclass
class Run:
    """A run's folder, and what belongs to this start of it."""

    folder: Path
    checkpoint: Checkpoint  # best.pt so far
    model: nn.Module  # the state's model, or its DistributedDataParallel
    criterion: MultiHeadLoss
    teacher: nn.Module | None
    val_split: Split
    amp_dtype: torch.dtype | None
    signals: cli.StopSignals = field(default_factory=cli.StopSignals)
    saved_at: float = field(default_factory=time.monotonic)  # when last.pt was written
    epoch_start: float = 0.0  # when the epoch began; after an interruption, less the seconds before it


# ---------------------------------------------------------------- the run


def train(settings: Settings) -> None:
    """Train until the last epoch, or until none was better for `patience` epochs."""
    data = settings.data  # errors name it as it was given
    settings = checked_settings(settings)
    device, amp_dtype = set_up_torch(settings)

    roots = [find_dataset(path, settings.subtask) for path in data]
    train_split, val_split = read_splits(roots, settings.subtask, settings.fit_all)
    view = choose_view(settings, train_split, val_split)
    check_cutmix(settings.cutmix or (), train_split.classes)
    if not settings.fit_all:
        note_doubts(train_split, val_split)

    torch.manual_seed(derive_seed(settings.seed, "weights"))
    model = new_model(settings, train_split)
    checkpoint = checkpoints.new_checkpoint(settings, model, train_split, view, read_preparation(roots[-1]))
    checkpoints.check_budget(checkpoint, model, settings)
    criterion = MultiHeadLoss(settings, train_split, device)
    teacher = checkpoints.load_teacher(settings.teacher, model.classes, device) if settings.teacher else None
    train_loader, val_loader = make_loaders(settings, model, train_split, val_split, view)

    state = new_state(settings, model.to(device))
    fingerprint = data_fingerprint(settings, train_split, val_split)
    folder = checkpoints.restore(settings, state, fingerprint) if settings.resume else checkpoints.new_folder(settings)
    if finished(settings, state):
        no_better = f" (no better {settings.monitor} for --patience {settings.patience})"
        early = no_better if state.epoch < settings.epochs else ""
        say(f"{folder} is finished after {state.epoch} epochs{early}; nothing was changed")
        return
    parallel = DistributedDataParallel(model, find_unused_parameters=True) if world_size() > 1 else model
    run = Run(folder, checkpoint, parallel, criterion, teacher, val_split, amp_dtype)
    first = state.epoch + 1
    with run.signals, checkpoints.opened(settings, state, run, fingerprint):
        while not finished(settings, state):
            loss = train_one_epoch(settings, state, train_loader, run)
            weights = checkpoints.exported_weights(state.ema or model, settings.export_dtype)
            prediction = None if settings.fit_all else validate(settings, state, weights, val_loader, run)
            finish_epoch(settings, state, loss, weights, prediction, run)
            left = state.metrics[-1]["seconds"] * (settings.epochs - state.epoch)
            if state.epoch == first and left > 600:
                say(f"about {cli.rough_time(left)} to epoch {settings.epochs}; Ctrl-C and --resume at any time")
    if dist.is_initialized():
        dist.destroy_process_group()
    if not console.quiet:
        finish(settings, state, train_loader.dataset, run)


def train_one_epoch(settings: Settings, state: TrainState, loader: DataLoader, run: Run) -> float:
    """Train the next epoch from `state.step` on; returns its mean loss, the heads' sum. Raises ValueError, Stopped."""
    model, sampler, device = run.model.train(), loader.batch_sampler, state.model.mean.device
    if settings.box_head and (settings.pretrained or settings.weights) and state.epoch >= settings.t_0 / 4:
        state.model.keep_statistics()
    sampler.epoch, sampler.skip = state.epoch + 1, state.step
    run.epoch_start = time.monotonic() - state.seconds
    recent: list[tuple[int, dict[str, Tensor]]] = []  # images and losses of the steps since the last check
    with progress(sampler.n, f"epoch {sampler.epoch}/{settings.epochs}") as bar:
        bar.advance(state.step * settings.batch_size)
        try:
            for images, targets in run.signals.waiting_for(loader):
                state.step += 1
                torch.manual_seed(step_seed(settings, state, "step"))
                images = images.to(device, non_blocking=True)
                targets = {head: values.to(device, non_blocking=True) for head, values in targets.items()}
                if settings.cutmix:
                    seed = step_seed(settings, state, "cutmix")
                    images, targets = cutmix(images, targets, state.model.classes, settings.cutmix, seed)
                step_losses = dict.fromkeys(run.criterion.losses, 0.0)
                for part in micro_batches(len(images), settings.grad_accum, state.model.min_images):
                    weight = (part.stop - part.start) / len(images)
                    with torch.autocast(device.type, run.amp_dtype or torch.bfloat16, enabled=bool(run.amp_dtype)):
                        logits = model(images[part])
                        teacher_logits = run.teacher(images[part]) if run.teacher else None
                    part_targets = {head: values[part] for head, values in targets.items()}
                    losses = run.criterion(logits, part_targets, teacher_logits)
                    state.scaler.scale(sum(losses.values()) * weight).backward()
                    step_losses = {head: step_losses[head] + loss.detach() * weight for head, loss in losses.items()}
                optimizer_step(settings, state, sampler.steps)
                recent.append((len(images), evaluate.mean_over_processes(step_losses)))
                bar.advance(len(images) * world_size())
                after_step(settings, state, recent, run)
                if sampler.epoch == 1 and state.step == 3 and device.type == "cpu":
                    cli.warn_of_days((time.monotonic() - run.epoch_start) / 3 * sampler.steps * settings.epochs)
        except Stopped:  # the state will be saved; after an error another process may have ended
            add_losses(state, recent)
            raise
        add_losses(state, recent)
    return state.loss_sum / (sampler.part_images * world_size())


def optimizer_step(settings: Settings, state: TrainState, steps: int) -> None:
    """From the gradients to new weights and a new average; `steps`: steps an epoch."""
    step = state.epoch * steps + state.step
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate(settings, state.scheduler.get_last_lr()[0], step / steps)
    if settings.clip_grad:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.get_last_lr()):
        group["lr"] = rate  # without warm-up and lr_scale: most schedulers go on from here
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema:
        update_ema(state.ema, state.model, settings.ema, step)


def micro_batches(n: int, parts: int, smallest: int) -> Iterator[slice]:
    """`n` images in this many parts, or in fewer: none has less than `smallest` where `n` is not less."""
    parts = max(1, min(parts, n // smallest))
    for i in range(parts):
        yield slice(n * i // parts, n * (i + 1) // parts)


def step_seed(settings: Settings, state: TrainState, purpose: str) -> int:
    """What is random in a step depends on its number alone, and differs between processes."""
    process = [rank()] if rank() else []  # the first of several has the seeds of one alone
    return derive_seed(settings.seed, purpose, state.epoch + 1, state.step, *process)


def after_step(settings: Settings, state: TrainState, recent: list[tuple[int, dict[str, Tensor]]], run: Run) -> None:
    """Check the losses, save, or stop, where it is time. Raises ValueError, Stopped."""
    stop = evaluate.in_any_process(run.signals.received)
    save = time.monotonic() - run.saved_at >= settings.save_every
    if save or len(recent) == CHECK_EVERY:
        add_losses(state, recent)
    if stop:
        raise Stopped
    if save:
        checkpoints.save_last(state, run)


def add_losses(state: TrainState, recent: list[tuple[int, dict[str, Tensor]]]) -> None:
    """Add the losses of the last steps to the epoch's sum. Raises ValueError where one is not finite."""
    if not recent:
        return
    values = torch.stack([torch.stack(list(losses.values())) for _, losses in recent]).tolist()  # waits once
    for i, (images, losses) in enumerate(recent):
        for head, value in zip(losses, values[i]):
            if not math.isfinite(value):
                where = f"epoch {state.epoch + 1}, step {state.step - len(recent) + i + 1}"
                raise ValueError(f"the loss of {head} is not finite at {where}; lower --lr, or try --amp off")
        state.loss_sum += sum(values[i]) * images * world_size()
    recent.clear()


def validate(settings: Settings, state: TrainState, weights: Weights, loader: DataLoader, run: Run) -> Prediction:
    """What a model with these weights, as they are saved, predicts. Raises ValueError for damaged photos, Stopped."""
    view, n = run.checkpoint.view, len(loader.batch_sampler.part)
    model = copy.deepcopy(state.model)
    model.load_state_dict(checkpoints.restored_weights(weights))
    with progress(n * (2 if view == "learned" else 1), f"epoch {state.epoch + 1}/{settings.epochs}, validation") as bar:

        def advance(images: int) -> None:
            bar.advance(images)
            if run.signals.received and world_size() == 1:
                raise Stopped

        prediction = evaluate.predict_split(model, loader, view, run.amp_dtype, advance, run.signals.waiting_for)
    if prediction.problems:
        raise ValueError("\n".join(prediction.problems.values()))
    return prediction


def finish_epoch(
    settings: Settings, state: TrainState, loss: float, weights: Weights, prediction: Prediction | None, run: Run
) -> None:
    """Add the epoch to the state, keep it where it is the best, write the run's files."""
    scores = dict.fromkeys(run.checkpoint.scores, math.nan)
    if prediction:
        val_loss = sum(value.item() for value in run.criterion(prediction.logits, prediction.targets).values())
        if not math.isfinite(val_loss):
            raise ValueError("the validation loss is not finite; lower --lr, or try --amp off")
        scores = {"loss": val_loss} | evaluate.score(prediction.logits, prediction.targets)
        if prediction.boxes is not None:
            boxes = loading.relative_boxes(run.val_split.samples, settings.train_view)
            scores |= evaluate.score_boxes(prediction.boxes, boxes)
    lr = learning_rate(settings, state.scheduler.get_last_lr()[0], state.epoch + 1)
    state.scheduler.step()
    state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0

    scores = {key: float(value) for key, value in scores.items()}  # one of your own may be a tensor
    row = {"epoch": state.epoch, "lr": lr, "train_loss": loss}
    row |= {f"val_{key}": value for key, value in scores.items()}
    row["seconds"] = round(time.monotonic() - run.epoch_start, 2)
    row = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}  # last.pt: no NumPy
    state.metrics.append(row)
    run.epoch_start = time.monotonic()

    column, sign = MONITORS[settings.monitor]
    is_best = settings.fit_all or sign * row[column] > state.best_score
    if is_best:
        state.best_epoch, state.best_score = state.epoch, sign * row[column]
        run.checkpoint = replace(run.checkpoint, weights=weights, epoch=state.epoch, scores=scores)
        if not console.quiet:
            if prediction:
                evaluate.write_predictions(run.folder / "val_predictions.csv", run.val_split, prediction)
            checkpoints.save(run.checkpoint.content(), run.folder / "best.pt")
    if not console.quiet:
        rows = [[past.get(column, math.nan) for column in row] for past in state.metrics]
        cli.write_csv(run.folder / "metrics.csv", list(row), rows)
    # The last file of an epoch: whatever is interrupted before it is there is done again, to the same bits.
    checkpoints.save_last(state, run)
    say(cli.epoch_line(row, settings.epochs, is_best))


def finish(settings: Settings, state: TrainState, photos: TrainPhotos, run: Run) -> None:
    """Print the best epoch's scores, draw the pictures."""
    folder, val_split = run.folder, run.val_split
    model, best = checkpoints.load_model(folder / "best.pt")
    if state.epoch < settings.epochs:
        say(f"stopped early: no better {settings.monitor} for {settings.patience} epochs")
    if settings.fit_all:
        say(f"nothing was held out, so there is no score: best.pt is of epoch {best.epoch}")
    else:
        cli.show_scores(f"validation ({best.view}), best epoch {best.epoch} of {state.epoch}", best.scores)
        cli.say_boxes(best.scores)
    if best.view == "learned" and val_split.has("bbox") and not settings.fit_all:
        model.to(state.model.mean.device)
        boxed = evaluate.predict_samples(
            model, val_split.samples, "bbox", best.resize, settings.batch_size, settings.workers, run.amp_dtype
        )
        cli.show_scores("the same model, boxes given (bbox)", evaluate.score(boxed.logits, boxed.targets))
    limit = f" of at most {settings.max_mb:g} MB" if settings.max_mb else ""
    say(f"best.pt: {(folder / 'best.pt').stat().st_size / 1e6:.2f} MB{limit}")
    predictions = "" if settings.fit_all else "val_predictions.csv, "
    say(f"files: {folder}/best.pt, last.pt, metrics.csv, {predictions}config.json")
    if settings.pictures:
        try:
            from report import draw_pictures

            draw_pictures(folder, photos, val_split)
        except Exception as error:  # the run is finished, and all of it is saved
            again = cli.command("report.py", folder)
            note(f"pictures are missing ({type(error).__name__}: {error}); again: {again}")
    say(f"next: {cli.command('predict.py', folder / 'best.pt')}")


# ---------------------------------------------------------------- set up


def set_up_torch(settings: Settings) -> tuple[torch.device, torch.dtype | None]:
    """Join torchrun's processes, choose device and precision, ask for the same bits every time. Raises BadParameter."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it
    processes = int(os.environ.get("WORLD_SIZE", 1))
    console.quiet = processes > 1 and int(os.environ.get("RANK", 0)) > 0
    if settings.batch_size % processes:  # before they meet: one that ends then would be another's lost connection
        raise usage_error("--batch-size", f"{settings.batch_size} is not a multiple of the {processes} processes")
    if processes > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    device = choose_device(settings.device)
    amp_dtype = choose_amp(settings.amp, device)
    torch.set_num_threads(settings.threads or min(torch.get_num_threads(), loading.cpu_cores()))
    set_deterministic(settings.deterministic, device)
    return device, amp_dtype


def new_model(settings: Settings, split: Split) -> FashionModel:
    """The model with its first weights; a resumed run replaces them by last.pt's. Raises BadParameter, OSError."""
    fresh = not (settings.resume and (Path(settings.resume) / "last.pt").exists())
    pretrained = settings.pretrained and not settings.weights and fresh
    options = (settings.image_size, pretrained, settings.drop_path, settings.box_head)
    model = build_model(settings.model, split.classes, *options)
    micro_batch = math.ceil(settings.batch_size / world_size() / settings.grad_accum)
    if micro_batch < model.min_images:
        least = f"{settings.model} has batch norm, which cannot train on one image at a time (--grad-accum)"
        raise usage_error("--batch-size", least)
    if settings.weights and fresh:
        checkpoints.load_weights(model, settings.weights, settings.model)
    return model


def make_loaders(
    settings: Settings, model: FashionModel, train_split: Split, val_split: Split, view: str
) -> tuple[DataLoader, DataLoader]:
    """Loaders of training and of this process's part of validation, their views decoded once."""
    workers, smallest = loading.default_workers(settings.workers), model.min_images
    train_photos = TrainPhotos(train_split.samples, model.image_size, settings)
    n = len(train_photos)
    sampler = loading.EpochSampler(n, settings.batch_size, settings.seed, rank(), world_size(), smallest)
    if not sampler.steps:
        raise usage_error("--data", f"{n} training photos are too few: {smallest * world_size()} are needed")
    val_photos = EvalPhotos(val_split.samples, model.image_size, view, checkpoints.eval_resize(settings))
    part = range(len(val_photos) * rank() // world_size(), len(val_photos) * (rank() + 1) // world_size())
    loading.decode_once({train_photos: train_photos.views, val_photos: {val_photos.view}}, settings.cache, workers)
    train_loader = loading.make_loader(train_photos, sampler, workers)
    return train_loader, loading.make_eval_loader(val_photos, settings.batch_size, workers, part)


def new_state(settings: Settings, model: FashionModel) -> TrainState:
    device, groups = model.mean.device, parameter_groups(model, settings.lr, settings.layer_decay)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
    # for another schedule edit settings.restart_epochs too, which notes and pictures read; one cosine is --t-0 EPOCHS
    scheduler = CosineAnnealingWarmRestarts(optimizer, settings.t_0, settings.t_mult, settings.eta_min)
    scaler = torch.amp.GradScaler(device.type, enabled=choose_amp(settings.amp, device) is torch.float16)
    return TrainState(model, copy.deepcopy(model) if settings.ema else None, optimizer, scheduler, scaler)


def finished(settings: Settings, state: TrainState) -> bool:
    return state.epoch >= settings.epochs or state.epoch - state.best_epoch >= settings.patience


if __name__ == "__main__":
    cli.run_app(app)
