"""A parser has no network: whatever way out it takes, and in every process that it starts."""

import logging
import os
import platform
import socket
import struct
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from reaching_child import TRIES

from ingest.parse import ParseError, cage, seccomp
from ingest.parse.cage import find_way_out, run_in_child
from ingest.parse.child import ParseLimits

LIMITS = ParseLimits(wall_s=30.0)
FOREIGN = {"call_x32", "call_i386"}
on_linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in seccomp._CALLS, reason="no filter is written for this machine"
)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def try_out(name: str, listener: socket.socket, user: int = 0, reason: str = "") -> object:
    port = listener.getsockname()[1]
    return run_in_child("tests.unit.reaching_child", [name, str(port), str(user), reason], LIMITS)


def code_of(name: str, listener: socket.socket, user: int = 0) -> tuple[str, str]:
    with pytest.raises(ParseError) as caught:
        try_out(name, listener, user)
    with pytest.raises(BlockingIOError):
        listener.accept()
    return caught.value.code, str(caught.value)


@on_linux
@pytest.mark.parametrize("name", sorted(TRIES.keys() - FOREIGN - {"look_up"}))
def test_every_way_out_is_refused_with_a_reason(listener, name):
    code, message = code_of(name, listener)
    assert code == "network_refused"
    assert "network" in message


@on_linux
def test_no_name_is_looked_up(listener):
    code, message = code_of("look_up", listener)
    assert code == "parser_crashed"
    assert "gaierror" in message


@on_linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other numbers for the same calls are x86's")
@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_the_numbers_of_another_architecture_are_no_way_round(listener, name):
    code, message = code_of(name, listener)
    assert code == "parser_crashed"
    assert "SIGSYS" in message or (name == "call_i386" and "SIGSEGV" in message)  # a kernel without 32-bit programs


@pytest.mark.parametrize("name", ["connect", "send_datagram", "open_local", "open_pair", "start_program"])
def test_the_same_ways_are_open_without_the_filter(listener, name):
    TRIES[name](listener.getsockname()[1])
    assert try_out(name, listener, reason="tried without") is None


@on_linux
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("name", ["connect", "send_datagram", "make_ring"])
def test_a_user_without_rights_has_the_filter_too(listener, name):
    assert code_of(name, listener, user=10001)[0] == "network_refused"


@on_linux
def test_the_way_out_is_looked_for_by_a_child():
    assert find_way_out() is None


def test_without_a_filter_parsing_goes_on_and_the_log_says_so_once(listener, caplog):
    cage._warn_of_network.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert try_out("open_pair", listener, reason="it is an old kernel") is None
    assert [record.getMessage() for record in caplog.records] == [
        "parsers are not kept off the network here: it is an old kernel"
    ]


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_where_there_is_no_filter_a_reason_is_given(monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    assert (machine if system == "linux" else system) in (seccomp.block_network() or "")


def run_filter(code: bytes, architecture: int, number: int) -> int:
    """What the kernel would: the instructions of the filter, one after the other."""
    program, at, value = list(struct.iter_unpack("=HBBI", code)), 0, 0
    while True:
        what, if_true, if_false, operand = program[at]
        at += 1
        match what:
            case seccomp._LOAD:
                value = {0: number, 4: architecture}[operand]
            case seccomp._IF_EQUAL:
                at += if_true if value == operand else if_false
            case seccomp._IF_AT_LEAST:
                at += if_true if value >= operand else if_false
            case seccomp._RETURN:
                return operand


@pytest.mark.parametrize("machine", seccomp._CALLS)
def test_the_filter_of_each_machine_refuses_these_calls_and_no_others(machine):
    architecture, _, refused = seccomp._CALLS[machine]
    code = seccomp._assemble(architecture, sorted(refused.values()))
    for number in range(600):
        want = seccomp._FAIL if number in refused.values() else seccomp._ALLOW
        assert run_filter(code, architecture, number) == want
        assert run_filter(code, architecture, number | seccomp._X32) == seccomp._KILL
        assert run_filter(code, 0x40000003, number) == seccomp._KILL  # i386
    assert run_filter(code, architecture, 0xFFFFFFFF) == seccomp._KILL
