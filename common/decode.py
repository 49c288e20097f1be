"""Every image is opened, checked, hashed and decoded once, to a memory-mapped file of uint8 pixels.

One file per data set and image size, written whole or not at all: a checksum, a table of ROW, and
(N, 3, S, S) pixels, whose checksums are in the table. An image is known by path, size and times of
its last change: what changed is decoded again, the rest is copied.
"""

import contextlib
import hashlib
import os
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from common.checkpoint import atomic_open
from common.cli import UserError, lock, progress

VERSION = 2  # of decode(); another number, another file
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIELDS = {
    "key": "u8",
    "hash": "u8",
    "width": "i4",
    "height": "i4",
    "frames": "i4",
    "mode": "U8",
    "crc": "u4",
}
ROW = np.dtype(list(FIELDS.items()))


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
    """Any Pillow image as 8-bit RGB, transparency laid over black. 16-bit, 32-bit and float grey is
    scaled from its own minimum and maximum to 0..255 (constant: black; NaN, infinite: minimum)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        finite = np.isfinite(values)
        low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0, 0)
        values = np.where(finite, values, low) - low
        image = Image.fromarray(np.rint(values * (255 / (high - low or 1))).astype(np.uint8))
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
    resized = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def decode(source, size):
    """square() of a file (its first frame, EXIF orientation applied) or of an array, (H, W[, 3])
    uint8, and {"hash": of the full-size RGB pixels, "width", "height", "frames", "mode": as in the
    file}. Raises ValueError with the reason in one line."""
    open_image = Image.open if isinstance(source, str) else Image.fromarray
    if isinstance(source, str) and os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("not a regular file")  # to open a named pipe would wait for ever
    Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses above twice as many
    try:
        with open_image(source) as image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            rgb = to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ValueError("above 200 megapixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not an image" if os.path.getsize(source) else "an empty file") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except Exception as error:  # decoders raise all kinds on broken files
        raise ValueError(f"broken image file ({error})") from None
    pixel_hash = digest(f"{rgb.width}x{rgb.height}", np.asarray(rgb))
    return square(rgb, size), dict(zip(ROW.names[1:], (pixel_hash, *rgb.size, frames, mode)))


class DecodedImages:
    """The decoded images by number, as (3, S, S) uint8 arrays: from the map, where each is checked,
    or from the files. An item that cannot be had any more raises UserError."""

    def __init__(self, sources, size, file=None, rows=None):
        self.sources, self.size, self.file = sources if file is None else None, size, file
        self.rows = np.arange(len(sources)) if rows is None else rows
        self.table, self.map = (None, None) if file is None else _open(file, size)

    def __reduce__(self):  # for spawned workers: a map would travel as pixels
        return DecodedImages, (self.sources, self.size, self.file, self.rows)

    def keep(self, mask):
        """Leave out the images where the (N,) bool mask is False."""
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
        if zlib.crc32(self.map[row]) != self.table["crc"][row]:
            Path(self.file).unlink(missing_ok=True)
            raise UserError(f"{self.file}: was damaged; it is deleted, and made anew next time")
        return self.map[row]


def _open(file, size):
    """(table, pixels) of a map, which is not removed as long as these pixels are in memory. Raises
    OSError or ValueError where it is broken."""
    with open(file, "rb") as f:
        lock(f, shared=True)
        n, rest = divmod(os.fstat(f.fileno()).st_size - 8, ROW.itemsize + 3 * size**2)
        checksum, table = f.read(8), np.frombuffer(f.read(max(n, 0) * ROW.itemsize), ROW)
        if rest or checksum != _checksum(table):
            raise ValueError(f"{file}: is no map of decoded images, or damaged")
        return table, np.memmap(f, np.uint8, "r", f.tell(), (n, 3, size, size))


def _checksum(table):
    return digest(table.tobytes()).to_bytes(8, "little")


def _key(source):
    """A number for a file's path, size and times, or for an array's pixels."""
    if not isinstance(source, str):
        return digest(f"{source.shape}", np.ascontiguousarray(source))
    try:
        stat = os.stat(source)
        return digest(f"{source}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}")
    except OSError:  # decode() will name the reason
        return 0


def decode_all(sources, size, name, directory):
    """Check and decode all images, in parallel: (N,) of ROW, DecodedImages, {unreadable: reason}.

    sources: paths (str) or arrays; name: of the data set, for the file in `directory` (None: no
    file, DecodedImages decodes each time). Raises UserError where it cannot be written.
    """
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
    stem = f"{digest(name):016x}-{size}-v{VERSION}-"
    file = Path(directory) / f"{stem}{digest(table['key'].tobytes()):016x}.map"
    for left in range(9, -1, -1):
        try:
            _update(file, f"{stem}*.map", size, table, known, pixels)
            return table, DecodedImages(sources, size, file), bad
        except OSError as error:
            if isinstance(error, FileNotFoundError) and left:
                continue  # removed just now, by a run on other images of the set
            need = f"the decoded images need {table.size * 3 * size**2 / 1e9:.2g} GB"
            what = f"{file.parent}: {error.strerror}; {need}"
            raise UserError(f"{what}: use --cache DIR or --no-cache") from error


def _in_order(function, n, use):
    """use(function(i)) for i below n, in order; function runs in threads, under a progress bar."""
    bar = progress(desc="checking images", total=n)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on odd EXIF and palettes
        for start in range(0, n, 64):  # bounded, whatever the disk's pace
            for result in pool.map(function, range(start, min(start + 64, n))):
                use(result)
                bar.update()


def _update(file, pattern, size, table, known, pixels):
    """Write the map, unless it is there, and the table: pixels(i) makes row i, from `known`, which
    gets {key: (row, pixels)} of what the maps of this pattern hold, or from the image."""
    for earlier in [file, *file.parent.glob(pattern)]:
        with contextlib.suppress(OSError, ValueError):
            there, arrays = _open(earlier, size)
            readable = np.flatnonzero(there["width"])
            known |= {int(there["key"][i]): (there[i], arrays[i]) for i in readable}
            if earlier == file and np.array_equal(there["key"], table["key"]):
                for i in np.flatnonzero(there["width"] == 0):  # unreadable then: still so?
                    pixels(i)
                if not table["width"].any():
                    table[:] = there
                    return
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(".*.map.*.tmp"):  # by runs that were killed
        with contextlib.suppress(FileNotFoundError):  # or that are done just now
            if time.time() - left.stat().st_mtime > 600:
                left.unlink()
    with atomic_open(file, "wb") as f:
        f.write(bytes(8 + table.nbytes))
        _in_order(pixels, len(table), lambda array: f.write(array.data))
        f.seek(0)
        f.write(_checksum(table) + table.tobytes())
    known.clear()
    arrays = None  # frees the last of the earlier maps
    for earlier in set(file.parent.glob(pattern)) - {file}:
        with contextlib.suppress(OSError), open(earlier, "rb") as f:
            if lock(f):  # nobody reads it
                earlier.unlink()
