"""Single-threaded PyTorch on a CPU, for work beside the model. Start at `solo_threads`.

Every other thread that calls PyTorch gets its own team of OpenMP threads. A team waits for its slowest member after
each operation, which on a busy machine takes longer than the operation itself; and if a process has more OpenMP threads
than cores, libgomp puts all of them to sleep between operations, including those of the model.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def solo_threads(number: int, name: str) -> ThreadPoolExecutor:
    """A pool of `number` started threads, in which operations run on the calling thread alone.

    `torch.set_num_threads` also applies to threads started later, so it is reset before this returns.
    """
    usual, started = torch.get_num_threads(), threading.Barrier(number + 1)

    def go_alone() -> None:
        torch.get_num_threads()  # the first call in a thread sets the default, so it must come first
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(number, name, initializer=go_alone)
    for _ in range(number):
        pool.submit(int)  # starts a thread each, as none is idle before the barrier
    started.wait()
    torch.set_num_threads(usual)
    return pool
