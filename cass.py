"""CASS (Singh & Cirrone, arXiv 2206.04170v6), section 3.1: one augmented batch through a CNN and a
Transformer, whose logits are made to agree. Needs torch, timm and `cosine_loss` of losses.py.

    cnn, vit = build_arm("resnet18", 64), build_arm("vit_tiny_patch16_224", 64)
    model = CASS(cnn, vit)
    optimizers = [torch.optim.Adam(arm.parameters(), lr=1e-3) for arm in (cnn, vit)]

    images = torch.randn(4, 3, 64, 64)  # one batch, augmented once, ImageNet-normalized
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = model(images)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
"""

import timm
from torch import nn

from losses import cosine_loss

NUM_LOGITS = 1000  # both arms give the same number of logits; ImageNet weights have these heads


def size_argument(name, img_size):
    """{"img_size": img_size} for timm models that are built for one image size, else {}."""
    cfg = timm.get_pretrained_cfg(name)
    return {"img_size": img_size} if cfg is not None and cfg.fixed_input_size else {}


def build_arm(name, img_size, num_classes=NUM_LOGITS, init="random", **model_kwargs):
    """One arm: the timm model `name`, for square images of img_size pixels.

    init: "random"; "imagenet" (timm's download); or a state dict with timm's keys, whose position
        embeddings and head are adapted to img_size and num_classes where they differ.
    model_kwargs: passed to timm.create_model (patch_size=8, drop_path_rate=0.1, ...).
    Raises timm's own errors for an unknown name, and for arguments or weights that do not fit.
    """
    kwargs = {"num_classes": num_classes, **size_argument(name, img_size), **model_kwargs}
    if isinstance(init, str):
        return timm.create_model(name, pretrained=init == "imagenet", **kwargs)
    classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None)
    first = classifier[0] if isinstance(classifier, tuple) else classifier  # some have two heads
    head = init.get(f"{first}.weight")
    source = {**kwargs, "num_classes": 0 if head is None else head.shape[0]}
    overlay = {"state_dict": dict(init), "num_classes": source["num_classes"]}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **source)
    if model.num_classes != kwargs["num_classes"]:
        model.reset_classifier(kwargs["num_classes"])
    return model


class CASS(nn.Module):
    """The two arms and their loss on one batch (Algorithm 1, lines 2 to 5).

    cnn, vit: any two models that map images to (N, C) logits with the same C.
    head_act: "none", "sigmoid" or "softmax" on the logits before the loss (Table 21).
    objective: the loss of both arms' (N, C) float32 logits; the paper's is equation 1.
    """

    def __init__(self, cnn, vit, head_act="none", objective=cosine_loss):
        super().__init__()
        self.cnn, self.vit, self.objective = cnn, vit, objective
        acts = {"none": nn.Identity(), "sigmoid": nn.Sigmoid(), "softmax": nn.Softmax(dim=1)}
        self.head_act = acts[head_act]

    @property
    def arms(self):
        """{"cnn": module, "vit": module}: what is optimized, averaged and saved."""
        return {"cnn": self.cnn, "vit": self.vit}

    def forward(self, images):
        """images: (N, 3, H, W) float, ImageNet-normalized, augmented once. Returns the loss."""
        R = self.cnn(images)
        T = self.vit(images)
        return self.objective(self.head_act(R.float()), self.head_act(T.float()))
