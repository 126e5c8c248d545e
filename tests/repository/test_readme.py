"""The README and the documents beside it say what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from mutations import MUTATIONS

from megatron_moe_spec import SpecConfig, losses
from megatron_moe_spec.losses import LOSSES, installed
from megatron_moe_spec.losses.base import options_of
from megatron_moe_spec.losses.specialization import PAPER

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("[a-z]*/README.md")),
]
of_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_table_of_flags():
    rows = re.findall(r"^\| `(--moe-[a-z0-9-]+)` \| `(\w+)` \| `?(\w*)`? \|", README, re.M)
    assert rows == [
        (f.metadata["flag"], f.name, f"{f.default:g}" if isinstance(f.default, float) else str(f.default))
        for f in options_of(SpecConfig)
    ]


def test_number_of_usable_recipes():
    number, usable = re.search(r"Of (\d+) public recipes .*, (\d+) are usable as they are", README).groups()
    report = (ROOT / "docs" / "recipes.md").read_text()
    assert f" {number} public recipes" in report and f"**{usable} are usable as they are**" in report


def test_the_paper_s_values_are_those_of_the_flags():
    for one in options_of(SpecConfig):
        for value in re.findall(r"\b\d[\d.e-]*\d|\b\d\b", one.metadata["paper"].partition(", Eq")[0]):
            (row,) = re.findall(rf"^\| `{one.metadata['flag']}` .*$", README, re.M)
            assert value in row


def test_table_of_the_units_of_specialization():
    guide = (ROOT / "docs" / "guide.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([\de.-]+) \| ([\de.-]+) \|$", guide, re.M)
    paper = float(PAPER)
    assert rows == [(f"{k}", f"{paper * k * (k - 1):g}", f"{paper / (k * (k - 1)):.3g}") for k in (2, 4, 6, 8)]


def test_every_loss_has_a_function_and_a_row():
    for loss in LOSSES:
        name = "expert_router_coupling" if loss.name == "erc_loss" else loss.name.removesuffix("_loss")
        assert callable(getattr(losses, f"{name}_loss"))
        assert re.search(rf"^\| {name.replace('_', '.')}\b", README, re.M), name


def test_the_loss_of_one_s_own_in_the_readme_runs():
    (block,) = re.findall(r"```python\n(@dataclass.*?)```", README, re.S)
    scope = {"dataclass": dataclasses.dataclass, "torch": torch, "ScoresLoss": losses.ScoresLoss}
    exec(block, scope)
    (loss,) = SpecConfig(extra_losses=(scope["RoutingEntropy"](0.01),)).extra_losses
    scores = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert float(loss.of_scores(scores)) == pytest.approx(0.5 * 0.6931472)


def test_the_example_in_contributing_is_the_tested_one():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"`tests/helpers/example_loss\.py`:\n\n```python\n(.*?)```", text, re.S)
    assert block == (ROOT / "tests" / "helpers" / "example_loss.py").read_text()
    assert f'entry-points."{installed.GROUP}"' in text


def test_the_figures_in_the_readme_are_of_the_published_reports():
    """test_compare.py computes these anew from the values of the runs."""
    rows = [line for line in README.splitlines() if " ± " in line]
    reports = "".join(path.read_text() for path in (ROOT / "docs/evidence").glob("*/report.md")).splitlines()
    assert len(rows) > 4 and set(rows) <= set(reports)


def test_tables_have_as_many_cells_in_every_row():
    for table in re.findall(r"(?:^\|.*\n)+", README, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table[:80]


def test_the_table_of_mutations():
    rows = re.findall(r"^\| (.+?) \| `(\w[\w/]*\.py)` \| ", (ROOT / "docs" / "layouts.md").read_text(), re.M)
    assert sorted(rows) == sorted((fault, file) for fault, file, *_ in MUTATIONS)


@of_each_document
def test_documents_name_what_exists(document):
    text = document.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (document.parent / link).exists(), link
    for path in re.findall(r"\b((?:examples|tests|configs)/[\w./-]+\.(?:py|sh|yaml))", text):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    flags = {one.metadata["flag"] for one in options_of(SpecConfig)}
    for flag in re.findall(r"--moe-(?:spec|coupling|specialization|erc|score-variance|orthogonality)[\w-]*", text):
        assert flag in flags, flag


def test_first_screen():
    """The two commands and the two lines of attach come before anything else."""
    first = "\n".join(README.splitlines()[:30])
    for needed in ("make quickstart", "make test", "attach(model, SpecConfig(", "torchrun"):
        assert needed in first
    assert len(README.splitlines()) <= 165
