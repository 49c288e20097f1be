"""What the scripts share on the command line: errors of one line, exit statuses, device, precision."""

import argparse
import errno
import os
import signal
import sys
import time

import torch
from tqdm import tqdm

import parallel


class UserError(Exception):
    """Something that the user can mend: its text is shown as one line, exit status 2."""


def some(items, n=3):
    """The first few of a list for a message of one line."""
    items = list(items)
    return ", ".join(map(str, items[:n])) + (f" and {len(items) - n} more" if len(items) > n else "")


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as help, no abbreviations, and one line per error."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run(main):
    """Call main() and leave with 0; 2 for wrong use or bad data; 1 for a failed run; 130 for
    SIGINT, 143 for SIGTERM."""
    def leave(status, message):
        where = f" (process {parallel.rank()})" if parallel.rank() else ""
        print(f"error{where}: {message}", file=sys.stderr)
        sys.exit(status)

    for stream in (sys.stdout, sys.stderr):  # file names may hold any bytes
        stream.reconfigure(errors="backslashreplace")

    try:
        main()
        parallel.stop()
    except UserError as error:
        leave(2, error)
    except FloatingPointError as error:
        leave(1, error)
    except torch.OutOfMemoryError:
        leave(1, "out of GPU memory: try a smaller --bs or --img-size")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        leave(1, f"{error.filename or 'output'}: {error.strerror}; what was there before is whole")
    except Stopped as stopped:
        leave(*stopped.args)
    except KeyboardInterrupt:
        leave(130, "interrupted")


def fraction(text):
    """An argparse type: a number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def positive(text):
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def count(text):
    """An argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def rate(text):
    """An argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no finite number of at least 0")
    return value


def t_max(text):
    """An argparse type: a number of iterations, or "run"."""
    return text if text == "run" else positive(text)


def refuse_overwrite(out, names, overwrite):
    """Raise UserError if the folder holds one of the files and overwriting was not asked for."""
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise UserError(f"{out}: holds an earlier run ({', '.join(there)}); name another folder "
                        f"with --out, or replace it with --overwrite")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not a folder (--out)")


def save_every(text):
    """An argparse type: a number of iterations (int), or of minutes as in 10m (float)."""
    return float(text[:-1]) if text.endswith("m") else positive(text)


def is_due(every, iteration, saved):
    """Whether --save-every asks for a checkpoint now; saved: time.perf_counter() of the last."""
    if isinstance(every, float):
        return time.perf_counter() - saved >= 60 * every
    return every is not None and iteration % every == 0


class Signals:
    """Inside `with`, SIGINT and SIGTERM are noted, for the loop to stop between two steps; a second
    one stops at once."""

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

    def noted(self, device, iteration):
        """The signal, or 0. Several processes agree on it; on GPUs, whose steps are short, every 20
        iterations."""
        if parallel.world() > 1:
            if device.type == "cuda" and iteration % 20:
                return 0
            self.number = int(parallel.over_all(torch.tensor(self.number, device=device), "MAX"))
        return self.number

    def leave(self, message):
        """Leave with 130 (SIGINT) or 143 (SIGTERM)."""
        raise Stopped(128 + self.number, f"stopped by {signal.Signals(self.number).name}; {message}")


class Stopped(Exception):
    """Raised by Signals.leave: an exit status and a line."""


def parse_again(parser, saved, free, path):
    """Parse with a checkpoint's arguments as defaults; raise UserError where one that is not `free`
    was given otherwise."""
    known = vars(parser.parse_args())
    parser.set_defaults(**{k: v for k, v in saved.items() if k in known and k not in free - {"epochs"}})
    args = parser.parse_args()
    data_paths = {k: os.path.abspath(v) for k, v in vars(args).items()
                  if k in ("ckpt", "data", "images", "split") and v}
    changed = [f"--{k.replace('_', '-')} {value} (not {new})" for k, value in saved.items()
               if k in known and k not in free
               and (new := data_paths.get(k, getattr(args, k))) != value]
    if changed:
        raise UserError(f"{path}: was made with other settings: {some(changed, 9)}; leave these flags "
                        f"out, or start anew in another --out")
    return args


def progress(iterable=None, unit="img", **kwargs):
    """A tqdm bar, over images: often on a terminal, seldom in a log file."""
    return tqdm(iterable, unit=unit, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30,
                disable=parallel.rank() > 0, **kwargs)


def add_run_arguments(parser):
    """Flags of every script that trains."""
    parser.add_argument("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    parser.add_argument("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"],
                        help="autocast precision; auto: bf16 where the hardware has it, fp16 on "
                             "older GPUs, off elsewhere; losses are float32 always")
    parser.add_argument("--workers", type=count, metavar="N",
                        help="loader processes (default: 0 on a CPU, up to 8 beside a GPU)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="FILE",
                        help="go on from the last.pt in --out, or from FILE; other flags are taken "
                             "from it")
    parser.add_argument("--save-every", type=save_every, metavar="N",
                        help="also write last.pt every N iterations, or every N minutes (10m); "
                             "by default every epoch and on SIGTERM or SIGINT")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace what an earlier run left in the output folder")


def pick_device(name):
    """torch.device for --device. Raises UserError where it is not there."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and parallel.world() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process of torchrun
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
            has_bf16 = (device.type == "cpu" and torch.backends.mkldnn.is_available()
                        and torch.ops.mkldnn._is_mkldnn_bf16_supported())
            amp = "bf16" if has_bf16 else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
