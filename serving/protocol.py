"""uvicorn's HTTP protocol with a limit that it lacks: the time that a client may owe the rest of a request."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_OWED = 20.0


class PunctualProtocol(H11Protocol):
    """Closes a connection whose client does not complete the head of a request, or a body that is already refused.

    The time for other bodies is the application's affair: see `ServerLimits.body_seconds`.
    """

    seconds = SECONDS_OWED
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Run the clock while the client owes something; more of it does not start the clock anew."""
        state, is_answered = self.conn.their_state, self.cycle is not None and self.cycle.response_complete
        is_new = state is h11.IDLE and not self.conn.trailing_data[0]
        owes = state is h11.IDLE or (state is h11.SEND_BODY and is_answered)
        if is_new or not owes:
            self._forget()
        if owes and self._late is None:
            self._late = self.loop.call_later(self.seconds, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
