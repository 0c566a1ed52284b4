"""What every script does alike for its user: one-line errors and exit codes, progress, tables, files written whole.

Imports nothing of ours. Results go to stdout, errors to stderr. Without a terminal all of it is plain text.
"""

import csv
import ctypes
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OUT_OF_MEMORY = "out of memory: lower --batch-size or --workers; in training --grad-accum splits a batch"
LOADER_DIED = "a loading process ended, as where memory or /dev/shm is full; try fewer --workers, or --workers 0"
LOADERS_SILENT = "the loading processes gave nothing for 10 minutes; are the photos' disk and network there?"
SILENT, GRACE = 600, 5  # seconds to wait for a loading process; after a signal that stops the run
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGALRM") if hasattr(signal, name)]
alarm = getattr(signal, "alarm", lambda seconds: 0)  # Windows has none

SCRIPTS = Path(__file__).resolve().parent

console = Console(highlight=False)  # quiet in all but the first process of a run
console.soft_wrap = not console.is_terminal
# Where nobody reads the output any more, go on in silence: the files are the result.
console.on_broken_pipe = lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print one line to stdout, as it is (no markup)."""
    console.print(text, markup=False, emoji=False)


def note(text: str) -> None:
    """Print one line that the user should notice."""
    console.print(Text.assemble(("note:", "yellow"), " ", text))


# ---------------------------------------------------------------- command lines

OFF, NONE = {"show_default": "off"}, {"show_default": "none"}
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", **OFF)]


def option(panel: str, help: str, *names: str, **more: Any) -> typer.models.OptionInfo:
    """An option in a panel of --help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def examples(doc: str) -> str:
    """The end of a script's --help: the commands of its docstring, each followed by its comment."""
    found = ["Examples:"]
    for line in re.findall(r"^ *(python (?:.*\\\n)*.*)", doc, re.MULTILINE):
        command, _, comment = line.partition("  #")
        found.append(command.strip() + (f"\n    #{comment}" if comment else ""))
    return "\n\n".join(found)


def command(script: str, *words: object) -> str:
    """The command line of a script beside the one that was started, to be pasted into a shell."""
    started = Path(sys.argv[0])
    if not (SCRIPTS / started.name).is_file():  # a notebook, or Python itself
        started = Path(__file__)
    return shlex.join(["python", str(started.with_name(script)), *map(str, words)])


# ---------------------------------------------------------------- errors, signals


def usage_error(flag: str, message: object) -> typer.BadParameter:
    """The exception for a wrong value of `flag`; `run_app` turns it into one line and exit code 2."""
    return typer.BadParameter(str(message), param_hint=flag)


class Stopped(KeyboardInterrupt):
    """A stop that was asked for, at a point from which the work can go on."""


class StopSignals:
    """Within it, Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) only set `received`; a second Ctrl-C stops at once.

    In another thread than the main one, where Python allows no handlers, it does nothing.
    """

    received = False
    alarm = staticmethod(lambda seconds: 0)

    def __enter__(self) -> "StopSignals":
        numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []
        self.before = {number: signal.signal(number, self._receive) for number in numbers}
        if self.before:
            self.alarm = alarm
        self.others = multiprocessing.active_children()  # of the program that trains
        return self

    def _receive(self, number: int, frame: object) -> None:
        if number == getattr(signal, "SIGALRM", None):
            raise Stopped if self.received else TimeoutError(LOADERS_SILENT)
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self.alarm(0):  # it waits for a loading process
            self.alarm(GRACE)

    def waiting_for(self, batches: Iterable) -> Iterator:
        """The batches of a loader. Raises Stopped GRACE seconds after a signal, TimeoutError after SILENT seconds."""
        arriving = None
        while True:
            self.alarm(SILENT)
            if self.received:  # asked after the alarm is set: a later signal shortens it itself
                self.alarm(GRACE)
            try:
                arriving = iter(batches) if arriving is None else arriving  # iter() starts the loading processes
                batch = next(arriving, None)
            finally:
                self.alarm(0)
            if batch is None:
                return
            yield batch

    def __exit__(self, kind: type | None, *error: object) -> None:
        self.alarm(0)
        if kind:
            end_processes([process for process in multiprocessing.active_children() if process not in self.others])
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _message(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    if hasattr(error, "format_message"):  # click's own errors, whichever click Typer brings
        return " ".join(error.format_message().split()) + "  (--help shows the options)", error.exit_code
    name, text = type(error).__name__, str(error)
    if "in DataLoader worker process" in text:  # with that process's traceback
        text = text.rpartition(f"\n{name}: ")[2].strip()
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return OUT_OF_MEMORY, 1
    if isinstance(error, RuntimeError) and re.search(r"shared memory|</torch_.*No space left|^DataLoader worker", text):
        return LOADER_DIED, 1
    if name.startswith("Dist") or "gloo" in text.lower() or "NCCL" in text:
        return "another process of this run has ended; its own message says why", 1
    code = 2 if isinstance(error, FileNotFoundError) else 1  # a path that the user named
    if text and (type(error) is ValueError or isinstance(error, OSError)):  # raised by us on purpose
        return text, code
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'^ *File "(.+)", line (\d+)', str(error), re.MULTILINE)  # of a loading process
    frames = [(Path(file).resolve(), line) for file, line in frames]
    places = [f"{file.name}, line {line}; " for file, line in frames if file.parent == SCRIPTS]
    return f"{name}: {' '.join(text.split())}  ({places[-1] if places else ''}--debug shows where)", code


def run_app(app: typer.Typer) -> None:
    """Run a Typer app: one line and exit code 2 for misuse, 1 for a failure; `--debug` shows the traceback instead."""
    in_torchrun = "WORLD_SIZE" in os.environ  # where a process may wait for others in C, no handler of Python's runs
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL and not in_torchrun:  # SIGINT: of answer_early
            signal.signal(number, signal.default_int_handler)
    raise SystemExit(_run(app) or 0)


def answer_early(app: typer.Typer) -> None:
    """Answer --help and misuse before torch is imported, which takes seconds. What torch finds as it loads is set."""
    set_up_libraries()
    parser = typer.main.get_command(app)
    parser.invoke = lambda context: context  # the command line is parsed, and not yet run
    if _run(parser) == 0:  # --help was printed
        raise SystemExit(0)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback


def set_up_libraries() -> None:
    """Defaults of OpenMP and of glibc's malloc that suit training, where the user has set none.

    A waiting OpenMP thread would spin for long, and keep the core from the thread that it waits for where another
    program has the other cores. malloc would give each step's memory back to the kernel, and get it again by pages.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with suppress(AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def _run(app: Callable) -> object:
    """What a Typer app or command returns. Its errors become one line and an exit code."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a file name may hold bytes that are no UTF-8
    if not debug:
        warnings.filterwarnings("ignore", module=r"(torch|timm|torchvision|PIL)")
        warnings.filterwarnings("once", message=".*deterministic")  # torch: what cannot repeat to the bit here
        warnings.showwarning = lambda message, *where, **more: note(str(message).splitlines()[0])
    try:
        if (result := app(standalone_mode=False)) == 130:  # some versions of Typer return it after Ctrl-C
            raise KeyboardInterrupt
        return result
    except (KeyboardInterrupt, typer.Abort):
        message, code = "interrupted", 130
        end_processes(multiprocessing.active_children())
    except Exception as error:
        message, code = _message(error)
        end_processes(multiprocessing.active_children())
        if console.quiet and hasattr(error, "format_message"):  # the first of several processes says it
            time.sleep(1)
            raise SystemExit(code) from None
        if debug:
            raise
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", message))
    raise SystemExit(code)


def end_processes(processes: list) -> None:
    """Kill the daemons among these: loading processes ignore other signals, and Python would wait for them for ever."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where one is killed
    for process in processes:
        if process.daemon:
            process.kill()


# ---------------------------------------------------------------- progress, tables


class _Progress:
    """A bar on a terminal; elsewhere, for a log file, a plain line every 30 seconds, at first after 5."""

    def __init__(self, bar: Progress, description: str, total: int, unit: str):
        self.bar, self.unit, self.printed = bar, unit, 0.0
        bar.add_task(description, total=total, rate="")
        self.task = bar.tasks[0]

    def advance(self, n: int) -> None:
        task, seconds = self.task, self.task.elapsed
        rate = (task.completed + n) / max(seconds, 1e-9)
        speed = f"{rate:.1f} {self.unit}/s"
        self.bar.update(task.id, advance=n, rate=speed)
        left = task.remaining / max(rate, 1e-9)
        soon = self.printed == 0 and left > 60
        if not console.is_terminal and left and seconds - self.printed >= (5 if soon else 30):
            self.printed = seconds
            done = f"{task.completed}/{task.total} {self.unit}"
            say(f"{task.description} {done}, {speed}, {rough_time(left)} left")


def rough_time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def warn_of_days(seconds: float) -> None:
    if seconds > 86_400:
        note(f"about {rough_time(seconds)} on this CPU; README (The organisers' data) has a command for one")


@contextmanager
def progress(total: int, description: str, unit: str = "images") -> Iterator[_Progress]:
    """Show the progress of `total` units of work; the object yielded has `.advance(n)`."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    with bar if console.is_terminal else nullcontext():
        yield _Progress(bar, description, total, unit)


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table as aligned text, the first column to the left."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    say(title)
    for first, *cells in [columns, *rows]:
        say("  ".join([f"  {first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths[1:]))]))


def show_scores(title: str, scores: dict[str, float]) -> None:
    """The table of training and prediction: Top-1 and ACSA of each label (`top1_<label>`, `acsa_<label>`)."""
    labels = [key.removeprefix("top1_") for key in scores if key.startswith("top1_")]
    rows = [[label, f"{scores[f'top1_{label}']:.4f}", f"{scores[f'acsa_{label}']:.4f}"] for label in labels]
    show_table(title, ["label", "Top-1", "ACSA"], rows)


def epoch_line(row: dict, epochs: int, is_best: bool) -> str:
    """A row of metrics.csv in words."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"lr {row['lr']:.1e}", f"loss {row['train_loss']:.3f}"]
    if row["val_loss"] == row["val_loss"]:  # NaN where nothing is held out
        labels = [key.removeprefix("val_top1_") for key in row if key.startswith("val_top1_")]
        each = ", ".join(f"{label} {row[f'val_top1_{label}']:.3f}" for label in labels if label != "mean")
        parts += [f"val_loss {row['val_loss']:.3f}", f"top1 {row['val_top1_mean']:.4f} ({each})"]
        parts += [f"acsa {row['val_acsa_mean']:.4f}"]
    return "  ".join([*parts, f"{row['seconds']:.0f} s", *(["best"] if is_best else [])])


def say_boxes(scores: dict[str, float]) -> None:
    """How well predicted boxes fit the given ones (`iou`, `iou_over_0.5`, `iou_over_0.8`), where any are given."""
    if "iou" in scores:
        above = f"{scores['iou_over_0.5']:.1%} above 0.5, {scores['iou_over_0.8']:.1%} above 0.8"
        say(f"predicted boxes: mean IoU {scores['iou']:.3f}, {above}")


# ---------------------------------------------------------------- files


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file that gets its name only when it is complete: a temporary file beside it, fsync, rename.

    Raises OSError with the path where it cannot be written; the old file is then as it was.
    """
    # a short name: `path` may have one as long as names can be
    temporary = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        with open(temporary, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Delete what `atomic_write` left in a folder and below when its process was killed."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


# The folders that are locked. A forked loading process must not hold them after its parent was killed.
_held: list[int] = []
if fcntl:
    os.register_at_fork(after_in_child=lambda: [os.close(handle) for handle in _held])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone (not on Windows). Raises ValueError where another process holds it."""
    if not fcntl:
        _remove_leftovers(folder)
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _held.append(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing into {folder}; wait for it to end") from None
        except OSError:  # some clusters' disks have no locks
            pass
        _remove_leftovers(folder)
        yield
    finally:
        _held.remove(handle)
        os.close(handle)


def user_cache() -> Path:
    """Where the user's caches of this program lie. Raises OSError where there is no such place."""
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise OSError("there is no home folder; XDG_CACHE_HOME=DIR names a place for caches") from None
    return Path(caches, "fashion-attributes")


def write_csv(path: Path, header: list[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV file, UTF-8, whole or not at all. File names of other bytes keep these."""
    with atomic_write(path) as f:
        csv.writer(f, lineterminator="\n").writerows([header, *rows])
