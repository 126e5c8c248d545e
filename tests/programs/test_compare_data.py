"""The experiments' texts: what is trained on, and what no run trains on."""

import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest

from examples.compare import data
from examples.quickstart.data import EOD

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not there: no Debian")


def texts(number, seed, low=0, high=256, length=1000):
    """{name: bytes} of random documents, so that none holds a long part of another."""
    random = numpy.random.default_rng(seed)
    return {f"{seed}/{i}": random.integers(low, high, length, dtype=numpy.uint8).tobytes() for i in range(number)}


# Splitting


def test_split_is_disjoint_and_holds_out_a_tenth_by_the_hash_of_names():
    documents = texts(100, seed=0)
    training, held_out = data.split(documents)
    assert len(held_out) == 10 and set(training) | set(held_out) == set(documents.values())
    assert not set(training) & set(held_out)
    ordered = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert held_out == [documents[name] for name in ordered[90:]]
    # Neither the order nor the texts matter: names alone.
    others = {name: bytes(reversed(documents[name])) for name in reversed(documents)}
    assert data.split(others)[1] == [bytes(reversed(text)) for text in held_out]


def test_split_leaves_short_documents_out_and_always_holds_one_out():
    short = {f"short {i}": bytes([i]) * (data.SHORTEST - 1) for i in range(30)}
    just_enough = {"long": b"x" * data.SHORTEST, "longer": b"y" * 999, "longest": b"z" * 9999}
    training, held_out = data.split(short | just_enough)
    assert len(training) == 2 and len(held_out) == 1
    assert set(training + held_out) == set(just_enough.values())


def test_capped_takes_the_first_documents_until_their_size_is_reached():
    documents = [b"a" * 10, b"b" * 20, b"c" * 30, b"d" * 40]
    assert data.capped(documents, 30) == documents[:2]
    assert data.capped(documents, 31) == documents[:3]
    assert data.capped(documents, 1000) == documents
    assert data.capped(documents, 0) == []


# Sequences


def test_sequences_are_windows_at_equal_distances_of_the_documents_and_their_ends():
    documents = [bytes([i]) * (300 + i) for i in range(1, 9)]
    tokens = [token for text in documents for token in (*text, EOD)]
    for number in (1, 3, 7, 18):
        found = data.sequences(documents, number)
        assert found.shape == (number, data.SEQ_LENGTH + 1) and found.dtype == numpy.int64
        distance = (len(tokens) - data.SEQ_LENGTH) // number
        assert distance >= data.SEQ_LENGTH  # inputs of two sequences share no token
        for row, window in enumerate(found.tolist()):
            assert window == tokens[row * distance : row * distance + data.SEQ_LENGTH + 1]
    assert (found == EOD).any()


def test_too_few_tokens_for_the_sequences_are_an_error_that_says_so():
    documents = [b"x" * 299, b"y" * 212]  # with their ends 513 tokens
    assert data.sequences(documents, 3).shape == (3, data.SEQ_LENGTH + 1)
    with pytest.raises(SystemExit, match="513 held-out tokens are too few for 4 sequences of 128"):
        data.sequences(documents, 4)


# The corpora


def test_dialects_are_the_same_each_time(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DIALECT_DOCUMENTS", 20)
    first = data.dialects(tmp_path)
    assert first == data.dialects(tmp_path)
    assert len(first) == data.DIALECTS == 8
    texts = [text for documents in first.values() for text in documents.values()]
    assert {len(text) for text in texts} == {data.DIALECT_LENGTH} and len(set(texts)) == 8 * 20
    assert data.DIALECT_LENGTH >= data.SHORTEST  # none is left out
    assert {symbol for text in texts for symbol in text} == set(range(data.SYMBOLS))


def test_a_dialect_is_one_markov_chain_and_differs_from_the_others(tmp_path):
    transitions = []  # of each dialect, in both halves of its documents
    for documents in data.dialects(tmp_path).values():
        symbols = numpy.stack([numpy.frombuffer(text, dtype=numpy.uint8) for text in documents.values()]).astype(int)
        for half in numpy.split(symbols, 2):
            counts = numpy.zeros((data.SYMBOLS, data.SYMBOLS))
            numpy.add.at(counts, (half[:, :-1], half[:, 1:]), 1)
            transitions.append(counts / counts.sum(axis=1, keepdims=True).clip(min=1))
    # Total variation distance of the successors, mean over the symbols: 0 alike, 1 disjoint.
    distance = numpy.array([[abs(a - b).sum(axis=1).mean() / 2 for b in transitions] for a in transitions])
    same = numpy.arange(16)[:, None] // 2 == numpy.arange(16) // 2
    assert distance[same].max() < 0.05
    assert distance[~same].min() > 0.5


def test_stdlib_is_the_sources_of_the_standard_library(tmp_path):
    (domain, documents), *others = data.stdlib(tmp_path).items()
    assert domain == "Python" and not others
    import argparse

    assert documents["argparse.py"] == Path(argparse.__file__).read_bytes()


# What is made of them


@pytest.fixture
def small(monkeypatch):
    """A corpus of two domains of other bytes and sizes; returns it."""
    domains = {"low": texts(30, seed=1, high=128), "high": texts(50, seed=2, low=128)}
    monkeypatch.setitem(data.CORPORA, "small", lambda folder: domains)
    monkeypatch.setattr(data, "HELD_OUT_SEQUENCES", 40)
    return domains


def test_make_writes_a_dataset_that_megatron_reads_and_sequences_that_it_lacks(megatron, small, tmp_path, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data.make("small", tmp_path / "made")
    dataset = IndexedDataset(str(tmp_path / "made/train"))
    trained = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(document[-1] == EOD for document in trained)
    trained = [bytes(document[:-1]) for document in trained]
    # As much of each domain as the smaller one has.
    low, high = (data.split(documents) for documents in small.values())
    assert trained == low[0] + high[0][:27] and len(low[0]) == 27
    assert "small: 54 documents, 0.1 million tokens, 2 domain(s)" in capsys.readouterr().out

    held_out = numpy.load(tmp_path / "made/held_out.npz")
    assert held_out["domains"].tolist() == ["low", "high"]
    tokens = held_out["tokens"]
    assert tokens.shape == (40, data.SEQ_LENGTH + 1) and tokens.dtype == numpy.int64
    for number, sequence in enumerate(tokens.tolist()):
        domain = (low, high)[number % 2]
        assert all((token >= 128) == number % 2 for token in sequence if token != EOD)
        end = sequence.index(EOD) if EOD in sequence else len(sequence)
        longest = bytes(max(sequence[:end], sequence[end + 1 :], key=len))
        assert len(longest) >= data.SEQ_LENGTH // 2
        assert any(longest in text for text in domain[1])
        assert not any(longest in text for text in trained)


def test_make_does_nothing_a_second_time_and_goes_on_after_an_interruption(megatron, small, tmp_path, monkeypatch):
    def make():
        data.make("small", tmp_path)
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    stamps = make()
    assert set(stamps) == {"train.bin", "train.idx", "held_out.npz"}
    assert make() == stamps
    digest = data.digest(tmp_path)
    (tmp_path / "held_out.npz").unlink()
    assert set(make()) == set(stamps) and data.digest(tmp_path) == digest


def test_digest_changes_with_the_text_of_either_part(megatron, small, tmp_path):
    for folder in ("one", "same"):
        data.make("small", tmp_path / folder)
    digest = data.digest(tmp_path / "one")
    assert data.digest(tmp_path / "same") == digest and len(digest) == 16
    held_out = dict(numpy.load(tmp_path / "same/held_out.npz"))
    held_out["tokens"][5, 3] ^= 1
    numpy.savez(tmp_path / "same/held_out.npz", **held_out)
    assert data.digest(tmp_path / "same") != digest
    trained = bytearray((tmp_path / "one/train.bin").read_bytes())
    trained[1000] ^= 1
    (tmp_path / "one/train.bin").write_bytes(trained)
    assert data.digest(tmp_path / "one") != digest


# Debian packages


def build(packages, name, files):
    """A Debian package of {path: bytes}."""
    root = packages.parent / f"root of {name}"
    for path, contents in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(contents)
    (root / "DEBIAN").mkdir()
    control = f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
    (root / "DEBIAN/control").write_text(control + "Description: a test\n")
    packages.mkdir(exist_ok=True)
    command = ["dpkg-deb", "--build", "--root-owner-group", root, packages / f"{name}_1.0_all.deb"]
    subprocess.run(command, check=True, capture_output=True)


LICENCE = b"  1 This software and database is being provided to you\n  2 under the following license.\n"


def data_file(first, number):
    """WordNet's: a licence, then a line for each synset, its definition last."""
    lines = [
        b"%08d 03 n 01 word 0 001 @ 00001740 n 0000 | meaning %d  \n" % (i, i) for i in range(first, first + number)
    ]
    return LICENCE + b"".join(lines)


def wordnet():
    files = {f"usr/share/wordnet/data.{part}": data_file(i, 3) for i, part in enumerate(("verb", "adj", "adv"))}
    files["usr/share/wordnet/data.noun"] = data_file(0, 120)
    return files | {"usr/share/wordnet/index.noun": b"word n 1 | no definition\n"}


@needs_dpkg
def test_files_of_a_package_are_those_of_a_suffix_and_pages_are_unpacked(tmp_path):
    page, header = b".TH LS 1\nlists files\n", b"#define ONE 1\n"
    files = {
        "usr/share/man/man1/ls.1.gz": gzip.compress(page),
        "usr/share/doc/tools/changelog.gz": gzip.compress(b"no page"),
        "usr/include/linux/one.h": header,
        "usr/include/linux/one.hpp": b"another suffix",
    }
    packages = tmp_path / "packages"
    build(packages, "tools", files)
    assert list(data.files_of(packages, "tools", ".gz")) == [("./usr/share/man/man1/ls.1.gz", page)]
    assert list(data.files_of(packages, "tools", ".h")) == [("./usr/include/linux/one.h", header)]


@needs_dpkg
def test_a_link_to_a_page_is_no_document_of_its_own(tmp_path):
    root = tmp_path / "root of tools/usr/share/man/man1"
    root.mkdir(parents=True)
    (root / "dir.1.gz").symlink_to("ls.1.gz")
    build(tmp_path / "packages", "tools", {"usr/share/man/man1/ls.1.gz": gzip.compress(b"page")})
    assert [contents for _, contents in data.files_of(tmp_path / "packages", "tools", ".gz")] == [b"page"]


@needs_dpkg
def test_glosses_are_definitions_alone_fifty_a_document(tmp_path):
    build(tmp_path / "packages", data.WORDNET, wordnet())
    found = dict(data.glosses(tmp_path / "packages"))
    assert list(found) == ["noun 0", "noun 50", "noun 100", "verb 0", "adj 0", "adv 0"]
    assert found["noun 50"].split(b"\n") == [b"meaning %d" % i for i in range(50, 100)]
    assert found["noun 100"].count(b"\n") == 19
    assert found["adj 0"] == b"meaning 1\nmeaning 2\nmeaning 3"


@needs_dpkg
def test_domains_are_eight_and_each_is_of_its_own_package(tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    build(packages, data.WORDNET, wordnet())
    build(packages, data.HEADERS, {"usr/include/one.h": b"int one;"})
    for language, name in data.MAN_PAGES.items():
        build(packages, name, {"usr/share/man/man1/ls.1.gz": gzip.compress(language.encode())})
    found = data.domains(tmp_path)
    assert list(found) == [
        "Python", "C", "man English", "man German", "man French", "man Russian", "man Japanese", "WordNet",
    ]  # fmt: skip
    for language in data.MAN_PAGES:
        assert list(found[f"man {language}"].values()) == [language.encode()]
    assert list(found["C"].values()) == [b"int one;"]
    assert found["WordNet"].keys() == dict(data.glosses(packages)).keys()


def programs(folder, **scripts):
    """A PATH of these shell scripts alone."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    return str(folder)


def test_a_package_that_is_there_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", apt_get="exit 1", dpkg_deb="exit 1"))
    for name in ("manpages-de_4_all.deb", "manpages_6_all.deb"):
        (tmp_path / name).touch()
    assert data.package_file(tmp_path, "manpages") == str(tmp_path / "manpages_6_all.deb")
    assert data.package_file(tmp_path, "manpages-de") == str(tmp_path / "manpages-de_4_all.deb")


def test_a_package_that_is_missing_is_fetched_into_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PATH", programs(tmp_path / "bin", apt_get='[ $1 = download ] && : > "$2_6_all.deb"', dpkg_deb="")
    )
    packages = tmp_path / "of/packages"
    assert data.package_file(packages, "manpages") == str(packages / "manpages_6_all.deb")
    assert [path.name for path in packages.iterdir()] == ["manpages_6_all.deb"]


@pytest.mark.parametrize("there", [{}, {"apt_get": ""}, {"dpkg_deb": ""}])
def test_without_apt_get_a_missing_package_is_an_error_that_names_it_and_its_folder(tmp_path, monkeypatch, there):
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", **there))
    with pytest.raises(SystemExit) as error:
        data.package_file(tmp_path / "packages", "manpages-fr")
    message = str(error.value)
    assert message.startswith("manpages-fr: needs apt-get and dpkg-deb")
    assert f"manpages-fr_*.deb in {tmp_path / 'packages'}" in message
