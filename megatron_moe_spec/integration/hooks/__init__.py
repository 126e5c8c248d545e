"""Hooks and replaced methods, the micro-batch of a call, what a router decided, and gradients that are added."""
