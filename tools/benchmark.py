"""Speed, as ratios measured in one run on one machine.

python -m tools.benchmark data --data FOLDER --out data.json
    images per second of the loader: (a) images opened, resized and augmented from disk in every
    epoch with Pillow, as in the published notebooks; (b) ours, from the decoded map. In turn, with
    the same augmentations, at 64, 224 and 384 px, on FOLDER and on 200 drawn 1024x1024 JPEGs.

python -m tools.benchmark step --preset small --out step.json
    images per second and peak memory of (a) a loop with the operations of the published notebook,
    (b) ours, (c) ours on a batch in memory, the ceiling; in turn, each in a process of its own.
    FLOPs an image, and the share of a large matrix product's speed.
"""

import json
import multiprocessing
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn.functional import normalize as unit
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

import data
import pretrain
from cass import CASS, build_arm
from common import cli
from common.checkpoint import write_json
from common.decode import IMAGENET_MEAN, IMAGENET_STD, decode_all
from common.readers import read_folder
from common.run import Run, on_device

PRESETS = {
    "small": ("resnet18", "vit_tiny_patch16_224", {"patch_size": 8}, 64, 20),
    "paper": ("resnet50", "vit_base_patch16_384", {}, 384, 2),
}
CPU = torch.device("cpu")
FIELDS = ("cnn", "vit", "vit_kwargs", "img_size", "steps")  # of a preset; steps in an epoch


class FromDisk(Dataset):
    """A loader as people write it first: Pillow transforms on each image, in every epoch."""

    def __init__(self, paths, size):
        resize = v2.Resize((size, size), InterpolationMode.BILINEAR)
        to_float = v2.ToDtype(torch.float32, scale=True)
        to_tensor = [v2.PILToTensor(), to_float, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self.paths = paths
        self.transform = v2.Compose([resize, data.augmentation(size), *to_tensor])

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))

    def __len__(self):
        return len(self.paths)


def from_decoded(images, size, batch_size, device, workers):
    """Our loader, of the (N, 3, size, size) array that decode_all returns."""
    dataset = data.AugmentedImages(images, range(len(images)), data.augmentation(size))
    return data.loader(dataset, data.EpochBatches(len(images), batch_size, 0), device, workers)


def draw_large(folder, n=200, side=1024):
    """n JPEGs of noise over soft shapes: large files that take a camera's time to decode."""
    paths = [str(Path(folder) / f"{i:03}.jpg") for i in range(n)]
    for i, path in enumerate(paths):
        rng = np.random.default_rng(i)
        soft = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        pixels = np.asarray(soft.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=90)
    return paths


def timed(function, *arguments):
    """Seconds of a call, until the device is done, and what it returns."""
    began = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def one_pass(loader):
    """One epoch, up to normalized float batches."""
    for _ in on_device(loader, CPU):
        pass


def compare_loaders(name, paths, size, workers, rounds, directory):
    """Images per second of both loaders, in turn: the median over the rounds of their ratio."""
    decoding, (_, images, _) = timed(decode_all, paths, size, f"benchmark {name}", directory)
    ours = from_decoded(images, size, 16, CPU, workers)
    from_disk = DataLoader(FromDisk(paths, size), batch_size=16, shuffle=True, num_workers=workers)
    one_pass(ours)  # starts the workers, which stay
    seconds = [[timed(one_pass, x)[0] for x in (from_disk, ours)] for _ in range(rounds)]
    disk, ours = len(paths) / np.array(seconds).T
    row = {"data": name, "size": size, "workers": workers, "images": len(paths)}
    row |= {"decode_once_seconds": round(decoding, 2), "from_disk": disk.round(1).tolist()}
    return row | {"ours": ours.round(1).tolist(), "ratio": round(float(np.median(ours / disk)), 2)}


def benchmark_data(args):
    """Both loaders at three sizes, on the folder and on large JPEGs."""
    order = np.random.default_rng(0).permutation(read_folder(args.data).sources)
    files, rows = {"/".join(Path(args.data).parts[-2:]): sorted(order[: args.images].tolist())}, []
    with tempfile.TemporaryDirectory() as folder:
        files["1024x1024 JPEG"] = draw_large(folder)
        for name, size in ((name, size) for name in files for size in (64, 224, 384)):
            row = compare_loaders(name, files[name], size, args.workers, args.rounds, folder)
            disk, ours = np.median(row["from_disk"]), np.median(row["ours"])
            rates = f"from disk {disk:8.1f} img/s, ours {ours:8.1f} img/s"
            print(f"{name:>20} {size:4} px: {rates}, ratio {row['ratio']:.2f}")
            rows.append(row)
    return rows


def arms_of(setup):
    """The two arms of a preset, the same every time."""
    torch.manual_seed(0)
    cnn = build_arm(setup["cnn"], setup["img_size"])
    return cnn, build_arm(setup["vit"], setup["img_size"], **setup["vit_kwargs"])


def notebook_loop(setup, device, paths, out):
    """(a) The operations of the published notebook: Pillow transforms in the loader, float32,
    channels first, two plain Adams, schedulers per batch, gradients never zeroed."""
    cnn, vit = (arm.to(device).train() for arm in arms_of(setup))
    dataset = FromDisk(paths, setup["img_size"])
    loader = DataLoader(dataset, setup["bs"], shuffle=True, num_workers=setup["workers"])
    optimizers = [torch.optim.Adam(arm.parameters(), lr=1e-3) for arm in (cnn, vit)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 16, 1e-6) for o in optimizers]

    def epoch():
        for images in loader:
            images = images.to(device)
            R, T = unit(cnn(images), dim=-1), unit(vit(images), dim=-1)
            (2 - 2 * (R * T).sum(dim=-1)).mean().backward()
            for part in (*optimizers, *schedulers):
                part.step()

    epoch()  # warms up
    return {"seconds": timed(epoch)[0] / len(loader)}


class InMemory(list):
    """Batches that are there already: a loader that costs nothing."""


def our_loop(setup, device, paths, out, in_memory=False):
    """(b) pretrain.train from the decoded map, or (c) on a batch in memory: the ceiling."""
    size, bs, amp = setup["img_size"], setup["bs"], cli.pick_amp(setup["amp"], device)
    if in_memory:
        pixels = torch.randint(0, 256, (bs, 3, size, size), dtype=torch.uint8).to(device)
        loader = InMemory([pixels] * setup["steps"])
        loader.batch_sampler = data.EpochBatches(bs * setup["steps"], bs)
    else:
        _, images, _ = decode_all(paths, size, "benchmark step", out)
        loader = from_decoded(images, size, bs, device, setup["workers"])
    model = CASS(*arms_of(setup)).to(device, memory_format=torch.channels_last)
    if setup["compile"]:
        model.compile()
    seconds, _ = timed(pretrain.train, model, loader, Run(out, device, amp, {}), 2)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rest = seconds - sum(line["seconds"] for line in log)
    return {"seconds": log[1]["seconds"] / setup["steps"], "checkpoint_seconds": rest / 2}


LOOPS = {"notebook": notebook_loop, "ours": our_loop, "ceiling": partial(our_loop, in_memory=True)}


def one_loop(name, setup, paths):
    """Seconds of a step of one loop and peak memory of this process."""
    device = cli.pick_device(setup["device"])
    with tempfile.TemporaryDirectory() as out:
        result = LOOPS[name](setup, device, paths, Path(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return result | {"peak_gb": peak / 1e9}


def flops_per_image(setup):
    """Of the forward and backward pass of both arms, by torch's own counter."""
    model = CASS(*arms_of(setup))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, setup["img_size"], setup["img_size"])).backward()
    return counter.get_total_flops() / 2


def matrix_peak(device, dtype):
    """FLOP/s of the best of several large matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(torch.matmul, a, b)[0] for _ in range(8))


def benchmark_step(args):
    """The three loops in turn, each in a process of its own."""
    setup = dict(zip(FIELDS, PRESETS[args.preset]))
    setup |= {key: getattr(args, key) for key in ("bs", "workers", "amp", "device", "compile")}
    setup["img_size"] = args.img_size or setup["img_size"]
    setup["steps"] = args.steps or setup["steps"]
    n, rounds = setup["steps"] * args.bs, {name: [] for name in LOOPS}
    device = cli.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = read_folder(args.data).sources[:n] if args.data else draw_large(folder, n, 512)
        if len(paths) < n:
            raise cli.UserError(f"{args.data}: {n} images are needed, {len(paths)} are there")
        for name in [*LOOPS] * args.rounds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                rounds[name].append(process.submit(one_loop, name, setup, paths).result())
    dtype = cli.pick_amp(args.amp, device) or torch.float32
    return step_figures(setup, rounds, flops_per_image(setup), matrix_peak(device, dtype), dtype)


def step_figures(setup, rounds, flops, peak, dtype):
    """What step.json holds of the rounds {loop: [results of one_loop]}; prints a summary."""
    rate = {name: setup["bs"] / np.array([r["seconds"] for r in rounds[name]]) for name in LOOPS}
    for name in LOOPS:
        memory = max(r["peak_gb"] for r in rounds[name])
        print(f"{name:>9}: {np.median(rate[name]):9.2f} img/s, peak memory {memory:.2f} GB")
    ratios = [float(np.median(rate["ours"] / rate[name])) for name in ("notebook", "ceiling")]
    share = {name: float(np.median(rate[name])) * flops / peak for name in ("ours", "ceiling")}
    print(f"ours / notebook {ratios[0]:.2f}, ours / ceiling {ratios[1]:.3f}")
    reached = ", ".join(f"{name} reaches {value:.0%}" for name, value in share.items())
    product = f"the {peak / 1e12:.2f} TFLOP/s of a {str(dtype)[6:]} matrix product"
    print(f"{flops / 1e9:.1f} GFLOP an image: {reached} of {product}")
    figures = {"setup": setup, "rounds": rounds, "gflops_per_image": flops / 1e9}
    figures |= {"matrix_peak_tflops": peak / 1e12, "dtype": str(dtype)}
    figures |= {"ratio_to_notebook": ratios[0], "ratio_to_ceiling": ratios[1]}
    return figures | {"share_of_peak": share}


def main():
    measure = {"data": benchmark_data, "step": benchmark_step}
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=list(measure))
    add("--data", metavar="FOLDER", help="folder of images (data: needed; step: instead of drawn)")
    add("--images", type=cli.positive, default=1000, help="data: of them, at most")
    add("--preset", default="small", choices=list(PRESETS), help="step: arms and size")
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
    figures = measure[args.what](args)
    if args.out:
        machine = platform.processor() or platform.machine()
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
        figures = {"what": args.what, "figures": figures, "threads": torch.get_num_threads()}
        figures |= {"machine": machine, "python": platform.python_version()}
        figures |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
        write_json(args.out, figures)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
