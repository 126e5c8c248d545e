"""Texts of the experiments: a training set for Megatron, and sequences that no run trains on.

``python -m examples.compare.data CORPUS FOLDER`` makes ``train.bin``, ``train.idx`` and ``held_out.npz`` there. A token
is a byte, 256 ends a document. Debian packages are fetched by apt-get; those that are in FOLDER/packages already are
taken as they are, so a machine without a network, or one that is no Debian, can be given them.
"""

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import numpy

from examples.quickstart.data import EOD, text_files, write_dataset

SEQ_LENGTH = 128
HELD_OUT_SEQUENCES = 1024
HELD_OUT_SHARE = 0.1  # of a domain's documents
SHORTEST = 200  # bytes of a document; man pages that only refer to another one are shorter
MAN_PAGES = {"English": "manpages", "German": "manpages-de", "French": "manpages-fr", "Russian": "manpages-ru"}
MAN_PAGES["Japanese"] = "manpages-ja"
HEADERS, WORDNET = "libgtk-3-dev", "wordnet-base"
GLOSSES_A_DOCUMENT = 50

DIALECTS = 8
SYMBOLS = 32
DIALECT_DOCUMENTS = 1200
DIALECT_LENGTH = 255


def stdlib(folder):
    """{domain: {name: bytes}} of the Python standard library's sources."""
    root = Path(sysconfig.get_path("stdlib"))
    return {"Python": {path.relative_to(root).as_posix(): path.read_bytes() for path in text_files(root)}}


def domains(folder):
    """Program texts in two languages, man pages in five, and a dictionary's definitions."""
    packages = folder / "packages"
    found = stdlib(folder)
    found["C"] = dict(files_of(packages, HEADERS, ".h"))
    found |= {f"man {language}": dict(files_of(packages, name, ".gz")) for language, name in MAN_PAGES.items()}
    found["WordNet"] = dict(glosses(packages))
    return found


def files_of(packages, package, suffix):
    """(path, contents) of the regular files of a Debian package whose names end so; man pages are unpacked.

    Args:
        suffix: or several, in a tuple.
    """
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package_file(packages, package)], stdout=subprocess.PIPE) as p:
        with tarfile.open(fileobj=p.stdout, mode="r|") as archive:
            for member in archive:
                is_page = suffix != ".gz" or "/man/" in member.name
                if member.isfile() and is_page and member.name.endswith(suffix):
                    contents = archive.extractfile(member).read()
                    yield member.name, gzip.decompress(contents) if suffix == ".gz" else contents


def glosses(packages):
    """(name, text) of the definitions in WordNet, in documents of so many."""
    parts = ("noun", "verb", "adj", "adv")
    files = dict(files_of(packages, WORDNET, tuple(f"/data.{part}" for part in parts)))
    for part in parts:
        (contents,) = [contents for name, contents in files.items() if name.endswith(f".{part}")]
        lines = [line.partition(b"| ")[2].strip() for line in contents.splitlines() if b"| " in line]
        for number in range(0, len(lines), GLOSSES_A_DOCUMENT):
            yield f"{part} {number}", b"\n".join(lines[number : number + GLOSSES_A_DOCUMENT])


def package_file(packages, package):
    """A Debian package's file, fetched where it is missing."""
    pattern = f"{package}_*.deb"
    is_there = any(packages.glob(pattern))
    if not shutil.which("dpkg-deb") or not (is_there or shutil.which("apt-get")):
        sys.exit(f"{package}: needs apt-get and dpkg-deb (Debian, Ubuntu), or dpkg-deb and {pattern} in {packages}")
    if not is_there:
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=packages, check=True, stdout=subprocess.DEVNULL)
    return str(next(packages.glob(pattern)))


def dialects(folder):
    """Sequences of Markov chains over the same symbols: a latent cluster each, known here."""
    random = numpy.random.default_rng(0)
    found = {}
    for dialect in range(DIALECTS):
        # A small concentration: a few likely successors of each symbol.
        cumulated = random.dirichlet(numpy.full(SYMBOLS, 0.1), SYMBOLS).cumsum(axis=1)
        symbols = random.integers(SYMBOLS, size=DIALECT_DOCUMENTS)
        documents = numpy.empty((DIALECT_DOCUMENTS, DIALECT_LENGTH), dtype=numpy.uint8)
        for position in range(DIALECT_LENGTH):
            documents[:, position] = symbols
            drawn = random.random((DIALECT_DOCUMENTS, 1))
            symbols = (cumulated[symbols] < drawn).sum(axis=1).clip(max=SYMBOLS - 1)
        found[f"dialect {dialect}"] = {str(number): row.tobytes() for number, row in enumerate(documents)}
    return found


CORPORA = {"stdlib": stdlib, "domains": domains, "dialects": dialects}


def split(documents):
    """(training, held out) of {name: bytes}, by a hash of the names; as many of each as their share says."""
    names = sorted(
        (name for name, contents in documents.items() if len(contents) >= SHORTEST),
        key=lambda name: hashlib.sha256(name.encode()).digest(),
    )
    first = len(names) - max(1, round(HELD_OUT_SHARE * len(names)))
    return [documents[name] for name in names[:first]], [documents[name] for name in names[first:]]


def sequences(documents, number):
    """[number, SEQ_LENGTH + 1] int64 from documents, at equal distances: inputs, and labels one further."""
    tokens = [numpy.append(numpy.frombuffer(text, dtype=numpy.uint8).astype(numpy.uint16), EOD) for text in documents]
    num_tokens = sum(map(len, tokens))
    distance = (num_tokens - SEQ_LENGTH) // number
    if distance < SEQ_LENGTH:
        sys.exit(f"{num_tokens} held-out tokens are too few for {number} sequences of {SEQ_LENGTH}")
    windows = numpy.lib.stride_tricks.sliding_window_view(numpy.concatenate(tokens), SEQ_LENGTH + 1)
    return windows[: distance * number : distance]


def capped(documents, size):
    """The first documents, of about so many bytes together."""
    kept, total = [], 0
    for text in documents:
        if total >= size:
            break
        kept.append(text)
        total += len(text)
    return kept


def make(corpus, folder):
    """Makes the files unless they are there."""
    folder = Path(folder).resolve()
    if (folder / "held_out.npz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parts = {domain: split(documents) for domain, documents in CORPORA[corpus](folder).items()}
    size = min(sum(map(len, training)) for training, _ in parts.values())
    each = HELD_OUT_SEQUENCES // len(parts)
    # Sequences of all domains in turn, so that any part of them holds all.
    tokens = numpy.stack([sequences(held_out, each) for _, held_out in parts.values()], axis=1)
    training = [text for documents, _ in parts.values() for text in capped(documents, size)]
    documents, num_tokens = write_dataset(training, folder / "train")
    part = folder / ".held_out.npz"
    numpy.savez(part, tokens=tokens.reshape(-1, SEQ_LENGTH + 1), domains=numpy.array(list(parts)))
    os.replace(part, folder / "held_out.npz")
    print(f"{corpus}: {documents} documents, {num_tokens / 1e6:.1f} million tokens, {len(parts)} domain(s)", flush=True)


def digest(folder):
    """Short hash of what runs train and are judged on."""
    held_out = numpy.load(folder / "held_out.npz")["tokens"].tobytes()
    return hashlib.sha256((folder / "train.bin").read_bytes() + held_out).hexdigest()[:16]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("folder")
    options = parser.parse_args()
    make(options.corpus, options.folder)
