"""Tell what is not supported, from the list of rules that attach() and the doctor go by.

python -m examples.unsupported          # prints docs/unsupported.md
python -m examples.unsupported --write  # writes it
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

from megatron_moe_spec.integration.support.rule import Rule
from megatron_moe_spec.integration.support.rules import RULES
from megatron_moe_spec.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "unsupported.md"

_TEXT = """# What is not supported

`attach` refuses a model or its settings by the rules of this table, and the doctor reports the same of the flags of a
run, with the remedy. A remedy names all flags that have to change: of those to remove, the ones that are set. A rule
concerns the losses that it names, also where they are measured only; "all" are all losses, metrics and traces. Notices
refuse nothing. `make unsupported` writes this page from `megatron_moe_spec/integration/support/rules.py`.

| setting | losses | why | remedy |
|---|---|---|---|
{rules}

## What the arithmetic of a loss needs

| loss | why | remedy |
|---|---|---|
{arithmetic}
"""


class _EverySetting:
    """A TransformerConfig with every setting that a remedy may name, and with sizes that no loss can do with."""

    moe_flex_dispatcher_backend, moe_token_dispatcher_type, offload_modules = "ncclep", "flex", ["fused_group_mlp"]
    moe_router_topk, num_moe_experts, gated_linear_unit = 1, 1, False

    def __getattr__(self, name):
        return True


class _Fact:
    """Any fact that a template names: N."""

    def __getattr__(self, name):
        return self

    def __str__(self):
        return "N"


class _AnyModel(_Fact):
    """A model in the templates of the rules."""

    transformer_config = _EverySetting()
    layer_pattern, switched_on = ["--hybrid-layer-pattern"], "the losses' coefficients"
    no_kernels = "they need an NVIDIA GPU"
    tensor_size = pairs_across = "M"


_ANY_MODEL = _AnyModel()
_ANY_LOSS = SimpleNamespace(title="the loss", off="its coefficient to 0", flag="its coefficient")
_ATTACH = {"given": "M", "expected": "N", "made_by": "--num-layers-per-virtual-pipeline-stage"}


def report() -> str:
    """docs/unsupported.md."""
    return _TEXT.format(rules="\n".join(map(_row, RULES)), arithmetic="\n".join(_arithmetic()))


def _row(rule: Rule) -> str:
    concerned = [loss() for loss in LOSSES if loss.reads in rule.reads]
    loss = concerned[0] if len(concerned) == 1 else _ANY_LOSS
    values = {"model": _ANY_MODEL, "loss": loss, **_ATTACH}
    remedy = rule.remedy(_ANY_MODEL) if callable(rule.remedy) else rule.remedy
    name = rule.name if rule.refuses else f"{rule.name} (notice)"
    losses = ", ".join(loss.title for loss in concerned) or "all"
    return _cells(name, losses, rule.message.format(**values), remedy.format(**values))


def _arithmetic():
    """A loss's own words, of a model that has nothing of what it needs."""
    for loss in (loss() for loss in LOSSES):
        for problem in loss.problems(_EverySetting()):
            why, _, remedy = problem.removesuffix(")").partition(" (")
            yield _cells(loss.title, why, remedy)


def _cells(*texts: str) -> str:
    cells = [re.sub(r"--[a-z][a-z0-9-]+", r"`\g<0>`", text.replace("|", "\\|")) for text in texts]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    text = report()
    if sys.argv[1:] == ["--write"]:
        REPORT.write_text(text)
        print(f"wrote {REPORT.relative_to(ROOT)}")
    elif sys.argv[1:]:
        sys.exit("usage: python -m examples.unsupported [--write]")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
