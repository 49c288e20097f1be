import pytest
import timm
import torch
from torch import nn

from cass import CASS, build_arm
from common.arms import check_pair, make_arm, rebuild_kwargs
from common.cli import UserError
from losses import cosine_loss


def arms(**kwargs):
    return (
        build_arm("test_resnet", 32, num_classes=10),
        build_arm("test_vit", 32, num_classes=10, **kwargs),
    )


@pytest.mark.parametrize(
    "act, function",
    [
        ("none", lambda x: x),
        ("sigmoid", torch.sigmoid),
        ("softmax", lambda x: x.exp() / x.exp().sum(1, True)),
    ],
)
def test_the_loss_is_equation_1_of_the_activated_logits(act, function):
    torch.manual_seed(0)
    cnn, vit = arms()
    cnn.eval(), vit.eval()
    images = torch.randn(4, 3, 32, 32)
    expected = cosine_loss(function(cnn(images)), function(vit(images)))
    torch.testing.assert_close(CASS(cnn, vit, act)(images), expected)


def test_one_backward_pass_reaches_both_arms():
    torch.manual_seed(0)
    method = CASS(*arms())
    method(torch.randn(4, 3, 32, 32)).backward()
    for arm in method.arms.values():
        assert all(p.grad is not None for p in arm.parameters())
        assert sum(p.grad.abs().sum() for p in arm.parameters()) > 0


def test_any_two_modules_make_a_pair():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    check_pair(linear, linear, 2)
    with pytest.raises(UserError, match=r"\(1, 5\).*\(1, 6\)"):
        check_pair(linear, nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), 2)
    with pytest.raises(UserError, match="--vit.* accepts no images of 3x4x4"):
        check_pair(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), linear, 4)


def test_check_pair_leaves_the_arms_as_they_were():
    method = CASS(*arms())
    before = {k: v.clone() for k, v in method.state_dict().items()}
    check_pair(method.cnn, method.vit, 32)
    assert method.training and method.cnn.training
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


def test_the_stored_arguments_rebuild_the_model():
    model = build_arm("test_vit", 48, num_classes=7, patch_size=8)
    kwargs = rebuild_kwargs("test_vit", 48, {"patch_size": 8})
    assert kwargs == {"img_size": 48, "patch_size": 8}
    again = timm.create_model("test_vit", num_classes=7, **kwargs)
    again.load_state_dict(model.state_dict())
    assert rebuild_kwargs("test_resnet", 48, {}) == {}


def test_close_names_are_suggested():
    with pytest.raises(UserError, match="resnet50"):
        make_arm("--cnn", "resnet5O", "random", 32)
    with pytest.raises(UserError, match="no model"):
        make_arm("--cnn", "qqqqqq", "random", 32)


def test_weights_are_fitted_to_another_size_and_head():
    torch.manual_seed(0)
    source = build_arm("test_vit", 32, num_classes=10)
    same = build_arm("test_vit", 32, num_classes=10, init=source.state_dict())
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in source.state_dict().items())
    other = build_arm("test_vit", 64, num_classes=4, init=source.state_dict())
    assert other(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    assert torch.equal(other.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    with pytest.raises(RuntimeError):
        build_arm("test_resnet", 32, init=source.state_dict())
