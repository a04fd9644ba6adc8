"""Compiles the GPU kernels into a wheel, or says in one line that it goes without them."""

import os
import subprocess
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("qvl_kernels", "gpu", "kernels.zip")


class GpuKernels(BuildHookInterface):
    """Triton compiles them; where it is not installed, as in an isolated build, a bundle made before is taken."""

    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        packages = Path(self.root, "kernels")
        command = [sys.executable, "-m", "qvl_kernels.gpu.build", "--missing"]
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        done = subprocess.run(command, cwd=packages, env=environment, capture_output=True, text=True)
        if done.returncode and not (packages / KERNELS).exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            self.app.display_warning(
                f"this wheel comes without GPU kernels ({last}); to have them: pip install triton==3.6.0 numpy, "
                "then python -m qvl_kernels.gpu.build in the folder kernels, and build again"
            )
