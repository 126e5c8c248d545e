"""Work that goes on while the next steps train."""

import threading
from collections.abc import Callable
from typing import Any, Optional


class Background:
    """Runs calls in a thread, in their order, of which one is under way at most.

    The program does not end before they have; a forked process has none of them. What a call raises is printed at once,
    and raised by ``check`` or ``wait``.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._name = name
        self._thread: Optional[threading.Thread] = None
        self._errors: list[BaseException] = []

    def start(self, call: Callable, *args: Any) -> None:
        """Begins ``call(*args)``, once the call before has ended."""
        self._join()
        # The interpreter joins it when it ends, also where a daemon thread trains.
        self._thread = threading.Thread(target=self._run, args=(call, *args), name=self._name, daemon=False)
        self._thread.start()

    def check(self) -> None:
        """Raises what a call has raised. Waits for nothing."""
        if self._errors:
            raise self._errors.pop(0)

    def wait(self) -> None:
        """Waits for the call; raises what it or one before has raised."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, call: Callable, *args: Any) -> None:
        try:
            call(*args)
        except BaseException as error:
            self._errors.append(error)
            raise  # to threading.excepthook, which prints it: there may be no check before the program ends
