"""Build a Megatron indexed dataset from the sources of the Python standard library.

They are on every machine that has Python: code, prose and tables, several megabytes, no download. A token is a byte;
``EOD`` ends a document, and a document is a file. Megatron reads it with
``--tokenizer-type NullTokenizer --vocab-size 257``.
"""

import argparse
import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import numpy

EOD = 256
VOCAB_SIZE = 257

# Tests and generated tables would be most of the bytes and teach the least.
SKIPPED_FOLDERS = {"__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}


def text_files(folder):
    """The library's sources in an order that depends on their names only, and that mixes the packages.

    The order is that of a hash of the relative path: Megatron cuts the splits as contiguous runs of documents,
    so an alphabetical order would train on one half of the library and validate on another kind of text.
    """
    folder = Path(folder)
    names = [
        path.relative_to(folder)
        for path in folder.rglob("*.py")
        if path.is_file() and not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts)
    ]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [folder / name for name in names]


def write_dataset(documents, prefix):
    """Write byte strings as the indexed dataset ``prefix``.bin and ``prefix``.idx.

    Args:
        documents: iterable of ``bytes``, one a document; empty ones are left out.
        prefix: path without suffix, as Megatron's ``--data-path`` takes it.

    Returns:
        (documents, tokens) written.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved into place, the index last: a run cut off here leaves no dataset that looks whole.
    parts = {suffix: prefix.parent / f".{prefix.name}.{os.getpid()}{suffix}" for suffix in (".bin", ".idx")}
    builder = IndexedDatasetBuilder(str(parts[".bin"]), dtype=numpy.uint16)
    num_documents = num_tokens = 0
    for document in documents:
        if not document:
            continue
        tokens = numpy.append(numpy.frombuffer(document, dtype=numpy.uint8).astype(numpy.uint16), EOD)
        builder.add_document(tokens, [len(tokens)])
        num_documents += 1
        num_tokens += len(tokens)
    builder.finalize(str(parts[".idx"]))
    for suffix, part in parts.items():
        os.replace(part, f"{prefix}{suffix}")
    return num_documents, num_tokens


def prepare(prefix):
    """Build the dataset unless it is there; returns a sentence about it."""
    if Path(f"{prefix}.idx").exists():
        return f"{prefix}.bin, made earlier"
    files = text_files(sysconfig.get_path("stdlib"))
    if not files:
        raise SystemExit(
            f"No sources of the standard library in {sysconfig.get_path('stdlib')}: this Python was installed without"
            " them. Use another one: PYTHON=/path/to/python"
        )
    documents, tokens = write_dataset((path.read_bytes() for path in files), prefix)
    return f"{prefix}.bin, {documents} documents, {tokens / 1e6:.1f} million bytes of Python {sys.version.split()[0]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", help="where to write: PREFIX.bin and PREFIX.idx")
    print(prepare(parser.parse_args().prefix))
