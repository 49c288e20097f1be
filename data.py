"""Images and labels as people have them -> one table, an honest split, augmented batches.

    python data.py PATH [--images DIR --image-col NAME --label-col NAME ...]

reports what PATH holds and what is wrong with it: the first thing to run on new data. PATH is
    a folder of images at any depth                               (no labels)
    a folder with one folder of images per class                  CLASS/a.png
    a folder with the splits above the classes                    train/CLASS/a.png, test/CLASS/b.png
    a CSV file of image names and a label, a list of labels, or a 0/1 column per label
    a MedMNIST file                                               {train,val,test}_{images,labels}
"""

import math
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

import cache
from checkpoint import write_csv
from cli import Parser, UserError, count, positive, refuse_overwrite, run, some
from layouts import read
from splits import copies, duplicates, make_split

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def decode(data, img_size, directory, skip_bad=False):
    """Check and decode all images of the set (cache.decode_all); sets data.table, data.images.
    Raises UserError naming every unreadable image, unless they are to be left out."""
    data.table, data.images, bad = cache.decode_all(data.sources, img_size,
                                                    os.path.abspath(data.path), directory)
    if bad:
        listed = [f"{data.names[i]} ({reason})" for i, reason in sorted(bad.items())]
        if not skip_bad or len(bad) == len(data):
            raise UserError(f"{data.path}: {len(bad)} of {len(data)} images cannot be read: "
                            f"{some(listed, 100)}; mend them, or leave them out with --skip-bad")
        data.notes.append(f"left out, since they cannot be read: {some(listed, 100)}")
        data.keep(~np.isin(np.arange(len(data)), list(bad)))
    several = [name for name, n in zip(data.names, data.table["frames"]) if n > 1]
    if several:
        data.notes.append(f"only the first page or frame is read of {some(several)}")


def augmentation(img_size, blur=False, solarize=False):
    """The augmentations of F.2.2 (v6) on (3, H, W) uint8, after resizing.

    With p = 0.3 colour jitter or perspective, with p = 0.3 colour jitter or affine, at equal odds;
    then both flips, p = 0.3 each. The strengths of the jitter are not in the paper: 0.2 as in its
    notebooks, hue 0.05 ours. blur, solarize: for Table 8, with DINO's parameters, our choice.
    """
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
    bilinear = InterpolationMode.BILINEAR
    steps = [
        v2.RandomApply([v2.RandomChoice([jitter, v2.RandomPerspective(0.2, 1.0, bilinear)])], 0.3),
        v2.RandomApply([v2.RandomChoice([jitter, v2.RandomAffine(10, interpolation=bilinear)])], 0.3),
        v2.RandomHorizontalFlip(0.3),
        v2.RandomVerticalFlip(0.3),
    ]
    if blur:
        kernel = max(3, img_size // 10 // 2 * 2 + 1)  # odd, a tenth of the image
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5))
    if solarize:
        steps.append(v2.RandomSolarize(128, 0.2))
    return v2.Compose(steps)


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(N, 3, H, W) uint8 -> float32, channels normalized (F.2.2)."""
    images = v2.functional.to_dtype(images, torch.float32, scale=True)
    return v2.functional.normalize(images, mean, std, inplace=True)


class Views(Dataset):
    """Augmented images: item (epoch, i) is the i-th of `index`, augmented as (seed, epoch, i) says,
    whichever process does it. With targets, a pair (image, target)."""

    def __init__(self, images, index, transform=None, targets=None, seed=0):
        self.images, self.index = images, index
        self.transform, self.targets, self.seed = transform, targets, seed

    def __getitem__(self, item):
        epoch, i = item
        image = torch.from_numpy(np.array(self.images[self.index[i]]))
        if self.transform is not None:
            state = torch.get_rng_state()
            draw = np.random.SeedSequence([self.seed, epoch, i]).generate_state(1)[0]
            torch.default_generator.manual_seed(int(draw))
            image = self.transform(image)
            torch.set_rng_state(state)
        return image if self.targets is None else (image, self.targets[i])

    def __len__(self):
        return len(self.index)


class Batches(Sampler):
    """Batches of (epoch, i), shuffled by (seed, epoch). Every image comes once an epoch, but a last
    batch of a single image is left out, where drop_single (batch-norm).

    Set `epoch` before each pass, and `start` to skip the first batches of it. Of several processes
    (`world`) each takes its share, number `rank`, of batches that are `world` times as large.
    """

    def __init__(self, n, batch_size, seed=None, drop_single=True, rank=0, world=1):
        self.n, self.batch_size, self.seed = n, batch_size * world, seed
        self.rank, self.world, self.epoch, self.start = rank, world, 0, 0
        self.single = drop_single and n > self.batch_size and 0 < n % self.batch_size < 2 * world

    def __len__(self):
        return math.ceil(self.n / self.batch_size) - self.single

    def __iter__(self):
        order = np.arange(self.n)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, 2, self.epoch]).permutation(self.n)
        for b in range(self.start, len(self)):
            part = order[b * self.batch_size:(b + 1) * self.batch_size]
            yield [(self.epoch, int(i)) for i in np.array_split(part, self.world)[self.rank]]


def _leave_signals_to_main(_):
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole process group
        signal.signal(number, signal.SIG_IGN)


def loader(views, batches, device, workers=None):
    """A DataLoader of uint8 batches. Workers stay alive between epochs."""
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count())
    return DataLoader(views, batch_sampler=batches, num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=device.type == "cuda",
                      worker_init_fn=_leave_signals_to_main,
                      generator=torch.Generator().manual_seed(0))


def text(classes, has):
    """The names of the classes that an image has, as files hold them."""
    return "|".join(c for c, h in zip(classes, has) if h)


def split_rows(data, split, used=None):
    """Rows of split.csv: path, split, labels, whether the label was used (empty without labels)."""
    for i, name in enumerate(data.names):
        labels = text(data.classes, data.labels[i])
        yield name, split[i], labels, "" if not data.classes else int(used is not None and used[i])


SPLIT_HEADER = ("path", "split", "labels", "label_used")
DUPLICATES_HEADER = ("group", "path", "split", "labels")


def duplicate_rows(data, split):
    """Rows of duplicates.csv: images with one number are pixel-identical."""
    for group, members in enumerate(duplicates(data)):
        for i in members:
            yield group, data.names[i], split[i], text(data.classes, data.labels[i])


def class_counts(data, mask):
    """{class: images} among the masked ones."""
    return dict(zip(data.classes, data.labels[mask].sum(0).tolist()))


def split_and_report(data, args, seed, seen=None, allow_seen=False):
    """make_split, --dedup, and the report at the start of every run. Returns the split."""
    split = make_split(data, seed, seen, allow_seen)
    if args.dedup:
        kept = ~copies(data, split)
        if not kept.all():
            data.notes.append(f"left out by --dedup: {(~kept).sum()} copies of images in an earlier "
                              f"split")
        data.keep(kept)
        split = split[kept]
    report(data, split)
    return split


def report(data, split):
    """Print what the set holds, how it is split and what is odd about it."""
    kind = "" if not data.multilabel else ", several or none to an image"
    print(f"{data.path}: {len(data)} images, " +
          (f"{len(data.classes)} classes{kind}" if data.classes else "no labels") +
          ("" if data.groups is None else f", {len(np.unique(data.groups))} groups"))
    for name in ("train", "val", "test"):
        mask = split == name
        if mask.any():
            counts = ", ".join(f"{c} {n}" for c, n in class_counts(data, mask).items())
            groups = "" if data.groups is None else f" in {len(np.unique(data.groups[mask]))} groups"
            print(f"  {name:5} {mask.sum():6}{groups}  {counts}")
    table = data.table
    modes = ", ".join(f"{mode} {n}" for mode, n in Counter(table["mode"].tolist()).most_common())
    print(f"  widths {table['width'].min()} to {table['width'].max()}, heights "
          f"{table['height'].min()} to {table['height'].max()} pixels; modes {modes}")
    train = np.flatnonzero(split == "train")
    sample = [data.images[i] / np.float32(255) for i in train[::len(train) // 100 + 1]]
    mean = np.mean([x.mean((1, 2)) for x in sample], axis=0)
    std = np.sqrt(np.mean([(x**2).mean((1, 2)) for x in sample], axis=0) - mean**2)
    print("  mean " + " ".join(f"{x:.3f}" for x in mean) +
          ", standard deviation " + " ".join(f"{x:.3f}" for x in std) +
          " (ImageNet: 0.485 0.456 0.406, 0.229 0.224 0.225)")
    same = duplicates(data)
    if same:
        print(f"  {sum(map(len, same))} images are pixel-identical to another; "
              f"{copies(data, split).sum()} of them to one in an earlier split (train, val, test)")
    contradicting = [g for g in same if (data.labels[g] != data.labels[g[0]]).any()]
    if contradicting:
        pairs = some(" = ".join(data.names[i] for i in group[:2]) for group in contradicting)
        print(f"  {len(contradicting)} sets of identical images bear different labels: {pairs}")
    for note in data.notes:
        print(f"  {note}")


def add_arguments(parser, positional=False):
    """The data flags, the same for every script."""
    parser.add_argument("data" if positional else "--data", metavar="PATH",
                        help="image folder, CSV file or MedMNIST .npz (layouts: see data.py)")
    parser.add_argument("--images", metavar="DIR", help="folder of a CSV file's images")
    parser.add_argument("--image-col", metavar="NAME", help="CSV column of image names")
    parser.add_argument("--label-col", metavar="NAME", nargs="+",
                        help="CSV column of labels, several 0/1 columns, or none")
    parser.add_argument("--label-sep", metavar="SEP",
                        help="what parts several labels in one cell of the label column, or none")
    parser.add_argument("--multilabel", action="store_true",
                        help="several labels to an image, though every image here has one")
    parser.add_argument("--group-col", metavar="NAME",
                        help="CSV column of patients or lesions, never parted by a split")
    parser.add_argument("--unlabelled", action="store_true",
                        help="folders below --data are no classes; all images are for training")
    parser.add_argument("--split", metavar="FILE", help="CSV with path and split, made elsewhere")
    parser.add_argument("--dedup", action="store_true",
                        help="leave out images that are pixel-identical to one in an earlier split")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    parser.add_argument("--cache", metavar="DIR", default=str(cache.default_dir()),
                        help="folder of the decoded images (default: %(default)s)")
    parser.add_argument("--no-cache", dest="cache", action="store_const", const=None,
                        help="decode every image again in every epoch")


# what a checkpoint carries, so that fine-tuning finds the same data
FLAGS = ("data", "images", "image_col", "label_col", "label_sep", "multilabel", "group_col",
         "unlabelled", "split", "skip_bad", "dedup")


def make_absolute(args):
    """Make the paths among the data flags absolute, so that they hold from any folder."""
    for key in ("data", "images", "split"):
        if getattr(args, key):
            setattr(args, key, os.path.abspath(getattr(args, key)))


def flags(args):
    """What a checkpoint carries of the data flags."""
    return {key: getattr(args, key) for key in FLAGS}


def main():
    parser = Parser(__doc__)
    add_arguments(parser, positional=True)
    parser.add_argument("--img-size", type=positive, default=384, help="side of the decoded images")
    parser.add_argument("--seed", type=count, default=0, help="of the split")
    parser.add_argument("--out", metavar="DIR", help="write split.csv and duplicates.csv there")
    args = parser.parse_args()
    make_absolute(args)
    refuse_overwrite(Path(args.out or "."), (), False)
    data = read(args)
    decode(data, args.img_size, args.cache, args.skip_bad)
    split = split_and_report(data, args, args.seed)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "split.csv", SPLIT_HEADER, split_rows(data, split))
        write_csv(out / "duplicates.csv", DUPLICATES_HEADER, duplicate_rows(data, split))


if __name__ == "__main__":
    run(main)
