"""README's commands for the demo sets, word for word, in an empty folder with the scripts: what a newcomer would paste.

    python tests/readme_demo.py              # half an hour on 2 busy cores, as preprocess.py cleans 2,000 photos
    python tests/readme_demo.py --long       # the experiments too
    python tests/readme_demo.py --list       # only say which

u2netp's weights are downloaded; without a network set U2NET_HOME to their folder.

Taken are the commands that read or write `demo`, `Small` or its copy, and those on runs/NAME that every run can be
given, where NAME becomes the first command's run: that word is README's own. What needs files of one's own is left out.
Exit code 1 where a command fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_readme import blocks, spans

from cli import run_app, say

DEMO = re.compile(r"\b(demo|Small)(-rembg)?(?= |$)")
ON_A_RUN = ("python predict.py runs/NAME/best.pt", "python report.py runs/NAME", "python experiments.py table")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def demo_commands(text: str, long: bool) -> list[str]:
    """README's lines and spans for the demo sets: first what installs and draws, then the others in their order."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in blocks(text) + spans(text)]
    lines = [line for line in dict.fromkeys(lines) if re.match(r"(pip install .*&& )?python \w+\.py", line)]
    chosen = [
        line
        for line in lines
        if line in ON_A_RUN or (DEMO.search(line) and not re.search(r"safetensors|Dataset|\$", line))
    ]
    if not long:
        chosen = [line for line in chosen if "experiments.py" not in line]
    first = ("pip ", "python demo.py")
    return sorted(
        chosen,
        key=lambda line: (
            next((i for i, start in enumerate(first) if line.startswith(start)), len(first)),
            line.endswith("table"),
        ),
    )


@app.command()
def main(
    long: Annotated[bool, typer.Option("--long", help="The experiments too.")] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Only say which commands.")] = False,
) -> None:
    """Run README's demo commands."""
    commands = demo_commands((ROOT / "README.md").read_text(encoding="utf-8"), long)
    if only_list:
        say("\n".join(commands))
        return
    failed, env = [], os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
            shutil.copy(path, folder)
        for command in commands:
            runs = sorted(Path(folder, "runs").glob("*"), key=lambda run: run.stat().st_mtime)
            start = time.monotonic()
            code = subprocess.run(
                command.replace("NAME", runs[0].name if runs else "NAME"), shell=True, cwd=folder, env=env
            ).returncode
            say(f"== {time.monotonic() - start:.0f} s, exit code {code}: {command}")
            failed += [command] if code else []
    if failed:
        raise ValueError("these failed: " + "; ".join(failed))
    say(f"all {len(commands)} ran")


if __name__ == "__main__":
    run_app(app)
