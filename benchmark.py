"""Speed, as ratios measured in one run on one machine.

    python benchmark.py data --data FOLDER --out data.json
        images per second of the loader: (a) every image opened, resized and augmented from disk in
        every epoch with Pillow, as the published notebooks do; (b) ours, from the decoded map. Both
        with the same augmentations and workers, in turn, at 64, 224 and 384 pixels, on FOLDER and
        on 200 generated JPEGs of 1024x1024.
"""

import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

import cache
import cli
import data
from checkpoint import write_json
from layouts import read_folder


class FromDisk(Dataset):
    """A loader as people write it first: Pillow transforms on each image, in every epoch."""

    def __init__(self, paths, size):
        self.paths = paths
        self.transform = v2.Compose([
            v2.Resize((size, size), InterpolationMode.BILINEAR), data.augmentation(size),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))

    def __len__(self):
        return len(self.paths)


def draw_large(folder, n=200, side=1024):
    """n JPEGs of noise over soft shapes: large files that take a camera's time to decode."""
    for i in range(n):
        rng = np.random.default_rng(i)
        soft = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        pixels = np.asarray(soft.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(Path(folder) / f"{i:03}.jpg", quality=90)


def one_pass(loader, ours):
    """Seconds of one epoch, up to normalized float batches."""
    began = time.perf_counter()
    for batch in loader:
        if ours:
            data.normalize(batch)
    return time.perf_counter() - began


def compare_loaders(name, paths, size, workers, rounds, directory):
    """Images per second of both loaders, in turn: the median over the rounds of their ratio."""
    began = time.perf_counter()
    _, images, _ = cache.decode_all(paths, size, f"benchmark {name}", directory)
    decoding = time.perf_counter() - began
    batches = data.Batches(len(paths), 16, seed=0)
    ours = data.loader(data.Views(images, range(len(paths)), data.augmentation(size)), batches,
                       torch.device("cpu"), workers)
    from_disk = DataLoader(FromDisk(paths, size), batch_size=16, shuffle=True, num_workers=workers)
    one_pass(ours, True)  # starts the workers, which stay
    seconds = np.array([[one_pass(from_disk, False), one_pass(ours, True)] for _ in range(rounds)])
    rate = len(paths) / seconds
    return {"data": name, "size": size, "workers": workers, "images": len(paths),
            "decode_once_seconds": round(decoding, 2),
            "from_disk": rate[:, 0].round(1).tolist(), "ours": rate[:, 1].round(1).tolist(),
            "ratio": round(float(np.median(rate[:, 1] / rate[:, 0])), 2)}


def benchmark_data(args):
    rng, rows = np.random.default_rng(0), []
    paths = sorted(rng.permutation(read_folder(args.data).sources)[:args.images].tolist())
    with tempfile.TemporaryDirectory() as folder:
        draw_large(folder)
        large = [str(p) for p in sorted(Path(folder).glob("*.jpg"))]
        for name, files in (("/".join(Path(args.data).parts[-2:]), paths),
                            ("1024x1024 JPEG", large)):
            for size in (64, 224, 384):
                rows.append(compare_loaders(name, files, size, args.workers, args.rounds, folder))
                row = rows[-1]
                print(f"{name:>20} {size:4} px: from disk {np.median(row['from_disk']):8.1f} img/s, "
                      f"ours {np.median(row['ours']):8.1f} img/s, ratio {row['ratio']:.2f}")
    return rows


def main():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=["data"])
    add("--data", metavar="FOLDER", required=True, help="folder of images")
    add("--images", type=cli.positive, default=1000, help="of them, at most")
    add("--workers", type=int, default=0, help="loader processes")
    add("--rounds", type=cli.positive, default=3, help="epochs of each, in turn")
    add("--out", metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    rows = benchmark_data(args)
    if args.out:
        write_json(args.out, {"machine": platform.processor() or platform.machine(),
                              "threads": torch.get_num_threads(), "torch": torch.__version__,
                              "torchvision": torchvision.__version__, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
