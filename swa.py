"""Stochastic weight averaging (Izmailov et al., arXiv 1803.05407v3) as sections 3.1 and F.2.3 of
the CASS paper (v6) ask for: the mean of an arm's weights at the ends of the annealing cycles."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn


def is_cycle_end(iteration, t_max):
    """True for the zero-based iteration whose step was taken at the minimum learning rate.

    CosineAnnealingLR stepped once per iteration falls for t_max iterations, rises for t_max, and
    so on: the minima are the iterations t_max, 3 t_max, 5 t_max, ... (16, 48, 80, ...).
    """
    return iteration % (2 * t_max) == t_max


class SWA:
    """Averages the weights of each arm; the arms themselves train on unchanged.

    arms: {name: module}; start: the share of the run, 0 to 1, after which snapshots are taken;
    iterations: of the whole run; t_max: half a cycle of the learning rate, in iterations.
    """

    def __init__(self, arms, start, iterations, t_max):
        self.arms, self.t_max = arms, t_max
        self.first = start * iterations
        self.averages = {}  # made at the first snapshot, so that nothing is paid before

    @property
    def snapshots(self):
        """How many snapshots the average holds."""
        return next((int(a.n_averaged) for a in self.averages.values()), 0)

    def after_step(self, iteration):
        """Call after the optimizer step of each zero-based iteration."""
        if iteration >= self.first and is_cycle_end(iteration, self.t_max):
            if not self.averages:
                self.averages = {name: AveragedModel(arm) for name, arm in self.arms.items()}
            for name, average in self.averages.items():
                average.update_parameters(self.arms[name])

    def finish(self, images):
        """Return {name: module}: the averaged arms, or the arms as they are without a snapshot.

        images: a callable that gives an iterable of batches, (N, 3, H, W) normalized, on the arms'
        device. Every arm with batch-norm goes through them once, since the statistics of the last
        weights are not those of the averaged ones.
        """
        if not self.averages:
            return self.arms
        finished = {name: average.module for name, average in self.averages.items()}
        for arm in finished.values():
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in arm.modules()):
                update_bn(images(), arm)
        return finished

    def state_dict(self):
        """Plain tensors, to resume from."""
        return {name: average.state_dict() for name, average in self.averages.items()}

    def load_state_dict(self, state):
        """The counterpart of state_dict()."""
        for name, arm in self.arms.items() if state else ():
            self.averages[name] = AveragedModel(arm)
            self.averages[name].load_state_dict(state[name])
