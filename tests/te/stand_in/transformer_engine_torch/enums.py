"""Enumerations and empty classes of the extension; their numbers are those of its C headers."""

from enum import IntEnum

__all__ = ["DType", "FP8TensorMeta"]


class DType(IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FP8TensorMeta:
    def __init__(self):
        self.scale = self.scale_inv = self.amax_history = None


def _enumeration(name: str, members: str, start: int = 0, prefix: str = "", **others: int) -> None:
    numbers = {f"{prefix}{member}": number for number, member in enumerate(members.split(), start)}
    globals()[name] = IntEnum(name, {**numbers, **{f"{prefix}{member}": value for member, value in others.items()}})
    __all__.append(name)


def _class(name: str, *bases) -> type:
    globals()[name] = type(name, bases, {})
    __all__.append(name)
    return globals()[name]


_enumeration("NVTE_Bias_Type", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI", prefix="NVTE_")
_enumeration(
    "NVTE_Mask_Type",
    "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    prefix="NVTE_",
)
_enumeration("NVTE_Softmax_Type", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX", prefix="NVTE_")
_enumeration(
    "NVTE_QKV_Format",
    "SBHD BSHD THD BSHD_2SBHD SBHD_2BSHD THD_2BSHD THD_2SBHD BHSD QKV_Format_NOT_SET",
    prefix="NVTE_",
)
_enumeration(
    "NVTE_QKV_Layout",
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D "
    "THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD Paged_KV_BSHD_BSHD_BSHD "
    "Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD Paged_KV_THD_BSHD_BSHD "
    "Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD QKV_Layout_NOT_SET",
    prefix="NVTE_",
)
_enumeration("NVTE_Fused_Attn_Backend", "F16_arbitrary_seqlen FP8", 1, prefix="NVTE_", No_Backend=-1)
_enumeration(
    "NVTEScalingMode",
    "DELAYED_TENSOR_SCALING MXFP8_1D_SCALING BLOCK_SCALING_1D BLOCK_SCALING_2D NVFP4_1D_SCALING",
    prefix="NVTE_",
    INVALID_SCALING=100,
)
_enumeration("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT INVALID")
_enumeration("CommOverlapType", "RS AG")
_enumeration(
    "CommOverlapAlgo",
    "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS "
    "ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG",
)
_enumeration("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8")
_enumeration("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC")
_enumeration(
    "FP8FwdTensors",
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
)
_enumeration("FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3")

_class("CommOverlapHelper")
_core = _class("CommOverlapCore")
_class("CommOverlap", _class("CommOverlapBase", _core))
_class("CommOverlapP2P", _class("CommOverlapP2PBase", _core))
