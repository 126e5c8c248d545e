"""What the extension says of the machine."""

from .enums import NVTE_Fused_Attn_Backend
from .registry import bound


@bound
def get_cudnn_version():
    return 91200


@bound
def get_cublasLt_version():
    return 130100  # has no products of grouped tensors: the experts' products are asked for one by one


@bound
def get_num_cublas_streams():
    return 1


@bound
def get_stream_priority_range(device_id=-1):
    return 0, -1


@bound
def device_supports_multicast(device_id=-1):
    return False


@bound
def ubuf_built_with_mpi():
    return False


@bound
def get_fused_attn_backend(fused_attn_params):
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no fused attention on CPU"
