"""Padding of each expert's rows. Their permutation by a map is Transformer Engine's own Triton code."""

import torch

from .registry import bound


@bound
def fused_multi_row_padding(input, output, input_row_list, padded_input_row_list):
    output.zero_()
    read = write = 0
    for rows, padded in zip(input_row_list, padded_input_row_list):
        output[write : write + rows] = input[read : read + rows]
        read, write = read + rows, write + padded


@bound
def fused_multi_row_unpadding(input, output, input_row_list, unpadded_input_row_list):
    read = write = 0
    for padded, rows in zip(input_row_list, unpadded_input_row_list):
        output[write : write + rows] = input[read : read + rows]
        read, write = read + padded, write + rows


@bound
def splits_to_offsets(first_dims, logical_last_dim):
    ends = first_dims.to(torch.int64).cumsum(0) * logical_last_dim
    return torch.cat([ends.new_zeros(1), ends])


@bound
def splits_to_offsets_multi(split_sizes, device, strides, include_leading_zero, dtypes, bulk_allocate=False):
    splits, offsets = split_sizes.to(torch.int64), []
    for stride, leads, dtype in zip(strides, include_leading_zero, dtypes):
        ends = (splits * stride).cumsum(0)
        offsets.append((torch.cat([ends.new_zeros(1), ends]) if leads else ends).to(dtype))
    return splits, offsets
