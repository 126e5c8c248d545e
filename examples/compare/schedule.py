"""Model, optimizer and length of the runs, as Megatron flags, on a CPU and on a GPU."""

from dataclasses import dataclass

from examples.quickstart import settings

GPU_MODEL = """
--num-layers 8 --hidden-size 512 --num-attention-heads 8 --group-query-attention --num-query-groups 4
--seq-length 512 --max-position-embeddings 512 --position-embedding-type rope
--normalization RMSNorm --swiglu --disable-bias-linear --ffn-hidden-size 1024
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64
--num-experts 32 --moe-router-topk 4 --moe-ffn-hidden-size 256 --moe-shared-expert-intermediate-size 256
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--moe-token-dispatcher-type alltoall --moe-router-dtype fp32
--bf16 --log-memory-to-tensorboard
""".split()


@dataclass(frozen=True)
class Scale:
    """Size of the runs on a kind of device."""

    model: list
    shape: str
    seq_length: int
    batch_size: int
    learning_rate: float
    max_iterations: int

    @property
    def tokens_per_step(self) -> int:
        return self.seq_length * self.batch_size


# A step of so small a model costs the same for 16 sequences as for 4.
CPU = Scale(
    settings.MODEL,
    "4 layers, hidden size 64, 16 routed experts of width 64 of which 2 serve a token, and a shared one",
    settings.SEQ_LENGTH,
    batch_size=16,
    learning_rate=5e-3,
    max_iterations=3000,
)
GPU = Scale(
    GPU_MODEL,
    "8 layers, hidden size 512, 32 routed experts of width 256 of which 4 serve a token, and a shared one",
    seq_length=512,
    batch_size=32,
    learning_rate=1e-3,
    max_iterations=3000,
)


def measuring_interval(iterations: int) -> int:
    """Measuring costs time, so it is done twenty times a run at most."""
    return min(iterations, max(5, iterations // 20))


def flags(scale: Scale, iterations: int, seed: int) -> list:
    """All of a run but its losses."""
    schedule = f"""
    --micro-batch-size {scale.batch_size} --global-batch-size {scale.batch_size}
    --train-iters {iterations} --seed {seed}
    --lr {scale.learning_rate:g} --min-lr {scale.learning_rate / 10:g} --lr-decay-style cosine
    --lr-warmup-iters {min(50, iterations // 4)} --weight-decay 0.01 --clip-grad 1.0 --num-workers 0
    --log-interval {max(1, min(10, iterations // 4))} --tensorboard-log-interval 1 --log-timers-to-tensorboard
    --eval-interval {max(1, iterations // 5)} --eval-iters {max(1, min(20, iterations // 10))}
    --moe-spec-metrics-interval {measuring_interval(iterations)}
    """
    return [*scale.model, *schedule.split()]
