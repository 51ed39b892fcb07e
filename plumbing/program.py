"""What every program needs: how it fails, shows its progress, and is stopped."""

import argparse
import ast
import contextlib
import errno
import json
import math
import os
import select
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

OURS = "SCRATCHDET_PARENT"  # in the environment of a rank that cores.py started: the starter's pid
LOST = 3  # exit status of such a rank if another one has ended; cores.py says why


def run_program(main: Callable[[], object]) -> None:
    """Calls `main` and ends the process with its exit status.

    That is what `main` returns, or 0; 2 after an error, which is printed in one line; 130 after
    Ctrl-C. Characters that the console cannot print appear as escapes.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the program that started this one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # notebooks replace them
            getattr(sys, name).reconfigure(errors="backslashreplace")
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except BrokenPipeError:  # the reader has gone, such as `| head`
        silence_output()
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except (ValueError, OSError) as error:
        full = getattr(error, "errno", 0) in (errno.ENOSPC, getattr(errno, "EDQUOT", -1))
        print(f"error: {error}{disk_full() if full else ''}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:  # of a GPU, of the machine
        what = str(error).splitlines()[0] if str(error) else "out of memory."
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            lost = "Connection", "Broken pipe", "Socket closed"
            if OURS in os.environ and (
                isinstance(error, dist.DistError) or any(word in what for word in lost)
            ):
                sys.exit(LOST)
            raise
        print(f"error: {what} Try a smaller --batch-size or, in training, --accumulate 2",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def disk_full() -> str:
    """The end of the error line for a full disk: which flags of this program fill it."""
    if Path(sys.argv[0]).stem == "train":
        return ": --out or --cache. Free some space, then go on with --resume"
    writing = ("--out", "--cache", "--draw", "--json", "--export", "--results", "--comp4", "--to")
    given = [word.partition("=")[0] for word in sys.argv[1:]]
    named = " or ".join(flag for flag in writing if flag in given)
    return (f": {named}" if named else "") + ". Free some space, or write to another place"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says so: of a GPU with a class of its own, of a CPU in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def silence_output() -> bool:
    """Where nobody reads standard output or error any more, what is printed goes nowhere.

    -> whether that is so: a pipe whose reader has ended, the terminal of a lost connection.
    """
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no file; no poll (Windows)
            end = select.poll()
            end.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in end.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                gone = True
    return gone


def check_file(path: str | None, *inputs: str | Path, flag: str = "") -> None:
    """Makes the folder of a file to be written; ValueError for a folder, or for an input's name.

    `flag`: the one that gave the name, for the error.
    """
    if path is None:
        return
    file, name = Path(os.path.realpath(path)), f"{flag} {path or repr(path)}".lstrip()
    if not path or file.is_dir():
        what = "a folder" if path else "no name"
        raise ValueError(f"{name}: {what}; expected the name of a file to write")
    if any(file == Path(os.path.realpath(one)) for one in inputs):
        raise ValueError(f"{name}: would be overwritten; choose another name for what is written")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        file.open("ab").close()  # find out now, not after an hour's work
        if new:
            file.unlink()
    except OSError as error:
        raise ValueError(f"{name}: cannot be written ({error.strerror}); choose another") from None


@contextlib.contextmanager
def kept_as_json(path: str | None) -> Iterator[list]:
    """`with kept_as_json(path) as rows:` what the list holds at the end becomes a JSON file.

    Where Ctrl-C or an error ends the work early, the file holds what was done, and that is said;
    if that is nothing, an older file stays as it is. None: no file.
    """
    rows: list = []

    def write() -> None:
        with StopSignals():  # a second Ctrl-C must not cut the file
            Path(path).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    try:
        yield rows
    except BaseException:
        if path and rows:
            print(f"stopped early: the results of {len(rows)} pictures go to {path}",
                  file=sys.stderr, flush=True)  # fmt: skip
            write()
        raise
    if path:
        write()


def as_words(value: object) -> str:
    """A flag's value as on a command line: ((160, 0.5), (300, 1.0)) -> "160:0.5 300:1"."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    pairs = value and isinstance(value[0], (list, tuple))
    return " ".join(":".join(f"{n:g}" for n in v) if pairs else str(v) for v in value)


def own_and_others(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """The command line before `--` and after it: flags for this program, and for those it runs."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default to its help text, unless there is none or the text says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        none = action.default is False or action.default in (None, (), argparse.SUPPRESS)
        said = none or "default:" in action.help
        default = as_words(action.default).replace("%", "%%")
        return action.help if said else f"{action.help} (default: {default})"


class SetFields(argparse.Action):
    """FIELD=VALUE ...: each field becomes an argument of its own. `const`: the names there are."""

    def __init__(self, **options):
        super().__init__(**options, default=argparse.SUPPRESS)

    def __call__(self, parser, namespace, values, option=None):
        for text in values:
            name, _, value = text.partition("=")
            if name not in self.const or not value:
                names = ", ".join(self.const)
                parser.error(
                    f"{option} {text}: expected FIELD=VALUE, where FIELD is one of {names}"
                )
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):  # a word, such as conv
                pass
            setattr(namespace, name, value)


def make_folder(path: Path, flag: str) -> Path:
    """Makes a folder with all above it; ValueError with the name of the flag where that, or a file
    in it, cannot be made."""
    what = "no folder can be made there"
    try:
        path.mkdir(parents=True, exist_ok=True)
        what = "nothing can be written there"
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {what} ({error.strerror}); choose another") from None
    return path


def check_range(args: Namespace, names: str, low: float, high: float = math.inf) -> None:
    """ValueError where one of these arguments, or one of its values, is not in [low, high]."""
    expected = (
        f"{low:g} or more" + ", finite" * (high < math.inf)
        if high > 1e300
        else f"{low:g} to {high:g}"
    )
    for name in names.split():
        value = getattr(args, name)
        for v in value if isinstance(value, (list, tuple)) else [value]:
            if v is not None and not low <= v <= high:
                raise ValueError(f"--{name.replace('_', '-')} {v}: expected {expected}")


class Progress:
    """One line with an ETA, rewritten in place on a terminal; elsewhere a line per `every` seconds.

    `progress(done, text)` may be called often; it prints rarely. `share` is the share of the work
    that is done, if that is not done / total; `first` is the share that was done before the start.
    """

    def __init__(
        self, total: int, what: str, *, unit: str = "images", every: float = 30, first: float = 0.0
    ):
        self.total, self.what, self.unit, self.every, self.first = total, what, unit, every, first
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, done: int, text: str = "", *, share: float | None = None) -> None:
        now, last = time.monotonic(), done == self.total
        if now - self.shown < (1 if self.live else self.every) and not last:
            return
        if last and not self.live and now - self.start < self.every and not text:
            return  # it took so short a time that nobody needs a line
        self.shown = now
        share = done / max(1, self.total) if share is None else share
        took = max(1e-9, now - self.start)
        text = text or f"{done / took:.1f} {self.unit}/s"
        line = f"{self.what} {done}/{self.total}  {text}"
        if share > self.first:  # before, nobody knows
            line += f"  ETA {duration(took * (1 - share) / (share - self.first))}"
        end = "\n" if last or not self.live else ""
        print(f"\r{line}  " if self.live else line, file=sys.stderr, flush=True, end=end)


def duration(seconds: float) -> str:
    """75 -> "0:01:15"; from a day on with the days in front."""
    days, rest = divmod(round(seconds), 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


class StopSignals:
    """`with StopSignals() as stop:` SIGTERM, SIGINT and SIGHUP (a lost terminal) set stop.number.

    So the program can finish and save its step before it ends. Outside of the main thread Python
    does not allow it, and nothing is changed.
    """

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopSignals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGHUP"):
                if hasattr(signal, name):  # Windows has no SIGHUP
                    number = getattr(signal, name)
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, _) -> None:
        self.number = number

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
