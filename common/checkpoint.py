"""Files written whole or not at all; weights files that timm can load (see docs/outputs.md)."""

import contextlib
import csv
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file  # comes with timm

from common.cli import UserError, refusing

TEXT = {"encoding": "utf-8", "newline": "", "errors": "surrogateescape"}


def versions():
    """{library or "python": its version}."""
    import timm  # data.py and processes of the loader do without
    import torchvision

    found = {library.__name__: library.__version__ for library in (torch, torchvision, timm)}
    return {**found, "python": sys.version.split()[0]}


def configuration(args):
    """What config.json says of a command: its words, all of its flags, the versions."""
    return {"command": sys.argv, "arguments": vars(args), "versions": versions()}


@contextlib.contextmanager
def atomic_open(path, mode="w"):
    """Open a file beside `path` that takes its place once it is complete and on disk."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(beside, mode, **({} if "b" in mode else TEXT)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk, which torch wraps: say of which file
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def start_folder(folder, names, fresh=(), age=0):
    """Make the folder; delete `fresh`, and what killed writers of `names` left, if `age` s old."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [path for name in names for path in folder.glob(f".{name}.*.tmp")]
    old = [path for path in left if not age or time.time() - path.stat().st_mtime > age]
    for path in (*old, *(folder / name for name in fresh)):
        path.unlink(missing_ok=True)


def write_json(path, value):
    """Indented. Raises ValueError on NaN and infinity."""
    with atomic_open(path) as file:
        file.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path, *keys):
    """The JSON object in a file, which has these keys. Raises UserError."""
    with refusing(f"{path}: damaged, or no {' or '.join(keys)}; delete and rerun"):
        value = json.loads(Path(path).read_text(TEXT["encoding"], TEXT["errors"]))
        return {**value, **{key: value[key] for key in keys}}


def write_csv(path, header, rows):
    """A header of N names and rows of N cells each."""
    with atomic_open(path) as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_json_lines(path, rows):
    """A dict a line. Raises ValueError on NaN and infinity."""
    with atomic_open(path) as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def save(path, value):
    """torch.save, whole or not at all. Raises OSError where it cannot be written."""
    with atomic_open(path, "wb") as file:
        torch.save(value, file)


def weights_file(model, **metadata):
    """The dict of a weights file: a timm model's state dict, and what it takes to rebuild it."""
    state_dict = {key: x.cpu().contiguous() for key, x in model.state_dict().items()}
    return {"state_dict": state_dict, "num_classes": model.num_classes, **metadata}


def load(path):
    """The dict in a torch or safetensors file, of which nothing is run. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    with refusing(f"{path}: is no checkpoint, or damaged; nothing in it was run"):
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")  # torch does not look at them
        return {**torch.load(path, map_location="cpu", weights_only=True)}
