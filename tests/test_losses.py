import math

import pytest
import torch
import torch.nn.functional as F

from losses import OBJECTIVES, class_weights, cosine_loss, focal_loss, vicreg


def slow_cosine_loss(R, T, eps):
    """Equation 1 with plain numbers."""
    total = 0.0
    for r, t in zip(R.tolist(), T.tolist()):
        norm_r = max(math.sqrt(sum(x * x for x in r)), eps)
        norm_t = max(math.sqrt(sum(x * x for x in t)), eps)
        total += 2 - 2 * sum(a / norm_r * b / norm_t for a, b in zip(r, t))
    return total / len(R)


def test_cosine_loss_is_equation_1():
    torch.manual_seed(0)
    R, T = torch.randn(5, 7), 3 * torch.randn(5, 7)
    assert cosine_loss(R, T).item() == pytest.approx(slow_cosine_loss(R, T, 1e-12), rel=1e-5)
    small = torch.full((2, 3), 1e-4)
    assert cosine_loss(small, small, eps=1.0).item() == pytest.approx(
        slow_cosine_loss(small, small, 1.0), rel=1e-6
    )


def test_cosine_loss_identities():
    torch.manual_seed(0)
    R, T = torch.randn(6, 9), torch.randn(6, 9)
    assert cosine_loss(R, R).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(R, -R).item() == pytest.approx(4, abs=1e-6)
    assert cosine_loss(R, T).item() == pytest.approx(cosine_loss(T, R).item(), abs=1e-6)
    assert cosine_loss(50 * R, 0.1 * T).item() == pytest.approx(cosine_loss(R, T).item(), abs=1e-5)


def test_cosine_loss_reaches_both_arms_and_survives_zeros():
    R, T = torch.zeros(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    loss = cosine_loss(R, T)
    loss.backward()
    assert loss.item() == pytest.approx(2)
    assert torch.isfinite(R.grad).all() and torch.isfinite(T.grad).all()
    R, T = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    cosine_loss(R, T).backward()
    assert R.grad.abs().sum() > 0 and T.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosine_loss_is_float32_inside_autocast_too(dtype):
    R, T = torch.randn(4, 1000).to(dtype), torch.randn(4, 1000).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cosine_loss(R, T)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_cosine_loss(R.float(), T.float(), 1e-12), rel=1e-5)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,))])
def test_cosine_loss_names_the_shapes(shapes):
    with pytest.raises(ValueError, match=str(shapes[0][0])):
        cosine_loss(torch.ones(shapes[0]), torch.ones(shapes[1]))


def slow_focal_loss(logits, targets, weights, alpha, gamma):
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist()):
        for x, t, w in zip(row, target, weights):
            p = 1 / (1 + math.exp(-x))
            p_t = p if t else 1 - p
            total += w * -alpha * (1 - p_t) ** gamma * math.log(p_t)
    return total / logits.numel()


@pytest.mark.parametrize("gamma, alpha", [(2, 1), (2, 0.25), (0, 1), (5, 3)])
def test_focal_loss_is_its_formula(gamma, alpha):
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    weights = torch.tensor([1.0, 0.2, 0.5, 2.0])
    matrix = F.one_hot(targets, 4)
    expected = slow_focal_loss(logits, matrix, weights.tolist(), alpha, gamma)
    for target in (targets, matrix, matrix.float(), matrix.bool()):
        loss = focal_loss(logits, target, weights, alpha=alpha, gamma=gamma)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_focal_loss_multilabel_without_any_label():
    logits = torch.randn(3, 2)
    targets = torch.tensor([[0, 0], [1, 1], [0, 1]])
    assert focal_loss(logits, targets).item() == pytest.approx(
        slow_focal_loss(logits, targets, [1, 1], 1, 2), rel=1e-4
    )


def test_focal_loss_with_gamma_0_is_cross_entropy_in_value_and_gradient():
    torch.manual_seed(0)
    a = torch.randn(5, 3, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    targets = torch.randint(0, 2, (5, 3)).float()
    focal_loss(a, targets, gamma=0).backward()
    F.binary_cross_entropy_with_logits(b, targets).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_focal_loss_is_stable_at_extreme_logits(gamma):
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 0]), gamma=gamma)
    loss.backward()
    assert loss.item() == pytest.approx(50)  # two terms of 100, two of 0
    assert torch.isfinite(logits.grad).all()
    half = focal_loss(logits.detach().half(), torch.tensor([0, 0]), gamma=gamma)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(50)


def test_focal_loss_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="gamma"):
        focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=0.5)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        focal_loss(torch.zeros(2, 3), torch.zeros(2, 2))


def test_class_weights():
    torch.testing.assert_close(
        class_weights([100, 50, 20], "minmax"), torch.tensor([1.0, 0.2 + 0.8 * 30 / 80, 0.2])
    )
    inverse = class_weights([100, 50, 20], "inverse")
    assert inverse.mean().item() == pytest.approx(1)
    torch.testing.assert_close(
        inverse * torch.tensor([100.0, 50, 20]), inverse[0] * 100 * torch.ones(3)
    )
    for kind in ("minmax", "inverse", "none"):
        assert class_weights([7, 7, 7], kind).tolist() == [1, 1, 1]
        absent = class_weights([0, 5, 10], kind)
        assert (
            torch.isfinite(absent).all() and absent.shape == (3,) and absent.dtype == torch.float32
        )
        assert class_weights([0, 0], kind).tolist() == [1, 1]
    assert class_weights([0, 5, 10], "minmax").tolist() == pytest.approx([0.2, 0.6, 1.0])
    with pytest.raises(ValueError, match="median"):
        class_weights([2, 2], "median")


def slow_vicreg(R, T):
    n, c = R.shape
    total = (
        25
        * sum((a - b) ** 2 for r, t in zip(R.tolist(), T.tolist()) for a, b in zip(r, t))
        / (n * c)
    )
    for x in (R, T):
        columns = [[v - sum(column) / n for v in column] for column in x.T.tolist()]
        cov = [[sum(a * b for a, b in zip(p, q)) / (n - 1) for q in columns] for p in columns]
        total += 25 * sum(max(0, 1 - math.sqrt(cov[i][i] + 1e-4)) for i in range(c)) / c
        total += sum(cov[i][j] ** 2 for i in range(c) for j in range(c) if i != j) / c
    return total


def test_vicreg_equals_the_loops():
    torch.manual_seed(0)
    R, T = 0.7 * torch.randn(6, 5), torch.randn(6, 5)
    assert vicreg(R, T).item() == pytest.approx(slow_vicreg(R, T), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cosine"])
def test_collapsed_arms_are_no_minimum(name):
    """Where both arms give one vector, equation 1 is 0 and these are not; a step along the gradient
    from nearly there leads away."""
    torch.manual_seed(0)
    objective, constant = OBJECTIVES[name], torch.randn(1, 8).expand(6, 8)
    different = torch.eye(8)[:6] * 4
    assert cosine_loss(constant, constant).item() == pytest.approx(0, abs=1e-6)
    assert objective(constant, constant) > objective(different, different) + 1
    R = (constant + 1e-2 * torch.randn(6, 8)).requires_grad_()
    T = R.detach().clone().requires_grad_()
    before = torch.stack([x.detach().std(0).mean() for x in (R, T)])
    objective(R, T).backward()
    with torch.no_grad():
        after = torch.stack([(x - 0.01 * x.grad).std(0).mean() for x in (R, T)])
    assert (after > before).all()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_objectives_are_symmetric_float32_and_name_the_shapes(name):
    torch.manual_seed(0)
    R, T = torch.randn(6, 50).bfloat16(), torch.randn(6, 50).bfloat16()
    whole = OBJECTIVES[name](R.float(), T.float())
    assert OBJECTIVES[name](T.float(), R.float()).item() == pytest.approx(whole.item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = OBJECTIVES[name](R, T)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(whole.item(), rel=1e-5)
    with pytest.raises(ValueError, match="50"):
        OBJECTIVES[name](R, T[:, :40])
