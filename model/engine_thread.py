"""One thread that owns an engine, and asyncio's way to it.

Requests and aborts reach the engine between two steps; its outputs reach the event loop that asked. Start at
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
    """The engine takes no requests: it is being closed, or a step of it failed."""


class TokenStream:
    """The outputs of one request, as an async iterator that ends after the one with a finish_reason.

    `await stream` waits until the engine has accepted the request, and raises if it refuses. `aclose`, or dropping the
    stream, aborts. No reader can hold up the engine: at most max_new_tokens outputs wait here.
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
        """Abort the request within one step, unless it has ended. What is already here is not given out any more."""
        if not self._finished:
            self._finished = True
            self._outputs.put_nowait(None)
            self._abort()

    def send(self, output: StepOutput | None = None, error: BaseException | None = None) -> bool:
        """From any thread: hand over an output, an error, or (neither) that the request is accepted.

        False if nobody can receive it any more, because the event loop is closed.
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
    refuse: Callable[[BaseException], object]  # instead, when the engine has stopped


class EngineThread:
    """Runs `engine` until `close` or `halt`. To be called from event loops; the engine stays its owner's to close."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: list[_Command] = []
        self._streams: dict[str, weakref.ref[TokenStream]] = {}  # by request, touched by the engine's thread alone
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
        """Submit a request; iterate over its outputs, or await it first to have a refusal raise there."""
        ids: list[str] = []  # one, as soon as the engine has given it
        stream = TokenStream(lambda: self._submit(_Command(lambda: self._abort(ids), _ignore)))
        self._submit(_Command(lambda: self._add(request, stream, ids), lambda error: stream.send(error=error)))
        return stream

    async def close(self, drain_s: float = 10.0) -> None:
        """Take no more requests, let those under way finish for at most `drain_s`, end the thread.

        The streams of those that did not finish raise EngineStopped.
        """
        with self._wake:
            self._draining = True
            self._wake.notify_all()
        await asyncio.to_thread(self._thread.join, drain_s)
        await asyncio.to_thread(self.halt)

    def halt(self) -> None:
        """End the thread behind the step that it is in. Blocks; twice does no harm."""
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
        """Wait for work and carry out what was asked for; False when it is time to end."""
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
    """Nothing needs to be said about an abort of what has stopped anyway."""
