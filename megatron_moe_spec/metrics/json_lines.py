"""Files of strict JSON lines that grow during training."""

import json
import math
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


class JsonLines:
    """A file to append to. A long run does not end because it cannot be written: it warns, once."""

    def __init__(self, path: Path):
        self._path = path
        self._warned = False

    def __str__(self) -> str:
        return str(self._path)

    def problem(self) -> str:
        """Why the file cannot be written; empty if it can."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()
        except OSError as error:
            return f"{error.strerror}: {error.filename}"
        return ""

    def append(self, line: dict) -> None:
        """Writes a line, with null for what is not finite."""
        self.extend([json.dumps(finite(line), allow_nan=False).encode() + b"\n"])

    def extend(self, lines: Iterable[bytes]) -> None:
        """Writes lines of JSON that end with a newline: all of them or none. Readers meanwhile find whole lines."""
        size = None
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", 0) as file:  # unbuffered: a fork would copy what is in the buffer
                for line in lines:
                    rest = memoryview(line)
                    while rest:  # again where the disk has room for a part of it; then the next write raises
                        rest = rest[file.write(rest) :]
        except BaseException as error:
            # No part of a line stays before the next one, if there is room for that later.
            if size is not None:
                with suppress(OSError):
                    os.truncate(self._path, size)
            if not isinstance(error, OSError):
                raise
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._path} cannot be written ({error.strerror}); training goes on without its lines",
                    stacklevel=2,
                )


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
