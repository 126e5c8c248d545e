"""What both losses cost on paper, relative to the experts' matrix products: the table of docs/kernels.md.

    python benchmarks/count.py

One GPU with all experts of a layer, bf16, 8192 tokens. Nothing here is measured. It is assumed that kernels move their
bytes at BANDWIDTH, that small operations take LAUNCH each, or the time of their bytes, and that matrix products run at
the rates below. A step is its matrix products with weights, without attention's own and without all that only moves
memory: of a real step, the losses cost a smaller part.
"""

from common import MODELS, Shape

BANDWIDTH, GROUPED, DENSE, LAUNCH, TOKENS = 3.0e12, 500e12, 600e12, 3e-6, 8192
# Active parameters of a token, in 1e9, and MoE layers, as published.
ACTIVE = {
    "Qwen3-30B-A3B": (3.3, 48),
    "DeepSeek-V3": (37.0, 58),
    "Mixtral-8x7B": (12.9, 32),
    "DeepSeek-V2-Lite": (2.4, 26),
}
# Bytes an element of the rows: the losses' kernels, Megatron's compiled backward of the SwiGLU, and the fused one.
COSINES, GRADIENT, MEGATRON_BACKWARD, FUSED_BACKWARD = 2, 6, 16, 10
SMALL_OPERATIONS = 7


def seconds_of_experts(shape: Shape) -> float:
    """Forward and backward of the three matrices of each of a token's experts."""
    return 18 * shape.hidden * shape.ffn * shape.top_k * TOKENS / GROUPED


def seconds_of_rows(shape: Shape, bytes_an_element: float) -> float:
    return bytes_an_element * shape.ffn * shape.top_k * TOKENS / BANDWIDTH


def seconds_of_small(shape: Shape) -> float:
    """The map of active experts, where the rows lie, and the masses: 29 bytes a token and expert."""
    return max(SMALL_OPERATIONS * LAUNCH, 29 * shape.experts * TOKENS / BANDWIDTH)


def share_of_step(model: str) -> float:
    """Of the experts' matrix products in those of a step."""
    active, layers = ACTIVE[model]
    shape = MODELS[model]
    experts = 3e-9 * shape.hidden * shape.ffn * shape.top_k * layers
    return experts / GROUPED / (experts / GROUPED + (active - experts) / DENSE)


def table() -> str:
    """In percent of the experts' matrix products / of a step."""
    variants = {
        "small operations": seconds_of_small,
        "kernels, fused backward": lambda s: seconds_of_rows(s, COSINES + FUSED_BACKWARD - MEGATRON_BACKWARD),
        "the same, relative to a fused SwiGLU": lambda s: seconds_of_rows(s, COSINES),
        "kernels, not fused": lambda s: seconds_of_rows(s, COSINES + GRADIENT),
    }
    lines = [
        "| | " + " | ".join(variants) + " |",
        "|---|" + "---:|" * len(variants),
    ]
    for model in ACTIVE:
        experts, share = seconds_of_experts(MODELS[model]), share_of_step(model)
        cells = [100 * seconds(MODELS[model]) / experts for seconds in variants.values()]
        lines.append(f"| {model} | " + " | ".join(f"{cell:.1f} / {cell * share:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
