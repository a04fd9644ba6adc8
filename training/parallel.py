"""The training loop: several processes on a CPU, or one GPU that several processes draw pictures for.

On a CPU each single-threaded process computes gradients on its own batches and applies them itself to shared weights,
one at a time under a lock, so on a busy machine no process waits for a slower one. Gradients may be one update old, and
two runs differ in the order of updates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.multiprocessing as mp
from optimiser import set_rate
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def share(modules: list[nn.Module], optimisers: list[torch.optim.Optimizer]) -> None:
    """On a CPU, move weights and optimiser states into shared memory, making the states first where there are none."""
    if DEVICE.type != "cpu":
        return
    for module in modules:
        module.share_memory()
    if not any(o.state for o in optimisers):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
        set_rate(optimisers, 0.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    for optimiser in optimisers:
        for state in optimiser.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.share_memory_()


class Progress:
    """Steps done by all processes, and the share of the time that is gone."""

    def __init__(self, minutes: float, step: int = 0, begin: float | None = None):
        self.begin, self.minutes = begin or time.time(), minutes
        self.counter = mp.Value("q", step)

    @property
    def minute(self) -> float:
        return (time.time() - self.begin) / 60

    @property
    def done(self) -> float:
        return self.minute / self.minutes


def work(rank, lock, progress, batches, loss_of, parameters, optimisers, schedule, after) -> None:
    """One process: batch, gradients, and the update under the lock, until the time is over."""
    torch.set_num_threads(1)
    for batch in batches(rank):
        if progress.done >= 1:
            return
        loss, log = loss_of(batch)
        loss.backward()
        with lock:
            progress.counter.value += 1
            step = progress.counter.value
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            set_rate(optimisers, schedule(step, progress.done))
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        if step % 25 == 0:
            print(f"step {step} minute {progress.minute:.1f} loss {loss.item():.3f} {log}", flush=True)
        if rank == 0:
            after(step)


class Drawn(IterableDataset):
    """The batches of every drawing process."""

    def __init__(self, batches: Callable[[int], Iterable]):
        self.batches = batches

    def __iter__(self) -> Iterator:
        return iter(self.batches(get_worker_info().id))


def uploaded(loader: Iterable) -> Iterator[list]:
    """Batches with their tensors on the device."""
    for batch in loader:
        yield [x.to(DEVICE, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in batch]


def launch(workers: int, pid_file: Path, progress, batches, *args) -> None:
    """Train until the time is over; the processes' ids go into `pid_file` so that they can be paused.

    `workers` processes compute on a CPU; beside a GPU they draw.
    """
    if DEVICE.type != "cpu":
        loader = DataLoader(Drawn(batches), None, num_workers=workers, pin_memory=True, multiprocessing_context="fork")
        pid_file.write_text(str(os.getpid()))
        work(0, nullcontext(), progress, lambda rank: uploaded(loader), *args)
        return
    context = mp.get_context("fork")
    lock = context.Lock()
    processes = [context.Process(target=work, args=(rank, lock, progress, batches, *args)) for rank in range(workers)]
    for process in processes:
        process.start()
    pid_file.write_text(" ".join(str(i) for i in [os.getpid(), *(p.pid for p in processes)]))
    for process in processes:
        process.join()
    if any(p.exitcode for p in processes):
        raise SystemExit("a training process failed; the last saved state is whole")
