"""Reads single series out of TensorBoard's event files, which hold those of every layer, too."""

import re
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_moe_spec.report.lines import RunError

EVENT_FILES = "events.out.tfevents.*"
_LENGTH = struct.Struct("<Q4x")  # of a record: the event's length in bytes, and a checksum of it
_CHECKSUM = struct.Struct("<I")  # of the event, which it follows


def read_scalars(folder: Path, tags: Collection[str]) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value) of what the event files of a folder have under these tags, in the order of writing.

    Other events are not parsed: of a model of many layers they are millions. The end of a file that is cut off is left
    out, as TensorBoard does it.

    Raises:
        RunError: a file is damaged.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    from tensorboard.util.tensor_util import make_ndarray

    # A tag as protobuf has it: number and type of its field, its length, its text.
    encoded = (re.escape(bytes([len(tag.encode())]) + tag.encode()) for tag in tags)
    wanted = re.compile(b"\n(?:" + b"|".join(encoded) + b")").search
    for file in sorted(folder.glob(EVENT_FILES)):
        for start, record, checksum in _records(file):
            if not wanted(record):
                continue
            if masked_crc32c(record) != checksum:
                raise RunError(f"{file} is damaged: cut it off there, by truncate -s {start}")
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag in tags:
                    is_tensor = value.WhichOneof("value") == "tensor"
                    scalar = make_ndarray(value.tensor).item() if is_tensor else value.simple_value
                    yield value.tag, event.step, float(scalar)


def _records(file: Path) -> Iterator[tuple[int, bytes, int]]:
    """(byte at which it starts, serialized event, its checksum) of the whole records of a file."""
    start = 0
    with file.open("rb", buffering=2**20) as stream:
        while len(header := stream.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(header)
            record = stream.read(length + _CHECKSUM.size)
            if len(record) < length + _CHECKSUM.size:
                return
            yield start, record[:length], *_CHECKSUM.unpack_from(record, length)
            start += _LENGTH.size + len(record)
