"""Permanently blocks network access of this process and its descendants with a seccomp filter (Linux, 64 bit).

A network namespace would need privileges that a service in a container lacks; a filter only needs no_new_privs. The
kernel runs it, a classic BPF program over number and architecture, before each system call. Calls that could reach the
network, or another process that has network access, fail with ENETDOWN. Calls by the numbers of another architecture
(32-bit x86 or ARM, x32), where the same numbers mean other calls, kill the process. Start at `block_network`.
"""

import ctypes
import errno
import os
import struct
import sys

# By machine: the kernel's architecture constant, the number of seccomp() itself, and the numbers of refused calls.
# Sockets of all kinds are refused, since no parser needs one; the last four calls could access a process that has some.
_CALLS = {
    "x86_64": (
        0xC000003E,
        317,
        {
            "socket": 41,
            "socketpair": 53,
            "io_uring_setup": 425,  # can create and use sockets without system calls
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "pidfd_getfd": 438,
        },
    ),
    "aarch64": (
        0xC00000B7,
        277,
        {
            "socket": 198,
            "socketpair": 199,
            "io_uring_setup": 425,
            "ptrace": 117,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "pidfd_getfd": 438,
        },
    ),
}
REFUSED = errno.ENETDOWN  # not otherwise returned to a process without sockets

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, RET|K
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000 | REFUSED, 0x80000000
_X32 = 0x40000000  # bit of the x32 call numbers on x86-64; not set in those of other architectures
_PR_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _ALL_THREADS = 38, 1, 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def block_network() -> str | None:
    """Install the filter; returns None, or the reason why it cannot be installed. Open sockets stay open."""
    if not sys.platform.startswith("linux"):
        return f"there is no seccomp on {sys.platform}"
    machine = os.uname().machine
    if machine not in _CALLS or sys.maxsize < 2**32:
        return f"no filter is written for this Python on {machine}"
    architecture, seccomp, refused = _CALLS[machine]
    code = _assemble(architecture, sorted(refused.values()))
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    no_more = [ctypes.c_ulong(value) for value in (1, 0, 0, 0)]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, *no_more) != 0:
        return f"prctl: {os.strerror(ctypes.get_errno())}"
    numbers = [ctypes.c_long(value) for value in (seccomp, _SET_MODE_FILTER, _ALL_THREADS)]
    done = libc.syscall(*numbers, ctypes.byref(program))
    if done > 0:
        return f"seccomp: thread {done} has a filter of its own"
    return f"seccomp: {os.strerror(ctypes.get_errno())}" if done < 0 else None


def _assemble(architecture: int, refused: list[int]) -> bytes:
    """The BPF program; an instruction is (code, jump if true, jump if false, value), with relative jumps."""
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for number in refused:
        program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL)]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
