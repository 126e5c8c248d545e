"""Hooks on modules, and what they find out about the call that they are in.

replacement  hooks and replaced methods, which copies of a model do not inherit
modes        autocast and inference mode of the caller
micro_batch  the micro-batch that a layer works on
routing      what a router decided for the tokens of a micro-batch
injection    adds a gradient to a tensor
scaling      factors on these gradients
"""
