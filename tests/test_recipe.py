"""The recipe's flags, each by its effect: rates, average, clipping, drop path, teacher, training on everything."""

import csv
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torchvision.transforms import v2

import losses
import train as train_script
from loading import Photos
from model import FashionModel, build_model, parameter_groups, read_checkpoint, update_average

PLAIN = [*TINY, "--augment", "none", "--amp", "off", "--patience", 99, "--threads", 1]  # 40 photos, so 3 steps an epoch
STILL = ["--epochs", 1, "--lr", 1e-12, "--eta-min", 0]  # nothing is learned: every step sees the first weights
CLASSES = {"Daily": 6, "Gender": 5, "Embellishment": 3}


def rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(f)]


def loss_of(name):
    return float(rows(f"runs/{name}/metrics.csv")[0]["train_loss"])


@pytest.fixture
def go(run, drawn):
    def call(name, *flags, code=0):
        done = run("train", "--data", drawn, *PLAIN, "--name", name, *flags)
        assert done.code == code, done.err
        return done

    return call


@pytest.fixture
def steps(monkeypatch):
    """What AdamW was given at each step: the groups' (rate, lr_scale, weight decay), and the norm of the whole gradient."""
    plain, seen = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        groups = [(group["lr"], group["lr_scale"], group["weight_decay"]) for group in self.param_groups]
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append((groups, torch.cat(gradients).norm().item()))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


@pytest.fixture
def forwards(monkeypatch):
    """Every forward pass: (the model, whether it trains, whether gradients are on, the images)."""
    plain, seen = FashionModel.forward, []

    def forward(self, images):
        seen.append((self, self.training, torch.is_grad_enabled(), images))
        return plain(self, images)

    monkeypatch.setattr(FashionModel, "forward", forward)
    return seen


@pytest.fixture(scope="module")
def teacher(drawn, tmp_path_factory):
    """A best.pt of another backbone and size than TINY's."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.chdir(tmp_path_factory.mktemp("teacher"))
        words = ["--data", drawn, *PLAIN, "--model", "test_resnet", "--image-size", 48, "--epochs", 1, "--name", "t"]
        patch.setattr("sys.argv", ["train.py", *map(str, words)])
        patch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
        train_script.run_app(train_script.app)
    return tmp_path_factory.getbasetemp() / "teacher0" / "runs" / "t" / "best.pt"


# ---------------------------------------------------------------- rates


def test_every_group_has_its_rate_at_every_step(go, steps):
    lr, low, t_0 = 1e-3, 1e-4, 3
    go(
        "a",
        "--epochs",
        5,
        "--lr",
        lr,
        "--eta-min",
        low,
        "--t-0",
        t_0,
        "--t-mult",
        1,
        "--layer-decay",
        0.5,
        "--warmup-epochs",
        1.5,
    )
    assert len(steps) == 15
    for step, (groups, _) in enumerate(steps, start=1):
        cosine = low + (lr - low) * (1 + math.cos(math.pi * ((step - 1) // 3 % t_0) / t_0)) / 2
        for rate, scale, _ in groups:
            assert rate == pytest.approx(scale * cosine * min(1, step / 3 / 1.5), rel=1e-9)
    assert {scale for _, scale, _ in steps[0][0]} == {0.5**depth for depth in range(7)}
    assert {decay for groups, _ in steps for _, _, decay in groups} == {0.01}
    shown = [float(row["lr"]) for row in rows("runs/a/metrics.csv")]
    assert shown == [pytest.approx(groups[0][0]) for groups, _ in steps[2::3]]  # the heads', as an epoch ends
    assert shown[3] == lr  # restarted


def test_layers_decay_from_the_heads_down_and_none_is_left_out():
    net, _ = build_model("test_vit", CLASSES, 32)
    scale = {id(p): group["lr_scale"] for group in parameter_groups(net, 0.5) for p in group["params"]}
    of = {name: scale[id(p)] for name, p in net.named_parameters()}
    assert len(scale) == len(of) == sum(len(group["params"]) for group in parameter_groups(net, 0.5))
    assert of["heads.0.weight"] == of["heads.2.bias"] == 1
    assert (
        of["backbone.patch_embed.proj.weight"]
        < of["backbone.blocks.0.attn.qkv.weight"]
        < of["backbone.blocks.5.attn.qkv.weight"]
        <= 1
    )
    (group,) = parameter_groups(net)
    assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()] and group["lr_scale"] == 1


# ---------------------------------------------------------------- the average


def test_the_average_is_the_formulas_and_is_what_is_scored_and_saved(go, run, monkeypatch):
    first, after = [], []

    def spied(average, net, decay, step):
        first.extend([] if first else [{key: value.double() for key, value in average.state_dict().items()}])
        after.append({key: value.double() for key, value in net.state_dict().items()})
        assert decay == 0.6 and step == len(after)
        update_average(average, net, decay, step)

    monkeypatch.setattr(train_script, "update_average", spied)
    monkeypatch.setattr(train_script, "MONITORS", {"top1": ("epoch", 1)})  # every epoch is the best
    go("a", "--model", "test_resnet", "--epochs", 3, "--ema", 0.6)
    assert len(after) == 9
    expected = first[0]
    for step, weights in enumerate(after, start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        for key, value in weights.items():
            expected[key] = (
                value if key.endswith("num_batches_tracked") else decay * expected[key] + (1 - decay) * value
            )
    assert decay < 0.6  # of nine steps none reaches it
    best, last = read_checkpoint("runs/a/best.pt")["weights"], read_checkpoint("runs/a/last.pt")
    for key, value in expected.items():
        torch.testing.assert_close(best[key].double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(best[key], last["average"][key]) and torch.equal(last["model"][key].double(), after[-1][key])
    assert (
        best["backbone.layer4.0.bn1.running_mean"] - last["model"]["backbone.layer4.0.bn1.running_mean"]
    ).abs().max() > 1e-4
    done = run("predict", "runs/a/best.pt", "--split", "val", "--workers", 0)
    assert f"mean           {float(rows('runs/a/metrics.csv')[-1]['val_top1_mean']):.4f}" in done.out


def test_a_run_with_everything_on_killed_in_mid_epoch_ends_with_the_same_bits(go, run, teacher, monkeypatch):
    flags = [
        "--epochs",
        2,
        "--ema",
        0.9,
        "--layer-decay",
        0.7,
        "--warmup-epochs",
        2,
        "--clip-grad",
        1,
        "--drop-path",
        0.3,
    ]
    flags += ["--model", "test_efficientnet", "--teacher", teacher, "--cutmix", "joint", "--save-every", 0]
    go("whole", *flags)

    def killed(average, net, decay, step):
        if step == 5:
            raise KeyboardInterrupt
        update_average(average, net, decay, step)

    monkeypatch.setattr(train_script, "update_average", killed)
    go("cut", *flags, code=130)
    monkeypatch.setattr(train_script, "update_average", update_average)
    assert read_checkpoint("runs/cut/last.pt")["step"] == 1
    done = run("train", "--resume", "runs/cut", "--workers", 1)
    assert done.code == 0, done.err
    assert rows("runs/cut/metrics.csv") == rows("runs/whole/metrics.csv")
    cut, whole = (read_checkpoint(f"runs/{name}/last.pt") for name in ("cut", "whole"))
    assert all(torch.equal(cut[part][key], whole[part][key]) for part in ("model", "average") for key in whole[part])


# ---------------------------------------------------------------- clipping, drop path


def test_the_gradient_is_clipped_after_its_pieces_were_added(go, steps):
    go("free", *STILL)
    go("clipped", *STILL, "--clip-grad", 0.25, "--grad-accum", 3)
    free, clipped = ([norm for _, norm in part] for part in (steps[:3], steps[3:]))
    assert min(free) > 0.5 and clipped == pytest.approx([0.25] * 3, rel=1e-3)


def test_drop_path_is_for_training_alone(go):
    nets = []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        nets.append(build_model("test_vit", CLASSES, 32, drop_path=rate)[0])
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    plain, dropping = nets
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), dropping.state_dict().values()))
    assert not torch.equal(plain.train()(images)["Daily"], dropping.train()(images)["Daily"])
    assert torch.equal(plain.eval()(images)["Daily"], dropping.eval()(images)["Daily"])
    go("plain", *STILL)
    go("dropping", *STILL, "--drop-path", 0.5)
    assert loss_of("plain") != pytest.approx(loss_of("dropping"), rel=1e-4)
    assert rows("runs/plain/metrics.csv")[0]["val_loss"][:8] == rows("runs/dropping/metrics.csv")[0]["val_loss"][:8]
    refused = go("none", "--model", "densenet121", "--drop-path", 0.1, code=2)
    assert "--drop-path" in refused.err and "densenet121 has no drop path" in refused.err


# ---------------------------------------------------------------- the teacher


def test_distillation_is_torchs_divergence_and_gives_the_teacher_no_gradient():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    direct = 9 * F.kl_div(F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean")
    loss = losses.distillation(student, teacher, 3)
    torch.testing.assert_close(loss, direct)
    torch.testing.assert_close(losses.distillation(student, teacher, 3, reduction="sum"), 7 * direct)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert losses.distillation(teacher, teacher).item() == 0
    assert losses.distillation(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_the_teacher_sees_the_students_pixels_and_has_its_share_of_the_loss(go, teacher, forwards):
    flags = [*STILL, "--batch-size", 15, "--class-weights", "--cutmix", "joint", "--distill-temperature", 2]
    before = teacher.read_bytes()
    go("hard", *flags[:-2])
    forwards.clear()
    go("soft", *flags, "--teacher", teacher, "--distill-weight", 1)
    student, soft = None, []
    for net, training, gradient, images in forwards[:]:
        if training and len(images) > 2:
            student, pixels = net, images
        elif images.shape[-1] == 48 and len(images) > 1:
            assert not gradient and not any(p.requires_grad for p in net.parameters())
            assert torch.equal(
                images, v2.functional.resize(pixels, [48, 48], v2.InterpolationMode.BICUBIC, antialias=True)
            )
            with torch.no_grad():
                ours, theirs = (
                    student(pixels),
                    net(images),
                )  # the student stands still, and has neither dropout nor batch norm
            soft.append(
                [sum(losses.distillation(ours[label], theirs[label], 2).item() for label in CLASSES), len(images)]
            )
    assert [n for _, n in soft] == [15, 15, 10]
    assert loss_of("soft") == pytest.approx(
        sum(loss * n for loss, n in soft) / 40, rel=0.01
    )  # the classes' weights weigh the batches
    go("both", *flags, "--teacher", teacher, "--distill-weight", 0.3)
    assert loss_of("both") == pytest.approx(0.7 * loss_of("hard") + 0.3 * loss_of("soft"), rel=1e-5)
    go("pieces", *flags, "--teacher", teacher, "--distill-weight", 0.3, "--grad-accum", 4)
    assert loss_of("pieces") == pytest.approx(loss_of("both"), rel=1e-5)
    assert teacher.read_bytes() == before
    best, plain = (read_checkpoint(f"runs/{name}/best.pt") for name in ("both", "hard"))
    assert best.keys() == plain.keys() and best["weights"].keys() == plain["weights"].keys()


def test_other_teachers_are_refused(go, run, teacher, tmp_path):
    other = torch.load(teacher)
    other["classes"] = {"Color": 3, "Daily": 6, "Gender": 5}
    other["weights"] |= {
        f"heads.{i}.{kind}": other["weights"][f"heads.{j}.{kind}"].clone()
        for i, j in enumerate((2, 0, 1))
        for kind in ("weight", "bias")
    }
    shutil.copy(teacher, "t.pt")
    go("a", "--epochs", 1, "--teacher", "t.pt")
    torch.save(other, "other.pt")
    refused = go("b", "--teacher", "other.pt", code=2)
    assert (
        "Embellishment has no classes there and 3 here" in refused.err
        and "Color has 3 classes there and none here" in refused.err
    )
    assert "no such" in go("b", "--teacher", "none.pt", code=2).err
    assert "no complete best.pt" in go("b", "--teacher", "runs/a/last.pt", code=1).err
    assert "--distill-temperature" in go("b", "--teacher", "t.pt", "--distill-temperature", 0, code=2).err
    again = ["--resume", "runs/a", "--epochs", 2]
    own = run("train", *again, "--teacher", "runs/a/best.pt")
    assert own.code == 2 and "--teacher" in own.err
    (tmp_path / "t.pt").rename("moved.pt")
    assert run("train", *again).code == 2
    shutil.copy("runs/a/best.pt", "t.pt")
    changed = run("train", *again)
    assert changed.code == 1 and "the teacher" in changed.err
    done = run("train", *again, "--teacher", "moved.pt")
    assert done.code == 0, done.err


def test_a_teacher_that_is_not_there_has_no_settings(go):
    assert "--distill-weight cannot act without --teacher" in go("a", *STILL, "--distill-weight", 0.5).out


# ---------------------------------------------------------------- training on everything


def test_fit_all_trains_on_every_row_and_keeps_the_last_epoch(go, run, drawn, monkeypatch):
    plain, seen = Photos.__getitem__, []
    monkeypatch.setattr(
        Photos,
        "__getitem__",
        lambda self, key: seen.append(self.samples[key if isinstance(key, int) else key[1]].name) or plain(self, key),
    )
    done = go("a", "--fit-all", "--epochs", 2, "--patience", 1, "--lr", 1e-12, "--eta-min", 0, "--export-dtype", "fp16")
    everything = sorted(
        row["image_name"] for split in ("train", "val") for row in rows(drawn / f"Fashion-How24_sub1_{split}.csv")
    )
    assert sorted(seen[:60]) == sorted(seen[60:]) == everything  # and none is read for validation
    assert (
        "--patience and --monitor do not act" in done.out
        and "nothing was held out" in done.out
        and "Top-1" not in done.out
    )
    best, last = read_checkpoint("runs/a/best.pt"), read_checkpoint("runs/a/last.pt")
    assert best["epoch"] == 2 and all(
        torch.equal(best["weights"][key], value.to(best["weights"][key].dtype)) for key, value in last["model"].items()
    )
    written = rows("runs/a/metrics.csv")
    scores = [
        f"val_{kind}_{label}" for label in ("Daily", "Gender", "Embellishment", "mean") for kind in ("top1", "acsa")
    ]
    assert list(written[0]) == ["epoch", "lr", "train_loss", "val_loss", *scores]  # as of any run
    assert len(written) == 2 and math.isnan(float(written[0]["val_top1_mean"])) and float(written[0]["train_loss"]) > 0
    again = run("train", "--resume", "runs/a", "--epochs", 3)
    assert again.code == 0 and read_checkpoint("runs/a/best.pt")["epoch"] == 3, again.err
    assert (
        "not at its lowest" not in done.out and "not at its lowest, as it is after 6 epochs" in again.out
    )  # two, then four more
    assert not (last.keys() & {"average"}) and not any(
        path.name == "val_predictions.csv" for path in drawn.parent.rglob("runs/a/*")
    )
    done = run("predict", "runs/a/best.pt", "--workers", 0)
    assert done.code == 0 and "nan" not in done.out, done.err
