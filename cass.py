"""CASS (Singh & Cirrone, arXiv 2206.04170v6), section 3.1: one augmented batch through a CNN and a
Transformer, whose logits are made to agree. Needs torch, timm and `cosine_loss` of losses.py.

    arms = build_arm("resnet50", 384, init="imagenet"), build_arm("vit_base_patch16_384", 384)
    loss = CASS(*arms)(images)
"""

import difflib

import timm
import torch
from torch import nn

from losses import cosine_loss

NUM_LOGITS = 1000  # both arms give as many logits; ImageNet weights come with these heads


def build_arm(name, img_size, num_classes=NUM_LOGITS, init="random", **model_kwargs):
    """One arm: the timm model `name`, for square images of `img_size` pixels.

    init: "random"; "imagenet" (timm's download); or a state dict with timm's keys, whose position
        embeddings and head are fitted to img_size and num_classes where they differ.
    model_kwargs: handed to timm.create_model (patch_size=8, drop_path_rate=0.1, ...).
    Returns (model, model_kwargs): the arguments that rebuild it, with img_size where it is needed.
    Raises ValueError for an unknown name; timm's own errors for arguments or weights that misfit.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        raise ValueError(f"timm has no model {name!r}" +
                         (f"; close names: {', '.join(close)}" if close else ""))
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        model_kwargs.setdefault("img_size", img_size)
    kwargs = {"num_classes": num_classes, **model_kwargs}
    if isinstance(init, str):
        model = timm.create_model(name, pretrained=init == "imagenet", **kwargs)
    else:
        head = init.get(f"{cfg.classifier}.weight") if cfg is not None else None
        source = {**kwargs, "num_classes": 0 if head is None else head.shape[0]}
        overlay = {"state_dict": dict(init), "num_classes": source["num_classes"]}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **source)
        if model.num_classes != kwargs["num_classes"]:
            model.reset_classifier(kwargs["num_classes"])
    return model, {key: value for key, value in model_kwargs.items() if key != "num_classes"}


class CASS(nn.Module):
    """The two arms and their loss on one batch (Algorithm 1, lines 2 to 5).

    cnn, vit: any two models that map images to (N, C) logits of one C.
    head_act: "none", "sigmoid" or "softmax" on the logits before the loss (Table 21).
    objective: the loss of both arms' (N, C) float32 logits; the paper's is equation 1.
    """

    def __init__(self, cnn, vit, head_act="none", objective=cosine_loss):
        super().__init__()
        self.cnn, self.vit, self.objective = cnn, vit, objective
        self.head_act = {"none": nn.Identity(), "sigmoid": nn.Sigmoid(),
                         "softmax": nn.Softmax(dim=1)}[head_act]

    @property
    def arms(self):
        """{"cnn": module, "vit": module}: what is optimized, averaged and saved."""
        return {"cnn": self.cnn, "vit": self.vit}

    def forward(self, images):
        """images: (N, 3, H, W) float, ImageNet-normalized, augmented once. Returns the mean loss."""
        R = self.cnn(images)
        T = self.vit(images)
        return self.objective(self.head_act(R.float()), self.head_act(T.float()))

    @torch.no_grad()
    def check_pair(self, img_size):
        """Raise ValueError, in one line, unless both arms map such images to logits of one shape."""
        images = torch.zeros(1, 3, img_size, img_size)
        shapes = {}
        for arm, model in self.arms.items():
            was_training = model.training
            try:
                shapes[arm] = tuple(model.eval()(images).shape)
            except (RuntimeError, AssertionError, ValueError) as error:
                raise ValueError(f"the {arm} arm takes no images of 3x{img_size}x{img_size}: "
                                 f"{str(error).splitlines()[0]}") from error
            model.train(was_training)
        if shapes["cnn"] != shapes["vit"] or len(shapes["cnn"]) != 2:
            raise ValueError(f"the arms cannot be paired: for one image the cnn arm gives logits of "
                             f"shape {shapes['cnn']}, the vit arm {shapes['vit']}")
