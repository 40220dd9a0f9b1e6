"""Upstream bytes -> client, as they arrive, and no faster than the client reads.

Each chunk is cut into frames, each frame is shown to the dialect's reader, and what comes out is
written at once, in one write per chunk. While the client is behind nothing is read, so the upstream
is slowed down and memory stays bounded.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from aiproxy import errors
from aiproxy.errors import ProxyError
from aiproxy.sse import Splitter

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.call import Call
    from aiproxy.dialects import Stream
    from aiproxy.dialects.responses_object import Produced
    from aiproxy.upstream import Ask

SOON = 0.001  # seconds: a limit of 0 would be none
HOLD = 1.0  # seconds that lifecycle events wait, while another attempt may follow
MOST_HELD = 64 * 1024  # bytes of them
TAIL = 1.0  # seconds for an upstream to end the body after its terminal event


class Relay:
    """One stream on its way to its client."""

    def __init__(
        self,
        call: Call,
        stream: Stream,
        answer: Ask,
        idle: float,
        settle: Callable[[], None] | None,
    ) -> None:
        """`settle`: given while another attempt may follow; called once none can."""
        self._call = call
        self._stream = stream
        self._answer = answer
        self._splitter = Splitter()
        self._idle = idle
        self._patience = math.inf  # until when the usage is waited for
        self._settle = settle
        self._held: list[bytes] = []  # lifecycle events, while another attempt may follow
        self._held_size = 0
        self._kept = call.kept

    async def run(self) -> None:
        """Relay to the end of the upstream's body; the client's body is left open.

        Raises:
            ProxyError: the stream broke off before it was whole.
            ConnectionError: the client has left.
        """
        if self._settle is None:
            await self._relay()
            return
        timer = asyncio.get_running_loop().call_later(HOLD, self.release)
        try:
            await self._relay()
        except asyncio.CancelledError:
            self.release()
            raise
        finally:
            timer.cancel()

    @property
    def began(self) -> bool:
        """Whether anything came of the answer."""
        return self._held_size > 0

    def release(self) -> None:
        """No other attempt follows: what was held goes to the client."""
        if self._settle is None:
            return
        settle, self._settle = self._settle, None
        settle()
        try:
            if not self._call.reply.started:
                self._call.start_stream(self._answer.passed_on())
            if self._held:
                self._write(b"".join(self._held))
        except ConnectionError:
            pass  # the client has left: whoever writes next is told
        self._held = []

    async def _relay(self) -> None:
        call, stream, answer, idle = self._call, self._stream, self._answer, self._idle
        watch = call.watch
        loop = asyncio.get_running_loop()
        ends: float | None = None  # when the upstream must have ended, after its terminal event
        while True:
            try:
                chunk = await self._chunk(answer)
            except ProxyError as error:
                await self._ended(error)
                return
            if not chunk:
                await self._ended(errors.upstream_error("The upstream ended without an end event."))
                return
            if ends is None:
                watch.touch()
            waited = await self._pass(chunk)
            if stream.error is not None:
                raise self._failure(stream.error)
            if self._settle is not None:
                self._judge_beginning()
            if ends is None and stream.over:
                ends = loop.time() + TAIL
                watch.enter("tail", TAIL)
            elif waited:
                left = idle if ends is None else max(SOON, ends - loop.time())
                watch.enter("idle" if ends is None else "tail", left)

    def _judge_beginning(self) -> None:
        """Whether the upstream says, before any output, that it has failed."""
        stream = self._stream
        if (declared := stream.cut()) is not None:
            raise self._failure(declared)
        if stream.over:
            spent = stream.usage is not None and stream.usage.total_output > 0
            if stream.outcome == "failed" and not spent:
                raise errors.declared_failure("The upstream's answer has failed.")
            self.release()

    async def _pass(self, chunk: bytes) -> bool:
        """Relay a chunk; whether the client had to be waited for."""
        call, stream = self._call, self._stream
        out: list[bytes] = []
        for frame in self._splitter.feed(chunk):
            if not frame.whole:
                out.append(stream.spill(frame.raw, ends=frame.ends))
            else:
                out.append(stream.feed(frame.raw))
            if stream.error is not None:
                break
            if stream.produced is not None:
                await self._keep(out, stream.produced)
        data = out[0] if len(out) == 1 else b"".join(out)
        call.holding_event = stream.error is None and not self._splitter.at_boundary
        if not data:
            return False
        self._write(data)
        if not call.reply.blocked:
            return False
        call.await_client()
        await call.reply.drain()
        return True

    async def _keep(self, out: list[bytes], produced: Produced) -> None:
        """Store the turn that is whole; only then its terminal event may go."""
        if before := b"".join(out):
            self._call.holding_event = False
            self._write(before)
        await self._call.keep(produced)
        self._call.watch.enter("idle", self._idle)
        out[:] = [self._stream.end()]

    def _write(self, data: bytes) -> None:
        call = self._call
        if self._settle is not None:
            self._held.append(data)
            self._held_size += len(data)
            if self._stream.begun or self._held_size > MOST_HELD:
                self.release()
            return
        call.told = True
        call.reply.write(data)
        call.watch.sent()
        if self._kept is not None:
            self._kept.answer(data, streamed=True)
        if self._stream.output_started and not call.exchange.first_token:
            call.exchange.first_token = time.monotonic()

    async def _chunk(self, answer: Ask) -> bytes:
        """The next bytes; empty also where an answer is whole, and its usage does not come."""
        if not self._stream.owes:
            return await answer.chunk()
        until = asyncio.get_running_loop().time() + self._stream.owes
        self._patience = min(self._patience, until)
        self._call.watch.enter("none", 0)  # the answer is whole: it is not late any more
        try:
            async with asyncio.timeout_at(self._patience):
                return await answer.chunk()
        except TimeoutError:
            return b""
        except asyncio.CancelledError:
            if self._call.watch.reason not in ("total", "shutting_down"):
                raise
            return b""  # it is whole, though its time is over

    async def _ended(self, error: ProxyError) -> None:
        """Nothing more comes from the upstream: an error unless what came is whole."""
        stream = self._stream
        out = [stream.close()]
        if stream.produced is not None:
            await self._keep(out, stream.produced)
        if data := b"".join(out):
            self._write(data)
        if not stream.whole:
            raise self._failure(stream.error or stream.cut() or error)
        if self._settle is not None:  # an answer without any output, told only now
            self._judge_beginning()

    def _failure(self, error: ProxyError) -> ProxyError:
        """An error; whether the upstream itself declared it before any output."""
        error.declared = self._settle is not None and error.outcome == "failed"
        return error
