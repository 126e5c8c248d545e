"""Measures of routing and expert overlap, as pure functions and sums that add up over micro-batches and ranks."""

from megatron_moe_spec.metrics.information import conditional_entropy, entropy, normalized_mutual_information

__all__ = ["conditional_entropy", "entropy", "normalized_mutual_information"]
