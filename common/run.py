"""What surrounds a training loop (pretrain.train): resume, checkpoints, signals, progress, log."""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from common import checkpoint, cli, collapse, distributed
from common.cli import progress, refusing
from common.decode import IMAGENET_MEAN, IMAGENET_STD, normalize


def half_cycle(t_max, iterations):
    """T_max of the cosine for --t-max: of "run", one descent to the last iteration."""
    return max(iterations - 1, 1) if t_max == "run" else t_max


def on_device(loader, device, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Batches (tensors or lists of tensors) on the device, uint8 images as normalized floats."""
    for batch in loader:
        single = torch.is_tensor(batch)
        parts = [x.to(device, non_blocking=True) for x in ([batch] if single else batch)]
        parts = [normalize(x, mean, std) if x.dtype == torch.uint8 else x for x in parts]
        yield parts[0] if single else parts


def seconds_per_step(step, batch, model, device, amp):
    """Seconds of step (batch -> loss) and backward, the second time; model and RNG stay as are."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            start = time.perf_counter()
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss = step(batch)
            loss.backward()
            loss.item()  # waits for the device
            seconds = time.perf_counter() - start
    for buffer, value in buffers:
        buffer.copy_(value)
    model.zero_grad()
    return seconds


@dataclass(repr=False)  # signal.signal() makes one of its handler and would print the tensors
class Run:
    """One training run in a folder."""

    out: Path
    device: torch.device
    amp: torch.dtype | None  # of autocast; None for full precision
    metadata: dict  # what last.pt holds besides the training state
    state: dict | None = None  # the dict of a last.pt to resume from
    log: list | tuple = ()  # rows that log.jsonl begins with
    save_every: float | None = None  # as the flag
    seconds_between_saves: float = 0.0  # at least, of epochs that end
    normalization: tuple = (IMAGENET_MEAN, IMAGENET_STD)
    monitor: object = None  # {arm: model}, device -> {measure: number} after every epoch
    react: object = lambda row: None  # takes each row of the log once it is saved
    write: object = lambda: None  # clears the folder, and writes what is there from the start
    iteration = property(lambda self: self.progress["iteration"])  # zero-based, over the whole run
    epoch = property(lambda self: self.progress["epoch"])  # how many are complete

    def __post_init__(self):
        self.components, self.status, self.signal = {}, "", 0  # signal: that came, to be heeded
        new = dict(epoch=0, batch=0, iteration=0, loss=[0.0], seconds=0, log=[*self.log], start={})
        self.progress = new | {k: x for k, x in (self.state or {}).items() if k in {*new, "best"}}

    def track(self, **components):
        """{name: module, optimizer, ...}: what last.pt saves; when resuming, restored here."""
        self.components |= components
        for name, part in components.items() if self.state is not None else ():
            if self.state.get(name) or name != "scaler":  # a scaler that was off has no state
                with refusing(f"{self.out}/last.pt: {name} damaged or not of this model"):
                    part.load_state_dict(self.state[name])

    def announce(self, step, model, loader, epochs, val_mask=()):
        """Print how long the epochs take, from a few timed steps; then write(). False: a dry run.
        step: batch -> loss; val_mask: true for images only evaluated, at a third of the cost."""
        sampler, dataset, processes = loader.batch_sampler, loader.dataset, distributed.WORLD_SIZE
        size = min(sampler.batch_size // processes, len(dataset))
        began = time.perf_counter()
        batch = loader.collate_fn([dataset[0, i] for i in range(size)])
        loading = 0 if loader.num_workers else time.perf_counter() - began
        (batch,) = on_device([batch], self.device, *self.normalization)
        with refusing(f"a batch of {size} is too small, see --bs and --img-size:", ValueError):
            seconds = seconds_per_step(step, batch, model, self.device, self.amp) + loading
        total = seconds / size * (sampler.n / processes + sum(val_mask) / 3) * epochs
        where = f"on this {self.device.type.upper()} ({size / seconds:.3g} images/s)"
        if total > 86400 and self.device.type == "cpu":
            where += "; smaller settings: README, recipe for a laptop"
        work = f"{epochs} epochs of {sampler.n} images"
        print(f"{work}: about {timedelta(seconds=round(total))} {where}", flush=True)
        if not (dry := self.metadata["args"]["dry_run"]):
            self.write()
        return not dry

    def epochs(self, n, loader, done=lambda epoch: False, models=None):
        """Numbers of the epochs that are left, until done(number of epochs that are complete).
        models: {arm: model} for the monitor, which measures them before the first step too."""
        self.n, self.loader, self.sampler, self.models = n, loader, loader.batch_sampler, models
        self.saved = time.perf_counter()
        if self.state is not None:
            with refusing(f"{self.out}/last.pt: rng damaged"):
                rng = self.state["rng"]
                torch.set_rng_state(rng["cpu"])
                torch.cuda.set_rng_state_all(rng["cuda"][: torch.cuda.device_count()])
            self.save(log_only=True)
            if self.state["batch"] == 0 and self.progress["log"]:
                self.react(self.progress["log"][-1])  # the epoch that the run ended with
        cut = self.epoch * self.sampler.n + self.progress["batch"] * self.sampler.batch_size
        with ExitStack() as self.undo, progress(total=n * self.sampler.n, initial=cut) as self.bar:
            cli.on_stop(self._note_signal, until=self.undo)
            if self.state is None and self.monitor is not None and n:
                self.progress["start"] = self.monitor(models, self.device)
            while self.epoch < n and not done(self.epoch):
                self.sampler.epoch, self.sampler.start = self.epoch, self.progress["batch"]
                loss = self.progress["loss"]
                self.loss = torch.tensor(loss[distributed.RANK % len(loss)], device=self.device)
                self.began = time.perf_counter() - self.progress["seconds"]
                yield self.epoch

    def batches(self):
        """The batches that are left of this epoch, on the device; after each, what is due."""
        loader = on_device(self.loader, self.device, *self.normalization)
        for batch, images in enumerate(loader, self.sampler.start + 1):
            yield images
            self.progress["iteration"] += 1
            size = len(images[0] if isinstance(images, list) else images)
            self.bar.update(size * distributed.WORLD_SIZE)
            if self.iteration % 20 == 0:  # the one wait for the device
                self.check_finite()
                self.show(f"loss {self.last.item():.3g}")
            stop, due = self._agree()
            if stop or due:
                self.check_finite()
                loss = distributed.gather(self.loss[None]).tolist()  # of each process
                self.save(stop, batch=batch, loss=loss, seconds=time.perf_counter() - self.began)

    def _note_signal(self, number, _):
        self.signal = number
        self.undo.close()  # a second one acts at once

    def _agree(self):
        """(signal, whether a checkpoint is due) in all processes; GPUs ask every 20 iterations."""
        every, seconds = self.save_every, time.perf_counter() - self.saved
        timed = isinstance(every, float)
        due = seconds >= 60 * every if timed else bool(every) and self.iteration % every == 0
        if distributed.WORLD_SIZE == 1:
            return self.signal, due
        if self.device.type == "cuda" and self.iteration % 20:
            return 0, due and not timed
        both = torch.tensor([self.signal, due], device=self.device)
        return distributed.all_reduce(both, "MAX").tolist()

    def show(self, text):
        self.bar.set_postfix_str(f"epoch {self.epoch + 1}/{self.n}, {text}{self.status}", False)

    def note(self, loss):
        self.last = loss.detach()  # nothing is copied from the device
        self.loss += self.last

    def mean_loss(self):
        """Mean loss of the epoch, over its steps and all processes."""
        total = distributed.all_reduce(self.loss.clone()).item()
        return total / (len(self.sampler) * distributed.WORLD_SIZE)

    def end_epoch(self, **numbers):
        """Log a row of numbers, and what the monitor measures; write last.pt."""
        self.check_finite()
        epoch, took = self.epoch + 1, time.perf_counter() - self.began
        row = {"epoch": epoch, "iteration": self.iteration, **numbers, "seconds": round(took, 3)}
        if self.models is not None:
            row["images_per_second"] = round(self.sampler.n / took, 2)
            row["arms"] = "+".join(self.models)
        if self.monitor is not None:
            start, now = self.progress["start"], self.monitor(self.models, self.device)
            row |= now | collapse.flags(start, now)
            row["monitor_seconds"] = round(time.perf_counter() - self.began - took, 3)
            self.status = collapse.change(start, row)
            row |= {"start": start} if row["epoch"] == 1 else {}
        self.progress["log"] = [*self.progress["log"], row]
        stop = self.signal if distributed.WORLD_SIZE == 1 else 0  # since the last step
        skip = time.perf_counter() - self.saved < self.seconds_between_saves and not stop
        self.save(stop, skip, epoch=row["epoch"], batch=0, loss=[0.0], seconds=0.0)
        self.react(row)

    def save(self, stop=0, log_only=False, **progress):
        """Write last.pt and log.jsonl, whole or not at all; then stop by this signal."""
        self.progress.update(progress)
        if distributed.RANK == 0 and not log_only:
            states = {name: part.state_dict() for name, part in self.components.items()}
            states["rng"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
            checkpoint.save(self.out / "last.pt", {**self.metadata, **self.progress, **states})
        if distributed.RANK == 0:
            checkpoint.write_json_lines(self.out / "log.jsonl", self.progress["log"])
        self.saved = self.saved if log_only else time.perf_counter()
        if stop:
            cli.stop(stop, advice=f"to resume from {self.out / 'last.pt'}, give --resume")

    def check_finite(self, *losses):
        """Stop with exit status 1 on a loss that is NaN or infinite."""
        if not math.isfinite(loss := sum(losses, self.loss.item())):
            what = f"the loss is {loss} in epoch {self.epoch + 1}; what this run saved is intact"
            raise cli.Stopped(1, f"{what}; try a smaller --lr, or --amp off")
