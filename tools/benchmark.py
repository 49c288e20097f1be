"""Speed, as ratios measured in one run on one machine.

python -m tools.benchmark data --data FOLDER --out data.json
    images per second of the loader: (a) every image opened, resized and augmented from disk in
    every epoch with Pillow, as the published notebooks do; (b) ours, from the decoded map. Both
    with the same augmentations and workers, in turn, at 64, 224 and 384 pixels, on FOLDER and
    on 200 generated JPEGs of 1024x1024.

python -m tools.benchmark step --preset small --out step.json
    images per second and peak memory of (a) a loop with the operations of the published
    notebook, (b) ours, (c) ours on a batch already in memory, the ceiling; each in a process of
    its own, in turn. FLOPs an image, and the share of a large matrix product's speed.

python -m tools.benchmark memory --preset paper --out memory.json       (needs a GPU)
python -m tools.benchmark scale --out scale.json
    seconds and memory of listing, decoding and loading 1,000 to 100,000 images.
"""

import json
import multiprocessing
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

import data
import pretrain
from cass import CASS, build_arm
from common import cli
from common.checkpoint import write_json
from common.decode import IMAGENET_MEAN, IMAGENET_STD, decode_all, normalize
from common.readers import read_folder
from common.run import Run


class FromDisk(Dataset):
    """A loader as people write it first: Pillow transforms on each image, in every epoch."""

    def __init__(self, paths, size):
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.Resize((size, size), InterpolationMode.BILINEAR),
                data.augmentation(size),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

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
            normalize(batch)
    return time.perf_counter() - began


def compare_loaders(name, paths, size, workers, rounds, directory):
    """Images per second of both loaders, in turn: the median over the rounds of their ratio."""
    began = time.perf_counter()
    _, images, _ = decode_all(paths, size, f"benchmark {name}", directory)
    decoding = time.perf_counter() - began
    batches = data.EpochBatches(len(paths), 16, seed=0)
    ours = data.loader(
        data.AugmentedImages(images, range(len(paths)), data.augmentation(size)),
        batches,
        torch.device("cpu"),
        workers,
    )
    from_disk = DataLoader(FromDisk(paths, size), batch_size=16, shuffle=True, num_workers=workers)
    one_pass(ours, True)  # starts the workers, which stay
    seconds = np.array([[one_pass(from_disk, False), one_pass(ours, True)] for _ in range(rounds)])
    rate = len(paths) / seconds
    return {
        "data": name,
        "size": size,
        "workers": workers,
        "images": len(paths),
        "decode_once_seconds": round(decoding, 2),
        "from_disk": rate[:, 0].round(1).tolist(),
        "ours": rate[:, 1].round(1).tolist(),
        "ratio": round(float(np.median(rate[:, 1] / rate[:, 0])), 2),
    }


def benchmark_data(args):
    """Both loaders at three sizes, on the folder and on large JPEGs."""
    rng, rows = np.random.default_rng(0), []
    paths = sorted(rng.permutation(read_folder(args.data).sources)[: args.images].tolist())
    with tempfile.TemporaryDirectory() as folder:
        draw_large(folder)
        large = [str(p) for p in sorted(Path(folder).glob("*.jpg"))]
        for name, files in (
            ("/".join(Path(args.data).parts[-2:]), paths),
            ("1024x1024 JPEG", large),
        ):
            for size in (64, 224, 384):
                rows.append(compare_loaders(name, files, size, args.workers, args.rounds, folder))
                row = rows[-1]
                print(
                    f"{name:>20} {size:4} px: from disk {np.median(row['from_disk']):8.1f} img/s, "
                    f"ours {np.median(row['ours']):8.1f} img/s, ratio {row['ratio']:.2f}"
                )
    return rows


PRESETS = {
    "small": {
        "cnn": "resnet18",
        "vit": "vit_tiny_patch16_224",
        "vit_kwargs": {"patch_size": 8},
        "img_size": 64,
        "steps": 20,
    },
    "paper": {
        "cnn": "resnet50",
        "vit": "vit_base_patch16_384",
        "vit_kwargs": {},
        "img_size": 384,
        "steps": 2,
    },
}


def arms_of(setup):
    """The two arms of a preset, the same every time."""
    torch.manual_seed(0)
    return [
        build_arm(setup["cnn"], setup["img_size"]),
        build_arm(setup["vit"], setup["img_size"], **setup["vit_kwargs"]),
    ]


def notebook_loop(setup, device, paths, out):
    """(a) The operations of the published notebook: Pillow transforms in the loader, float32,
    channels first, two plain Adams, schedulers per batch, gradients never zeroed. Seconds a step."""
    cnn, vit = (arm.to(device).train() for arm in arms_of(setup))
    loader = DataLoader(
        FromDisk(paths, setup["img_size"]), setup["bs"], shuffle=True, num_workers=setup["workers"]
    )
    optimizers = [torch.optim.Adam(arm.parameters(), lr=1e-3) for arm in (cnn, vit)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 16, 1e-6) for o in optimizers]
    for _ in range(2):  # the first epoch warms up
        began = time.perf_counter()
        for images in loader:
            images = images.to(device)
            R, T = (torch.nn.functional.normalize(arm(images), dim=-1) for arm in (cnn, vit))
            (2 - 2 * (R * T).sum(dim=-1)).mean().backward()
            for part in (*optimizers, *schedulers):
                part.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {"seconds": seconds / len(loader)}


class InMemory:
    """The same batch again and again: a loader that costs nothing."""

    def __init__(self, images, steps):
        self.images, self.steps = images, steps
        self.batch_sampler = data.EpochBatches(len(images) * steps, len(images))

    def __len__(self):
        return self.steps

    def __iter__(self):
        return iter([self.images] * self.steps)


def our_loop(setup, device, paths, out, in_memory=False):
    """(b) pretrain.train from the decoded map, or (c) on a batch in memory: the ceiling."""
    size, bs, amp = setup["img_size"], setup["bs"], cli.pick_amp(setup["amp"], device)
    if in_memory:
        pixels = torch.randint(0, 256, (bs, 3, size, size), dtype=torch.uint8).to(device)
        loader = InMemory(pixels, setup["steps"])
    else:
        _, images, _ = decode_all(paths, size, "benchmark step", out)
        loader = data.loader(
            data.AugmentedImages(images, range(len(paths)), data.augmentation(size)),
            data.EpochBatches(len(paths), bs, 0),
            device,
            setup["workers"],
        )
    method = CASS(*arms_of(setup)).to(device, memory_format=torch.channels_last)
    began = time.perf_counter()
    pretrain.train(
        method, loader, Run(out, device, {}), device, amp, epochs=2, compiled=setup["compile"]
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rest = time.perf_counter() - began - sum(line["seconds"] for line in log)
    return {"seconds": log[1]["seconds"] / setup["steps"], "checkpoint_seconds": rest / 2}


def ceiling_loop(*arguments):
    """(c)"""
    return our_loop(*arguments, in_memory=True)


LOOPS = {"notebook": notebook_loop, "ours": our_loop, "ceiling": ceiling_loop}


def one_loop(name, setup, paths, results):
    """Run one loop in a process of its own, so that its peak memory is its own."""
    device = cli.pick_device(setup["device"])
    with tempfile.TemporaryDirectory() as out:
        result = LOOPS[name](setup, device, paths, Path(out))
    result["peak_gb"] = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ) / 1e9
    results.put(result)


def flops_per_image(setup):
    """Of the forward and backward pass of both arms, by torch's own counter."""
    method = CASS(*arms_of(setup))
    with FlopCounterMode(display=False) as counter:
        method(torch.zeros(2, 3, setup["img_size"], setup["img_size"])).backward()
    return counter.get_total_flops() / 2


def matrix_peak(device, dtype):
    """FLOP/s of the best of several large matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def benchmark_step(args):
    """The three loops in turn, each in a process of its own."""
    setup = {
        **PRESETS[args.preset],
        "bs": args.bs,
        "workers": args.workers,
        "amp": args.amp,
        "device": args.device,
        "compile": args.compile,
    }
    setup["img_size"] = args.img_size or setup["img_size"]
    setup["steps"] = args.steps or setup["steps"]
    device, n = cli.pick_device(args.device), setup["steps"] * args.bs
    spawn, rounds = multiprocessing.get_context("spawn"), {name: [] for name in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            paths = read_folder(args.data).sources[:n]
        else:
            draw_large(folder, n, 512)
            paths = [str(p) for p in sorted(Path(folder).glob("*.jpg"))]
        if len(paths) < n:
            raise cli.UserError(f"{args.data}: {n} images are needed, {len(paths)} are there")
        for _ in range(args.rounds):
            for name in LOOPS:
                results = spawn.Queue()
                process = spawn.Process(target=one_loop, args=(name, setup, paths, results))
                process.start()
                process.join()
                if process.exitcode:
                    raise cli.UserError(f"the loop {name} ended with status {process.exitcode}")
                rounds[name].append(results.get())
    flops, amp = flops_per_image(setup), cli.pick_amp(args.amp, device)
    peak = matrix_peak(device, amp or torch.float32)
    rate = {name: np.array([args.bs / r["seconds"] for r in rounds[name]]) for name in LOOPS}
    figures = {
        "setup": setup,
        "rounds": rounds,
        "gflops_per_image": flops / 1e9,
        "matrix_peak_tflops": peak / 1e12,
        "dtype": str(amp or torch.float32),
        "ratio_to_notebook": float(np.median(rate["ours"] / rate["notebook"])),
        "ratio_to_ceiling": float(np.median(rate["ours"] / rate["ceiling"])),
        "share_of_peak": {
            name: float(np.median(rate[name])) * flops / peak for name in ("ours", "ceiling")
        },
    }
    for name in LOOPS:
        print(
            f"{name:>9}: {np.median(rate[name]):9.2f} img/s, peak memory "
            f"{max(r['peak_gb'] for r in rounds[name]):.2f} GB"
        )
    print(
        f"ours / notebook {figures['ratio_to_notebook']:.2f}, ours / ceiling "
        f"{figures['ratio_to_ceiling']:.3f}; {flops / 1e9:.1f} GFLOP an image, "
        + ", ".join(
            f"{name} reaches {share:.0%}" for name, share in figures["share_of_peak"].items()
        )
        + f" of the {peak / 1e12:.2f} TFLOP/s of a {figures['dtype'][6:]} matrix product"
    )
    return figures


def benchmark_memory(args):
    """Peak memory of one step as the batch grows, and the largest batch for 12, 24 and 48 GB."""
    if not torch.cuda.is_available():
        raise cli.UserError("benchmark memory measures a GPU's memory, and there is none here")
    setup, device = PRESETS[args.preset], torch.device("cuda")
    method = CASS(*arms_of(setup)).to(device, memory_format=torch.channels_last)
    optimizers = [torch.optim.Adam(arm.parameters()) for arm in method.arms.values()]
    peaks = {}
    for bs in (8, 16, 24, 32):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            with torch.autocast("cuda", cli.pick_amp(args.amp, device) or torch.float32):
                loss = method(
                    torch.randn(bs, 3, setup["img_size"], setup["img_size"], device=device)
                )
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        peaks[bs] = torch.cuda.max_memory_allocated()
        print(f"batch {bs:3}: {peaks[bs] / 1e9:.2f} GB")
    per_image, fixed = np.polyfit(list(peaks), list(peaks.values()), 1)
    largest = {gb: int((gb * 1e9 - fixed) / per_image) for gb in (12, 24, 48)}
    print(
        f"{per_image / 1e6:.0f} MB an image and {fixed / 1e9:.2f} GB fixed: the largest batch is "
        + ", ".join(f"{n} in {gb} GB" for gb, n in largest.items())
    )
    return {
        "peak_bytes": peaks,
        "bytes_per_image": per_image,
        "fixed_bytes": fixed,
        "largest_batch": largest,
    }


def benchmark_scale(args):
    """Seconds of a loader epoch and memory of the process at 1,000, 10,000 and 100,000 images."""
    size, rows = 64, []
    with tempfile.TemporaryDirectory() as folder:
        tile = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        for n in (1_000, 10_000, 100_000):
            for i in range(len(list(Path(folder).glob("*.bmp"))), n):
                Image.fromarray(np.roll(tile, i, axis=i % 2)).save(Path(folder) / f"{i:06}.bmp")
            began = time.perf_counter()
            sources = read_folder(folder).sources
            listing = time.perf_counter() - began
            began = time.perf_counter()
            _, images, _ = decode_all(sources, size, folder, Path(folder) / f"cache{n}")
            decoding = time.perf_counter() - began
            loader = data.loader(
                data.AugmentedImages(images, range(n), data.augmentation(size)),
                data.EpochBatches(n, 16, 0),
                torch.device("cpu"),
                args.workers,
            )
            seconds = one_pass(loader, True)
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            rows.append(
                {
                    "images": n,
                    "listing_seconds": listing,
                    "decoding_seconds": decoding,
                    "epoch_seconds": seconds,
                    "private_mb": int(status["RssAnon"].split()[0]) / 1024,
                }
            )
            print(
                "{images:7} images: listed in {listing_seconds:.2f} s, decoded in "
                "{decoding_seconds:.1f} s, epoch of the loader {epoch_seconds:.1f} s, private "
                "memory {private_mb:.0f} MB".format(**rows[-1])
            )
    return rows


def main():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=["data", "step", "memory", "scale"])
    add("--data", metavar="FOLDER", help="folder of images (data: needed; step: instead of drawn)")
    add("--images", type=cli.positive, default=1000, help="data: of them, at most")
    add("--preset", default="small", choices=list(PRESETS), help="step, memory: arms and size")
    add("--img-size", type=cli.positive, help="step: another size than the preset's")
    add("--bs", type=cli.positive, default=16, help="step: images in a step")
    add("--steps", type=cli.positive, help="step: steps in an epoch, instead of the preset's")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="of our loops")
    add("--compile", action="store_true", help="torch.compile our loops")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add("--workers", type=int, default=0, help="loader processes")
    add("--rounds", type=cli.positive, default=3, help="how often each is measured, in turn")
    add("--out", metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    if args.what == "data" and not args.data:
        parser.error("data needs --data FOLDER")
    figures = {
        "data": benchmark_data,
        "step": benchmark_step,
        "memory": benchmark_memory,
        "scale": benchmark_scale,
    }[args.what](args)
    if args.out:
        write_json(
            args.out,
            {
                "what": args.what,
                "figures": figures,
                "threads": torch.get_num_threads(),
                "machine": torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else platform.processor() or platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
        )


if __name__ == "__main__":
    cli.run(main)
