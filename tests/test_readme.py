"""The words of README and of docs/ hold: each command parses, each flag, script and link named there exists, and the
scripts' commands run, shrunk.

A command is a line of a code block, or a span in backticks, that starts with `python SCRIPT.py` or `torchrun`. What
stands in <...> or [...] is left out.
"""

import importlib.util
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import typer
from conftest import ROOT, TINY, run_script
from PIL import Image

import demo
import entry
import predict
import preprocess

TEXTS = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/*.md"))]
ELSEWHERE = {"--standalone", "--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint"}
ELSEWHERE |= {"--help", "--shm-size", "--signal", "--signals-to-handle"}  # torchrun's, everyone's, docker's, Slurm's
SERVICES = {"task.py"}  # scripts named that are not ours
SHRUNK = {
    "train": [*TINY, "--epochs", "1", "--t-0", "1", "--warmup-epochs", "0"],
    "predict": ["--workers", "0"],
    "entry": [],
    "preprocess": ["--rembg-model", "u2netp", "--workers", "1"],
    "demo": ["--train", "4", "--val", "2", "--test", "2"],
    "data": [],
    "report": [],
}


def blocks(text: str) -> list[str]:
    """The lines of the code blocks; one that ends in a backslash goes on in the next."""
    inside = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.S | re.M)
    return [line.strip() for block in inside for line in block.replace("\\\n", " ").splitlines()]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


def commands(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of the lines that start one of ours; `R="..."` on a line before stands for $R."""
    found, variables = [], {}
    for line in lines:
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
        if setting := re.match(r'(\w+)="(.*?)"', line):
            variables[setting[1]] = setting[2]
        for part in re.sub(r"<[^>]*>|\[[^\]]*\]", "", line).split(" && "):
            if re.match(r"(\$ )?(python3? \S+\.py|torchrun )", part):
                words = shlex.split(part, comments=True)
                at = next(i for i, word in enumerate(words) if word.endswith(".py"))
                found.append((words[at].removesuffix(".py"), [word for word in words[at + 1 :] if word != "..."]))
    return found


NAMED = sorted(
    {
        (script, *args)
        for text in TEXTS
        for script, args in commands(blocks(text.read_text(encoding="utf-8")) + spans(text.read_text(encoding="utf-8")))
    }
)
RUN = dict.fromkeys(
    (script, *args)
    for text in TEXTS
    for script, args in commands(blocks(text.read_text(encoding="utf-8")))
    if script in SHRUNK
)


@cache
def command_of(script: str):
    """The command line of a script as Typer made it."""
    if "/" not in script:
        return typer.main.get_command(importlib.import_module(script).app)
    spec = importlib.util.spec_from_file_location(script.replace("/", "_"), ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return typer.main.get_command(module.app)


def parse(command, args: list[str]) -> None:
    """Raises click's UsageError for what the command does not take."""
    if not hasattr(command, "commands"):
        command.make_context("", list(args))
        return
    assert args and args[0] in command.commands, f"{args[:1]} is none of {', '.join(command.commands)}"
    own, behind = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    parse(command.commands[own[0]], own[1:])
    parse(command_of("train"), behind)  # experiments.py hands it on


def test_the_commands_are_found():
    assert {"train", "predict", "preprocess", "data", "experiments"} <= {script for script, *_ in NAMED}
    assert commands(['R="-x y"', "pip install x && python a.py $R --b 'c d' <more> [e ...]   # f"]) == [
        ("a", ["-x", "y", "--b", "c d"])
    ]
    with pytest.raises(Exception, match="--nonsense"):
        parse(command_of("train"), ["--nonsense"])


@pytest.mark.parametrize("command", NAMED, ids=" ".join)
def test_each_command_parses(command):
    script, *args = command
    assert (ROOT / f"{script}.py").is_file()
    parse(command_of(script), args)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_each_flag_script_and_link_exists(text):
    words = text.read_text(encoding="utf-8")
    paths = [
        *ROOT.glob("*.py"),
        *ROOT.glob("benchmarks/*.py"),
        ROOT / "tests" / "torture.py",
    ]
    scripts = [path.relative_to(ROOT).with_suffix("").as_posix() for path in paths]
    known = set(ELSEWHERE)
    for script in (
        script for script in scripts if "typer.Typer(" in (ROOT / f"{script}.py").read_text(encoding="utf-8")
    ):
        top = command_of(script)
        for command in getattr(top, "commands", {"": top}).values():
            known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    named = {flag for span in spans(words) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert not named - known, f"no script takes {named - known}"
    files = {span for span in spans(words) if re.fullmatch(r"[\w./]+\.py", span)} - SERVICES
    assert not [
        file for file in files if not any((ROOT / folder / file).is_file() for folder in (".", "tests", "benchmarks"))
    ]
    for file, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", words):
        assert "://" not in file and (text.parent / file).exists(), file
        there = (text.parent / file if file else text).read_text(encoding="utf-8") if heading else ""
        assert not heading or heading in {
            re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.*)$", there, flags=re.M)
        }


@pytest.fixture(scope="module")
def place(drawn, tmp_path_factory):
    """A folder where the first runs that the commands speak of have been made; runs/NAME looks twice."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(drawn, folder / "Dataset")
    assert run_script(folder, "train", *SHRUNK["train"], "--box-head", "--crop-prob", "0.5", "--name", "NAME") == 0
    return folder


@pytest.fixture
def stand_ins(monkeypatch, drawn, tmp_path):
    """The demo set is a small one, garments are found in the middle of photos, entries are not tried."""
    weights = tmp_path / "u2netp.onnx"
    weights.touch()
    for script in (preprocess, predict, entry):
        monkeypatch.setattr(script, "find_weights", lambda model: ("md5:0", weights))
    monkeypatch.setattr(preprocess.Remover, "start", lambda self: ["CPU"])
    middle = Image.new("L", (64, 64))
    middle.paste(255, (16, 16, 48, 48))
    monkeypatch.setattr(preprocess.Remover, "mask", lambda self, photo: middle.resize(photo.size))
    monkeypatch.setattr(demo, "cached", lambda: drawn)
    monkeypatch.setattr(entry, "try_entry", lambda *args: 0.02)


def fill(args: list[str], drawn: Path, script: str) -> None:
    """Make what a command is given and is not there: datasets, earlier runs, photos."""
    for before, word in zip(["", *args], args):
        if before in ("--data", "--clean-data") or (script in ("data", "preprocess") and word == args[0]):
            if word != "demo" and not Path(word).exists():
                shutil.copytree(drawn, word)
        elif match := re.match(r"(runs/\w+)", word):
            if not Path(match[1]).exists():
                shutil.copytree("runs/NAME", match[1])
        elif (
            script == "predict" and not before.startswith("--") and not word.startswith("-") and not Path(word).exists()
        ):
            target = Path(word) if Path(word).suffix else Path(word) / "a.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 50)).save(target)


@pytest.mark.parametrize("command", RUN, ids=" ".join)
def test_each_command_runs(command, run, place, stand_ins, drawn, monkeypatch):
    script, *args = command
    if any(word.isupper() for word in args):
        pytest.skip("speaks of files of one's own")
    monkeypatch.chdir(place)
    if script == "train" and "mask" in args:  # it needs a dataset with such boxes
        assert run("preprocess", drawn, args[args.index("--data") + 1], "--keep-background").code == 0
    fill(args, drawn, script)
    before = set(place.iterdir()) | set((place / "runs").iterdir())
    if script in ("preprocess", "demo", "entry"):  # the folder to write
        shutil.rmtree(args[script != "demo"], ignore_errors=True)
    more = [] if "--resume" in args else [*SHRUNK[script], *(["--name", "shrunk"] if script == "train" else [])]
    done = run(script, *args, *more)
    assert done.code == 0, done.err
    for new in (set(place.iterdir()) | set((place / "runs").iterdir())) - before:
        shutil.rmtree(new) if new.is_dir() else new.unlink()
