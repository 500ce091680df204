"""A child that tries to reach the network in one of many ways, as a parser might that a document has taken over.

Each of TRIES returns when it got through. They are given the port of a listener on 127.0.0.1.
"""

import ctypes
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable

from ingest.parse import child

_X32_SOCKET = 0x40000000 + 41
# mov eax, 359 (i386's socket); mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; ret
_I386_SOCKET = bytes.fromhex("53 b867010000 bb02000000 b901000000 31d2 cd80 5b c3".replace(" ", ""))
_PROGRAM = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 2).sendall(b'x')"


def connect(port: int) -> None:
    with socket.socket() as connection:
        connection.connect(("127.0.0.1", port))


def connect_by_version_6(port: int) -> None:
    socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()


def send_datagram(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", port))


def look_up(port: int) -> None:
    socket.getaddrinfo("example.com", 80)


def open_local(port: int) -> None:
    socket.socket(socket.AF_UNIX).close()


def open_pair(port: int) -> None:
    for end in socket.socketpair():
        end.close()


def ask_kernel(port: int) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()


def make_ring(port: int) -> None:
    _call(425, 1, ctypes.create_string_buffer(120))  # io_uring_setup


def trace_parent(port: int) -> None:
    _call({"x86_64": 101, "aarch64": 117}[os.uname().machine], 16, os.getppid(), None, None)  # PTRACE_ATTACH


def read_parent(port: int) -> None:
    into = ctypes.create_string_buffer(8)
    local = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(into), 8))
    remote = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(into), 8))
    _call({"x86_64": 310, "aarch64": 270}[os.uname().machine], os.getppid(), local, 1, remote, 1, 0)


def start_program(port: int) -> None:
    done = subprocess.run([sys.executable, "-IS", "-c", _PROGRAM, str(port)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(int(done.stderr.rpartition("[Errno ")[2].partition("]")[0]), "of the program")


def call_x32(port: int) -> None:
    _call(_X32_SOCKET, 2, 1, 0)


def call_i386(port: int) -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_I386_SOCKET)
    run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    if (result := run()) < 0:
        raise OSError(-result, os.strerror(-result))


TRIES: dict[str, Callable[[int], None]] = {
    one.__name__: one
    for one in (
        *(connect, connect_by_version_6, send_datagram, look_up, open_local, open_pair, ask_kernel, make_ring),
        *(trace_parent, read_parent, start_program, call_x32, call_i386),
    )
}


def _call(number: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(name: str, port: str, user: str, reason: str, raw_limits: str) -> None:
    """`user`: whom to become first, or 0; `reason`: why no filter can be had, or empty."""
    if int(user):
        os.setgroups([])
        os.setresgid(int(user), int(user), int(user))
        os.setresuid(int(user), int(user), int(user))
    if reason:
        child.block_network = lambda: reason
    child.answer_parent(child.ParseLimits(*json.loads(raw_limits)), lambda: TRIES[name](int(port)))
