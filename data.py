"""Images and labels as people have them -> one table, a leak-free split, augmented batches.

    python data.py PATH [--images DIR --image-col NAME --label-col NAME ...]

reports what PATH holds and what is wrong with it: the first command to run on new data. PATH is
    a folder of images at any depth                    (no labels)
    a folder with one folder of images per class       CLASS/a.png
    a folder with the splits above the classes         train/CLASS/a.png, test/CLASS/b.png
    a CSV file of image names and a label, a list of labels, or a 0/1 column per label
    a MedMNIST file                                    {train,val,test}_{images,labels}
"""

import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from common.cli import Parser, claim, count, on_stop, positive, refuse_inputs, refuse_overwrite, run
from common.decode import default_dir
from common.readers import read
from common.splits import cross_split_duplicates, make_split, print_report, write_split


def augmentation(img_size, blur=False, solarize=False):
    """F.2.2 (v6), on (3, H, W) uint8: with p = 0.3 color jitter or perspective, with p = 0.3 color
    jitter or affine, at equal odds; then both flips, p = 0.3 each. Jitter, not in the paper: 0.2 as
    in its notebooks, hue 0.05 ours. blur, solarize: Table 8, DINO's parameters, our choice."""
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
    perspective = v2.RandomPerspective(0.2, 1.0, InterpolationMode.BILINEAR)
    affine = v2.RandomAffine(10, interpolation=InterpolationMode.BILINEAR)
    steps = [v2.RandomApply([v2.RandomChoice([jitter, x])], 0.3) for x in (perspective, affine)]
    steps += [v2.RandomHorizontalFlip(0.3), v2.RandomVerticalFlip(0.3)]
    kernel = max(3, img_size // 10 // 2 * 2 + 1)  # odd, a tenth of the image
    steps += [v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5)] * blur
    return v2.Compose(steps + [v2.RandomSolarize(128, 0.2)] * solarize)


class AugmentedImages(Dataset):
    """Item (epoch, i) is the i-th image of `index`, augmented as (seed, epoch, i) determines, in
    whichever process. With targets, a pair (image, target)."""

    def __init__(self, images, index, transform=None, targets=None, seed=0):
        self.images, self.index = images, index
        self.transform, self.targets, self.seed = transform, targets, seed

    def __getitem__(self, item):
        epoch, i = item
        image = torch.from_numpy(np.array(self.images[self.index[i]]))
        if self.transform is not None:
            with torch.random.fork_rng([]):
                draw = np.random.SeedSequence([self.seed, epoch, i]).generate_state(1)[0]
                torch.default_generator.manual_seed(int(draw))
                image = self.transform(image)
        return image if self.targets is None else (image, self.targets[i])

    def __len__(self):
        return len(self.index)


class EpochBatches(Sampler):
    """Batches of (epoch, i), shuffled by (seed, epoch); a last batch of a single image is left out
    where drop_single (batch-norm). Set `epoch` before each pass, and `start` to skip its first
    batches. Each process takes its share, number `rank`, of batches `world_size` times as large."""

    def __init__(self, n, batch_size, seed=None, drop_single=True, rank=0, world_size=1):
        self.n, self.batch_size, self.seed = n, batch_size * world_size, seed
        self.rank, self.world_size, self.epoch, self.start = rank, world_size, 0, 0
        single = drop_single and n > self.batch_size and 0 < n % self.batch_size < 2 * world_size
        self.length = math.ceil(n / self.batch_size) - single

    def __len__(self):
        return self.length

    def __iter__(self):
        rng = np.random.default_rng([self.seed or 0, 2, self.epoch])
        order = np.arange(self.n) if self.seed is None else rng.permutation(self.n)
        for b in range(self.start, len(self)):
            batch = order[b * self.batch_size : (b + 1) * self.batch_size]
            yield [(self.epoch, int(i)) for i in np.array_split(batch, self.world_size)[self.rank]]


def _ignore_signals(_):
    on_stop(signal.SIG_IGN)  # they may reach the whole process group; cli kills what is left


def loader(dataset, batches, device, workers=None):
    """A DataLoader of uint8 batches. Workers stay alive; torch's own generator stays as it is."""
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count())
    options = {"generator": torch.Generator().manual_seed(0), "persistent_workers": workers > 0}
    options |= {"worker_init_fn": _ignore_signals, "pin_memory": device.type == "cuda"}
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, **options)


def split_and_report(images, seed, dedup=False, known=None, allow_seen=False):
    """make_split, --dedup, and the report of every run; known: (2, M) carried split. The split."""
    split = make_split(images, seed, known, allow_seen)
    held = (split != "train") & ~images.labelled & bool(images.classes)
    copies = cross_split_duplicates(images, split) & dedup
    out = {"without a label beside a validation or test image": held, "by --dedup": copies}
    images.notes += [f"left out {why}: {x.sum()}" for why, x in out.items() if x.any()]
    kept = ~(held | copies)
    images.keep(kept)
    print_report(images, split[kept])
    return split[kept]


def path(text):
    """An argparse type: an absolute path, which holds from any folder; none: that of --no-cache."""
    return text if text in ("", "none") else os.path.abspath(text)


def add_arguments(parser, data="--data"):
    """The data flags, the same for every script."""
    add = parser.add_argument
    layouts = "image folder, CSV file or MedMNIST .npz (layouts: data.py --help)"
    add(data, metavar="PATH", type=path, help=layouts)
    other = "labels of a folder's images, a CSV file; or the folder of a CSV file's images"
    add("--labels", "--images", dest="images", metavar="PATH", type=path, help=other)
    add("--image-col", metavar="NAME", help="CSV column of image names")
    labels = "CSV columns of labels; of a folder, level or pattern of classes; none: ignore them"
    add("--label-col", "--class-depth", metavar="WHAT", nargs="+", help=labels)
    several = "several labels per image (SEP between those in a cell; none: a cell is one label)"
    flags = {"nargs": "?", "const": True, "default": False, "metavar": "SEP", "help": several}
    add("--multilabel", "--label-sep", **flags)
    unsure = "what -1 means in 0/1 columns; skip: an image without a label; blank: negative"
    add("--uncertain", choices=["negative", "positive", "skip"], help=unsure)
    groups = "patients or lesions, kept on one side: a CSV column, or a pattern on the paths"
    add("--group-by", "--group-col", dest="group_col", metavar="WHAT", help=groups)
    add("--group-near", action="store_true", help="keep near-duplicates on one side, too")
    split = "CSV file of path and split, column, pattern on the paths, or none: draw another"
    file_or_name = lambda text: path(text) if os.path.exists(text) else text  # noqa: E731
    add("--split", "--split-col", metavar="WHAT", type=file_or_name, help=split)
    add("--dedup", action="store_true", help="drop exact duplicates of images in earlier splits")
    add("--skip-bad", action="store_true", help="leave missing and unreadable images out")
    cache = f"folder of the decoded images (default: {default_dir()})"
    add("--cache", metavar="DIR", type=path, help=cache)
    add("--no-cache", dest="cache", action="store_const", const="none", help="decode every time")


READING = ("images", "image_col", "label_col", "multilabel", "uncertain", "group_col", "split")
READING += ("skip_bad", "group_near")
OPTIONS = ("data", *READING, "dedup", "cache")  # what a weights file carries


def options(args, keys=READING):
    """{name: value} of data flags: those read() takes, or OPTIONS, which weights files carry."""
    return {key: getattr(args, key) for key in keys}


def cache_dir(value):
    """The folder that --cache means, None for --no-cache."""
    return None if value == "none" else value or default_dir()


def main():
    parser = Parser(__doc__)
    add_arguments(parser, "data")
    parser.add_argument("--img-size", type=positive, default=384, help="side of the decoded images")
    parser.add_argument("--seed", type=count, default=0, help="of the split")
    parser.add_argument("--out", metavar="DIR", help="write split.csv and duplicates.csv there")
    parser.add_argument("--dry-run", action="store_true", help="say what disk space it needs")
    args = parser.parse_args()
    if args.out:
        out = Path(args.out)
        refuse_inputs([out / "split.csv", out / "duplicates.csv"], args.data, args.split)
        refuse_overwrite(out, None)
        claim(out)
    images = read(args.data, **options(args))
    images.decode(args.img_size, cache_dir(args.cache), args.skip_bad, args.dry_run)
    split = split_and_report(images, args.seed, args.dedup)
    if args.out and not args.dry_run:
        write_split(out, images, split)


if __name__ == "__main__":
    run(main)
