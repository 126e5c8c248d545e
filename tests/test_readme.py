"""The README says what the code does."""

import re
from dataclasses import fields
from pathlib import Path

from megatron_moe_spec import SpecConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_table_of_flags():
    rows = re.findall(r"^\| `(--moe-[a-z-]+)` \| `(\w+)` \| `?(\w+)`? \|", README, re.M)
    assert rows == [(f.metadata["flag"], f.name, f"{f.default:g}" if isinstance(f.default, float) else str(f.default))
                    for f in fields(SpecConfig)]  # fmt: skip


def test_files_and_targets_exist():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).is_file(), link
    for path in re.findall(r"`((?:examples|tests)/[\w/.]+)`", README):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.M)
    assert targets == ["quickstart", "compare", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)
