"""Settings: the command line, config.json and what is built; what may change on resume."""

import dataclasses
import inspect
import json
import math
import os
from pathlib import Path

import pytest
import typer
from conftest import TINY

import settings as settings_module
import train
from settings import (
    CHANGEABLE,
    Settings,
    checked_settings,
    learning_rate,
    print_notes,
    read_settings,
    restart_epochs,
    resumed_settings,
)


def parsed(*arguments: object) -> Settings:
    """The settings of a command line."""
    command = typer.main.get_command(train.app)
    context = command.make_context("train.py", [str(argument) for argument in arguments])
    return typer.core.TyperCommand.invoke(command, context)


def written(folder: Path, settings: dict) -> Path:
    (folder / "config.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    return folder


# ---------------------------------------------------------------- the command line is the dataclass


def test_parsed_settings_equal_built_ones():
    assert parsed() == Settings()
    flags = ["--data", "a", "--data", "b", "--cutmix", "Daily", "--cutmix", "Gender", "--lr", "1e-3", "--no-pretrained"]
    flags += ["--class-weights", "--crop-prob", 0.7, "--image-size", 96, "--weights", "w.pt", "--teacher", "t.pt"]
    built = Settings(
        data=["a", "b"],
        cutmix=["Daily", "Gender"],
        lr=1e-3,
        pretrained=False,
        class_weights=True,
        crop_prob=0.7,
        image_size=96,
        weights=Path("w.pt"),
        teacher="t.pt",
    )
    assert parsed(*flags) == built and hash(parsed(*flags)) == hash(built)
    assert built.data == ("a", "b") and built.cutmix == ("Daily", "Gender") and built.weights == "w.pt"
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.lr = 1.0


def test_every_setting_is_a_flag_of_its_name():
    parameters = {parameter.name: parameter for parameter in typer.main.get_command(train.app).params}
    assert [field.name for field in dataclasses.fields(Settings)] == [name for name in parameters if name != "help"]
    for name, parameter in parameters.items():
        flag = "--" + name.replace("_", "-")
        assert flag in parameter.opts, name
    assert list(inspect.signature(Settings).parameters) == [field.name for field in dataclasses.fields(Settings)]


# ---------------------------------------------------------------- config.json


def test_config_json_round_trip(tmp_path):
    settings = Settings(data=["a", "b"], cutmix=["joint"], lr=1.2345e-3, weights="한글/w.pt", epochs=7, val_view="full")
    assert read_settings(written(tmp_path, dataclasses.asdict(settings))) == settings


def test_config_json_of_a_run_is_its_settings_with_checked_settings(run, drawn, tmp_path):
    flags = ["--data", drawn, *TINY, "--epochs", 1, "--cache", "views", "--name", "a"]
    assert run("train", *flags).code == 0
    expected = dataclasses.replace(parsed(*flags), data=(str(drawn),), cache=str(tmp_path / "views"))
    assert read_settings("runs/a") == expected == checked_settings(parsed(*flags))
    assert Settings(data="demo", cutmix="Daily") == Settings(data=["demo"], cutmix=["Daily"])
    assert checked_settings(Settings(data=["demo"], cache="off")) == Settings(data=["demo"], cache="off")


def test_what_config_json_lacks_has_its_default(tmp_path):
    settings = dataclasses.asdict(Settings(epochs=7, ema=0.9))
    for name in ("clip_grad", "resize", "cache"):
        del settings[name]
    assert read_settings(written(tmp_path, settings)) == Settings(epochs=7, ema=0.9)


def test_a_setting_that_is_there_no_longer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no setting mine, which the run had as 3"):
        read_settings(written(tmp_path, dataclasses.asdict(Settings(epochs=7)) | {"mine": 3}))


def test_a_float_of_your_own_may_have_a_whole_default(tmp_path, monkeypatch):
    edited = dataclasses.make_dataclass("Edited", [("mine", float, 0)], bases=(Settings,), frozen=True)
    monkeypatch.setattr(settings_module, "Settings", edited)
    for value in (0, 0.5):
        assert read_settings(written(tmp_path, {"mine": value})).mine == value


DAMAGE = [
    {"epochs": "7"}, {"epochs": 0}, {"epochs": float("inf")}, {"t_0": 0}, {"t_mult": 0}, {"batch_size": -1},
    {"lr": "fast"}, {"monitor": None}, {"data": 1}, {"pretrained": 1}, {"seed": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_values_of_another_type_are_damage(tmp_path, damage):
    written(tmp_path, dataclasses.asdict(Settings()) | damage)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_settings(tmp_path)


def test_a_folder_without_config_json_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(typer.BadParameter, match="is no run"):
            read_settings(folder)


# ---------------------------------------------------------------- resume


OTHER = {  # another value of each setting that may change
    "workers": 3, "debug": True, "data": ("b",), "teacher": "u.pt", "epochs": 9, "save_every": 1.0, "cache": "off",
    "patience": 60, "pictures": False,
}  # fmt: skip


def test_what_may_change_on_resume(tmp_path):
    written(tmp_path, dataclasses.asdict(Settings(epochs=7, t_0=9, data=["a"])))
    given = Settings(resume=str(tmp_path), **OTHER)
    assert set(OTHER) | {"resume"} == CHANGEABLE
    resumed = resumed_settings(given, ["resume", *OTHER])
    assert resumed == Settings(resume=str(tmp_path), t_0=9, **OTHER)
    # a setting that was not given has the run's value, not this command's default
    assert resumed_settings(given, ["resume"]) == Settings(resume=str(tmp_path), epochs=7, t_0=9, data=["a"])
    with pytest.raises(typer.BadParameter, match="started with another t_0; take resumed_settings"):
        checked_settings(given)  # from Python


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(Settings)} - CHANGEABLE))
def test_what_may_not_change_on_resume(tmp_path, name):
    written(tmp_path, dataclasses.asdict(Settings(data=["a"])))
    value = getattr(Settings(), name)
    other = not value if isinstance(value, bool) else (value or 0) + 1 if not isinstance(value, str) else "another"
    if value is None and name not in ("image_size", "threads"):
        other = "another"
    given = Settings(resume=str(tmp_path), **{name: other})
    with pytest.raises(typer.BadParameter, match=r"only --cache, .*--workers may change") as error:
        resumed_settings(given, ["resume", name])
    assert error.value.param_hint == "--" + name.replace("_", "-")
    same = Settings(resume=str(tmp_path))  # given as it was is fine
    assert resumed_settings(same, ["resume", name]) == Settings(resume=str(tmp_path), data=["a"])


def test_the_same_weights_may_be_given_on_resume(tmp_path):
    written(tmp_path, dataclasses.asdict(Settings(data=["a"], weights=os.path.abspath("w.pt"))))
    given = Settings(resume=str(tmp_path), weights="w.pt")
    assert resumed_settings(given, ["resume", "weights"]).weights == "w.pt"


def test_fewer_epochs_are_refused_and_restarts_are_said(tmp_path, capsys):
    written(tmp_path, dataclasses.asdict(Settings(epochs=30)))
    with pytest.raises(typer.BadParameter, match="fewer"):
        resumed_settings(Settings(resume=str(tmp_path), epochs=29), ["resume", "epochs"])
    with pytest.raises(typer.BadParameter, match="started with 50; fewer"):
        resumed_settings(Settings(resume=str(tmp_path), patience=49), ["resume", "patience"])
    capsys.readouterr()
    assert resumed_settings(Settings(resume=str(tmp_path), epochs=40), ["resume", "epochs"]).epochs == 40
    said = capsys.readouterr().out
    assert "restarts in epoch 31" in said and "lowest after 90 epochs" in said


def test_the_same_weights_may_be_given_again_by_another_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, dataclasses.asdict(Settings(weights=str(tmp_path / "w.pt"))))
    resumed = resumed_settings(Settings(resume=".", weights="w.pt"), ["resume", "weights"])
    assert checked_settings(resumed).weights == str(tmp_path / "w.pt")


# ---------------------------------------------------------------- checks, notes, the schedule


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--lr", {"lr": 0.0}),
        ("--lr", {"lr": float("nan")}),
        ("--ema", {"ema": float("inf")}),
        ("--layer-decay", {"layer_decay": 0.0}),
        ("--eta-min", {"eta_min": 1.0}),
        ("--name", {"name": "../a"}),
        ("--name", {"name": ""}),
        ("--val-view", {"val_view": "learned"}),
        ("--box-head", {"box_head": True}),
        ("--box-head", {"box_head": True, "crop_prob": 0.7, "cutmix": ["joint"]}),
        ("--box-head", {"box_head": True, "crop_prob": 0.7, "resize": "random-resized-crop"}),
        ("--grad-accum", {"grad_accum": 9, "batch_size": 8}),
    ],
)
def test_settings_that_make_no_sense_together(flag, settings):
    with pytest.raises(typer.BadParameter) as error:
        checked_settings(Settings(**settings))
    assert error.value.param_hint == flag


def test_the_defaults_and_the_notes_settings_pass(capsys):
    for settings in (
        Settings(),
        Settings(loss="focal", crop_prob=0.7),
        Settings(box_head=True, crop_prob=0.7, lr=5e-5),
    ):
        checked_settings(settings)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"t_0": 9, "epochs": 8}, "--t-0 9 is longer than 8 epochs"),
        ({"fit_all": True}, "it measures nothing"),
        ({"fit_all": True, "epochs": 50}, "lowest after 90 epochs, not at the end; --t-0 50 ends there"),
        ({"pretrained": False}, "--lr 5e-06 is for pretrained weights"),
        ({"subtask": 2}, "sub-task 2 admit no pretrained models"),
    ],
)
def test_notes(settings, words, capsys):
    print_notes(Settings(**settings))
    assert words in " ".join(capsys.readouterr().out.split())


def test_a_schedule_of_ones_own_without_restarts_has_no_note(monkeypatch, capsys):
    monkeypatch.setattr(settings_module, "restart_epochs", lambda settings: iter([math.inf]))  # as the guide says
    print_notes(Settings(fit_all=True, epochs=3, t_0=3))
    assert "lowest" not in capsys.readouterr().out


def test_restarts_and_warm_up():
    epochs = restart_epochs(Settings(t_0=30, t_mult=2))
    assert [next(epochs) for _ in range(3)] == [31, 91, 211]
    settings = Settings(warmup_epochs=2.0)
    assert [learning_rate(settings, 4.0, epochs) for epochs in (0.5, 1, 2, 3)] == [1.0, 2.0, 4.0, 4.0]
    assert learning_rate(Settings(), 4.0, 0.01) == 4.0
