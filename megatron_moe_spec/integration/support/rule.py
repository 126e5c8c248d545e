"""What a rule is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional, Union

from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.remedies import is_set
from megatron_moe_spec.losses import Loss

When = Callable[[ModelFacts, Any], Any]


@dataclass(frozen=True)
class Rule:
    """One thing that is not supported, or that is worth knowing.

    Attributes:
        name: of the setting, in documents and tests.
        message: why; a template of ``{model...}``, a ``ModelFacts``, and ``{loss...}``.
        remedy: what to change, likewise, or a function of the model that returns it; follows in parentheses.
        when: whether it applies to (model, loss). None: code that runs later raises its text.
        reads: it concerns the losses that read one of these, one by one. Empty: all of them, metrics and traces too,
            and the loss is None.
        refuses: or else it is a notice.
        of_dense: it looks at models without MoE layers; the others look at models with some.
    """

    name: str
    message: str
    remedy: Union[str, Callable[[Any], str]] = ""
    when: Optional[When] = None
    reads: tuple[str, ...] = ()
    refuses: bool = True
    of_dense: bool = False

    def complaints(self, model: ModelFacts) -> Iterator[str]:
        """Its text, for each loss to which it applies."""
        if model.spec.enabled and model.has_moe_layers != self.of_dense:
            for loss in model.spec.computed_losses if self.reads else (None,):
                if (loss is None or loss.reads in self.reads) and self.applies(model, loss):
                    yield self.text(model, loss)

    def applies(self, model: ModelFacts, loss: Optional[Loss]) -> bool:
        return self.when is not None and bool(self.when(model, loss))

    def text(self, model: Any = None, loss: Optional[Loss] = None, **values: Any) -> str:
        """Message and remedy; in training, ``model`` is a layer; ``values``: other fields of the templates."""
        remedy = self.remedy(model) if callable(self.remedy) else self.remedy
        template = f"{self.message} ({remedy})" if remedy else self.message
        return template.format(model=model, loss=loss, **values)


def any_set(*settings: str) -> When:
    """For ``when``: one of these settings of the TransformerConfig is there, and neither None nor False."""
    return lambda model, loss: is_set(model, *settings)
