"""Expert-specialization auxiliary losses for Mixture-of-Experts models in Megatron.

Importing this package imports neither torch nor Megatron until a name is used, and changes neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_moe_spec import losses
    from megatron_moe_spec.config import SpecConfig
    from megatron_moe_spec.integration.attach import SpecHandle, attach
    from megatron_moe_spec.metrics.writer import MetricsWriter

__version__ = "0.1.0"
__all__ = ["MetricsWriter", "SpecConfig", "SpecHandle", "attach", "losses"]


def __getattr__(name: str) -> Any:
    if name == "SpecConfig":
        return import_module("megatron_moe_spec.config").SpecConfig
    if name == "MetricsWriter":
        return import_module("megatron_moe_spec.metrics.writer").MetricsWriter
    if name in ("SpecHandle", "attach"):
        return getattr(import_module("megatron_moe_spec.integration.attach"), name)
    if name == "losses":
        return import_module("megatron_moe_spec.losses")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
