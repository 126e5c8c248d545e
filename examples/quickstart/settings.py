"""The model and the training schedule of the quickstart, as Megatron flags."""

# DeepSeek style: fine-grained routed experts beside one shared expert, an MoE in every layer. Megatron's default for
# initial weights, 0.02, suits hidden sizes in the thousands: with 64, training begins on a plateau and leaves it at a
# moment of chance, and runs that hardly differ end far apart.
DENSE = """
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
--normalization RMSNorm --swiglu --disable-bias-linear --ffn-hidden-size 128 --init-method-std 0.1
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64
""".split()
EXPERTS = (
    "--num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64".split()
)
ROUTING = """
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--moe-token-dispatcher-type alltoall --moe-router-dtype fp32
""".split()
MODEL = [*DENSE, *EXPERTS, *ROUTING]

# Neither Transformer Engine nor Apex is needed.
PLAIN_TORCH = """
--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-persist-layer-norm --no-rope-fusion
""".split()

SEQ_LENGTH = 128
GLOBAL_BATCH_SIZE = 8
TOKENS_PER_STEP = SEQ_LENGTH * GLOBAL_BATCH_SIZE
LOG_INTERVAL = 10
TRACED_STEPS = 9

ARMS = ("baseline", "specialized")


def validation(iterations):
    """When and how long to validate in a run of this length."""
    return f"--eval-interval {max(1, iterations // 6)} --eval-iters {min(20, 2 + iterations // 10)}".split()


def schedule(iterations, seed):
    """Optimizer, learning rate, logging and validation for a run of this length."""
    flags = f"""
    --micro-batch-size 4 --global-batch-size {GLOBAL_BATCH_SIZE} --train-iters {iterations} --seed {seed}
    --lr 5e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters {min(20, iterations // 2)}
    --weight-decay 0.01 --clip-grad 1.0 --num-workers 0
    --log-interval {LOG_INTERVAL} --tensorboard-log-interval 1 --log-timers-to-tensorboard
    """
    return [*flags.split(), *validation(iterations)]
