"""pretrain.py with controls, and with what the search for a recipe tried: results/pretrained.

    python tests/variants.py --variant shuffled [flags of pretrain.py]

Variants, of which several may be given:
shuffled       equation 1 or another objective, but no image meets itself: no pair agrees
frozen_cnn     the CNN gets no gradient, though batch-norm sees the images; frozen_vit: the ViT
keep_bn        batch-norm keeps the statistics it came with
two_views      each arm sees an augmentation of its own
relations      the cosines between the images of a batch agree, of features, not logits
anchor=W       W times the squared distance from the initial weights, relative to their own square
decay=W        AdamW with this weight decay
cnn=X, vit=X   the learning rate of one arm, as a multiple of --lr
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parents[1]))

import cass
import data
import pretrain
import swa
from common import cli

given = {}  # {variant: its number, or 1.0}


def relations(a, b):
    """Mean squared difference of the cosines between different images, (N, D) features each."""
    a, b = (F.normalize(x - x.mean(0), dim=1) for x in (a, b))
    off = ~torch.eye(len(a), dtype=bool, device=a.device)
    return (a @ a.T - b @ b.T)[off].square().mean()


def features(model, images):
    return model.forward_head(model.forward_features(images), pre_logits=True).float()


class Variant(cass.CASS):
    """CASS with what is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if "anchor" in given:
            self.initial = {k: p.detach().clone() for k, p in self.named_parameters()}
        for m in self.modules() if "keep_bn" in given else ():
            if isinstance(m, _BatchNorm):
                m.eval()
                m.train = lambda mode=True, m=m: m

    def forward(self, images):
        both = (images[:, 0], images[:, 1]) if images.ndim == 5 else (images, images)
        run = features if "relations" in given else lambda model, x: model(x).float()
        outputs = []
        for (name, arm), x in zip(self.arms.items(), both):
            with torch.set_grad_enabled(f"frozen_{name}" not in given):
                outputs.append(run(arm, x.contiguous(memory_format=torch.channels_last)))
        R, T = outputs
        T = T.roll(1, 0) if "shuffled" in given else T
        with torch.autocast(R.device.type, enabled=False):
            loss = (relations if "relations" in given else self.objective)(R, T)
        if "anchor" in given:
            moved = sum((p - self.initial[k]).square().sum() for k, p in self.named_parameters())
            size = sum(x.square().sum() for x in self.initial.values())
            loss = loss + given["anchor"] * moved / size
        return loss


def main():
    parser = cli.Parser(None, add_help=False)
    parser.add_argument("--variant", nargs="+", default=[])
    args, sys.argv[1:] = parser.parse_known_args()
    for name, _, number in (word.partition("=") for word in args.variant):
        given[name] = float(number or 1)
    pretrain.CASS = Variant
    if "keep_bn" in given:
        swa.update_bn = lambda images, arm: None
    adam, scales = torch.optim.Adam, [given.get("cnn", 1), given.get("vit", 1)]  # in this order

    def optimizer(parameters, lr, **kwargs):
        lr = lr * scales.pop(0)
        if "decay" in given:
            return torch.optim.AdamW(parameters, lr, weight_decay=given["decay"], **kwargs)
        return adam(parameters, lr, **kwargs)

    torch.optim.Adam = optimizer
    if "two_views" in given:
        one = data.augmentation

        def two(*args):
            transform = one(*args)
            return lambda image: torch.stack([transform(image), transform(image)])

        data.augmentation = two
        on_device = pretrain.on_device  # for the batch-norm pass after training
        pretrain.on_device = lambda *args: (x[:, 0] for x in on_device(*args))
    pretrain.main()


if __name__ == "__main__":
    cli.run(main)
