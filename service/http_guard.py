"""What uvicorn's HTTP protocol leaves to a proxy in front: no client holds a connection, or our memory, for nothing.

A request has to come in time, its headers have a size, an answer has to be read, and connections are counted.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import HttpSettings

MOST_HEADER_BYTES = 64 * 1024
LEAST_BYTES_A_SECOND = 512  # of a body that takes longer than `request_timeout_seconds`
MOST_FILES = 65_536
OWN_FILES = 256  # database, engines, logs: there must be room for them, however many clients come
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 35\r\n\r\nThe request's headers are too large"
)


def guarded(settings: HttpSettings) -> type[HttpToolsProtocol]:
    """uvicorn makes one for each connection."""
    most = min(settings.max_connections, room_for_connections())

    class GuardedProtocol(HttpToolsProtocol):
        _due: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None
        _in_headers = True
        _header_bytes = 0
        _body_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
                return
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_no_more()
            self._move()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            in_headers = self._in_headers
            super().data_received(data)
            if in_headers and self._in_headers:
                self._header_bytes += len(data)
                if self._header_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
                    self._refuse()
            elif self._due is None and self.timeout_keep_alive_task is None and self._between_requests():
                self._expect()  # empty lines, which begin no request but ended uvicorn's wait for one

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_headers, self._header_bytes, self._body_bytes = True, 0, 0
            self._expect()

        def on_headers_complete(self) -> None:
            self._in_headers = False
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._body_bytes += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._expect_no_more()
            super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._move()
            self._stalled = self.loop.call_later(settings.stalled_client_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._move()
            super().resume_writing()

        def _expect(self) -> None:
            self._expect_no_more()
            self._due = self.loop.call_later(settings.request_timeout_seconds, self._late)

        def _expect_no_more(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due = None

        def _move(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def _late(self) -> None:
            """A body that goes on coming may go on; one that we don't read ourselves at the moment may, too."""
            self._due = None
            coming = self._body_bytes >= LEAST_BYTES_A_SECOND * settings.request_timeout_seconds
            if not self._in_headers and (coming or self.flow.read_paused):
                self._body_bytes = 0
                self._expect()
            else:
                self.transport.abort()

        def _between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _refuse(self) -> None:
            if self._between_requests():
                self.transport.write(TOO_LARGE)
            self.transport.close()

    return GuardedProtocol


def room_for_connections() -> int:
    """Raises this process's limit of open files as far as it may; what is left for clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else max(soft - OWN_FILES, soft // 2)
