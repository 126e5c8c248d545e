"""Of Apex's extension of this name, what Megatron's gradient accumulation fusion calls (tensor_parallel/layers.py)."""


def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
    x, gradient = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (total_input, grad_output))
    main_grad.add_(gradient.T @ x)


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
