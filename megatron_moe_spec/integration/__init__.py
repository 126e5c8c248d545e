"""Hooks on Megatron-Core models. The only code of this package that knows Megatron."""
