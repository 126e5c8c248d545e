"""The experiments: model, text, arms, seeds, and what is tested. docs/evidence/protocol.md says why."""

from dataclasses import dataclass, field

from examples.compare.arms import BASELINE, Arm, arm, baseline, control, summed
from examples.quickstart import settings

VALIDATION_LOSS = "validation_loss"
INFERENCE = "Inference: what the losses promise"
PEERS = ("z-loss", "orthogonality-variance", "erc", "router-orthogonality")
OURS = ("both", "mass", "pathway", "specialization")

LARGER = """
--hidden-size 128 --ffn-hidden-size 256 --moe-ffn-hidden-size 128 --moe-shared-expert-intermediate-size 128
--moe-router-topk 4
""".split()

EXPERTS = [*"--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 128".split(), *settings.ROUTING]
CLUSTERED = (
    """--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --moe-ffn-hidden-size 32""".split()
)

GPU_MODEL = """
--num-layers 12 --hidden-size 768 --num-attention-heads 12 --group-query-attention --num-query-groups 4
--seq-length 512 --max-position-embeddings 512 --position-embedding-type rope
--normalization RMSNorm --swiglu --disable-bias-linear --ffn-hidden-size 2048
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64
--num-experts 32 --moe-router-topk 4 --moe-ffn-hidden-size 512 --moe-shared-expert-intermediate-size 512
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--moe-token-dispatcher-type alltoall --moe-router-dtype fp32 --bf16
""".split()

# Last ones count: any experiment with these is over in seconds.
TINY_ITERATIONS = 4
TINY = f"""
--num-layers 2 --hidden-size 16 --num-attention-heads 2 --num-query-groups 1 --ffn-hidden-size 16 --micro-batch-size 2
--global-batch-size 2 --train-iters {TINY_ITERATIONS} --lr-warmup-iters 1 --log-interval 2
""".split()
TINY_EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 16".split()


@dataclass(frozen=True)
class Hypothesis:
    """That an arm differs from another one in a measure; two-sided."""

    arm: str
    measure: str = VALIDATION_LOSS
    against: str = BASELINE


@dataclass(frozen=True)
class Experiment:
    """What is trained, and what is asked of it.

    Attributes:
        title: of its report.
        shape: of the model, for readers.
        model: Megatron's flags.
        arms: in groups; all seeds of a group run before those of the next.
        corpus: a name in ``data.CORPORA``.
        families: title -> the hypotheses that are corrected together.
        fewer: experts a token to evaluate with, beside the trained number.
        bound: on the validation loss, which an arm may exceed the baseline's by where it gains in inference.
        iterations, batch_size, learning_rate, warmup: of the training.
        seeds: of every arm.
    """

    title: str
    shape: str
    model: list
    arms: tuple
    corpus: str
    families: dict = field(default_factory=dict)
    fewer: tuple = ()
    bound: float = 0.01
    iterations: int = 450
    batch_size: int = 8
    learning_rate: float = 5e-3
    warmup: int = 20
    seeds: tuple = tuple(range(101, 113))

    @property
    def all_arms(self) -> list:
        return [one for group in self.arms for one in group]

    def flags(self, seed) -> list:
        """All of a run but its arm."""
        schedule = f"""
        --micro-batch-size {self.batch_size} --global-batch-size {self.batch_size}
        --train-iters {self.iterations} --seed {seed}
        --lr {self.learning_rate:g} --min-lr {self.learning_rate / 10:g} --lr-decay-style cosine
        --lr-warmup-iters {self.warmup} --weight-decay 0.01 --clip-grad 1.0 --num-workers 0
        --log-interval {min(50, self.iterations)} --tensorboard-log-interval 1 --log-timers-to-tensorboard
        --eval-interval {self.iterations + 1} --eval-iters 1
        """
        return [*self.model, *schedule.split()]


def at(scale: int, *losses) -> tuple:
    return tuple(arm(loss, scale) for loss in losses)


def hypotheses(arms, measure=VALIDATION_LOSS) -> tuple:
    return tuple(Hypothesis(one.name, measure) for one in arms)


text = Experiment(
    title="Text, the quickstart's model",
    shape="4 layers, hidden size 64, 16 routed experts of width 64 of which 2 serve a token, and a shared one",
    model=settings.MODEL,
    corpus="stdlib",
    arms=(
        (baseline, control, *at(10, *OURS)),
        (*at(1, *OURS), summed(10, top_k=2)),
        (*at(10, *PEERS), *at(1, *PEERS)),
    ),
    families={
        "Primary: both losses, and each alone, at ten times the paper's coefficients": hypotheses(at(10, *OURS)),
        "Secondary: the paper's coefficients, the summed reading, and other losses": hypotheses(
            (*at(1, *OURS), summed(10, 2), *at(10, *PEERS), *at(1, *PEERS))
        ),
        "Decisive routing: one expert of two costs less": tuple(
            Hypothesis(name, "cost_of_1_experts") for name in ("mass-10x", "both-10x")
        ),
    },
    fewer=(1,),
)

domains = Experiment(
    title="Text of eight domains, a larger model",
    shape="4 layers, hidden size 128, 16 routed experts of width 128 of which 4 serve a token, and a shared one",
    model=[*settings.MODEL, *LARGER],
    corpus="domains",
    arms=(
        (baseline, control, *at(10, *OURS)),
        (summed(10, top_k=4), *at(10, *PEERS)),
    ),
    families={
        "Primary: both losses, and each alone, at ten times the paper's coefficients": hypotheses(at(10, *OURS)),
        "Secondary: the summed reading, and other losses": hypotheses((summed(10, 4), *at(10, *PEERS))),
        INFERENCE: (
            Hypothesis("pathway-10x", "next_layer_hits"),
            Hypothesis("pathway-10x", "lru_hits"),
            Hypothesis("mass-10x", "cost_of_1_experts"),
            Hypothesis("mass-10x", "cost_of_2_experts"),
            Hypothesis("both-10x", "cost_of_2_experts"),
            Hypothesis("both-10x", "domain_information"),
        ),
    },
    fewer=(3, 2, 1),
    iterations=300,
)

NOISES = (0, 0.01, 0.1)
UPCYCLED = ("specialization", "mass", "both")


def upcycled(one: Arm, noise: float) -> Arm:
    flags = (*EXPERTS, f"--upcycle-noise={noise:g}", *one.flags)
    return Arm(f"{one.name}-noise-{noise:g}", f"{one.title}, noise {noise:g}", flags, start="dense")


upcycling = Experiment(
    title="Upcycling: experts that start as copies of a dense model",
    shape="4 layers, hidden size 64, 8 experts of width 128 of which 2 serve a token",
    model=settings.DENSE,
    corpus="stdlib",
    arms=(
        (Arm("dense", "the dense model to start from"),),
        tuple(upcycled(one, noise) for noise in NOISES for one in (baseline, *at(10, *UPCYCLED))),
    ),
    families={
        "Primary: specialization does less to copies without noise": (
            Hypothesis("specialization-10x-noise-0", "mean_abs_cos", "specialization-10x-noise-0.1"),
            Hypothesis("specialization-10x-noise-0.01", "mean_abs_cos", "specialization-10x-noise-0.1"),
        ),
        "Validation loss: each loss at each noise": tuple(
            Hypothesis(upcycled(one, noise).name, against=upcycled(baseline, noise).name)
            for noise in NOISES
            for one in at(10, *UPCYCLED)
        ),
    },
    iterations=300,
    seeds=tuple(range(101, 107)),
)

clusters = Experiment(
    title="Latent clusters: sequences of eight Markov chains",
    shape="2 layers, hidden size 32, 8 experts of width 32 of which 2 serve a token",
    model=[*settings.DENSE, *EXPERTS, *CLUSTERED],
    corpus="dialects",
    arms=((baseline, control, *at(10, *OURS), *at(10, *PEERS)),),
    families={
        "Primary: tokens whose likeliest expert is that of their cluster": hypotheses(
            at(10, *OURS, *PEERS), "matched_tokens"
        ),
        "Validation loss": hypotheses(at(10, *OURS, *PEERS)),
    },
    iterations=400,
    batch_size=16,
    seeds=tuple(range(101, 111)),
)

gpu = Experiment(
    title="A model of 90 million active parameters, on a GPU",
    shape="12 layers, hidden size 768, 32 routed experts of width 512 of which 4 serve a token, and a shared one",
    model=GPU_MODEL,
    corpus="domains",
    arms=((baseline, *at(10, "both"), *at(1, "both")),),
    families={"Primary: both losses": hypotheses((*at(10, "both"), *at(1, "both")))},
    fewer=(3, 2, 1),
    iterations=1000,
    batch_size=32,
    learning_rate=6e-4,
    warmup=100,
)

EXPERIMENTS = {"text": text, "domains": domains, "upcycling": upcycling, "clusters": clusters, "gpu": gpu}
