"""The rules of what is not supported, by name, and what they say."""

import re

from megatron_moe_spec.integration.support.rules import RULES

BY_NAME = {rule.name: rule for rule in RULES}


def message_of(name: str) -> str:
    """A pattern of the rule's message, whatever the model and the loss."""
    return ".+".join(map(re.escape, re.split(r"\{[^}]*\}", BY_NAME[name].message)))
