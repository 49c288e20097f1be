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


class UserError(Exception):
    """Something that the user can fix: its text is shown as one line, exit status 2."""


class Stopped(Exception):
    """A run that stops early on purpose: an exit status and a line."""


def preview(items, n=3):
    """The first few items of a list, for a one-line message."""
    items = list(items)
    return ", ".join(map(str, items[:n])) + (
        f" and {len(items) - n} more" if len(items) > n else ""
    )


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as help, no abbreviations, and one-line errors."""

    def __init__(self, doc, **kwargs):
        super().__init__(
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

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
    except UserError as error:
        leave(2, error)
    except FloatingPointError as error:
        leave(1, error)
    except torch.OutOfMemoryError:
        leave(1, "out of GPU memory: try a smaller --bs or --img-size")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        leave(1, f"{error.filename or 'output'}: {error.strerror}; what was there before is intact")
    except Stopped as stopped:
        leave(*stopped.args)
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
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{out}: holds an earlier run ({', '.join(there)}); name another folder "
            f"with --out, or replace it with --overwrite"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not a folder (--out)")


def parse_again(parser, saved, may_change, path):
    """Parse with a checkpoint's arguments as defaults; raise UserError where one that may not change
    was given with another value."""
    known = vars(parser.parse_args())
    parser.set_defaults(
        **{k: v for k, v in saved.items() if k in known and k not in may_change - {"epochs"}}
    )
    args = parser.parse_args()
    paths = {
        k: os.path.abspath(v)
        for k, v in vars(args).items()
        if k in ("ckpt", "data", "images", "split") and v
    }
    changed = [
        f"--{k.replace('_', '-')} {value} (not {new})"
        for k, value in saved.items()
        if k in known and k not in may_change and (new := paths.get(k, getattr(args, k))) != value
    ]
    if changed:
        raise UserError(
            f"{path}: was made with other settings: {preview(changed, 9)}; leave these "
            f"flags out, or start a new run in another --out"
        )
    return args


class Signals:
    """Inside `with`, SIGINT and SIGTERM are noted, so that a loop can stop between two steps; a
    second one stops at once."""

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
        raise Stopped(
            128 + self.number, f"stopped by {signal.Signals(self.number).name}; {message}"
        )


def progress(iterable=None, unit="img", **kwargs):
    """A tqdm bar over images: updated often on a terminal, seldom in a log file."""
    return tqdm(
        iterable,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=distributed.rank() > 0,
        **kwargs,
    )


def duration(seconds):
    """Seconds as "40 s", "12 min", "3.5 h" or "4.1 days"."""
    for unit, size, below in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < below * size:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def add_run_arguments(parser):
    """Flags of every command that trains."""
    add = parser.add_argument
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add(
        "--amp",
        default="auto",
        choices=["auto", "off", "bf16", "fp16"],
        help="autocast precision; auto: bf16 where the hardware has it, fp16 on older GPUs, off "
        "elsewhere; losses are always float32",
    )
    add(
        "--workers",
        type=count,
        metavar="N",
        help="loader processes (default: 0 on a CPU, up to 8 beside a GPU)",
    )
    add(
        "--resume",
        nargs="?",
        const=True,
        metavar="FILE",
        help="resume from the last.pt in --out, or from FILE, which holds the other flags",
    )
    add(
        "--save-every",
        type=save_every,
        metavar="N",
        help="also write last.pt every N iterations, or every N minutes (10m); default: every "
        "epoch, and on SIGTERM or SIGINT",
    )
    add("--overwrite", action="store_true", help="replace an earlier run in the output folder")


def pick_device(name):
    """torch.device for --device. Raises UserError where there is none."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda" and distributed.world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each process of torchrun
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it and --amp is off
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def pick_amp(amp, device):
    """The autocast dtype for --amp on this device, None for full precision."""
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            has_bf16 = (
                device.type == "cpu"
                and torch.backends.mkldnn.is_available()
                and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            )
            amp = "bf16" if has_bf16 else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
