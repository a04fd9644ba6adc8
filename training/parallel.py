"""The training loop: several processes on a CPU, or one GPU with several processes that draw pictures.

On a CPU each single-threaded process computes gradients on its own batches and applies them to shared weights under a
lock, so that no process waits for a slower one. Gradients may be one update old, and the order of updates differs
between runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.multiprocessing as mp
from optimizer import set_rate
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def share(modules: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """On a CPU, move weights and optimizer states into shared memory; create missing states first."""
    if DEVICE.type != "cpu":
        return
    for module in modules:
        module.share_memory()
    if not any(o.state for o in optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
        set_rate(optimizers, 0.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.share_memory_()


class Progress:
    """Steps of all processes, and the elapsed share of the time."""

    def __init__(self, minutes: float, step: int = 0, begin: float | None = None):
        self.begin, self.minutes = begin or time.time(), minutes
        self.counter = mp.Value("q", step)

    @property
    def minute(self) -> float:
        return (time.time() - self.begin) / 60

    @property
    def done(self) -> float:
        return self.minute / self.minutes


def work(rank, lock, progress, batches, loss_of, parameters, optimizers, schedule, after) -> None:
    """One process: batch, gradients, and the update under the lock, until the time is up."""
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
            set_rate(optimizers, schedule(step, progress.done))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
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
    """Train until the time is up; `pid_file` gets the process ids, so that they can be paused.

    On a CPU `workers` processes compute; with a GPU they draw pictures.
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
