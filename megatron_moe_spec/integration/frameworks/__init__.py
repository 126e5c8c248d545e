"""Adapters for frameworks that train Megatron-Core models. None imports its framework."""
