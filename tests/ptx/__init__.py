"""An interpreter of PTX, the text NVIDIA's assembler makes machine code of: kernels run as they ship, without a GPU.

A launch takes what the driver takes: the parameters in order, the grid, threads of a block, dynamic shared memory. All
threads of some blocks advance together, each instruction one numpy operation over them. What a GPU would let pass in
silence is an error here: accesses out of bounds or misaligned, uninitialized registers and memory, races between the
threads of a block and between blocks, shared memory used while an asynchronous copy into it is on its way, and
barriers that not all threads reach. An unknown opcode is an error when a kernel is loaded.

parse.py                                  text -> instructions
group.py                                  registers of the threads that advance together
arithmetic.py  movement.py  tensor.py     what each opcode does
memory.py  shared.py  meeting.py          memory, and who may see what
launch.py                                 which threads advance, and when
"""

from ptx.errors import PtxError
from ptx.launch import Kernel
from ptx.memory import DeviceMemory

__all__ = ["DeviceMemory", "Kernel", "PtxError"]
