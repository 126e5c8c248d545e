"""Records of a routing trace as lines, in the schema of ``traces/schema.py``.

Suffixes: T tokens, K experts of a token, E experts of a layer, W characters of a row.
"""

import json

import numpy as np

from megatron_moe_spec.traces.schema import PADDING


class TraceLines:
    """Looks each number's text up in a table, where they have the same width: an order faster than json.dumps.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int):
        numbers = range(PADDING, num_experts)  # DROPPED, too
        width = max(len(str(number)) for number in numbers)
        self._texts = np.array([f",{number:>{width}}".encode() for number in numbers])

    def line(self, record: dict, rows_TK: np.ndarray) -> bytes:
        """The record, in which ``top_indices`` alone is None, with these rows as its ``top_indices``."""
        before, after = json.dumps(record).encode().split(b"null")
        return before + self.rows(rows_TK) + after + b"\n"

    def rows(self, rows_TK: np.ndarray) -> bytes:
        """A JSON list of lists of numbers, the shorter ones after blanks.

        Raises:
            IndexError: a number above those of the experts.
        """
        texts_TW = self._texts[rows_TK.astype(np.intp) - PADDING].view(np.uint8)
        ends_T2 = np.broadcast_to(np.frombuffer(b"],", np.uint8), (len(rows_TK), 2))
        texts_TW = np.concatenate((texts_TW, ends_T2), axis=1)
        texts_TW[:, 0] = ord("[")  # instead of the first number's comma
        return b"[" + texts_TW.tobytes()[:-1] + b"]"
