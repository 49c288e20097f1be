"""The whole way on images that are drawn here: pre-train, fine-tune, and the same without.

    python -m tools.demo

draws four kinds of cells, told apart by outline and texture, to demo/images, runs and shows three
commands: both arms without labels, the CNN with 10 % of the labels, the same without pre-training.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import Parser, progress, refuse_overwrite, run

CLASSES = ("granular", "ringed", "spiky", "striped")
PER_CLASS, SIZE = 300, 48
ARMS = "--cnn resnet18 --vit vit_tiny_patch16_224 --vit-kwargs patch_size=8 --init random"
LOSS = "--objective vicreg --lr 3e-4"  # equation 1 would collapse from random weights
COMMANDS = (
    f"pretrain.py {ARMS} --img-size 48 --epochs 3 --swa-start 0.5 {LOSS} --out OUT",
    "finetune.py --ckpt OUT/cnn.pt --frac 0.1 --out OUT/finetune",
    "finetune.py --arch resnet18 --init random --img-size 48 --frac 0.1 --out OUT/baseline",
)


def cells(kind, rng):
    """(SIZE, SIZE, 3) uint8: an image of three to five cells of CLASSES[kind]."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    image, stain = [225, 195, 210] + rng.normal(0, 10, 3), [130, 90, 150] + rng.normal(0, 12, 3)
    image = image + rng.normal(0, 4, (SIZE, SIZE, 1))
    for _ in range(rng.integers(3, 6)):
        dx, dy = x - rng.uniform(8, SIZE - 8), y - rng.uniform(8, SIZE - 8)
        angle, distance = np.arctan2(dy, dx), np.hypot(dx, dy)
        radius, turn = rng.uniform(8, 11), rng.uniform(0, 2 * np.pi)
        grains = np.kron(rng.choice([-1, 1], (SIZE // 2, SIZE // 2)), np.ones((2, 2)))
        stripes = np.cos((dx * np.cos(turn) + dy * np.sin(turn)) * 1.2)
        texture = (grains, np.cos(distance * 1.2 + turn), 0 * x, stripes)[kind]
        waves = (0.05, 0.05, 0.4, 0.05)[kind] * np.sin(rng.integers(6, 9) * angle + turn)
        inside = np.clip(radius * (1 + waves) - distance, 0, 1)[..., None]
        image = image * (1 - inside) + (stain + 60 * texture[..., None]) * inside
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", default="demo", metavar="DIR", help="output folder")
    parser.add_argument("--amp", default="auto", help="autocast precision of the three commands")
    args = parser.parse_args()
    out, scripts = Path(args.out), Path(__file__).parent.parent
    refuse_overwrite(out, ("images", "cnn.pt"), False)
    for i in progress(range(PER_CLASS * len(CLASSES)), desc="drawing images"):
        number, kind = divmod(i, len(CLASSES))
        file = out / "images" / CLASSES[kind] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cells(kind, np.random.default_rng([0, i]))).save(file)
    for command in COMMANDS:
        words = f"{command} --data OUT/images --cache OUT/cache --amp {args.amp}".split()
        words = [word.replace("OUT", args.out) for word in words]
        print(f"\npython {shlex.join(words)}", flush=True)
        if status := subprocess.call([sys.executable, scripts / words[0], *words[1:]]):
            sys.exit(status)


if __name__ == "__main__":
    run(main)
