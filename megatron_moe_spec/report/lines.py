"""Reads files of JSON lines, each the record of an iteration."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional


class RunError(ValueError):
    """A run that cannot be read. The message names the file and the remedy."""


class Line(NamedTuple):
    number: int  # from 1
    start: int  # byte of the file
    record: dict


def json_lines(path: Path, notices: list[str], shortened: Callable[[str], str] = str) -> Iterator[Line]:
    """The lines of a file; a last one that is cut off adds a sentence to ``notices``.

    Args:
        shortened: called with the text of each line before it is parsed.

    Raises:
        RunError: another line is no record of an iteration.
    """
    broken, start = 0, 0
    with path.open("rb", buffering=2**20) as lines:
        for number, line in enumerate(lines, start=1):
            if broken:
                raise RunError(f"{path}:{broken} is no record of an iteration: delete this line")
            record = _record(shortened(_text(line)))
            if record is None:
                broken = number
            else:
                yield Line(number, start, record)
            start += len(line)
    if broken:
        notices.append(f"The last line of {path.name} is cut off and was left out; is the run still going on?")


def line_at(path: Path, start: int, shortened: Callable[[str], str] = str) -> dict:
    """The record of the line that starts at a byte of the file; raises ValueError if there is none."""
    with path.open("rb") as file:
        file.seek(start)
        record = _record(shortened(_text(file.readline())))
    if record is None:
        raise ValueError(f"no record at byte {start} of {path}")
    return record


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


def _record(line: str) -> Optional[dict]:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("iteration")) is int else None
