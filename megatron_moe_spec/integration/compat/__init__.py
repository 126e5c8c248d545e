"""Facts about Megatron: its symbols and attributes, the order of its rows, and how releases differ.

Nothing else in this package imports Megatron, except ``megatron_moe_spec.cpu``.

protocols         the attributes that we use of Megatron's objects
release           which releases are supported
assumed           libraries and devices of another machine than this one
models            models, their MoE layers and routers, and wrappers around them
groups            process groups
settings          facts of a TransformerConfig
training_program  Megatron's training program: its arguments, flags and writers
experts           linear layers of experts, and their weights
dispatch          the rows of each token dispatcher
cuda_graphs       outputs of CUDA graphs of routers
checkpoints       activation checkpoints
schedules         pipeline schedules, and the loss scale that they set
"""
