"""The README says what the code does."""

import re
from pathlib import Path

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.losses.base import options_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_table_of_flags():
    rows = re.findall(r"^\| `(--moe-[a-z-]+)` \| `(\w+)` \| `?(\w+)`? \|", README, re.M)
    assert rows == [(f.metadata["flag"], f.name, f"{f.default:g}" if isinstance(f.default, float) else str(f.default))
                    for f in options_of(SpecConfig)]  # fmt: skip


def test_files_and_targets_exist():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).is_file(), link
    for path in re.findall(r"`((?:examples|tests)/[\w/.]+)`", README):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.M)
    assert targets == ["quickstart", "test", "compare"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_other_documents_name_what_exists():
    for document in (ROOT / "docs" / "guide.md", ROOT / "docs" / "frameworks.md", *ROOT.glob("*/README.md")):
        text = document.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            assert (document.parent / link).is_file(), f"{document}: {link}"
        for path in re.findall(r"\b((?:examples|tests|configs)/[\w./-]+\.(?:py|sh|yaml))", text):
            assert (ROOT / path).is_file(), f"{document}: {path}"
        flags = {field.metadata["flag"] for field in options_of(SpecConfig)}
        for flag in re.findall(r"--moe-(?:spec|coupling|specialization)[\w-]*", text):
            assert flag in flags, f"{document}: {flag}"
