"""A job on many machines: Ray Data distributes blocks to one worker per machine; results return here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qvl_kernels.atomic import replacing
from qvl_kernels.cache_folder import foreign, open_private
from qvl_runtime.batch.job import Computed, Task, Worker
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.rows import Source
from qvl_runtime.errors import QvlError

LOCAL = "local"
"""The address that starts a cluster on this machine, whichever others run there."""


def ray_package() -> Any:
    """Import the optional package.

    Raises
    ------
    QvlError
        If it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise QvlError("--ray needs the package ray: pip install 'qvl-runtime[batch]'") from None
    return ray


def on_ray(
    address: str,
    ship_model: bool,
    model: ModelSpec,
    source: Source,
    options: Options,
    tasks: Sequence[Task],
    on_computed: Callable[[Computed], None],
) -> None:
    """Compute tasks on a Ray cluster. If a worker is lost, its block is computed on another machine.

    The input must have the same path on every machine; so must the model, unless it is sent.

    Parameters
    ----------
    address : str
        Address of the cluster's head, "auto", or `LOCAL`.
    ship_model : bool
        Send the model's file to every machine once.

    Raises
    ------
    QvlError
        If Ray is not installed, there is no cluster at the address or no processor in it, or all workers fail.
    """
    ray = ray_package()
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == LOCAL else None,
            ignore_reinit_error=True,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise QvlError(f"--ray {address}: no cluster answers ({str(error)[:200]}); name its head, or local") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:  # such as a cluster of which only the head runs
        raise QvlError(f"--ray {address}: no machine of the cluster has a processor to use; start its workers first")
    shipped = ray.put(model.path.read_bytes()) if ship_model else None
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = ray.data.from_items(
        [{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks)
    ).map_batches(
        _RayWorker,
        fn_constructor_args=(model, source, options, [shipped]),
        batch_size=1,
        num_cpus=min(node["CPU"] for node in nodes),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, len(nodes))),
    )
    try:
        for row in blocks.iter_rows():
            on_computed(_read(row["computed"]))
    except ray.exceptions.RayError as error:
        raise QvlError(f"--ray {address}: the job ended early ({str(error)[-300:]}); run again to go on") from None


class _RayWorker:
    """A `Worker` in an actor that uses all processors of a machine."""

    def __init__(self, model: ModelSpec, source: Source, options: Options, shipped: Sequence[Any]):
        # Ray limits the threads of libraries with this variable; our limit is the processors of the process.
        os.environ.pop("OMP_NUM_THREADS", None)
        if shipped[0] is not None:
            model = ModelSpec(_unpacked(ray_package().get(shipped[0])), model.load)
        self._worker = Worker(model, source, options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found: list[str] = []
        tasks = [Task(block, tuple(rows)) for block, rows in map(json.loads, batch["task"])]
        self._worker(tasks, lambda computed: found.append(json.dumps(computed)))
        return {"computed": found}


def _read(text: str) -> Computed:
    (block, rows), records, pictures = json.loads(text)
    return Computed(Task(block, tuple(rows)), records, pictures)


def _unpacked(content: bytes) -> Path:
    """Write a model that was sent to a private file; all workers of the machine share it."""
    folder = Path(tempfile.gettempdir(), f"qvl-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if problem := foreign(folder, folder.stat()):
        raise QvlError(f"{folder}: cannot hold the model ({problem}); remove it")
    path = folder / f"{hashlib.sha256(content).hexdigest()}.qvl"
    present = open_private(path)
    if present is None:
        with replacing(path) as file:
            file.write(content)
    else:
        present.close()
    return path
