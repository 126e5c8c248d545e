"""Reports of training runs: ``python -m megatron_moe_spec.report``."""
