"""Hooks on Megatron-Core models. Each room imports only from those above it.

compat      facts about Megatron; the only room that imports it
hooks       hooks on modules, the micro-batch of a call, gradients that are added
step        clock, losses, measures and traces of a training step
pipeline    coupling of MoE layers in different pipeline stages
support     what is not supported, and the remedy
taps        the places in Megatron that losses read
attach      attaches the losses to a model
training    the same in Megatron's training program
"""
