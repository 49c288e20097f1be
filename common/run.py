"""What surrounds a training loop: exact resume, checkpoints, signals, progress and log.jsonl. The
loop asks `epochs` and `batches` for its work and reads as if nothing surrounded it:

    run.track(model=model, optimizer=optimizer)
    for _ in run.epochs(n, loader):
        for images in run.batches():
            ...
            run.note(loss)
        run.end_epoch(lr=lr)
"""

import math
import time

import torch

from common import checkpoint, collapse, distributed
from common.cli import Signals, duration, progress
from common.decode import IMAGENET_MEAN, IMAGENET_STD, normalize


def half_cycle(t_max, iterations):
    """--t-max in iterations: "run" is one descent that ends with the last of them."""
    return max(iterations - 1, 1) if t_max == "run" else t_max


def on_device(loader, device, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """The batches of a loader on the device: uint8 images become normalized floats, the rest stays
    as it is. A batch is a tensor, or a list of tensors (several views; images and targets)."""

    def move(x):
        x = x.to(device, non_blocking=True)
        return normalize(x, mean, std) if x.dtype == torch.uint8 else x

    for batch in loader:
        yield [move(x) for x in batch] if isinstance(batch, (list, tuple)) else move(batch)


def seconds_per_step(step, amp, model, batch, limit=3.0):
    """Seconds of a forward and backward pass: the last of up to three, fewer where they take longer
    than `limit` seconds together. Leaves weights, buffers, gradients and random state as they were.

    step: batch -> loss.
    """
    random_state = checkpoint.random_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    began = time.perf_counter()
    for _ in range(3):
        before = time.perf_counter()
        with torch.autocast(batch_device(batch).type, amp, enabled=amp is not None):
            loss = step(batch)
        loss.backward()
        if batch_device(batch).type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - before
        if time.perf_counter() - began > limit:
            break
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    model.zero_grad()
    checkpoint.set_random_state(random_state)
    return seconds


def batch_device(batch):
    """The device of a batch, which may be a list of tensors."""
    return (batch[0] if isinstance(batch, list) else batch).device


class Run:
    """One training run in a folder.

    out: the folder; metadata: what last.pt holds besides the training state; state: the dict of a
    last.pt to resume from, or None; log: rows that log.jsonl begins with; save_every: as the flag;
    save_epochs: False where last.pt after an epoch may be skipped to keep its cost below a
    twentieth of the time; mean, std: of the normalization.
    """

    def __init__(
        self,
        out,
        device,
        metadata,
        state=None,
        log=(),
        save_every=None,
        save_epochs=True,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ):
        self.out, self.device, self.metadata = out, device, metadata
        self.save_every, self.save_epochs, self.mean, self.std = save_every, save_epochs, mean, std
        self.state, self.components, self.cost, self.status = state, {}, 0.0, ""
        self.progress = {
            "epoch": 0,
            "batch": 0,
            "iteration": 0,
            "loss": [0.0],
            "seconds": 0.0,
            "log": list(log),
        }
        if state is not None:
            self.progress = {key: state[key] for key in self.progress}

    def track(self, **components):
        """{name: module, optimizer, ...}: what last.pt saves; when resuming, restored here."""
        self.components = components
        if self.state is not None:
            checkpoint.restore(components, self.state)
            self._write_log()

    def announce(self, step, amp, model, loader, epochs, also=0):
        """Print how long `epochs` will take here, from a few timed steps.

        step: batch -> loss of the model, before autocast to amp; also: images of each epoch that are
        only evaluated, at a third of the cost.
        """
        sampler, dataset = loader.batch_sampler, loader.dataset
        size = min(sampler.batch_size // distributed.world_size(), len(dataset))
        began = time.perf_counter()
        batch = loader.collate_fn([dataset[0, i] for i in range(size)])
        loading = 0 if loader.num_workers else time.perf_counter() - began
        (batch,) = on_device([batch], self.device, self.mean, self.std)
        seconds = seconds_per_step(step, amp, model, batch) + loading
        total = seconds / size * (sampler.n / distributed.world_size() + also / 3) * epochs
        print(
            f"{epochs} epochs of {sampler.n} images: about {duration(total)} on this "
            f"{self.device.type.upper()} ({size / seconds:.3g} images/s)"
            + (
                "; smaller settings: README, recipe for a laptop"
                if total > 86400 and self.device.type == "cpu"
                else ""
            ),
            flush=True,
        )

    @property
    def iteration(self):
        """Zero-based number of the current step, over the whole run."""
        return self.progress["iteration"]

    @property
    def epoch(self):
        """How many epochs are complete."""
        return self.progress["epoch"]

    def epochs(self, n, loader, done=lambda: False):
        """Numbers of the epochs that are left, until done()."""
        self.n, self.loader, self.sampler = n, loader, loader.batch_sampler
        self.saved = time.perf_counter()
        with (
            Signals() as self.signals,
            progress(
                total=n * self.sampler.n, initial=self.progress["epoch"] * self.sampler.n
            ) as self.bar,
        ):
            while self.progress["epoch"] < n and not done():
                epoch = self.progress["epoch"]
                self.sampler.epoch, self.sampler.start = epoch, self.progress["batch"]
                loss = self.progress["loss"]
                self.loss = torch.tensor(loss[distributed.rank() % len(loss)], device=self.device)
                self.began = time.perf_counter() - self.progress["seconds"]
                yield epoch

    def batches(self):
        """The batches of this epoch that are left, as on_device gives them. After each step: the
        progress bar, signals and checkpoints."""
        loader = on_device(self.loader, self.device, self.mean, self.std)
        for batch, images in enumerate(loader, self.sampler.start + 1):
            yield images
            self.progress["iteration"] += 1
            self.bar.update(
                len(images[0] if isinstance(images, list) else images) * distributed.world_size()
            )
            if self.iteration % 20 == 0:  # the one wait for the device
                self.check_finite()
                self.show(f"loss {self.last.item():.3g}")
            stop, due = self._agree()
            if stop or due:
                self.check_finite()
                loss = distributed.gather(self.loss[None]).tolist()  # of each process
                self.save(batch=batch, loss=loss, seconds=time.perf_counter() - self.began)
            if stop:
                self.signals.leave(
                    f"{self.out / 'last.pt'} holds iteration {self.iteration}; resume with --resume"
                )

    def _agree(self):
        """(a signal arrived, a checkpoint is due): the same in all processes. On several GPUs, whose
        steps are short, they ask each other every 20 iterations."""
        if isinstance(self.save_every, float):
            due = time.perf_counter() - self.saved >= 60 * self.save_every
        else:
            due = self.save_every is not None and self.iteration % self.save_every == 0
        if distributed.world_size() == 1:
            return self.signals.number, due
        if self.device.type == "cuda" and self.iteration % 20:
            return 0, due and not isinstance(self.save_every, float)
        both = torch.tensor([self.signals.number, due], device=self.device)
        self.signals.number, due = distributed.all_reduce(both, "MAX").tolist()
        return self.signals.number, bool(due)

    def show(self, text):
        """Beside the progress bar: the epoch, the text, and what was last measured."""
        self.bar.set_postfix_str(
            f"epoch {self.progress['epoch'] + 1}/{self.n}, {text}{self.status}", refresh=False
        )

    def note(self, loss):
        """Add up the loss of a step; nothing is copied from the device."""
        self.last = loss.detach()
        self.loss += self.last

    def mean_loss(self):
        """Mean loss of the epoch, over its steps and all processes."""
        total = distributed.all_reduce(self.loss.clone()).item()
        return total / (len(self.sampler) * distributed.world_size())

    def end_epoch(self, monitor=None, models=None, **row):
        """Log a row of numbers, and what the monitor measures of {arm: model}; write last.pt. Returns
        the row."""
        self.check_finite()
        seconds = time.perf_counter() - self.began
        row = {
            "epoch": self.progress["epoch"] + 1,
            "iteration": self.iteration,
            **row,
            "seconds": round(seconds, 3),
        }
        if models is not None:
            row |= {
                "arms": "+".join(models),
                "images_per_second": round(self.sampler.n / seconds, 2),
            }
        if monitor is not None and distributed.rank() == 0:
            row |= monitor(models, self.device)
            row["monitor_seconds"] = round(time.perf_counter() - self.began - seconds, 3)
            self.status = collapse.in_brief(row)
        self.progress.update(
            epoch=row["epoch"], batch=0, loss=[0.0], seconds=0.0, log=[*self.progress["log"], row]
        )
        if self.save_epochs or time.perf_counter() - self.saved > 20 * self.cost:
            self.save()
        else:
            self._write_log()
        return row

    def save(self, **progress):
        """Write last.pt and log.jsonl, whole or not at all."""
        began = time.perf_counter()
        self.progress.update(progress)
        if distributed.rank() == 0:
            checkpoint.save(
                self.out / "last.pt",
                {
                    **self.metadata,
                    **self.progress,
                    "rng": checkpoint.random_state(),
                    **{name: part.state_dict() for name, part in self.components.items()},
                },
            )
        self._write_log()
        self.saved = time.perf_counter()
        self.cost = self.saved - began

    def _write_log(self):
        if distributed.rank() == 0:
            checkpoint.write_json_lines(self.out / "log.jsonl", self.progress["log"])

    def check_finite(self, *losses):
        """Raise FloatingPointError (exit status 1) on a loss that is NaN or infinite."""
        for loss in (self.loss.item(), *losses):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} in epoch {self.progress['epoch'] + 1}; what was saved "
                    f"before is intact; try a smaller --lr, or --amp off"
                )
