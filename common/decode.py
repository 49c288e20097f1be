"""Images are decoded once, to a memory-mapped file per data set and image size: a checksum, a table
of ROW, (N, 3, S, S) uint8. What changed since (path, size, times) is decoded again."""

import contextlib
import functools
import hashlib
import os
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torchvision.transforms.v2 import functional

from common.checkpoint import atomic_open
from common.cli import UserError, lock, progress
from common.dicom import is_dicom, to_pillow
from common.near import perceptual_hash

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIELDS = ("key", "hash", "near", "width", "height", "frames", "mode", "crc")
ROW = np.dtype([*zip(FIELDS, ("u8", "u8", "4u8", "i4", "i4", "i4", "U8", "u4"))])
TURNS = dict(enumerate((0, 3, 1, 5, 4, 6, 2), 2))  # EXIF orientation: Image.Transpose
BUDGET, TURN = 200, threading.Lock()  # megapixels of the images that are decoded at a time
MEGAPIXELS = threading.Semaphore(BUDGET)
WHITE_IS_ZERO = b"MM", 0, (1,), 1, (16,), ()  # which Pillow lacks: big-endian 16-bit grey
TiffImagePlugin.OPEN_INFO.setdefault(WHITE_IS_ZERO, ("I;16B", "I;16B"))


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


def to_rgb(image):
    """Any Pillow image as it is opened: 8-bit RGB, upright by EXIF, transparency laid over black.
    16-bit, 32-bit and float grey is scaled from its own minimum and maximum to 0..255 (constant:
    black; NaN, infinite, transparent: minimum). Raises UnidentifiedImageError, as Pillow does."""
    tags, clear = getattr(image, "tag_v2", {339: (2,)}), image.info.get("transparency")
    if _misread(tags):
        raise Image.UnidentifiedImageError
    if isinstance(clear, tuple) and ";16" in str(getattr(image, "tile", "")):  # cut to 8, as pixels
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    image.load()
    turn = None
    with contextlib.suppress(Exception):  # broken EXIF
        turn = TURNS.get(image.getexif().get(0x112))
    image = image if turn is None else image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        if image.mode == "I" and tags.get(339, (1,))[0] == 1:
            values = values % 2**32  # unsigned: those of Pillow are signed
        values = np.ma.masked_invalid(-values if tags.get(262) == 0 else values)
        values = np.ma.masked_equal(values, clear)
        values = (values - values.min()).filled(0)
        image = Image.fromarray(np.rint(values * (255 / (values.max() or 1))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(N, 3, H, W) uint8 -> float32, channels normalized (F.2.2)."""
    images = functional.to_dtype(images, torch.float32, scale=True)
    return functional.normalize(images, mean, std, inplace=True)


def square(rgb, size):
    """Pillow RGB -> (3, size, size) uint8: bilinear, antialiased, the aspect ignored (F.2.2)."""
    return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def _misread(tags):  # what Pillow opens, but reads wrong: tests/test_pixels.py tries all kinds
    bits, kind, packed = tags.get(258, (1,))[0], tags.get(339, (1,))[0], tags.get(259, 1) != 1
    planes = tags.get(284) == 2 and not packed and (bits not in (1, 8) or not tags.get(262))
    planes |= tags.get(284) == tags.get(277) == 2
    return planes or kind != 1 and (bits == 8 or packed and tags.prefix == b"MM")


def _why_not(file):  # what a TIFF file holds, or that this is none
    with contextlib.suppress(Exception), open(file, "rb") as f:
        head = f.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + f.read(8 if head[2] == 43 else 0))
        f.seek(tags.next)
        tags.load(f)
        kind = {1: "unsigned", 2: "signed", 3: "float"}.get(tags.get(339, (1,))[0], "complex")
        what = f"TIFF of {tags.get(277, 1)} x {tags.get(258, (1,))[0]}-bit {kind}"
        what += f" ({tags.prefix.decode()}, compression {tags.get(259, 1)}"
        return f"{what}, planes {tags.get(284, 1)}) is not supported: convert it"
    return "not an image" if os.path.getsize(file) else "an empty file"


def _take(room, width, height):  # wait until there is room for an image, until `room` is closed
    with TURN:
        for _ in range(min(BUDGET, width * height // 10**6 + 1)):
            room.enter_context(MEGAPIXELS)


def decode(source, size):
    """square() of a file (first frame, EXIF orientation applied) or (H, W[, 3]) uint8 array, and
    {"hash": of all pixels, "near": perceptual_hash(), "width", "height", "frames", "mode"}. Raises
    ValueError, of one line."""
    path = isinstance(source, str)
    if path and os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("not a regular file")  # to open a named pipe would wait for ever
    Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses above twice as many
    try:
        with contextlib.ExitStack() as room:
            if path and is_dicom(source):
                image, frames = to_pillow(source, functools.partial(_take, room))
            else:
                image = room.enter_context(Image.open(source) if path else Image.fromarray(source))
                frames = getattr(image, "n_frames", 1)
                _take(room, *image.size)
            mode, rgb = image.mode, to_rgb(image)
            pixel_hash = digest(f"{rgb.width}x{rgb.height}", np.asarray(rgb))
            row = pixel_hash, perceptual_hash(rgb), *rgb.size, frames, mode
            return square(rgb, size), dict(zip(FIELDS[1:], row))
    except Image.DecompressionBombError:
        raise ValueError("above 200 megapixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(_why_not(source)) from None
    except UserError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # decoders raise all kinds on broken files
        reason = " ".join(f"broken image ({error})".split())
        raise ValueError(getattr(error, "strerror", "") or reason) from None


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

    def keep(self, mask):  # as in common.readers
        self.rows = self.rows[mask]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        if self.file is None:
            try:
                return decode(self.sources[row], self.size)[0]
            except ValueError as error:
                raise UserError(f"{self.sources[row]}: {error}; it was readable before") from None
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
            if not left or not isinstance(error, FileNotFoundError):  # else another run removed it
                what = f"{error.strerror}; it needs {table.size * 3 * size**2 / 1e9:.2g} GB"
                raise UserError(f"{file.parent}: {what}: use --cache DIR or --no-cache") from error


def _in_order(function, n, use):  # use(function(i)) for i below n; function runs in threads
    blocks = (range(i, min(i + 64, n)) for i in range(0, n, 64))  # whatever the disk's pace
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on odd EXIF and palettes
        results = (result for block in blocks for result in pool.map(function, block))
        for result in progress(results, desc="checking images", total=n):
            use(result)


def _update(file, pattern, size, table, known, pixels):
    """Write the map and table, unless it is there, and open it: pixels(i) makes row i, from images
    or from `known`, which gets {key: (row, pixels)} of the maps of this pattern."""
    for earlier in dict.fromkeys([file, *file.parent.glob(pattern)]):
        with contextlib.suppress(OSError, ValueError):
            old = DecodedImages(None, size, earlier)
            if earlier == file and np.array_equal(old.table["key"], table["key"]):
                for i in np.flatnonzero(old.table["width"] == 0):  # unreadable then: still so?
                    pixels(i)
                if not table["width"].any():
                    table[:] = old.table
                    return old
            known |= {int(r["key"]): (r, x) for r, x in zip(old.table, old.map) if r["width"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(".*.map.*.tmp"):  # by runs that were killed
        with contextlib.suppress(FileNotFoundError):  # or that are done just now
            if time.time() - left.stat().st_mtime > 600:
                left.unlink()
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
