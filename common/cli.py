"""What the commands share: one-line errors, exit statuses, argument types, device and precision."""

import argparse
import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback

import torch
from tqdm import tqdm

from common import distributed

MAY_CHANGE = {"workers", "device", "out", "overwrite", "resume", "cache", "save_every", "dry_run"}
RUN = "cnn.pt", "vit.pt", "best.pt", "metrics.json", "last.pt"  # a run in a folder has one of these
_afterwards = contextlib.ExitStack()  # what is undone when a command ends


class UserError(Exception):
    """Something that the user can fix: its text is shown as one line, exit status 2."""


class Stopped(BaseException):
    """A run that stops early on purpose: an exit status and a line."""


@contextlib.contextmanager
def refusing(what, kinds=Exception):
    """Errors inside become a UserError: `what` and, if that ends with a colon, their own text."""
    try:
        yield
    except kinds as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
        raise UserError(f"{what} {reason}" if what.endswith(":") else what) from error


def preview(items, n=3):
    """The first few items of a list, for a one-line message."""
    items = list(map(str, items))
    return ", ".join(items[:n]) + f" and {len(items) - n} more" * (len(items) > n)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # with the default of a flag that has one
        told = action.default == argparse.SUPPRESS or "default" in action.help
        return action.help + " (default: %(default)s)" * (bool(action.default) and not told)


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as help, no abbreviations, and one-line errors."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def on_stop(handler, until=_afterwards):
    """Give a handler the signals to stop that nohup lets through, until the ExitStack closes."""
    numbers = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]
    for number in [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]:
        until.callback(signal.signal, number, signal.signal(number, handler))


def stop(number, _=None, advice="to resume, give the command again, where it trains with --resume"):
    """What a signal to stop does: end with exit status 128 + its number."""
    raise Stopped(128 + number, f"stopped by {signal.Signals(number).name}; {advice}")


def explain(error):
    """(exit status, line) for an error; where a line is not enough, the traceback is printed."""
    text = str(error)
    if isinstance(error, UserError):  # a loader process sends its traceback along
        return 2, text.rpartition("UserError: ")[2].strip()
    if isinstance(error, Stopped):
        return error.args
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "t allocate memory" in text:
        return 1, "out of memory: try a smaller --bs or --img-size"
    if "DataLoader worker (pid" in text or "unable to write to file </torch" in text:
        return 1, "a loader process lacked (shared) memory: try --workers 0 or docker's --shm-size"
    if isinstance(error, OSError) and error.strerror:
        return 1, f"{error.filename or 'output'}: {error.strerror}; what was written is whole"
    traceback.print_exception(error)
    return 1, "failed as shown above; what was written is whole, --resume goes on from last.pt"


@atexit.register
def _end_loaders():
    """Kill the loader processes: they ignore the signal by which Python would end them."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would raise as they die
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in [x for x in multiprocessing.active_children() if x.daemon]:
        child.kill()


def run(main):
    """Call main() and exit: 0 done, 2 wrong use or bad data, 1 failed, 128 + n by signal n."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):  # file names may hold any bytes
        stream.reconfigure(errors="backslashreplace")
    on_stop(stop)
    with _afterwards:
        try:
            main()
            _end_loaders()
            sys.stdout.flush()
            return distributed.stop()
        except (Exception, Stopped) as error:
            _end_loaders()
            if isinstance(error, BrokenPipeError):  # `| head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            status, line = explain(error)
            traceback.clear_frames(error.__traceback__)  # closes the progress bar
            where = f" (process {distributed.RANK})" if distributed.RANK else ""
            print(f"error{where}: {line}", file=sys.stderr)
            sys.exit(status)


def lock(descriptor, shared=False):
    """Lock an open file or folder until it is closed; False where another process holds it."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except (ImportError, OSError) as error:  # other errors: the system has no such locks
        return not isinstance(error, BlockingIOError)
    return True


def claim(folder):
    """Make an output folder, for this command alone until it ends. Raises UserError."""
    if distributed.RANK:
        return
    with refusing(f"{folder}: give another folder with --out, this one cannot be used:", OSError):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    descriptor = os.open(folder if os.name == "posix" else os.devnull, os.O_RDONLY)
    _afterwards.callback(os.close, descriptor)
    if made:
        _afterwards.callback(lambda: any(folder.iterdir()) or folder.rmdir())
    if not lock(descriptor):
        raise UserError(f"{folder}: another run writes there now; give another --out")


def checked(kind, allowed, otherwise):
    """An argparse type: a value of this kind that is allowed."""

    def parse(text):
        if not allowed(kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is {otherwise}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it where `kind` fails
    return parse


fraction = checked(float, lambda x: 0 < x <= 1, "not in (0, 1]")
positive = checked(int, lambda x: x >= 1, "not at least 1")
count = checked(int, lambda x: x >= 0, "not at least 0")
rate = checked(float, lambda x: 0 <= x < float("inf"), "not a finite number of at least 0")
share = checked(float, lambda x: 0 <= x <= 1, "not in [0, 1]")


def t_max(text):
    """For argparse: iterations of half a cycle of the learning rate, or "run"."""
    return text if text == "run" else positive(text)


def save_every(text):
    """For argparse: float minutes ("10m"), or int iterations."""
    return rate(text[:-1]) if text.endswith("m") else positive(text)


def refuse_overwrite(out, overwrite, names=RUN):
    """Raise UserError if the folder holds one of the files. overwrite: bool; None: no such flag."""
    there = preview([name for name in names if (out / name).exists()])
    if there and not overwrite:
        ways = "another --out" + " or --overwrite" * (overwrite is not None)
        raise UserError(f"{out}: has {there} of an earlier run; give {ways}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not a folder (--out)")


def refuse_inputs(outputs, *inputs):
    """Raise UserError where a file to write is one of those to read."""
    outputs = [os.path.realpath(path) for path in outputs if path]
    for path in [path for path in inputs if path and os.path.realpath(path) in outputs]:
        raise UserError(f"{path}: is read, and would be replaced; write elsewhere with --out")


def progress(iterable=None, unit="img", **kwargs):
    """A tqdm bar over images: updated often on a terminal, seldom in a log file."""
    kwargs |= {"mininterval": 0.2 if sys.stderr.isatty() else 30, "disable": distributed.RANK > 0}
    return tqdm(iterable, unit=unit, dynamic_ncols=True, **kwargs)


def add_run_arguments(parser, epochs, lr, least=positive):
    """Flags of every command that trains; epochs, lr: their defaults; least: type of epochs."""
    add = parser.add_argument
    zero = "; 0: the arms as they begin" * (least is count)
    add("--epochs", type=least, default=epochs, help="passes over the training images" + zero)
    add("--bs", "--batch-size", type=positive, default=16, help="images per step")
    add("--lr", type=rate, default=lr, help="Adam's learning rate")
    add("--min-lr", type=rate, default=1e-6, help="the minimum of its cosine")
    add("--t-max", type=t_max, default=16, help="iterations down, then up; or: run, one descent")
    add("--dry-run", action="store_true", help="say what it needs, in disk and time, and stop")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="autocast precision")
    add("--workers", type=count, metavar="N", help="loader processes (CPU: 0; GPU: up to 8)")
    add("--resume", nargs="?", const=True, metavar="FILE", help="from FILE, or --out's last.pt")
    add("--save-every", type=save_every, metavar="N", help="save last.pt every N steps, or 10m")
    add("--overwrite", action="store_true", help="replace an earlier run in the output folder")


def pick_device(name):
    """torch.device for --device. Raises UserError where there is none."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda" and distributed.WORLD_SIZE > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each process of torchrun
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it and --amp is off
    with refusing(f"--device {name}:", (RuntimeError, AssertionError)):
        torch.zeros(1, device=name)
    return torch.device(name)


def pick_amp(amp, device):
    """The autocast dtype or None; auto: bf16 if the hardware has it, else fp16 on a GPU, or off."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        amp = "bf16" if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
