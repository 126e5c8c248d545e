"""Places the experts of a model on the devices that serve it, by a routing trace; the command line is ``command.py``.

Suffixes of tensors in this folder: T tokens, M MoE layers, E experts, K experts of a token, S physical slots of a
layer, D devices, B bins of time, R replicas of an expert.
"""
