"""Threads that do PyTorch's work on a CPU each alone, for work beside a model. Start at `solo_threads`.

Any other thread that calls PyTorch gets a team of OpenMP threads of its own. A team waits for its slowest member after
each operation, which on a busy machine takes longer than the operation; and once a process holds more OpenMP threads
than there are cores, libgomp lets all of them sleep between operations, those of the model included.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def solo_threads(number: int, name: str) -> ThreadPoolExecutor:
    """A pool of `number` threads, all started, in which an operation runs on the thread that calls it.

    PyTorch keeps the last number of threads set anywhere for threads to come: it is set back before this returns.
    """
    usual, started = torch.get_num_threads(), threading.Barrier(number + 1)

    def go_alone() -> None:
        torch.get_num_threads()  # the first call in a thread takes over the usual number, and must not come later
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(number, name, initializer=go_alone)
    for _ in range(number):
        pool.submit(int)  # none is idle before all have started: each starts one
    started.wait()
    torch.set_num_threads(usual)
    return pool
