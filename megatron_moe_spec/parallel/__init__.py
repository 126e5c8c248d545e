"""Communication between the ranks of a layer's process groups. Knows torch.distributed, not Megatron."""
