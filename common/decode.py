"""Images are decoded once, to a memory-mapped file per data set and image size: a checksum, a table
of ROW, (N, 3, S, S) uint8. What changed since (path, size, times) is decoded again."""

import contextlib
import hashlib
import os
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from common.checkpoint import atomic_open, start_folder
from common.cli import UserError, lock, progress, refusing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIELDS = ("key", "hash", "near", "width", "height", "frames", "mode", "crc")
ROW = np.dtype([*zip(FIELDS, ("u8", "u8", "4u8", "i4", "i4", "i4", "U8", "u4"))])


def default_dir():
    """$CASS_CACHE, or a folder `cass` in the user's cache directory, or in that of all."""
    home = os.path.expanduser("~/.cache")  # stays as it is where nobody has that home
    base = os.environ.get("XDG_CACHE_HOME") or (tempfile.gettempdir() if home[0] == "~" else home)
    return Path(os.environ.get("CASS_CACHE") or Path(base) / "cass")


def digest(*parts):
    """8 bytes of BLAKE2b over strings and buffers, as an int."""
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        h.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
    return int.from_bytes(h.digest(), "little")


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(N, 3, H, W) uint8 -> float32, channels normalized (F.2.2)."""
    images = functional.to_dtype(images, torch.float32, scale=True)
    return functional.normalize(images, mean, std, inplace=True)


class DecodedImages:
    """Images by number, (3, S, S) uint8: decoded from `sources`, or from the map in `file`, each
    checked. A broken map raises OSError or ValueError, an item that is gone since UserError."""

    def __init__(self, sources, size, file=None, rows=None):
        self.sources, self.size, self.file, n = sources, size, file, len(sources or ())
        if file is not None:
            with open(file, "rb") as f:
                lock(f, shared=True)  # while these pixels are in memory the map is not removed
                n, rest = divmod(os.fstat(f.fileno()).st_size - 8, ROW.itemsize + 3 * size**2)
                checksum = int.from_bytes(f.read(8), "little")
                self.table = np.frombuffer(f.read(max(n, 0) * ROW.itemsize), ROW)
                if rest or checksum != digest(self.table.tobytes()):
                    raise ValueError(f"{file}: is no map of decoded images, or damaged")
                self.map = np.asarray(np.memmap(f, np.uint8, "r", f.tell(), (n, 3, size, size)))
        self.rows = np.arange(n) if rows is None else rows

    def __reduce__(self):  # for spawned workers: a map would travel as pixels
        return DecodedImages, (self.sources, self.size, self.file, self.rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        if self.file is None:
            from common.pixels import decode  # not loaded where there is a map

            with refusing(f"{self.sources[row]}: was readable before:", ValueError):
                return decode(self.sources[row], self.size)[0]
        pixels = self.map[row]
        if zlib.crc32(pixels) != self.table["crc"][row]:
            Path(self.file).unlink(missing_ok=True)
            raise UserError(f"{self.file}: was damaged; it is deleted, and made anew next time")
        return pixels


def _key(source):  # a number for a file's path, size and times, or for an array's pixels
    if not isinstance(source, str):
        return digest(f"{source.shape}", np.ascontiguousarray(source))
    with contextlib.suppress(OSError):  # decode() will name the reason
        stat = os.stat(source)
        return digest(f"{source}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}")
    return 0


def decode_all(sources, size, name, directory):
    """Decode N paths (str) or arrays, of the data set at the path `name`, to a map in `directory`
    (None: no map): (N,) of ROW, DecodedImages, {unreadable: reason}. Raises UserError."""
    table, bad, known = np.zeros(len(sources), ROW), {}, {}
    table["key"] = [_key(source) for source in sources]

    def pixels(i):
        row, array = known.get(int(table["key"][i]), (None, None))
        if array is not None and zlib.crc32(array) == row["crc"]:
            table[i] = row
            return array
        from common.pixels import decode

        try:
            array, metadata = decode(sources[i], size)
            table[i] = (table["key"][i], *metadata.values(), 0)
        except ValueError as error:
            bad[i], array = str(error), np.zeros((3, size, size), np.uint8)
        table["crc"][i] = zlib.crc32(array)
        return array

    if directory is None:
        _in_order(pixels, len(sources), lambda array: None)
        return table, DecodedImages(sources, size), bad
    stem = f"{digest(os.path.abspath(name)):016x}-{size}-v3-"  # v3: the version of decode()
    file = Path(directory) / f"{stem}{digest(table['key'].tobytes()):016x}.map"
    for left in range(9, -1, -1):
        try:
            return table, _update(file, f"{stem}*.map", size, table, known, pixels), bad
        except OSError as error:
            if not left or not isinstance(error, FileNotFoundError):  # removed by another run
                what = f"{error.strerror}; it needs {table.size * 3 * size**2 / 1e9:.2g} GB"
                raise UserError(f"{file.parent}: {what}: use --cache DIR or --no-cache") from error


def _in_order(function, n, use):  # use(function(i)) for i below n, of which 64 at a time in threads
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on odd EXIF and palettes
        results = (x for i in range(0, n, 64) for x in pool.map(function, range(i, min(i + 64, n))))
        for result in progress(results, desc="checking images", total=n):
            use(result)


def _update(file, pattern, size, table, known, pixels):
    """Write the map and table, unless it is there, and open it: pixels(i) makes row i, from images
    or from `known`, which gets {key: (row, pixels)} of the maps of this pattern."""
    for earlier in dict.fromkeys([file, *file.parent.glob(pattern)]):
        with contextlib.suppress(OSError, ValueError):
            old = DecodedImages(None, size, earlier)
            if earlier == file:  # its name holds a digest of the keys
                for i in np.flatnonzero(old.table["width"] == 0):  # unreadable then: still so?
                    pixels(i)
                if not table["width"].any():
                    table[:] = old.table
                    return old
            known |= {int(r["key"]): (r, x) for r, x in zip(old.table, old.map) if r["width"]}
    start_folder(file.parent, ["*.map"], age=600)
    with atomic_open(file, "wb") as f:
        f.write(bytes(8 + table.nbytes))
        _in_order(pixels, len(table), f.write)
        f.seek(0)
        f.write(digest(table.tobytes()).to_bytes(8, "little") + table.tobytes())
    known.clear()
    old = DecodedImages(None, size, file)  # and frees the earlier maps
    for earlier in set(file.parent.glob(pattern)) - {file}:
        with contextlib.suppress(OSError), open(earlier, "rb") as f:
            if lock(f):  # nobody reads it
                earlier.unlink()
    return old
