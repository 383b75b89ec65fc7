"""HTTP connections of a server: none waits for its client without end, and slow clients cannot keep others out.

uvicorn sets no limit on the time in which a request's header, or a client that reads nothing, must get on; and at
`limit_concurrency` connections it refuses requests, even if most of these connections have not sent a request. Here

    a connection without a complete header is closed after `HEADER_SECONDS`
    a client that does not read its answer is disconnected after `UNREAD_SECONDS`
    a client that goes away is noticed even if it has sent its next request, up to `MAX_PIPELINED` bytes of it
    a connection that would be one too many takes the place of the one that has kept the server waiting longest
"""

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS, UNREAD_SECONDS, MAX_PIPELINED = 10, 60, 1 << 16


class GuardedHttpConnection(H11Protocol):
    """A connection of uvicorn with these limits; the class is the setting `http` of `uvicorn.Config`."""

    _header_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _waits_since = 0.0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request; where there are too many connections, close another one."""
        super().connection_made(transport)
        self._limit_header_time(HEADER_SECONDS)
        if self.limit_concurrency is None:
            return
        if len(self.connections) >= self.limit_concurrency:
            others = [c for c in self.connections if isinstance(c, GuardedHttpConnection) and c is not self]
            waiting = [connection for connection in others if connection.waits_for_client()]
            if not waiting:
                return  # uvicorn refuses its request
            slowest = min(waiting, key=lambda connection: connection._waits_since)
            self.connections.discard(slowest)
            slowest.transport.abort()
        # It has its place. uvicorn would still count the requests of connections that were closed just now.
        self.limit_concurrency = None

    def waits_for_client(self) -> bool:
        """Return whether the client has not sent a whole request, or none."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; its complete header stops the clock."""
        super().data_received(data)
        if self._has_request():
            self._stop_header_timer()
            if self.conn.their_state is h11.DONE:  # uvicorn reads nothing until the answer ends, not even the end
                if len(self.conn.trailing_data[0]) > MAX_PIPELINED:
                    self.transport.abort()
                else:
                    self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer has begun; the request that it is a part of has no other answer."""
        has_begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        if self._has_request():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if has_begun:
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        if not self._has_request():
            self._limit_header_time(self.timeout_keep_alive + HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_header_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on with writing."""
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()

    def _has_request(self) -> bool:
        """Return whether a request with a complete header has not been answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _limit_header_time(self, seconds: float) -> None:
        self._stop_header_timer()
        self._waits_since = self.loop.time()
        self._header_timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()


class GuardedHttpServer(uvicorn.Server):
    """A server of uvicorn that a second Ctrl-C ends without a traceback for each request that still runs."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().shutdown(sockets)
        finally:
            # Requests end by themselves when their connection is gone; uvicorn would cancel them, and print it.
            for connection in [*self.server_state.connections]:
                connection.transport.abort()
            if self.server_state.tasks:
                await asyncio.wait([*self.server_state.tasks], timeout=2)
