"""Facts about Megatron: its symbols and attributes, the order of its rows, and how releases differ.

Nothing else in this package imports Megatron, except ``megatron_moe_spec.cpu``.
"""
