"""Stopping a long computation: the first Ctrl-C or SIGTERM asks for it, the second ends the process at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """A computation ended early because a signal asked for it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yield a function that gives the number of the signal that asked to stop, None as long as none did.

    Within the context SIGINT and SIGTERM do nothing else, once, but say so. Python delivers signals to the main
    thread; in another thread this does nothing.

    Raises:
        Stopped: at the end of the context, where a signal came that nobody asked for any more.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print might be interrupted

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield lambda: received[0] if received else None
        if received:
            raise Stopped(received[0], "interrupted")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
