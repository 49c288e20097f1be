import torch
from torch import nn

import pretrain
from common.decode import normalize
from swa import SWA, is_cycle_end


def test_cycle_ends_are_the_minima_of_the_schedule():
    for t_max in (1, 3, 16):
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([parameter], lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max, 1e-6)
        for iteration in range(200):
            at_minimum = abs(optimizer.param_groups[0]["lr"] - 1e-6) < 1e-9
            assert is_cycle_end(iteration, t_max) == at_minimum, (t_max, iteration)
            optimizer.step()
            scheduler.step()
    assert [i for i in range(100) if is_cycle_end(i, 16)] == [16, 48, 80]


def test_the_average_is_the_mean_of_the_snapshots():
    torch.manual_seed(0)
    arms = {"cnn": nn.Linear(3, 2), "vit": nn.Linear(3, 2)}
    swa, taken = SWA(arms, 0.5, 40, 4), []
    for iteration in range(40):
        with torch.no_grad():
            for arm in arms.values():
                arm.weight.add_(torch.randn(2, 3))
        swa.after_step(iteration)
        if iteration in (20, 28, 36):  # 4 + 8 k, from iteration 20 on
            taken.append(arms["cnn"].weight.detach().clone())
    assert swa.snapshots == 3
    torch.testing.assert_close(
        swa.finish(None)["cnn"].weight, torch.stack(taken).mean(0), rtol=0, atol=1e-6
    )
    assert not torch.equal(arms["cnn"].weight, taken[-1])  # the arm itself trained on


def test_without_a_snapshot_the_arms_themselves_come_back():
    arms = {"cnn": nn.Linear(3, 2)}
    swa = SWA(arms, 0.75, 10, 16)
    for iteration in range(10):
        swa.after_step(iteration)
    assert swa.snapshots == 0 and swa.finish(None) is arms


def test_going_on_from_a_state_dict_equals_going_on():
    def grow(arms, swa, iterations):
        for i in iterations:
            with torch.no_grad():
                arms["cnn"].weight.add_(i)
            swa.after_step(i)

    torch.manual_seed(0)
    arms = {"cnn": nn.Linear(3, 2)}
    swa = SWA(arms, 0, 30, 2)
    grow(arms, swa, range(15))
    again = {"cnn": nn.Linear(3, 2)}
    again["cnn"].load_state_dict(arms["cnn"].state_dict())
    resumed = SWA(again, 0, 30, 2)
    resumed.load_state_dict(swa.state_dict())
    for a, s in ((arms, swa), (again, resumed)):
        grow(a, s, range(15, 30))
    assert resumed.snapshots == swa.snapshots == 7
    assert torch.equal(resumed.finish(None)["cnn"].weight, swa.finish(None)["cnn"].weight)


def test_a_run_averages_its_snapshots_and_recomputes_batch_norm(
    folder, tmp_path, script, monkeypatch
):
    """The saved arm against the mean of weights noted from outside, and its first batch-norm
    against a loop of our own over the training batches."""
    noted, seen = {}, []
    step = SWA.after_step

    def note(self, iteration):
        noted[iteration] = {k: v.clone() for k, v in self.arms["cnn"].state_dict().items()}
        step(self, iteration)

    def note_batches(self, images):
        seen.extend(images())
        return finish(self, lambda: seen)

    finish = SWA.finish
    monkeypatch.setattr(SWA, "after_step", note)
    monkeypatch.setattr(SWA, "finish", note_batches)
    status, out, err = script(
        pretrain,
        "--data",
        folder,
        "--cnn",
        "test_resnet",
        "--vit",
        "test_vit",
        "--img-size",
        32,
        "--init",
        "random",
        "--epochs",
        4,
        "--bs",
        8,
        "--t-max",
        2,
        "--amp",
        "off",
        "--out",
        tmp_path / "run",
    )
    assert status == 0, err
    ends = [i for i in noted if i in (2, 6, 10, 14, 18) and i >= 0.75 * len(noted)]
    weights = torch.load(tmp_path / "run/cnn.pt", weights_only=True)
    assert weights["swa_snapshots"] == len(ends) > 0
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)["method"]
    for name, value in weights["state_dict"].items():
        if name.endswith(("weight", "bias")):
            mean = torch.stack([noted[i][name] for i in ends]).mean(0)
            torch.testing.assert_close(value, mean, rtol=0, atol=1e-6)
            assert not torch.equal(value, last[f"cnn.{name}"])
    assert not any(name.startswith("module.") for name in weights["state_dict"])

    assert sum(map(len, seen)) >= 20
    first = torch.nn.functional.conv2d
    means = [
        first(x, weights["state_dict"]["conv1.0.weight"], stride=2, padding=1).mean((0, 2, 3))
        for x in seen
    ]
    torch.testing.assert_close(
        weights["state_dict"]["conv1.1.running_mean"],
        torch.stack(means).mean(0),
        rtol=1e-3,
        atol=1e-4,
    )
    assert normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).min() < -1  # seen are normalized
    assert min(x.min() for x in seen) < -1
