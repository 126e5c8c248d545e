"""Everything that is known of Megatron: its symbols and attributes, the order of its rows, and how releases differ.

Nothing else in this package imports Megatron, apart from ``megatron_moe_spec.cpu``. ``contract`` lists the symbols.
"""
