"""Judge public training recipes: which of them take the losses as they are, and what stands in the way of the others.

python -m examples.recipes          # prints docs/recipes.md
python -m examples.recipes --write  # writes it
"""

import contextlib
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES, REPORT = ROOT / "configs" / "recipes.json", ROOT / "docs" / "recipes.md"

_TEXT = """# Public recipes

What `python -m megatron_moe_spec.doctor` says of {number} public recipes, by the validation of Megatron-Core {version}:
**{usable} are usable as they are**, {refused} are refused, {objected} Megatron does not take. Nothing was trained for
this table. `make recipes` makes it anew.

The flags and the file of each source are in `configs/recipes.json`. Flags from Megatron-MoE-ModelZoo follow from its
configs and scripts; the others were transcribed: what matters here is the source's, shapes of models are partly from
memory. In {changed} of them something that this Megatron does not take was changed, as the file says. Where a recipe
has no flag of this package, specialization and coupling are on, at the paper's coefficients. Transformer Engine, DeepEP
and the GPUs are taken for there.

| recipe | source | losses | verdict | left out, and worth knowing |
|---|---|---|---|---|
{rows}
"""
_CHANGED = "changed_for_0_19_2"


def report() -> str:
    """docs/recipes.md."""
    from megatron_moe_spec.doctor import judge

    recipes = json.loads(RECIPES.read_text())
    verdicts = []
    for recipe in recipes:
        # Megatron's own log and its tables of pipeline layouts.
        with contextlib.redirect_stderr(io.StringIO()):
            verdicts.append(judge(shlex.split(recipe["flags"])))
    from megatron_moe_spec.integration.compat.release import megatron_version

    return _TEXT.format(
        number=len(recipes),
        version=megatron_version().partition("+")[0],
        usable=sum(not verdict.problems and not verdict.megatron_error for verdict in verdicts),
        refused=sum(bool(verdict.problems) for verdict in verdicts),
        objected=sum(bool(verdict.megatron_error) for verdict in verdicts),
        changed=sum(_CHANGED in recipe for recipe in recipes),
        rows="\n".join(map(_row, recipes, verdicts)),
    )


def _row(recipe: dict, verdict) -> str:
    losses = re.sub(r" x [\d.e-]+| \(assumed.*\)", "", dict(verdict.used).get("losses", ""))
    if verdict.megatron_error:
        said = f"Megatron: {verdict.megatron_error}"
    else:
        said = "refused: " + "; ".join(verdict.problems) if verdict.problems else "usable"
    source = recipe["source"].partition(": ")[0]
    cells = (recipe["name"], source, losses, said, "; ".join(verdict.notices))
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def main() -> None:
    os.environ.pop("WORLD_SIZE", None)  # each recipe is judged at the smallest size of its layout
    text = report()
    if sys.argv[1:] == ["--write"]:
        REPORT.write_text(text)
        print(f"wrote {REPORT.relative_to(ROOT)}")
    elif sys.argv[1:]:
        sys.exit("usage: python -m examples.recipes [--write]")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
