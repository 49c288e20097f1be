"""Speed, as ratios measured in turn in one run on one machine.

python -m tools.benchmark data --data FOLDER --out data.json
    images per second of (a) images opened and augmented with Pillow in every epoch, as in the
    notebooks; (b) ours, decoded once; at 64, 224, 384 px, on FOLDER and 200 1024x1024 JPEGs.

python -m tools.benchmark step --preset small --out step.json
    images per second and peak memory of (a) a loop with the operations of the published notebook
    and (b) ours, each in a process of its own; their shares of a large matrix product's speed.
"""

import platform
import resource
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

import data
import pretrain
from cass import CASS, build_arm
from common import arms, checkpoint, cli, decode, folders
from common.run import Run, on_device

SMALL = dict(cnn="resnet18", vit="vit_tiny_patch16_224", patch_size=8, img_size=64, steps=20)
PAPER = dict(cnn="resnet50", vit="vit_base_patch16_384", patch_size=16, img_size=384, steps=2)
CPU = torch.device("cpu")


def from_disk(paths, size, batch_size, workers):
    """A loader as people write it first: Pillow transforms on each image, in every epoch."""
    steps = [pil_loader, v2.Resize((size, size)), data.augmentation(size), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(**arms.NORMALIZATION)]
    collate = v2.Compose([partial(map, v2.Compose(steps)), tuple, torch.stack])  # of paths
    return DataLoader(paths, batch_size, shuffle=True, num_workers=workers, collate_fn=collate)


def from_decoded(paths, size, batch_size, workers, folder, device=CPU):
    """Our loader, of uint8 images (3, size, size) that are decoded to a map in the folder."""
    _, images, _ = decode.decode_all(paths, size, "benchmark", folder)
    dataset = data.AugmentedImages(images, range(len(images)), data.augmentation(size))
    return data.loader(dataset, data.EpochBatches(len(images), batch_size, 0), device, workers)


def draw_large(folder, n=200, side=1024):
    """n JPEGs of noise over soft shapes: large files that take a camera's time to decode."""
    rng, paths = np.random.default_rng(0), [f"{folder}/{i:03}.jpg" for i in range(n)]
    for path in paths:
        soft = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        noisy = soft.resize((side, side)) + rng.normal(0, 8, (side, side, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def timed(function, *arguments):
    """Seconds of a call, until the device is done, and what it returns."""
    began = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def benchmark_data(args, folder):
    """Both loaders in turn, three sizes, on the folder and large JPEGs: images/s, median ratio."""
    order = np.random.default_rng(0).permutation(folders.read_folder(args.data).sources)
    files = {"/".join(Path(args.data).parts[-2:]): sorted(order[:1000].tolist())}
    files["1024x1024 JPEG"], rows = draw_large(folder), []
    for (name, paths), size in product(files.items(), (64, 224, 384)):
        ours = from_decoded(paths, size, 16, args.workers, folder)
        deque(on_device(ours, CPU), maxlen=0)  # one epoch; starts the workers, which stay
        pair = [from_disk(paths, size, 16, args.workers), ours] * args.rounds
        seconds = [timed(deque, on_device(loader, CPU), 0)[0] for loader in pair]
        disk, ours = len(paths) / np.reshape(seconds, (-1, 2)).T
        rates = f"from disk {np.median(disk):8.1f} img/s, ours {np.median(ours):8.1f} img/s"
        print(f"{name:>20} {size:4} px: {rates}, ratio {np.median(ours / disk):.2f}")
        rows.append({"data": name, "size": size, "from_disk": disk.tolist(), "ours": ours.tolist()})
    return rows


def build(setup):
    """CASS on the arms of a preset, the same every time."""
    torch.manual_seed(0)
    cnn = build_arm(setup.cnn, setup.img_size)
    return CASS(cnn, build_arm(setup.vit, setup.img_size, patch_size=setup.patch_size))


def notebook_loop(setup, device, paths, folder):
    """(a) The operations of the published notebook: Pillow transforms in the loader, float32,
    channels first, two plain Adams, schedulers per batch, gradients never zeroed."""
    model = build(setup).to(device)
    loader = from_disk(paths, setup.img_size, setup.bs, setup.workers)
    optimizers = [torch.optim.Adam(arm.parameters(), lr=1e-3) for arm in model.arms.values()]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 16, 1e-6) for o in optimizers]

    def epoch():
        for images in loader:
            model(images.to(device)).backward()
            for part in (*optimizers, *schedulers):
                part.step()

    epoch()  # warms up
    return {"seconds": timed(epoch)[0] / len(loader)}


def our_loop(setup, device, paths, folder):
    """(b) pretrain.train, from the decoded map."""
    loader = from_decoded(paths, setup.img_size, setup.bs, setup.workers, folder, device)
    model = build(setup).to(device, memory_format=torch.channels_last)
    run = Run(folder, device, cli.pick_amp(setup.amp, device), {})
    seconds, _ = timed(pretrain.train, model, loader, run, 2)
    first, second = (row["seconds"] for row in run.progress["log"])  # the first warms up
    return {"seconds": second / setup.steps, "checkpoint_seconds": (seconds - first - second) / 2}


LOOPS = {"notebook": notebook_loop, "ours": our_loop}


def one_loop(name, setup, paths, folder):
    """Seconds of a step of one loop and peak memory of this process."""
    device = cli.pick_device(setup.device)
    result = LOOPS[name](setup, device, paths, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak
    return result | {"peak_gb": peak / 1e9}


def count_flops(setup, device, dtype):
    """FLOPs of an image, through both arms and back; FLOP/s of the best large matrix product."""
    model, n = build(setup), 8192 if device.type == "cuda" else 2048
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, setup.img_size, setup.img_size)).backward()
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    peak = 2 * n**3 / min(timed(torch.matmul, a, b)[0] for _ in range(8))
    return counter.get_total_flops() / 2, peak


def benchmark_step(args, folder):
    """Both loops in turn, each in a process of its own."""
    rounds, device = {name: [] for name in LOOPS}, cli.pick_device(args.device)
    paths = draw_large(folder, args.steps * args.bs, 512)
    for name in [*LOOPS] * args.rounds:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            rounds[name].append(process.submit(one_loop, name, args, paths, folder).result())
    flops, peak = count_flops(args, device, cli.pick_amp(args.amp, device) or torch.float32)
    rate = {name: args.bs / np.array([r["seconds"] for r in rounds[name]]) for name in LOOPS}
    share = {name: float(np.median(x)) * flops / peak for name, x in rate.items()}
    for name in LOOPS:
        speed = f"{np.median(rate[name]):8.2f} img/s, {share[name]:.0%} of a matrix product's"
        memory = max(r["peak_gb"] for r in rounds[name])
        ratio = np.median(rate["ours"] / rate[name])
        print(f"{name:>9}: {speed}, {memory:.2f} GB; ours is {ratio:.2f} times as fast")
    return {"rounds": rounds, "share_of_peak": share}


def main():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=["data", "step"])
    add("--data", metavar="FOLDER", help="data: folder of images, of which 1,000 are taken")
    add("--preset", default="small", choices=["small", "paper"], help="step: arms and size")
    add("--img-size", type=cli.positive, help="step: another size than the preset's")
    add("--bs", type=cli.positive, default=16, help="step: images in a step")
    add("--steps", type=cli.positive, help="step: steps in an epoch, instead of the preset's")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="of our loops")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add("--workers", type=int, default=0, help="loader processes")
    add("--rounds", type=cli.positive, default=3, help="how often each is measured, in turn")
    add("--out", metavar="FILE", help="write every figure as JSON")
    parser.set_defaults(**PAPER if parser.parse_args().preset == "paper" else SMALL)
    args = parser.parse_args()
    if args.what == "data" and not args.data:
        parser.error("data needs --data FOLDER")
    measure = benchmark_data if args.what == "data" else benchmark_step
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    if args.out:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        found = {"setup": vars(args), "figures": figures, "threads": torch.get_num_threads()}
        checkpoint.write_json(args.out, found | {"machine": machine, **checkpoint.versions()})
        print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
