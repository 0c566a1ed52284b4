"""The recipe's flags, each by its effect: rates, average, clipping, drop path, teacher, training on everything."""

import csv
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torchvision.transforms import v2

import cli
import losses
import train as train_script
from checkpoint import Teacher, read
from loading import EvalPhotos, TrainPhotos
from model import FashionModel, build_model, parameter_groups, update_ema

PLAIN = [*TINY, "--augment", "none", "--amp", "off", "--patience", 99, "--threads", 1]  # 40 photos, so 3 steps an epoch
STILL = ["--epochs", 1, "--lr", 1e-12, "--eta-min", 0]  # nothing is learned: every step sees the first weights
CLASSES = {label: tuple("012345"[:n]) for label, n in {"Daily": 6, "Gender": 5, "Embellishment": 3}.items()}


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
    """What AdamW was given at each step: the groups' (lr, lr_scale, weight decay), and the norm of the gradient."""
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

    def forward(self, images, **options):
        seen.append((self, self.training, torch.is_grad_enabled(), images))
        return plain(self, images, **options)

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
        cli.run_app(train_script.app)
    return tmp_path_factory.getbasetemp() / "teacher0" / "runs" / "t" / "best.pt"


# ---------------------------------------------------------------- rates


def test_every_group_has_its_rate_at_every_step(go, steps):
    lr, low, t_0 = 1e-3, 1e-4, 3
    flags = ["--epochs", 5, "--lr", lr, "--eta-min", low, "--t-0", t_0, "--t-mult", 1, "--layer-decay", 0.5]
    go("a", *flags, "--warmup-epochs", 1.5)
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
    net = build_model("test_vit", CLASSES, 32)
    scale = {id(p): group["lr_scale"] for group in parameter_groups(net, 1e-3, 0.5) for p in group["params"]}
    of = {name: scale[id(p)] for name, p in net.named_parameters()}
    assert len(scale) == len(of) == sum(len(group["params"]) for group in parameter_groups(net, 1e-3, 0.5))
    assert of["heads.0.weight"] == of["heads.2.bias"] == 1
    rising = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.5.attn.qkv")
    first, low, high = (of[f"backbone.{name}.weight"] for name in rising)
    assert first < low < high <= 1
    (group,) = parameter_groups(net, 1e-3)
    assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()] and group["lr_scale"] == 1


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_a_module_of_ones_own_learns(decay):
    net = build_model("test_efficientnet", CLASSES, 32, box_head=True)
    net.neck = torch.nn.Linear(4, 4)
    assert sum(len(group["params"]) for group in parameter_groups(net, 1e-3, decay)) == len([*net.parameters()])


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize(("lr", "scale"), [(5e-6, 500), (5e-3, 1)])
def test_a_new_box_head_learns_at_its_own_rate(lr, scale, decay):
    net = build_model("test_efficientnet", CLASSES, 32, box_head=True)
    *others, group = parameter_groups(net, lr, decay)
    assert {id(p) for p in group["params"]} == {id(p) for p in net.box_head.parameters()}
    assert group["lr_scale"] == pytest.approx(scale) and all(other["lr_scale"] <= 1 for other in others)
    assert sum(len(of["params"]) for of in [group, *others]) == len([*net.parameters()])


# ---------------------------------------------------------------- the average


def test_the_average_is_the_formulas_and_is_what_is_scored_and_saved(go, run, monkeypatch):
    first, after = [], []

    def spied(ema, net, decay, step):
        first.extend([] if first else [{key: value.double() for key, value in ema.state_dict().items()}])
        after.append({key: value.double() for key, value in net.state_dict().items()})
        assert decay == 0.6 and step == len(after)
        update_ema(ema, net, decay, step)

    monkeypatch.setattr(train_script, "update_ema", spied)
    monkeypatch.setattr(train_script, "MONITORS", {"top1": ("epoch", 1)})  # every epoch is the best
    go("a", "--model", "test_resnet", "--epochs", 3, "--ema", 0.6)
    assert len(after) == 9
    expected = first[0]
    for step, weights in enumerate(after, start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        for key, value in weights.items():
            copied = key.endswith("num_batches_tracked")
            expected[key] = value if copied else decay * expected[key] + (1 - decay) * value
    assert decay < 0.6  # of nine steps none reaches it
    best, last = read("runs/a/best.pt")["weights"], read("runs/a/last.pt")
    for key, value in expected.items():
        torch.testing.assert_close(best[key].double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(best[key], last["ema"][key]) and torch.equal(last["model"][key].double(), after[-1][key])
    key = "backbone.layer4.0.bn1.running_mean"
    assert (best[key] - last["model"][key]).abs().max() > 1e-4
    done = run("predict", "runs/a/best.pt", "--split", "val", "--workers", 0)
    assert f"mean           {float(rows('runs/a/metrics.csv')[-1]['val_top1_mean']):.4f}" in done.out


def test_a_run_with_everything_on_killed_in_mid_epoch_ends_with_the_same_bits(go, run, teacher, monkeypatch):
    flags = ["--epochs", 2, "--ema", 0.9, "--layer-decay", 0.7, "--warmup-epochs", 2, "--clip-grad", 1]
    flags += ["--drop-path", 0.3, "--model", "test_efficientnet", "--teacher", teacher]
    flags += ["--cutmix", "joint", "--save-every", 0]
    go("whole", *flags)

    def killed(ema, net, decay, step):
        if step == 5:
            raise KeyboardInterrupt
        update_ema(ema, net, decay, step)

    monkeypatch.setattr(train_script, "update_ema", killed)
    go("cut", *flags, code=130)
    monkeypatch.setattr(train_script, "update_ema", update_ema)
    assert read("runs/cut/last.pt")["step"] == 1
    done = run("train", "--resume", "runs/cut", "--workers", 1)
    assert done.code == 0, done.err
    assert rows("runs/cut/metrics.csv") == rows("runs/whole/metrics.csv")
    cut, whole = (read(f"runs/{name}/last.pt") for name in ("cut", "whole"))
    assert all(torch.equal(cut[part][key], whole[part][key]) for part in ("model", "ema") for key in whole[part])


# ---------------------------------------------------------------- clipping, drop path


def test_the_gradient_is_clipped_after_its_micro_batches_were_added(go, steps):
    go("free", *STILL)
    go("clipped", *STILL, "--clip-grad", 0.25, "--grad-accum", 3)
    free, clipped = ([norm for _, norm in part] for part in (steps[:3], steps[3:]))
    assert min(free) > 0.5 and clipped == pytest.approx([0.25] * 3, rel=1e-3)


def test_drop_path_is_for_training_alone(go):
    nets = []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        nets.append(build_model("test_vit", CLASSES, 32, drop_path=rate))
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


def test_a_teacher_teaches_its_labels_alone(monkeypatch):
    """Not another learned task that an edit of FashionModel.forward adds, whose output need not be of classes."""
    net, plain = build_model("test_vit", CLASSES, 32), FashionModel.forward
    monkeypatch.setattr(FashionModel, "forward", lambda *args, **more: plain(*args, **more) | {"light": torch.ones(2)})
    assert Teacher(net)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).keys() == CLASSES.keys()


def test_the_teacher_sees_the_students_pixels_and_has_its_share_of_the_loss(go, teacher, forwards):
    flags = [*STILL, "--batch-size", 15, "--cutmix", "joint"]
    before = teacher.read_bytes()
    go("hard", *flags)
    forwards.clear()
    go("soft", *flags, "--teacher", teacher, "--distill-weight", 1)
    student, soft = None, []
    for net, training, gradient, images in forwards[:]:
        if training and len(images) > 2:
            student, pixels = net, images
        elif images.shape[-1] == 48 and len(images) > 1:
            assert not gradient and not any(p.requires_grad for p in net.parameters())
            bicubic = v2.functional.resize(pixels, [48, 48], v2.InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(images, bicubic)
            with torch.no_grad():  # the student stands still, and has neither dropout nor batch norm
                ours, theirs = student(pixels), net(images)
            divergences = [losses.distillation(ours[label], theirs[label], 4).item() for label in CLASSES]
            soft.append([sum(divergences), len(images)])
    assert [n for _, n in soft] == [15, 15, 10]
    assert loss_of("soft") == pytest.approx(sum(loss * n for loss, n in soft) / 40, rel=1e-5)
    go("both", *flags, "--teacher", teacher, "--distill-weight", 0.3)
    assert loss_of("both") == pytest.approx(0.7 * loss_of("hard") + 0.3 * loss_of("soft"), rel=1e-5)
    go("parts", *flags, "--teacher", teacher, "--distill-weight", 0.3, "--grad-accum", 4)
    assert loss_of("parts") == pytest.approx(loss_of("both"), rel=1e-5)
    assert teacher.read_bytes() == before
    best, plain = (read(f"runs/{name}/best.pt") for name in ("both", "hard"))
    assert best.keys() == plain.keys() and best["weights"].keys() == plain["weights"].keys()


def test_other_teachers_are_refused(go, run, teacher, tmp_path):
    other = torch.load(teacher, weights_only=True)
    other["classes"] = {label: other["classes"].get(label, ("0", "1", "2")) for label in ("Color", "Daily", "Gender")}
    other["common_classes"] = dict.fromkeys(other["classes"], 0)
    weights = dict(other["weights"])
    for i, j in enumerate((2, 0, 1)):
        for kind in ("weight", "bias"):
            other["weights"][f"heads.{i}.{kind}"] = weights[f"heads.{j}.{kind}"].clone()
    shutil.copy(teacher, "t.pt")
    go("a", "--epochs", 1, "--teacher", "t.pt")
    torch.save(other, "other.pt")
    refused = go("b", "--teacher", "other.pt", code=2)
    assert "Embellishment has no classes there and 3 here" in refused.err
    assert "no such" in go("b", "--teacher", "none.pt", code=2).err
    assert "no complete best.pt" in go("b", "--teacher", "runs/a/last.pt", code=1).err
    again = ["--resume", "runs/a", "--epochs", 2]
    own = run("train", *again, "--teacher", "runs/a/best.pt")
    assert own.code == 1 and "the teacher changed" in own.err
    (tmp_path / "t.pt").rename("moved.pt")
    assert run("train", *again).code == 2
    shutil.copy("runs/a/best.pt", "t.pt")
    changed = run("train", *again)
    assert changed.code == 1 and "the teacher changed" in changed.err
    done = run("train", *again, "--teacher", "moved.pt")
    assert done.code == 0, done.err


# ---------------------------------------------------------------- training on everything


def test_fit_all_trains_on_every_row_and_keeps_the_last_epoch(go, run, drawn, monkeypatch, tmp_path):
    plain, plain_eval, seen = TrainPhotos.__getitem__, EvalPhotos.__getitem__, []

    def training_item(self, key):
        seen.append(self.samples[key[1]].name)
        return plain(self, key)

    def validation_item(self, key):
        raise AssertionError("a photo is read for validation")

    monkeypatch.setattr(TrainPhotos, "__getitem__", training_item)
    monkeypatch.setattr(EvalPhotos, "__getitem__", validation_item)
    done = go("a", "--fit-all", "--epochs", 2, "--patience", 1, "--lr", 1e-12, "--eta-min", 0, "--export-dtype", "fp16")
    everything = [row["image_name"] for s in ("train", "val") for row in rows(drawn / f"Fashion-How24_sub1_{s}.csv")]
    assert sorted(seen[:60]) == sorted(seen[60:]) == sorted(everything)
    assert "it measures nothing" in done.out and "nothing was held out" in done.out and "Top-1" not in done.out
    best, last = read("runs/a/best.pt"), read("runs/a/last.pt")
    assert best["epoch"] == 2
    for key, value in last["model"].items():
        assert torch.equal(best["weights"][key], value.to(best["weights"][key].dtype))
    written = rows("runs/a/metrics.csv")
    labels = (*CLASSES, "mean")
    scores = [f"val_{kind}_{label}" for label in labels for kind in ("top1", "acsa")]
    assert list(written[0]) == ["epoch", "lr", "train_loss", "val_loss", *scores]  # as of any run
    assert len(written) == 2 and math.isnan(float(written[0]["val_top1_mean"])) and float(written[0]["train_loss"]) > 0
    again = run("train", "--resume", "runs/a", "--epochs", 3)
    assert again.code == 0 and read("runs/a/best.pt")["epoch"] == 3, again.err
    assert "not at the end" not in done.out
    assert "lowest after 6 epochs, not at the end" in again.out  # two, then four more
    assert last["ema"] is None and not (tmp_path / "runs/a/val_predictions.csv").exists()
    monkeypatch.setattr(EvalPhotos, "__getitem__", plain_eval)
    done = run("predict", "runs/a/best.pt", "--workers", 0)
    assert done.code == 0 and "nan" not in done.out, done.err
