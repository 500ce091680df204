"""Runs an engine on its own thread and connects it to asyncio.

Requests and aborts are handled between engine steps; outputs are delivered to the event loop of the caller. Start at
`EngineThread.generate`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from typing import NamedTuple, Self

from model.engine_request import Engine, EngineRequest, StepOutput

_log = logging.getLogger(__name__)


class EngineStopped(RuntimeError):
    """The engine accepts no requests: it is closing, or one of its steps failed."""


class TokenStream:
    """The outputs of one request: an async iterator that ends after the output with a finish_reason.

    `await stream` waits until the engine accepts the request, and raises if it refuses. `aclose`, or dropping the
    stream, aborts the request. A slow reader does not block the engine: up to max_new_tokens outputs are queued.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._answered = asyncio.Event()
        self._error: BaseException | None = None
        self._finished = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StepOutput:
        if self._finished:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._finished = output is None or output.finish_reason is not None
        if output is None:
            raise self._error or StopAsyncIteration
        return output

    def __await__(self) -> Generator[object, None, Self]:
        yield from self._answered.wait().__await__()
        if self._error is not None:
            self._finished = True
            raise self._error
        return self

    async def aclose(self) -> None:
        """Abort the request within one step, unless it has ended. Outputs still queued are discarded."""
        if not self._finished:
            self._finished = True
            self._outputs.put_nowait(None)
            self._abort()

    def send(self, output: StepOutput | None = None, error: BaseException | None = None) -> bool:
        """Deliver an output, an error or, with neither, that the request is accepted. Callable from any thread.

        Returns False if the event loop is closed.
        """
        try:
            self._loop.call_soon_threadsafe(self._receive, output, error)
        except RuntimeError:
            return False
        return True

    def _receive(self, output: StepOutput | None, error: BaseException | None) -> None:
        self._answered.set()
        if error is not None:
            self._error = error
        if output is not None or error is not None:
            self._outputs.put_nowait(output)


class _Command(NamedTuple):
    run: Callable[[], None]  # on the engine's thread
    refuse: Callable[[BaseException], object]  # called instead if the engine has stopped


class EngineThread:
    """Runs `engine` until `close` or `halt`. Call it from event loops; the caller closes the engine itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: list[_Command] = []
        self._streams: dict[str, weakref.ref[TokenStream]] = {}  # by request id; used only by the engine thread
        self._draining = self._halted = False
        self._stopped: EngineStopped | None = None
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests can be answered."""
        return self._stopped is None and not self._draining

    def generate(self, request: EngineRequest) -> TokenStream:
        """Submit a request. Iterate over the stream; await it first to learn of a refusal before the first output."""
        ids: list[str] = []  # the request id, once the engine has assigned it
        stream = TokenStream(lambda: self._submit(_Command(lambda: self._abort(ids), _ignore)))
        self._submit(_Command(lambda: self._add(request, stream, ids), lambda error: stream.send(error=error)))
        return stream

    async def close(self, drain_s: float = 10.0) -> None:
        """Refuse new requests, give running ones up to `drain_s` to finish, end the thread.

        Streams of unfinished requests raise EngineStopped.
        """
        with self._wake:
            self._draining = True
            self._wake.notify_all()
        await asyncio.to_thread(self._thread.join, drain_s)
        await asyncio.to_thread(self.halt)

    def halt(self) -> None:
        """End the thread after its current step. Blocks; calling it twice is harmless."""
        with self._wake:
            self._draining = self._halted = True
            self._wake.notify_all()
        self._thread.join()

    def _submit(self, command: _Command) -> None:
        with self._wake:
            if self.is_alive or (self._stopped is None and command.refuse is _ignore):
                self._commands.append(command)
                self._wake.notify_all()
                return
        command.refuse(self._stopped or EngineStopped("the engine is being closed"))

    def _run(self) -> None:
        reason = EngineStopped("the engine is closed")
        try:
            while self._take_commands():
                for output in self._engine.step():
                    self._deliver(output)
        except Exception as error:
            _log.exception("the engine failed and stops")
            reason = EngineStopped(f"the engine failed ({type(error).__name__}: {error}) and needs a restart")
            reason.__cause__ = error
        with self._wake:
            self._stopped, commands = reason, self._commands
        for command in commands:
            command.refuse(reason)
        for stream in filter(None, (reference() for reference in self._streams.values())):
            stream.send(error=reason)

    def _take_commands(self) -> bool:
        """Wait for work and run all commands; False if the thread should end."""
        while not self._is_wanted() and self._engine.prepare():
            pass
        with self._wake:
            self._wake.wait_for(self._is_wanted)
            commands, self._commands = self._commands, []
        for command in commands:
            command.run()
        return not self._halted and (self._engine.has_work() or not self._draining)

    def _is_wanted(self) -> bool:
        return bool(self._commands) or self._engine.has_work() or self._draining or self._halted

    def _add(self, request: EngineRequest, stream: TokenStream, ids: list[str]) -> None:
        try:
            ids.append(self._engine.add(request))
        except (ValueError, RuntimeError) as error:
            stream.send(error=error)
            return
        self._streams[ids[0]] = weakref.ref(stream)
        stream.send()

    def _abort(self, ids: list[str]) -> None:
        for request_id in ids:
            self._engine.abort(request_id)

    def _deliver(self, output: StepOutput) -> None:
        stream = self._streams[output.request_id]()
        if output.finish_reason is not None:
            del self._streams[output.request_id]
        if stream is None or not stream.send(output):
            self._engine.abort(output.request_id)


def _ignore(_: BaseException) -> None:
    """For aborts: a stopped engine has nothing to abort."""
