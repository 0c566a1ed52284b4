"""What every script does alike for its user: one-line errors and exit codes, progress, tables, files written whole or not at all.

Imports nothing of ours. Results go to stdout, errors to stderr. Without a terminal all of it is plain text. `console.quiet` is set in all but the first of
several processes of one run.
"""

import csv
import os
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
OUT_OF_MEMORY = "out of memory: lower --batch-size, or --workers; in training --grad-accum splits a batch into pieces, with the same result"


def say(text: str) -> None:
    """Print one line to stdout, as it is (no markup)."""
    console.print(text, markup=False, emoji=False)


def note(text: str) -> None:
    """Print one line that the user should notice: a fallback, or a setting that cannot act in this run."""
    console.print(Text.assemble(("note:", "yellow"), " ", text))


def misuse(flag: str, message: object) -> typer.BadParameter:
    """The exception for a wrong value of `flag`; `run_app` turns it into one line and exit code 2."""
    return typer.BadParameter(str(message), param_hint=flag)


@contextmanager
def blaming(flag: str) -> Iterator[None]:
    """Turn a ValueError within into the misuse of `flag`."""
    try:
        yield
    except ValueError as error:
        raise misuse(flag, error) from None


class Stopped(KeyboardInterrupt):
    """A stop that was asked for, at a point from which the work can go on."""


class StopSignals:
    """Within it, Ctrl-C and SIGTERM only set `asked`, so that the work can stop at a good point; a second Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignals":
        self.asked = False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def until_asked(self, pieces: Iterable) -> Iterator:
        """The pieces of some work; raises Stopped before the next one once a stop is asked for."""
        for piece in pieces:
            if self.asked:
                raise Stopped
            yield piece


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _fail(message: str, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", message))
    raise SystemExit(code)


def run_app(app: typer.Typer) -> None:
    """Run a Typer app: exit code 2 and one line for misuse, 1 and one line for a failure; `--debug` shows the traceback instead."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):  # a file name may hold bytes that are no UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not debug:
        warnings.filterwarnings("ignore", module=r"(torch|timm|torchvision|PIL)")
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        traceback.clear_frames(
            error.__traceback__
        )  # they hold the loaders, whose decoding processes Python would wait for at exit, for ever
        if hasattr(error, "format_message") and console.quiet:  # one of several processes: the first one says it
            time.sleep(1)
            raise SystemExit(error.exit_code) from None
        if hasattr(error, "format_message"):  # click's own errors, whichever click Typer carries
            _fail(" ".join(error.format_message().split()) + "  (--help shows the options)", error.exit_code)
        if debug:
            raise
        if _is_out_of_memory(error):
            _fail(OUT_OF_MEMORY, 1)
        if type(error).__name__.startswith("Dist") or "gloo" in str(error).lower() or "NCCL" in str(error):
            _fail("another process of this run has ended; its own message says why", 1)
        # The errors that our code raises on purpose explain themselves; of any other, the type is part of the message.
        code = 2 if isinstance(error, FileNotFoundError) else 1  # a path that the user named
        expected = type(error) is ValueError or isinstance(error, OSError)
        _fail(
            str(error) if expected and str(error) else f"{type(error).__name__}: {error}  (--debug shows where)", code
        )


class _PlainProgress:
    """Progress for a log file: a plain line every `every` seconds, none for work that ends sooner."""

    def __init__(self, total: int, description: str, unit: str, every: float = 30.0):
        self.total, self.description, self.unit, self.every = total, description, unit, every
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last >= self.every and self.done < self.total:
            self.last = now
            rate = self.done / (now - self.start)
            say(
                f"{self.description} {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {(self.total - self.done) / rate:.0f} s left"
            )


class _RichProgress:
    """Progress for a terminal: a bar with the rate and the time left, gone when the work ends."""

    def __init__(self, bar: Progress, total: int, description: str, unit: str):
        self.bar, self.unit, self.start, self.done = bar, unit, time.monotonic(), 0
        self.task = bar.add_task(description, total=total, rate="")

    def advance(self, n: int) -> None:
        self.done += n
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        self.bar.update(self.task, advance=n, rate=f"{rate:.{0 if rate >= 10 else 1}f} {self.unit}/s")


@contextmanager
def progress(total: int, description: str, unit: str = "images") -> Iterator[_PlainProgress | _RichProgress]:
    """Show the progress of `total` pieces of work; the object yielded has `.advance(n)`."""
    if not console.is_terminal:
        yield _PlainProgress(total, description, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _RichProgress(bar, total, description, unit)


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table: rich lines on a terminal, aligned plain text elsewhere."""
    if console.is_terminal:
        table = Table(title=escape(title), title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    say(title)
    for row in [columns, *rows]:
        say("  " + "  ".join(f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(row, widths))))


def show_scores(title: str, scores: dict[str, float]) -> None:
    """The table of training and prediction: Top-1 and ACSA of each label (keys `top1_<label>`, `acsa_<label>`) and their means."""
    labels = [key.removeprefix("top1_") for key in scores if key.startswith("top1_")]
    show_table(
        title,
        ["label", "Top-1", "ACSA"],
        [[label, f"{scores[f'top1_{label}']:.4f}", f"{scores[f'acsa_{label}']:.4f}"] for label in labels],
    )


def say_boxes(scores: dict[str, float]) -> None:
    """How well the boxes found fit the given ones (keys `iou`, `iou_over_0.5`, `iou_over_0.8`); nothing where none are given."""
    if "iou" in scores:
        say(
            f"boxes found: mean IoU {scores['iou']:.3f}, {scores['iou_over_0.5']:.1%} above 0.5, {scores['iou_over_0.8']:.1%} above 0.8"
        )


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file that appears under its name only when it is complete: a temporary file in the same folder, fsync, rename.

    Raises OSError with the path where it cannot be written (a full disk, a folder without permission); the old file is then as it was.
    """
    temporary = path.with_name(
        f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.tmp"
    )  # short, where a name is as long as may be
    try:
        with open(
            temporary,
            mode,
            **({} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}),
        ) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete what `whole_file` left in a folder and those below it when its process was killed. Call it under `locked`."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, wait: str = "") -> Iterator[None]:
    """Hold a folder for this process alone (where the system can: not on Windows). Where another one holds it, says `wait` and waits, or raises ValueError."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if wait:
            note(wait)
            fcntl.flock(handle, fcntl.LOCK_EX)
        else:
            os.close(handle)
            raise ValueError(f"another process is writing into {folder}; wait for it to end") from None
    _held.append(handle)
    try:
        yield
    finally:
        _held.remove(handle)
        os.close(handle)


_held: list[int] = []  # locks; a forked helper must not keep one after its parent was killed
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [os.close(handle) for handle in _held])


def write_csv(path: Path, header: list[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV file, UTF-8, whole or not at all."""
    with whole_file(path) as f:  # a file name of other bytes than UTF-8 keeps its bytes
        csv.writer(f, lineterminator="\n").writerows([header, *rows])
