"""What the commands share: one-line errors, exit statuses, argument types, device and precision."""

import argparse
import errno
import os
import signal
import sys
import traceback

import torch
from tqdm import tqdm

from common import distributed

MAY_CHANGE = {"workers", "device", "out", "overwrite", "resume", "cache", "save_every"}


class UserError(Exception):
    """Something that the user can fix: its text is shown as one line, exit status 2."""


class Stopped(Exception):
    """A run that stops early on purpose: an exit status and a line."""


def preview(items, n=3):
    """The first few items of a list, for a one-line message."""
    items = list(map(str, items))
    return ", ".join(items[:n]) + f" and {len(items) - n} more" * (len(items) > n)


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as help, no abbreviations, and one-line errors."""

    def __init__(self, doc, **kwargs):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, allow_abbrev=False, formatter_class=raw, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run(main):
    """Call main() and exit: 0 done, 2 wrong use or bad data, 1 failed, 130 SIGINT, 143 SIGTERM."""

    def leave(status, message):
        traceback.clear_frames(sys.exc_info()[2])  # closes the progress bar
        where = f" (process {distributed.rank()})" if distributed.rank() else ""
        print(f"error{where}: {message}", file=sys.stderr)
        sys.exit(status)

    for stream in (sys.stdout, sys.stderr):  # file names may hold any bytes
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        distributed.stop()
    except (UserError, FloatingPointError) as error:
        leave(2 if isinstance(error, UserError) else 1, error)
    except torch.OutOfMemoryError:
        leave(1, "out of GPU memory: try a smaller --bs or --img-size")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        leave(1, f"{error.filename or 'output'}: {error.strerror}; what was there before is intact")
    except Stopped as error:
        leave(*error.args)
    except KeyboardInterrupt:
        leave(130, "interrupted")


def _number(kind, allowed, meaning):
    """An argparse type: a number of this kind that is allowed."""

    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {meaning}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` fails
    return parse


fraction = _number(float, lambda x: 0 < x <= 1, "in (0, 1]")
positive = _number(int, lambda x: x >= 1, "at least 1")
count = _number(int, lambda x: x >= 0, "at least 0")
rate = _number(float, lambda x: 0 <= x < float("inf"), "a finite number of at least 0")


def t_max(text):
    """An argparse type: a number of iterations, or "run"."""
    return text if text == "run" else positive(text)


def save_every(text):
    """An argparse type: a number of iterations (int), or of minutes as in 10m (float)."""
    return float(text[:-1]) if text.endswith("m") else positive(text)


def refuse_overwrite(out, names, overwrite):
    """Raise UserError if the folder holds one of the files and overwriting was not asked for."""
    there = preview([name for name in names if (out / name).exists()])
    if there and not overwrite:
        raise UserError(f"{out}: has {there} of an earlier run; give another --out or --overwrite")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not a folder (--out)")


def parse_again(parser, saved, may_change, path):
    """Parse with a checkpoint's arguments as defaults. Raises UserError where one that may not
    change was given with another value."""
    settings = vars(parser.parse_args()).keys() - may_change
    fixed = {key: value for key, value in saved.items() if key in settings}
    parser.set_defaults(**{key: saved[key] for key in saved if key in fixed or key == "epochs"})
    args = parser.parse_args()
    given = dict(vars(args))
    for key in ("ckpt", "data", "images", "split"):
        given[key] = given.get(key) and os.path.abspath(given[key])
    changed = [key for key in fixed if given[key] != fixed[key]]
    if changed:
        flags = [f"--{k.replace('_', '-')} {fixed[k]} (not {given[k]})" for k in changed]
        what = f"was made with {preview(flags, 9)}"
        raise UserError(f"{path}: {what}; leave these flags out, or start anew in another --out")
    return args


class Signals:
    """Inside `with`, SIGINT and SIGTERM are noted, for the loop to stop; a second one acts."""

    def __enter__(self):
        self.number = 0
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.number = number
        self.__exit__()

    def leave(self, message):
        """Leave with 130 (SIGINT) or 143 (SIGTERM)."""
        name = signal.Signals(self.number).name
        raise Stopped(128 + self.number, f"stopped by {name}; {message}")


def progress(iterable=None, unit="img", **kwargs):
    """A tqdm bar over images: updated often on a terminal, seldom in a log file."""
    kwargs |= {"mininterval": 0.2 if sys.stderr.isatty() else 30, "disable": distributed.rank() > 0}
    return tqdm(iterable, unit=unit, dynamic_ncols=True, **kwargs)


def add_run_arguments(parser, epochs, lr):
    """Flags of every command that trains; epochs, lr: their defaults."""
    add = parser.add_argument
    add("--epochs", type=positive, default=epochs, help="at most; passes over the training images")
    add("--bs", "--batch-size", type=positive, default=16, help="images per step")
    add("--lr", type=rate, default=lr, help="Adam's learning rate")
    add("--min-lr", type=rate, default=1e-6, help="the minimum of its cosine")
    iterations = "iterations from --lr down to --min-lr, and up again, or: run, one descent"
    add("--t-max", type=t_max, default=16, metavar="N", help=iterations)
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="autocast precision")
    add("--workers", type=count, metavar="N", help="loader processes (CPU: 0; GPU: up to 8)")
    resume = "from the last.pt in --out, or from FILE; it holds the other flags"
    add("--resume", nargs="?", const=True, metavar="FILE", help=resume)
    add("--save-every", type=save_every, metavar="N", help="save last.pt every N steps, or 10m")
    add("--overwrite", action="store_true", help="replace an earlier run in the output folder")


def pick_device(name):
    """torch.device for --device. Raises UserError where there is none."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda" and distributed.world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each process of torchrun
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it and --amp is off
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def pick_amp(amp, device):
    """The autocast dtype for --amp on this device, None for full precision. "auto": bf16 where the
    hardware has it, else fp16 on a GPU and off elsewhere."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        amp = "bf16" if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
