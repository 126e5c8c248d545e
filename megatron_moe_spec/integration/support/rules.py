"""What is not supported: the one list, from which attach(), the doctor and docs/unsupported.md have it."""

from megatron_moe_spec.integration.compat.models import main_part
from megatron_moe_spec.integration.compat.settings import replaced_logits, shares_differently
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.remedies import with_experts
from megatron_moe_spec.integration.support.rule import Rule
from megatron_moe_spec.integration.support.rules_of_graphs import GRAPHS
from megatron_moe_spec.integration.support.rules_of_pairs import PAIRS_OF_LAYERS
from megatron_moe_spec.integration.support.rules_of_rows import ROWS
from megatron_moe_spec.integration.support.rules_of_weights import WEIGHTS


def _lacks_pattern(model: ModelFacts) -> bool:
    flag, pattern = model.layer_pattern
    return bool(flag) and "E" not in main_part(pattern)


def _lacks_frequency(model: ModelFacts) -> bool:
    frequency = getattr(model.transformer_config, "moe_layer_freq", 1)
    return not model.layer_pattern[0] and not isinstance(frequency, int) and not any(frequency)


def _random_logits(flag: str) -> Rule:
    return Rule(
        flag,
        f"{flag} replaces the routers' logits by random ones, for benchmarks: no loss says anything of training",
        when=lambda model, loss: replaced_logits(model.transformer_config) == flag,
        refuses=False,
    )


# Raised by attach() before it knows the model.
SOME_CHUNKS = Rule(
    "some of a rank's model chunks",
    "attach() takes all model chunks of a rank at once, as get_model returns them: got {given} of {expected}",
    "{made_by}",
)

RULES: tuple[Rule, ...] = (
    SOME_CHUNKS,
    Rule(
        "no E in the layer pattern",
        "the model has no MoE layer: {model.layer_pattern[0]} has no MoE layer (E) in its main part, before the first "
        "/",
        with_experts("add an E there"),
        lambda model, loss: _lacks_pattern(model),
        of_dense=True,
    ),
    Rule(
        "--moe-layer-freq without 1",
        "the model has no MoE layer: --moe-layer-freq selects none",
        with_experts("set --moe-layer-freq to 1 or to a list with a 1"),
        lambda model, loss: _lacks_frequency(model),
        of_dense=True,
    ),
    Rule(
        "no MoE layer",
        "the model has no MoE layer",
        "set --num-experts, or leave out {model.switched_on}",
        lambda model, loss: not _lacks_pattern(model) and not _lacks_frequency(model),
        of_dense=True,
    ),
    Rule(
        "--moe-spec-kernels triton where Triton cannot run",
        "the Triton kernels cannot run: {model.no_kernels}",
        "set --moe-spec-kernels to auto or torch",
        lambda model, loss: model.no_kernels,
    ),
    Rule(
        "inference layers",
        "inference layers are not for training",
        "set --transformer-impl transformer_engine",
        lambda model, loss: getattr(model.transformer_config, "transformer_impl", None) == "inference_optimized",
    ),
    Rule(
        "--hybrid-context-parallel",
        "each sample has context-parallel ranks of its own, over which the losses do not reduce",
        "remove --hybrid-context-parallel",
        lambda model, loss: shares_differently(model.transformer_config),
    ),
    Rule(
        "a frozen model",
        "the whole model is frozen",
        "attach to the one that is trained, or to the module that holds what is trained through it",
        lambda model, loss: model.is_frozen and model.spec.trained_losses,
    ),
    _random_logits("--moe-router-force-load-balancing"),
    _random_logits("--moe-router-force-biased"),
    *GRAPHS,
    *PAIRS_OF_LAYERS,
    *ROWS,
    *WEIGHTS,
)
