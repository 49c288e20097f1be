"""What the scripts share on the command line: errors of one line, exit statuses, device, precision."""

import argparse
import errno
import sys

import torch
from tqdm import tqdm


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
    """Call main() and leave with 0; 2 for wrong use or bad data; 1 for a failed run; 130 for ^C."""
    def leave(status, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)

    try:
        main()
    except UserError as error:
        leave(2, error)
    except FloatingPointError as error:
        leave(1, error)
    except torch.OutOfMemoryError:
        leave(1, "out of GPU memory: try a smaller --bs or --img-size")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        leave(1, f"{error.filename or 'output'}: {error.strerror}")
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


def progress(iterable=None, **kwargs):
    """A tqdm bar over images: often on a terminal, seldom in a log file."""
    return tqdm(iterable, unit="img", dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30, **kwargs)


def add_run_arguments(parser):
    """Flags of every script that trains."""
    parser.add_argument("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    parser.add_argument("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"],
                        help="autocast precision; auto: bf16 where the hardware has it, fp16 on "
                             "older GPUs, off elsewhere; losses are float32 always")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="loader processes (default: 0 on a CPU, up to 8 beside a GPU)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace what an earlier run left in the output folder")


def pick_device(name):
    """torch.device for --device. Raises UserError where it is not there."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
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
            has_bf16 = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            amp = "bf16" if has_bf16 else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
