"""Train a classifier of garment attributes: one backbone, a linear head per label.

    python train.py --data demo --no-pretrained --model test_resnet --image-size 64 --augment none --box-head --crop-prob 0.7 \\
        --epochs 8 --t-0 8 --lr 4e-3 --batch-size 32 --threads 1        # the built-in set: README's first command
    python train.py --loss focal --crop-prob 0.7                          # the organisers' Dataset/ folder, the notes' settings
    python train.py --resume runs/NAME                                    # go on after an interruption, or with more --epochs

Writes runs/NAME/: config.json, metrics.csv (a row an epoch), best.pt (to predict with and to send in), last.pt (to go on from),
val_predictions.csv (the best epoch's) and report.py's pictures. The defaults are those of the notes' last entry; they suit a GPU and 11,058 photos.
"""

import copy
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import timm
import torch
import torch.distributed as dist
import torchvision
import typer
from timm.layers import DropPath
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

import losses
from augment import cutmix
from cache import add_cache
from cli import (
    Stopped,
    StopSignals,
    blaming,
    console,
    locked,
    misuse,
    note,
    progress,
    remove_leftovers,
    run_app,
    say,
    say_boxes,
    show_scores,
    whole_file,
    write_csv,
)
from data import BOX, Split, dataset_path, find_dataset, needs_remover, read_preparation, read_splits, relative_boxes
from loading import EpochBatches, Photos, batches, default_workers, derive_seed, make_loader, share_of, training_photos
from model import (
    BOX_SCORES,
    FIXED_LOOK,
    FORMAT,
    MAX_IMAGE_SIZE,
    FashionModel,
    box_of,
    build_model,
    check_backbone,
    checkpoint_bytes,
    choose_amp,
    choose_device,
    exported_weights,
    load_model,
    load_weights,
    look_twice,
    parameter_groups,
    predict_logits,
    read_checkpoint,
    save_checkpoint,
    score,
    score_boxes,
    update_average,
)
from photos import crop_box
from report import draw_pictures, restarts

CHANGEABLE_ON_RESUME = {  # of data and teacher: where the same ones lie
    "resume", "workers", "debug", "data", "teacher", "epochs", "save_every", "cache_dir", "no_cache", "pictures",
}  # fmt: skip
MONITORS = {
    "top1": ("val_top1_mean", 1),
    "acsa": ("val_acsa_mean", 1),
    "loss": ("val_loss", -1),
}  # column of metrics.csv, sign of better
EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
START = {  # the loop's state: epochs finished; of the next one, steps done, sums of losses and of weights, seconds; the best so far; metrics.csv
    "epoch": 0, "step": 0, "totals": None, "seconds": 0.0, "best_epoch": 0, "best_value": (-math.inf, 0.0), "metrics": [],
}  # fmt: skip
STATEFUL = ("model", "average", "optimizer", "schedule", "scaler")  # what last.pt holds beside it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def option(panel: str, help: str, *names: str, **kwargs) -> typer.models.OptionInfo:
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


DATA, MODEL, LOSS, OPTIMISATION, RUN = "Data", "Model", "Loss", "Optimisation", "Run"


@app.command()
def train(
    ctx: typer.Context,
    data: Annotated[
        list[str],
        option(DATA, "Dataset folder, or `demo`. Given several times: trained on all, validated on the last."),
    ] = ["Dataset"],  # noqa: B006
    subtask: Annotated[int, option(DATA, "Which sub-task's CSVs to read.", min=1, max=2)] = 1,
    crop_prob: Annotated[
        float, option(DATA, "Probability that a training photo is cut to --train-view, else whole.", min=0, max=1)
    ] = 1.0,
    train_view: Annotated[
        Literal["bbox", "mask"], option(DATA, "What it is cut to: the CSV's box, or the foreground's (preprocess.py).")
    ] = "bbox",
    val_view: Annotated[
        Literal["bbox", "full", "mask", "learned"] | None,
        option(
            DATA,
            "What validation sees; all but `bbox` can be had of test photos too.",
            show_default="bbox; with --box-head learned",
        ),
    ] = None,
    resize: Annotated[
        Literal["squash", "random-resized-crop"],
        option(DATA, "How a training view becomes square: whole, or a random part of it."),
    ] = "squash",
    augment: Annotated[
        Literal["basic", "randaugment", "none"],
        option(DATA, "Augmentation of training images: the notes', RandAugment, none."),
    ] = "basic",
    cutmix: Annotated[
        list[str] | None,
        option(DATA, "CutMix for this label; repeats. `joint`: one paste for all labels.", show_default="off"),
    ] = None,
    image_size: Annotated[
        int | None,
        option(DATA, "Side of the square image in pixels.", min=16, max=MAX_IMAGE_SIZE, show_default="the backbone's"),
    ] = None,
    fit_all: Annotated[
        bool,
        option(DATA, "Train on the validation rows too; best.pt is the last epoch's.", "--fit-all", show_default="off"),
    ] = False,
    workers: Annotated[
        int | None,
        option(DATA, "Processes that decode photos; 0: none.", min=0, max=256, show_default="one a core, at most 8"),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        option(DATA, "Where decoded photos are kept for later epochs and runs.", show_default="DATASET/.cache"),
    ] = None,
    no_cache: Annotated[
        bool, option(DATA, "Decode the photos again in every epoch.", "--no-cache", show_default="off")
    ] = False,
    model: Annotated[str, option(MODEL, "Any backbone of timm, by name.")] = "eva02_tiny_patch14_224.mim_in22k",
    pretrained: Annotated[bool, option(MODEL, "Start from timm's pretrained weights (downloaded once).")] = True,
    weights: Annotated[
        Path | None,
        option(
            MODEL, "Start from this .safetensors, .pth or .pt file, or a best.pt; no download.", show_default="none"
        ),
    ] = None,
    drop_path: Annotated[
        float,
        option(MODEL, "Drop path of the backbone: the rate of its last block, less towards the first.", min=0, max=1),
    ] = 0.0,
    box_head: Annotated[
        bool,
        option(
            MODEL,
            "Learn from whole photos where the garment is, to look again there.",
            "--box-head",
            show_default="off",
        ),
    ] = False,
    box_weight: Annotated[float, option(MODEL, "Weight of the loss of its box.", min=0)] = 1.0,
    box_jitter: Annotated[
        float, option(MODEL, "Error of the sides of training crops, in shares of the box's.", min=0, max=0.5)
    ] = 0.0,
    export_dtype: Annotated[
        Literal["fp32", "fp16"], option(MODEL, "Precision of the weights in best.pt; fp16 halves its size.")
    ] = "fp32",
    max_mb: Annotated[float, option(MODEL, "Largest best.pt in MB of 1,000,000 bytes; 0: no limit.", min=0)] = 25.0,
    loss: Annotated[
        Literal["ce", "focal", "asymmetric"],
        option(LOSS, "Cross-entropy, focal or asymmetric loss, summed over the labels."),
    ] = "ce",
    label_smoothing: Annotated[float, option(LOSS, "Smoothing of ce and asymmetric.", min=0, max=1)] = 0.1,
    focal_gamma: Annotated[float, option(LOSS, "Focusing of focal.", min=0)] = 2.0,
    asym_gamma_pos: Annotated[float, option(LOSS, "Focusing of asymmetric on the target class.", min=0)] = 1.0,
    asym_gamma_neg: Annotated[float, option(LOSS, "Focusing of asymmetric on the other classes.", min=0)] = 4.0,
    class_weights: Annotated[
        bool,
        option(LOSS, "Weight each class by 1 - its share of the training rows.", "--class-weights", show_default="off"),
    ] = False,
    teacher: Annotated[
        Path | None, option(LOSS, "Learn from this best.pt too, of any backbone and size.", show_default="none")
    ] = None,
    distill_weight: Annotated[
        float, option(LOSS, "Share of the teacher in the loss; the labels have the rest.", min=0, max=1)
    ] = 0.9,
    distill_temperature: Annotated[float, option(LOSS, "Temperature at which teacher and student are compared.")] = 4.0,
    epochs: Annotated[int, option(OPTIMISATION, "Passes over the training rows.", min=1)] = 300,
    batch_size: Annotated[int, option(OPTIMISATION, "Images a step.", min=1)] = 256,
    grad_accum: Annotated[
        int, option(OPTIMISATION, "Pieces that a batch is split into: the same step in less memory.", min=1)
    ] = 1,
    lr: Annotated[float, option(OPTIMISATION, "Learning rate of AdamW at each restart.")] = 5e-6,
    layer_decay: Annotated[
        float,
        option(
            OPTIMISATION, "Each layer's learning rate is this times that of the one above; the heads have --lr.", max=1
        ),
    ] = 1.0,
    warmup_epochs: Annotated[
        float, option(OPTIMISATION, "The learning rate rises to the schedule's over this many epochs.", min=0)
    ] = 0.0,
    weight_decay: Annotated[float, option(OPTIMISATION, "Weight decay of AdamW, on every parameter.", min=0)] = 0.01,
    clip_grad: Annotated[float, option(OPTIMISATION, "Largest norm of a step's gradient; 0: no limit.", min=0)] = 0.0,
    ema: Annotated[
        float,
        option(
            OPTIMISATION, "Validate and keep weights averaged over the steps, with this decay; 0: off.", min=0, max=1
        ),
    ] = 0.0,
    t_0: Annotated[
        int, option(OPTIMISATION, "Epochs to the first restart of the cosine schedule.", "--t-0", min=1)
    ] = 30,
    t_mult: Annotated[
        int, option(OPTIMISATION, "Each stretch between restarts is this many times the one before.", min=1)
    ] = 2,
    eta_min: Annotated[float, option(OPTIMISATION, "Lowest learning rate.", min=0)] = 5e-8,
    patience: Annotated[int, option(OPTIMISATION, "Stop after this many epochs without a better one.", min=1)] = 50,
    monitor: Annotated[
        Literal["top1", "acsa", "loss"], option(OPTIMISATION, "Which validation figure picks the best epoch.")
    ] = "top1",
    amp: Annotated[
        Literal["auto", "fp16", "bf16", "off"],
        option(OPTIMISATION, "Mixed precision; auto: what the device is fastest with."),
    ] = "auto",
    name: Annotated[
        str | None, option(RUN, "Name of the run's folder under runs/.", show_default="date and time")
    ] = None,
    seed: Annotated[int, option(RUN, "Seed of everything random.", min=0)] = 1103,
    save_every: Annotated[
        float, option(RUN, "Seconds between two writings of last.pt within an epoch.", min=0)
    ] = 300.0,
    deterministic: Annotated[bool, option(RUN, "Same bits every time, at some cost on GPUs.")] = True,
    resume: Annotated[
        Path | None, option(RUN, "Go on with this run (runs/NAME), with its settings.", show_default="none")
    ] = None,
    device: Annotated[str, option(RUN, "auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    threads: Annotated[
        int | None,
        option(RUN, "CPU threads of the model; the decoding processes want a core too.", min=1, show_default="torch's"),
    ] = None,
    pictures: Annotated[bool, option(RUN, "Draw the run's pictures as it ends (report.py).")] = True,
    debug: Annotated[bool, option(RUN, "Show the traceback of an error.", "--debug", show_default="off")] = False,
) -> None:
    """Train on a dataset's train split, validate on its val split, keep the best epoch."""
    flags = SimpleNamespace(**{key: value for key, value in locals().items() if key != "ctx"})

    # ------------------------------------------------ set up
    rank, world = start_processes()
    config, saved = resume_settings(ctx, flags) if flags.resume else (None, None)
    run = flags.resume or Path("runs") / from_first(flags.name or datetime.now().strftime("%Y%m%d_%H%M%S"))
    device, amp_dtype = check_flags(flags)
    torch.set_num_threads(flags.threads or torch.get_num_threads())
    set_deterministic(flags.deterministic, device)
    if not config and rank == 0 and run.exists():
        raise misuse("--name", f"{run} exists; choose another --name, or go on with it: --resume {run}")

    # ------------------------------------------------ data
    roots = [find_dataset(data, flags.subtask) for data in flags.data]
    preparation = [read_preparation(root) for root in roots][-1]
    train_split, val_split = read_splits(roots, flags.subtask, flags.fit_all)
    view = choose_views(flags, train_split, val_split)
    check_cutmix(flags.cutmix, train_split.classes)
    say_what_is_idle(ctx, flags, train_split, view, cleaned=any(read_preparation(root) for root in roots))

    # ------------------------------------------------ model
    torch.manual_seed(derive_seed(flags.seed, "weights"))
    net, size = make_model(flags, train_split.classes, fresh=saved is None)
    best = {  # all that predict.py needs; weights and scores follow with each best epoch
        "format": FORMAT, "backbone": flags.model, "image_size": size, "classes": train_split.classes,
        "mean": net.mean.flatten().tolist(), "std": net.std.flatten().tolist(), "weights": exported_weights(net, EXPORT_DTYPES[flags.export_dtype]),
        "data": {"path": dataset_path(flags.data[-1]), "subtask": flags.subtask, "view": view, "preparation": preparation},
        "batch_size": flags.batch_size, "amp": flags.amp, "epoch": 0, "learned": FIXED_LOOK if flags.box_head else None,
        "scores": {f"{kind}_{label}": 0.0 for label in (*train_split.classes, "mean") for kind in ("top1", "acsa")},
    }  # fmt: skip
    best["scores"] |= dict.fromkeys(BOX_SCORES if view == "learned" else (), 0.0)
    megabytes = check_budget(best, flags)
    net.to(device)
    teach = load_teacher(flags, train_split.classes, device) if flags.teacher else None
    criteria = make_criteria(flags, train_split, device)
    order = EpochBatches(len(train_split.samples), flags.batch_size, flags.seed, rank, world)
    unused = try_step(net, criteria, size, amp_dtype, flags, order)

    # ------------------------------------------------ loaders, optimiser, schedule
    workers = default_workers(flags.workers)
    photos = training_photos(train_split.samples, size, flags)
    share = share_of(len(val_split.samples), rank, world)
    val_photos = Photos(val_split.samples[share], size, "full" if view == "learned" else view)
    if not flags.no_cache:
        add_cache([photos, val_photos], roots, flags.cache_dir, workers)
    train_loader = make_loader(photos, flags.batch_size, workers, order)
    val_loader = make_loader(val_photos, flags.batch_size, workers)
    fused = device.type in ("cpu", "cuda")  # one pass over all parameters
    optimizer = torch.optim.AdamW(
        parameter_groups(net, flags.layer_decay), lr=flags.lr, weight_decay=flags.weight_decay, fused=fused
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, flags.t_0, flags.t_mult, flags.eta_min)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    parts = {
        "model": net,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": scaler,
        "forward": net,
        "teach": teach,
    }
    if flags.ema:
        parts["average"] = copy.deepcopy(net)
    shown = parts.get("average", net)  # what is validated and saved
    if world > 1:
        parts["forward"] = DistributedDataParallel(
            net, [device] if device.type == "cuda" else None, find_unused_parameters=unused
        )

    # ------------------------------------------------ resume, or claim the run's folder
    fingerprint = {"train": train_split.fingerprint, "val": val_split.fingerprint}
    if flags.teacher:
        fingerprint["teacher"] = file_hash(flags.teacher)
    state = restore(run, config, saved, fingerprint, parts) if config else dict(START)
    if finished(state, flags):
        say(f"{run} is finished after {state['epoch']} epochs; nothing was changed")
        return
    new_parent = not run.parent.exists()
    if not config and rank == 0:
        run.mkdir(parents=True)
    among = f", {world} processes" if world > 1 else ""
    say(f"{run}: {flags.model}, {size} px, best.pt {megabytes:.2f} MB, {device}{among}, {amp_dtype or torch.float32}")
    held_out = "none held out" if flags.fit_all else f"{len(val_split.samples):,} validation photos ({view})"
    say(f"{len(photos):,} training photos ({flags.train_view} with probability {flags.crop_prob:g}), {held_out}")

    def validate(
        model: FashionModel, advance: Callable = lambda n: None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
        """Logits and targets of the whole validation split; and what best.pt says of it: `scores`, and of the view `learned` how it is made."""

        def predict(crops: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            closer = None if crops is None else Photos(val_split.samples[share], size, crops=crops[share])
            pieces = batches(val_loader if closer is None else make_loader(closer, flags.batch_size, workers))
            return evaluate(
                model,
                pieces if world > 1 else signals.until_asked(pieces),
                amp_dtype,
                advance,
                find_box=view == "learned" and crops is None,
            )

        if view != "learned":
            logits, targets = predict()
            return logits, targets, {"scores": score(logits, targets)}
        truth = relative_boxes(val_split.samples, flags.train_view)
        logits, targets, look = look_twice(predict, truth=truth)
        return logits, targets, {"scores": score(logits, targets) | score_boxes(logits[BOX], truth), "learned": look}

    def save_last() -> None:
        """Write all that it takes to go on from here."""
        state["seconds"], written["at"] = time.monotonic() - start, time.monotonic()
        if rank == 0:
            whole = (
                state
                | {"format": FORMAT, "settings": fixed_settings(flags)}
                | {part: parts[part].state_dict() for part in STATEFUL if part in parts}
            )
            save_checkpoint(whole, run / "last.pt")

    def after_step(images: int) -> None:
        bar.advance(images)
        if agreed(signals.asked, world):
            raise Stopped
        if time.monotonic() - written["at"] >= flags.save_every:
            save_last()

    # ------------------------------------------------ the loop
    with locked(run) if rank == 0 else nullcontext(), StopSignals() as signals:
        try:
            if rank == 0:
                remove_leftovers(run)
                write_config(run, flags, device, amp_dtype, world, fingerprint, config)
            written = {"at": time.monotonic()}
            while not finished(state, flags):
                start = time.monotonic() - state["seconds"]
                epoch = order.epoch = state["epoch"] + 1
                order.done, begun = state["step"], time.monotonic()
                row = {"epoch": epoch, "lr": learning_rate(schedule, flags.warmup_epochs, epoch)}
                with progress(len(photos), f"epoch {epoch}/{flags.epochs}") as bar:
                    bar.advance(min(len(photos), order.done * flags.batch_size))
                    row["train_loss"] = train_one_epoch(
                        parts, batches(train_loader), criteria, state, order, flags, amp_dtype, after_step
                    )
                rate = (len(photos) - order.done * flags.batch_size) / (time.monotonic() - begun)
                if flags.fit_all:  # nothing to measure with: the columns stay, without numbers
                    row["val_loss"], result = math.nan, {"scores": dict.fromkeys(best["scores"], math.nan)}
                else:
                    with progress(
                        len(val_split.samples) * (1 + (view == "learned")), f"epoch {epoch}/{flags.epochs}, validation"
                    ) as bar:
                        logits, targets, result = validate(shown, bar.advance)
                    row["val_loss"] = mean_loss(logits, targets, criteria)
                row |= {f"val_{key}": value for key, value in result["scores"].items()} | {
                    "seconds": round(time.monotonic() - start, 2)
                }
                row = from_first(row)
                schedule.step()
                state |= {"epoch": epoch, "step": 0, "totals": None, "metrics": [*state["metrics"], row]}
                column, sign = MONITORS[flags.monitor]
                value = (
                    sign * row[column],
                    row.get("val_iou", 0.0),
                )  # of epochs that are as good, the one with the better boxes
                if flags.fit_all or value > state["best_value"]:
                    state |= {"best_epoch": epoch, "best_value": value}
                    best |= {
                        "weights": exported_weights(shown, EXPORT_DTYPES[flags.export_dtype]),
                        "epoch": epoch,
                        **result,
                    }
                    kept = shown if flags.export_dtype == "fp32" else as_saved(shown, best["weights"])
                    if kept is not shown and not flags.fit_all:
                        best |= validate(kept)[2] | {"scores_fp32": result["scores"]}
                    if rank == 0:
                        if not flags.fit_all:
                            write_predictions(run / "val_predictions.csv", val_split, logits)
                        save_checkpoint(best, run / "best.pt")
                if rank == 0:
                    write_csv(run / "metrics.csv", list(row), [list(past.values()) for past in state["metrics"]])
                # The last file of an epoch: whatever is interrupted before it is there is done again, to the same bits.
                start = time.monotonic()
                save_last()
                say(epoch_line(row, flags.epochs, rate, state["best_epoch"] == epoch))
        except BaseException as error:
            if isinstance(error, Stopped):
                save_last()
            if rank == 0 and not config and not (run / "last.pt").exists():
                shutil.rmtree(run, ignore_errors=True)  # nothing was saved yet: leave no run that has nothing
                with suppress(OSError):  # another run may have come into it
                    if new_parent:
                        run.parent.rmdir()
            elif isinstance(error, KeyboardInterrupt):
                note(f"stopped; to go on: python train.py --resume {run}")
            raise

    # ------------------------------------------------ finish
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    if state["epoch"] < flags.epochs:
        say(f"stopped early: no better {flags.monitor} for {flags.patience} epochs")
    final = read_checkpoint(run / "best.pt")
    title = f"validation ({view}), best epoch {final['epoch']} of {state['epoch']}"
    if "scores_fp32" in final:
        show_scores(f"{title}, in float32", final["scores_fp32"])
        title += f", as saved in {flags.export_dtype}"
    if flags.fit_all:
        say(
            f"nothing was held out, so there is no score: best.pt is of epoch {final['epoch']}, trained on the training and validation rows together"
        )
    else:
        show_scores(title, final["scores"])
        if look := final["learned"]:
            say_boxes(final["scores"])
            say("learned: " + ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in look.items()))
        if view == "learned" and val_split.has("bbox"):
            boxed = make_loader(Photos(val_split.samples, size, "bbox"), flags.batch_size, workers)
            kept = as_saved(shown, final["weights"])
            show_scores(
                "the same model, boxes given (bbox)", score(*predict_logits(kept, batches(boxed), device, amp_dtype))
            )
    say(
        f"best.pt: {(run / 'best.pt').stat().st_size / 1e6:.2f} MB"
        + (f" of at most {flags.max_mb:g} MB" if flags.max_mb else "")
    )
    say(f"files: {run}/best.pt, last.pt, metrics.csv, {'' if flags.fit_all else 'val_predictions.csv, '}config.json")
    if flags.pictures:
        try:
            draw_pictures(run, photos, val_split)
        except Exception as error:  # the run is finished, and all of it is saved
            note(
                f"the pictures could not be drawn ({type(error).__name__}: {error}); to try again: python report.py {run}"
            )
    say(f"next: python predict.py {run}/best.pt")


# ---------------------------------------------------------------- one epoch


def train_one_epoch(
    parts: dict,
    batches: Iterable,
    criteria: dict,
    state: dict,
    order: EpochBatches,
    flags: SimpleNamespace,
    amp_dtype: torch.dtype | None,
    after_step: Callable,
) -> float:
    """The steps of epoch `state["epoch"] + 1` from `state["step"]` on, which follows each step, as `totals` does.

    Returns the epoch's mean loss over the images (weighted means: over their weight), summed over the heads. Raises ValueError where a
    head's loss is not finite. In several processes, each sees its share of every batch, and all take the same step.
    """
    net, scaler, forward = parts["model"].train(), parts["scaler"], parts["forward"].train()
    device, epoch, steps = net.mean.device, state["epoch"] + 1, math.ceil(order.n / flags.batch_size)
    if "average" in parts:
        parts["average"].train()  # some backbones keep what they computed in eval mode
    if state["totals"] is None:
        state["totals"] = torch.zeros(2, len(criteria), device=device)
    recent: list[Tensor] = []  # losses of the steps since the last check: one wait for the device in 20 steps
    for images, targets in batches:
        step = state["step"] + 1
        # what is random in the model (dropout, drop path) depends on (seed, step) alone
        seed = derive_seed(flags.seed, "step", epoch, step, *([order.rank] if order.rank else []))
        (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)
        whole = (
            targets[BOX].isfinite().all(-1) if BOX in targets else None
        )  # who has a box to find, asked on the CPU: a GPU would have to be waited for
        images = images.to(device, non_blocking=True)
        targets = {label: target.to(device, non_blocking=True) for label, target in targets.items()}
        if flags.cutmix:
            images, targets = mix(images, targets, net.classes, flags, order, step)
        divisors = torch.stack(
            [losses.total_weight(targets[label], weights) for label, (_, weights) in criteria.items()]
        ).to(device)
        add_over_processes(divisors)
        shares = 1 / divisors.masked_fill(divisors == 0, 1)  # a batch may show no garment whole
        empty = len(images) == 0  # more processes than images: this one takes part in the sum with nothing
        if empty:
            images = images.new_zeros(2, *images.shape[1:])
            targets = {label: target.new_zeros(2, *target.shape[1:]) for label, target in targets.items()}
        sums = torch.zeros(len(criteria), device=device)
        n = min(flags.batch_size, order.n - (step - 1) * flags.batch_size)  # images of all processes
        pieces = torch.arange(len(images)).chunk(flags.grad_accum)
        for i, piece in enumerate(pieces, start=1):
            piece = slice(piece[0].item(), piece[-1].item() + 1)
            piece_targets = {label: target[piece] for label, target in targets.items()}
            wanted = {}
            if whole is not None:
                wanted["find_box"] = whole[piece].nonzero()[:, 0].to(device, non_blocking=True)
                piece_targets[BOX] = piece_targets[BOX][wanted["find_box"]]
            with forward.no_sync() if order.world > 1 and i < len(pieces) else nullcontext():
                with torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                    logits = forward(images[piece], **wanted)
                    taught = parts["teach"](images[piece]) if parts["teach"] else {}
                piece_sums = sum_losses(logits, piece_targets, criteria, taught, divisors / n, flags)
                if empty:
                    piece_sums = piece_sums * 0
                # DistributedDataParallel takes the mean over the processes, of sums that are shares of the global mean
                scaler.scale((piece_sums * shares).sum() * order.world).backward()
            sums += piece_sums.detach()
        take_step(parts, flags, (epoch - 1) * steps + step, steps)
        add_over_processes(sums)
        state["totals"] += torch.stack([sums, divisors])
        state["step"] = step
        recent.append(sums * shares)
        if len(recent) == 20:
            check_finite(recent, criteria, epoch, step)
        after_step(n)
    check_finite(recent, criteria, epoch, state["step"])
    sums, divisors = state["totals"]
    return (sums / divisors.masked_fill(divisors == 0, 1)).sum().item()


def take_step(parts: dict, flags: SimpleNamespace, step: int, steps: int) -> None:
    """From the gradients to new weights and a new average: step `step` (1, 2, ...) of the run, which has `steps` an epoch."""
    net, optimizer, scaler = parts["model"], parts["optimizer"], parts["scaler"]
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate(parts["schedule"], flags.warmup_epochs, step / steps)
    if flags.clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), flags.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if "average" in parts:
        update_average(parts["average"], net, flags.ema, step)


def learning_rate(schedule: torch.optim.lr_scheduler.LRScheduler, warmup_epochs: float, epochs: float) -> float:
    """The heads' learning rate once `epochs` are done (a part of one counts): the schedule's, times a share that rises to 1 during the warm-up."""
    rate = schedule.get_last_lr()[0]
    return rate if epochs >= warmup_epochs else rate * epochs / warmup_epochs


def sum_losses(
    logits: dict[str, Tensor],
    targets: dict[str, Tensor],
    criteria: dict,
    taught: dict[str, Tensor],
    per_image: Tensor,
    flags: SimpleNamespace,
) -> Tensor:
    """Each head's loss, summed over the images: (heads,). `taught`: the teacher's logits; `per_image`: (heads,), what the sums are divided by, an image."""
    sums = []
    for (label, (criterion, _)), weight in zip(criteria.items(), per_image):
        hard = criterion(logits[label], targets[label], reduction="sum")
        if label in taught:  # a mean over the images, whatever the classes weigh
            soft = (
                losses.distillation(logits[label], taught[label], flags.distill_temperature, reduction="sum") * weight
            )
            hard = (1 - flags.distill_weight) * hard + flags.distill_weight * soft
        sums.append(hard)
    return torch.stack(sums)


def check_finite(recent: list[Tensor], criteria: dict, epoch: int, step: int) -> None:
    """Empty `recent`, the heads' losses of the steps up to `step`. Raises ValueError with the first step and head whose loss is not finite."""
    if recent:
        bad = (~torch.stack(recent).isfinite()).nonzero()
        if len(bad):
            at, head = bad[0].tolist()
            label, at = list(criteria)[head], step - len(recent) + 1 + at
            raise ValueError(
                f"the loss of {label} is not finite at epoch {epoch}, step {at}; lower --lr, or try --amp off"
            )
        recent.clear()


def make_criteria(
    flags: SimpleNamespace, split: Split, device: torch.device
) -> dict[str, tuple[Callable, Tensor | None]]:
    """{label, or BOX: (its loss, its class weights)}; the loss is a function of logits, targets and reduction."""
    chosen = {
        "ce": partial(losses.cross_entropy, smoothing=flags.label_smoothing),
        "focal": partial(losses.focal, gamma=flags.focal_gamma),
        "asymmetric": partial(
            losses.asymmetric,
            gamma_pos=flags.asym_gamma_pos,
            gamma_neg=flags.asym_gamma_neg,
            smoothing=flags.label_smoothing,
        ),
    }[flags.loss]
    criteria = {}
    for label, n in split.classes.items():
        counts = Counter(sample.labels[label] for sample in split.samples)
        if flags.class_weights and len(counts) == 1:
            raise misuse("--class-weights", f"every training row has the same {label}, whose weight would be 0")
        weights = (
            torch.tensor([1 - counts[c] / len(split.samples) for c in range(n)], device=device)
            if flags.class_weights
            else None
        )
        criteria[label] = (partial(chosen, class_weights=weights), weights)
    if flags.box_head:
        criteria[BOX] = (
            lambda logits, boxes, reduction: flags.box_weight * losses.box(box_of(logits)[0], boxes, reduction),
            None,
        )
    return criteria


def mean_loss(logits: dict[str, Tensor], targets: dict[str, Tensor], criteria: dict) -> float:
    """The loss of a whole split, from its logits (N, classes) and targets (N,) on the CPU, summed over the heads. Raises ValueError where it is not finite."""
    total = 0.0
    for label in targets:
        criterion, weights = criteria[label]
        weights = None if weights is None else weights.cpu()
        total += criterion(logits[label], targets[label], class_weights=weights).item()
        if not math.isfinite(total):
            raise ValueError(f"the validation loss of {label} is not finite; lower --lr, or try --amp off")
    return total


# ---------------------------------------------------------------- checks before the first step


def check_flags(flags: SimpleNamespace) -> tuple[torch.device, torch.dtype | None]:
    """What Typer's bounds do not say: raises BadParameter. Returns the device and autocast's dtype."""
    for key, value in vars(flags).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise misuse("--" + key.replace("_", "-"), f"{value} is not a finite number")
    for key in ("lr", "layer_decay", "distill_temperature"):
        if getattr(flags, key) <= 0:
            raise misuse("--" + key.replace("_", "-"), f"{getattr(flags, key)} is not above 0")
    if flags.eta_min > flags.lr:
        raise misuse("--eta-min", f"{flags.eta_min} is above --lr {flags.lr}")
    if flags.name is not None and (
        flags.name in ("", ".", "..") or "/" in flags.name or "\\" in flags.name or len(flags.name) > 100
    ):
        raise misuse("--name", f"{flags.name!r} is no name for a folder under runs/")
    if flags.box_head and (flags.cutmix or flags.resize != "squash"):
        other = "--cutmix" if flags.cutmix else f"--resize {flags.resize}"
        raise misuse(
            "--box-head", f"it needs the garment where it was in the photo; it cannot be had together with {other}"
        )
    if flags.grad_accum > flags.batch_size:
        raise misuse("--grad-accum", f"{flags.grad_accum} pieces of a batch of {flags.batch_size}")
    with blaming("--model"):
        check_backbone(flags.model)
    with blaming("--device"):
        device = choose_device(flags.device)
    with blaming("--amp"):
        return device, choose_amp(flags.amp, device)


def choose_views(flags: SimpleNamespace, train_split: Split, val_split: Split) -> str:
    """What validation sees: --val-view, or `full` where it is `bbox` and there are none. Raises BadParameter for what cannot be seen or learned."""
    flags.val_view = flags.val_view or ("learned" if flags.box_head else "bbox")
    if flags.val_view == "learned" and not flags.box_head:
        raise misuse("--val-view", "`learned` is what a box head finds; add --box-head")
    for flag, view, split in (
        ("--train-view", flags.train_view, train_split),
        ("--val-view", flags.val_view, val_split),
    ):
        if view == "mask" and not split.has("mask"):
            raise misuse(flag, f"{split.csv} has no Mask_ columns; python preprocess.py writes a dataset that has them")
    if not flags.box_head:
        return flags.val_view if val_split.has(flags.val_view) else "full"
    if flags.crop_prob == 1 or not train_split.has(flags.train_view):
        lacks = (
            "no whole photo (--crop-prob 1)"
            if flags.crop_prob == 1
            else f"no boxes ({train_split.csv} has none for --train-view {flags.train_view})"
        )
        raise misuse(
            "--box-head",
            f"it learns where the garment is in whole photos, and training has {lacks}; --crop-prob 0.7 shows three in ten whole",
        )
    return flags.val_view if flags.val_view == "learned" or val_split.has(flags.val_view) else "full"


def check_cutmix(labels: list[str] | None, classes: dict[str, int]) -> None:
    """Raises BadParameter where CutMix is asked for a label that is not there, twice, or both jointly and for one label."""
    for i, label in enumerate(labels or []):
        if label not in (*classes, "joint"):
            raise misuse("--cutmix", f"there is no label {label!r}; choose of {', '.join(classes)}, or joint")
        if label in labels[:i] or ("joint" in labels and len(labels) > 1):
            raise misuse(
                "--cutmix",
                f"{label} is given twice" if label in labels[:i] else "joint mixes every label already; give it alone",
            )


def say_what_is_idle(ctx: typer.Context, flags: SimpleNamespace, split: Split, view: str, cleaned: bool) -> None:
    """A line for each setting that cannot act in this run."""
    if view != flags.val_view:
        note(f"validation has no boxes: it sees whole photos (--val-view {flags.val_view} cannot act)")
    unboxed = sum(flags.train_view not in sample.boxes for sample in split.samples)
    if flags.crop_prob > 0 and unboxed == len(split.samples):
        note(f"training has no boxes: it sees whole photos (--crop-prob {flags.crop_prob:g} cannot act)")
    elif flags.crop_prob > 0 and unboxed:
        note(
            f"{unboxed:,} of {len(split.samples):,} training photos have no {flags.train_view} box: they are shown whole"
        )
    if flags.t_0 > flags.epochs:
        note(
            f"--t-0 {flags.t_0} is longer than the run of {flags.epochs} epochs: the learning rate does not come down to --eta-min"
        )
    if flags.warmup_epochs > flags.epochs:
        note(
            f"--warmup-epochs {flags.warmup_epochs:g} is longer than the run of {flags.epochs} epochs: the learning rate does not come up to --lr"
        )
    if flags.fit_all:
        note(
            f"--fit-all: trains for all of the {flags.epochs} epochs, and best.pt is the last one's; --patience and --monitor do not act"
        )
        end = next(epoch - 1 for epoch in restarts(vars(flags)) if epoch > flags.epochs)
        if end != flags.epochs:
            note(
                f"--fit-all keeps the last epoch, and there the learning rate is not at its lowest, as it is after {end} epochs, or with --t-0 {flags.epochs}"
            )
    elif flags.patience >= flags.epochs:
        note(f"--patience {flags.patience} cannot act in {flags.epochs} epochs")
    with_loss = f"with --loss {flags.loss}"
    acts = {  # a flag that was given: whether it can, and beside what it cannot
        "label_smoothing": (flags.loss in ("ce", "asymmetric"), with_loss),
        "focal_gamma": (flags.loss == "focal", with_loss),
        "asym_gamma_pos": (flags.loss == "asymmetric", with_loss),
        "asym_gamma_neg": (flags.loss == "asymmetric", with_loss),
        "distill_weight": (flags.teacher, "without --teacher"),
        "distill_temperature": (flags.teacher, "without --teacher"),
        "box_weight": (flags.box_head, "without --box-head"),
        "pretrained": (not flags.pretrained or not flags.weights, "beside --weights"),
    }
    for key, (can, beside) in acts.items():
        if given(ctx, key) and not can:
            note(f"--{key.replace('_', '-')} cannot act {beside}")
    if not flags.pretrained and not flags.weights and flags.lr < 1e-4:
        note(
            f"--lr {flags.lr:g} is a rate for pretrained weights: a model from scratch hardly learns with it; 1e-3 to 4e-3 are usual"
        )
    elif flags.box_head and flags.lr < 2e-5:
        note(f"--lr {flags.lr:g} hardly moves the new box head; 5e-5 does")
    if flags.subtask == 2 and (flags.pretrained or flags.weights or cleaned):
        note(
            "the rules of sub-task 2 admit no pretrained models, rembg's among them: an entry wants --no-pretrained, on raw photos"
        )


def given(ctx: typer.Context, key: str) -> bool:
    return ctx.get_parameter_source(key).name == "COMMANDLINE"


def make_model(flags: SimpleNamespace, classes: dict[str, int], fresh: bool) -> tuple[FashionModel, int]:
    """The model and its image size; if `fresh` with its first weights, else they will be last.pt's. Says which tensors of --weights did not match."""
    try:
        net, size = build_model(
            flags.model,
            classes,
            flags.image_size,
            fresh and flags.pretrained and not flags.weights,
            flags.drop_path,
            flags.box_head,
        )
    except ValueError as error:
        raise misuse(
            "--box-head"
            if "--box-head" in str(error)
            else "--image-size"
            if flags.image_size and " px" in str(error)
            else "--model",
            error,
        ) from None
    if flags.drop_path and not any(isinstance(module, DropPath) for module in net.modules()):
        raise misuse("--drop-path", f"{flags.model} has no drop path")
    for line in load_weights(net, flags.weights, flags.model) if fresh and flags.weights else ():
        note(line)
    return net, size


def load_teacher(
    flags: SimpleNamespace, classes: dict[str, int], device: torch.device
) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function from the student's own pixels to the teacher's logits, without gradient. Raises BadParameter where its labels are not the student's."""
    if flags.resume and flags.teacher.resolve().parent == flags.resume.resolve():
        raise misuse("--teacher", f"{flags.teacher} is of the run that it would teach")
    teacher, saved = load_model(flags.teacher)
    there, size = saved["classes"], saved["image_size"]
    if differ := [label for label in {**classes, **there} if classes.get(label) != there.get(label)]:
        each = ", ".join(
            f"{label} has {there.get(label, 'no')} classes there and {classes.get(label, 'none')} here"
            for label in differ
        )
        raise misuse("--teacher", f"{flags.teacher} was trained on other labels: {each}")
    teacher.box_head = None  # its labels alone are learned from
    teacher.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def teach(images: Tensor) -> dict[str, Tensor]:
        if images.shape[-1] != size:
            images = resize(images, [size, size], InterpolationMode.BICUBIC, antialias=True)
        outputs = teacher(images)
        return {label: outputs[label] for label in classes}

    return teach


def evaluate(
    net: FashionModel,
    batches: Iterable,
    amp_dtype: torch.dtype | None,
    advance: Callable = lambda n: None,
    find_box: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`predict_logits` of the whole split in its order; in several processes each takes its share, all get the whole."""
    if not dist.is_initialized():
        return predict_logits(net, batches, net.mean.device, amp_dtype, advance, find_box)
    for (
        buffer
    ) in net.buffers():  # batch norm's, which DistributedDataParallel takes from the first process at the next step
        dist.broadcast(buffer, 0)
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, predict_logits(net, batches, net.mean.device, amp_dtype, advance, find_box))
    return tuple(
        {label: torch.cat([share[i][label] for share in shares if share[i]]) for label in shares[0][i]} for i in (0, 1)
    )


def as_saved(net: FashionModel, weights: dict[str, Tensor]) -> FashionModel:
    """A copy of the model with the weights that are saved, which are rounded."""
    saved = copy.deepcopy(net)
    saved.load_state_dict(weights)
    return saved


def check_budget(best: dict, flags: SimpleNamespace) -> float:
    """The size of best.pt in MB (1,000,000 bytes), from the bytes that would be saved. Raises BadParameter over --max-mb (0: no limit).

    Says where it is over only together with the remover's weights, which prediction needs for test photos.
    """
    megabytes, preparation = checkpoint_bytes(best) / 1e6, best["data"]["preparation"]
    half = "--export-dtype fp16 halves best.pt" if flags.export_dtype == "fp32" else "choose a smaller backbone"
    if 0 < flags.max_mb < megabytes:
        advice = f"{half}, or --max-mb 0 where the model is not sent in"
        raise misuse("--model", f"best.pt would take {megabytes:.2f} MB, over --max-mb {flags.max_mb:g}; {advice}")
    if flags.max_mb and preparation and needs_remover(preparation, best["data"]["view"]):
        remover = preparation["weights_bytes"] / 1e6
        if megabytes + remover > flags.max_mb:
            advice = (
                half
                if remover < flags.max_mb
                else "clean with preprocess.py --rembg-model u2netp (4.6 MB), and " + half
            )
            both = f"best.pt ({megabytes:.2f} MB) and {preparation['rembg_model']} ({remover:.2f} MB), which prediction needs to treat raw photos alike"
            note(f"{both}, are over --max-mb {flags.max_mb:g} together: {advice}")
    return megabytes


# ---------------------------------------------------------------- the same bits, in one process or several


def set_deterministic(on: bool, device: torch.device) -> None:
    """Ask torch for deterministic algorithms, which for attention on CUDA means the plain one."""
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not on
    if device.type == "cuda":
        for enable in (
            torch.backends.cuda.enable_flash_sdp,
            torch.backends.cuda.enable_mem_efficient_sdp,
            torch.backends.cuda.enable_cudnn_sdp,
        ):
            enable(not on)


def fewest_images(flags: SimpleNamespace, order: EpochBatches) -> int:
    """Of the pieces of batches that a process sees at a time, the smallest."""
    whole = min(order.n, flags.batch_size)
    shares = (
        share_of(length, rank, order.world)
        for length in (whole, order.n % whole or whole)
        for rank in range(order.world)
    )
    return min(
        len(piece)
        for share in shares
        for piece in torch.arange(share.stop - share.start).chunk(flags.grad_accum)
        if len(piece)
    )


def try_step(
    net: FashionModel,
    criteria: dict,
    size: int,
    amp_dtype: torch.dtype | None,
    flags: SimpleNamespace,
    order: EpochBatches,
) -> bool:
    """One step on blank images, as few as there may be, for its errors: says what cannot be deterministic. Returns whether a parameter got no gradient.

    Raises BadParameter where that is one image, on which batch norm over pooled features cannot train.
    """
    device, n = net.mean.device, min(2, fewest_images(flags, order))
    images, zeros = (
        torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device),
        torch.zeros(n, dtype=torch.int64, device=device),
    )
    targets = dict.fromkeys(criteria, zeros) | {BOX: torch.tensor([[0.0, 0.0, 1.0, 1.0]] * n, device=device)}
    for warn_only in (False, True):
        trial = copy.deepcopy(net).train()
        try:
            with torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                logits = trial(images)
            sum(
                criterion(logits[label], targets[label], reduction="sum") for label, (criterion, _) in criteria.items()
            ).backward()
            break
        except ValueError:
            if n > 1:
                raise
            advice = f"a step would see one image alone (of {order.n}), on which {flags.model} cannot train; change it by one"
            raise misuse("--batch-size", advice + (" or lower --grad-accum" if flags.grad_accum > 1 else "")) from None
        except RuntimeError as error:
            if warn_only or "deterministic" not in str(error):
                raise
            note(
                f"not everything here can be deterministic ({str(error).split(' does not')[0]}): two runs may differ in their last digits"
            )
            torch.use_deterministic_algorithms(True, warn_only=True)
    return any(parameter.grad is None for parameter in trial.parameters())


def start_processes() -> tuple[int, int]:
    """Join the other processes of torchrun; returns this one's rank and their number, (0, 1) alone. All but the first are silent."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read when CUDA starts; cuBLAS is deterministic with it
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    console.quiet = dist.get_rank() > 0
    return dist.get_rank(), dist.get_world_size()


def from_first(value: object) -> object:
    """The first process's value, in all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def add_over_processes(values: Tensor) -> None:
    """Replace the values by their sums over the processes."""
    if dist.is_initialized():
        dist.all_reduce(values)


def agreed(asked: bool, world: int) -> bool:
    """Whether any process asks."""
    if world == 1:
        return asked
    flag = torch.tensor(int(asked))
    dist.all_reduce(flag)
    return flag.item() > 0


def mix(
    images: Tensor,
    targets: dict[str, Tensor],
    classes: dict[str, int],
    flags: SimpleNamespace,
    order: EpochBatches,
    step: int,
) -> tuple[Tensor, dict]:
    """CutMix over the whole batch; of several processes, each gets the others' images for it and keeps its own share."""
    seed = derive_seed(flags.seed, "cutmix", order.epoch, step)
    if order.world == 1:
        return cutmix(images, targets, classes, flags.cutmix, seed)
    n = min(flags.batch_size, order.n - (step - 1) * flags.batch_size)
    shares = [share_of(n, rank, order.world) for rank in range(order.world)]

    def whole(own: Tensor) -> Tensor:
        parts = [own.new_zeros(shares[0].stop, *own.shape[1:]) for _ in shares]  # the first share is the longest
        dist.all_gather(parts, torch.cat([own, own.new_zeros(len(parts[0]) - len(own), *own.shape[1:])]))
        return torch.cat([part[: share.stop - share.start] for part, share in zip(parts, shares)])

    images, targets = cutmix(
        whole(images), {label: whole(target) for label, target in targets.items()}, classes, flags.cutmix, seed
    )
    return images[shares[order.rank]], {label: target[shares[order.rank]] for label, target in targets.items()}


# ---------------------------------------------------------------- the run's folder


def resume_settings(ctx: typer.Context, flags: SimpleNamespace) -> tuple[dict, dict | None]:
    """Fill `flags` with the settings of the run to resume; returns its config and its last.pt (None before the first was written).

    Raises BadParameter for a setting that was given and differs, ValueError where the files are damaged or do not belong together.
    """
    path = flags.resume / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = {key: config["settings"][key] for key in vars(flags)}
        if not all(isinstance(settings[key], int) and settings[key] > 0 for key in ("epochs", "t_0", "t_mult")):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise misuse(
            "--resume", f"{flags.resume} is no run (it has no config.json); give the folder, runs/NAME"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged or of another version of this program; the run cannot go on") from None
    saved = read_checkpoint(flags.resume / "last.pt") if (flags.resume / "last.pt").exists() else None
    if saved and saved.get("settings") != {
        key: value for key, value in settings.items() if key not in CHANGEABLE_ON_RESUME
    }:
        raise ValueError(
            f"{path} was changed since {flags.resume / 'last.pt'} was written; put the old settings back, or start a new run"
        )
    for key, value in settings.items():
        if not given(ctx, key):
            setattr(flags, key, Path(value) if key in ("weights", "teacher", "cache_dir") and value else value)
        elif key not in CHANGEABLE_ON_RESUME and str(getattr(flags, key)) != str(value):
            may = ", ".join("--" + key.replace("_", "-") for key in sorted(CHANGEABLE_ON_RESUME - {"resume"}))
            raise misuse("--" + key.replace("_", "-"), f"the run was started with {value}; only {may} may change")
    if flags.epochs < settings["epochs"]:
        raise misuse("--epochs", f"the run was started with {settings['epochs']}; fewer cannot be asked for")
    anew = next(epoch for epoch in restarts(vars(flags)) if epoch > settings["epochs"])
    if anew <= flags.epochs:
        end = next(epoch - 1 for epoch in restarts(vars(flags)) if epoch > flags.epochs)
        note(
            f"--epochs {flags.epochs}: the learning rate begins anew in epoch {anew} (--t-0, --t-mult); it is at its lowest after {end} epochs"
        )
    return config, saved


def restore(run: Path, config: dict, saved: dict | None, fingerprint: dict[str, str], parts: dict) -> dict:
    """Load model, optimiser, schedule and scaler from last.pt; returns the loop's state. Raises ValueError where data or files do not fit."""
    if config.get("data") != fingerprint:
        what, of = ("the data or the teacher", ", or its file") if "teacher" in fingerprint else ("the data", "")
        raise ValueError(
            f"{what} are not those that {run} was started with (rows, labels or image files{of} changed); start a new run"
        )
    if saved is None:
        note(f"{run} was stopped before its first state was saved: it starts again")
        return dict(START)
    try:
        for part in parts.keys() & STATEFUL:
            parts[part].load_state_dict(saved[part])
        state = {key: saved[key] for key in START}
        if state["totals"] is not None:
            state["totals"] = state["totals"].to(parts["model"].mean.device)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{run / 'last.pt'} does not fit the run's settings ({str(error).splitlines()[0]})") from None
    if state["best_epoch"] and not (run / "best.pt").is_file():
        raise ValueError(f"{run}/best.pt is gone; without it the run cannot go on")
    return state


def finished(state: dict, flags: SimpleNamespace) -> bool:
    return state["epoch"] >= flags.epochs or state["epoch"] - state["best_epoch"] >= flags.patience


def saved_settings(flags: SimpleNamespace) -> dict:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(flags).items()} | {
        "resume": None
    }


def fixed_settings(flags: SimpleNamespace) -> dict:
    """The settings that a resumed run must share with the interrupted one."""
    return {key: value for key, value in saved_settings(flags).items() if key not in CHANGEABLE_ON_RESUME}


def write_config(
    run: Path,
    flags: SimpleNamespace,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    world: int,
    fingerprint: dict[str, str],
    before: dict | None,
) -> None:
    """config.json: every setting, and what else decides a run's numbers. Says what of it is not as `before`, when the run was started."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = {
        "device": str(device),
        "chip": chip,
        "threads": torch.get_num_threads(),
        "processes": world,
        "precision": str(amp_dtype or torch.float32),
    }
    config = {
        "settings": saved_settings(flags),
        "versions": versions,
        **machine,
        "commit": git_commit(),
        "data": fingerprint,
    }
    if before and (other := [key for key in ("versions", *machine) if before.get(key) != config[key]]):
        note(f"the run was started with other {', '.join(other)}: its last digits may differ from an undisturbed run's")
    with whole_file(run / "config.json") as f:
        f.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def file_hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def git_commit() -> str | None:
    """The commit of these scripts, with "+changes" where files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
        return commit + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_predictions(path: Path, split: Split, logits: dict[str, Tensor]) -> None:
    """val_predictions.csv: image_name; for each label its truth, prediction and probabilities; where the model found the garment, that box in pixels."""
    header, columns = ["image_name"], [[sample.name for sample in split.samples]]
    for label in split.classes:
        values = logits[label]
        header += [label, f"{label}_predicted", *(f"{label}_p{c}" for c in range(values.shape[1]))]
        columns += [
            [sample.labels[label] for sample in split.samples],
            values.argmax(-1).tolist(),
            *values.softmax(-1).T.tolist(),
        ]
    if BOX in logits:
        header += [f"Learned_{side}" for side in ("xmin", "ymin", "xmax", "ymax")]
        columns += zip(*(crop_box(box, sample.size) for box, sample in zip(logits[BOX].tolist(), split.samples)))
    write_csv(path, header, zip(*columns))


def epoch_line(row: dict, epochs: int, images_per_second: float, best: bool) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"lr {row['lr']:.1e}", f"loss {row['train_loss']:.3f}"]
    if not math.isnan(row["val_loss"]):
        labels = [
            key.removeprefix("val_top1_") for key in row if key.startswith("val_top1_") and key != "val_top1_mean"
        ]
        each = ", ".join(f"{label} {row[f'val_top1_{label}']:.3f}" for label in labels)
        parts += [
            f"val_loss {row['val_loss']:.3f}",
            f"top1 {row['val_top1_mean']:.4f} ({each})",
            f"acsa {row['val_acsa_mean']:.4f}",
        ]
    return "  ".join(
        [
            *parts,
            f"{images_per_second:.0f} images/s",
            f"{row['seconds']:.0f} s",
            *(["best"] if best and len(parts) > 3 else []),
        ]
    )


if __name__ == "__main__":
    run_app(app)
