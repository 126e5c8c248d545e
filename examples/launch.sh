# Shared by the scripts beside it, which source it: turns a config into a torchrun command, and runs or prints it.
#
#   launch PREFIX... -- CONFIG [--dry-run] [--cpu] [MEGATRON'S FLAGS...]
#
# PREFIX is what comes before `-m megatron_moe_spec.launch`. Flags given last override the config's. Settings, as
# environment variables:
#   DATA_PATH              prefix of the tokenized data; without it, Megatron's mock data
#   TOKENIZER              Hugging Face name or folder of its tokenizer; without it, numbers for tokens
#   OUTPUT                 folder of checkpoints and logs (default: build/<name of the config>)
#   SPECIALIZATION_COEFF   default 2e-3, the paper's number; its units: docs/guide.md
#   COUPLING_COEFF         default 1e-3, the paper's
#   SCRIPT                 the pretraining script (default: pretrain_gpt.py beside this file)
#   PYTHON                 the interpreter (default: python)
set -euo pipefail

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

launch() {
    local -a prefix=() flags=() command=()
    local config dry_run="" cpu="" arguments argument
    while [ "$1" != -- ]; do prefix+=("$1"); shift; done
    shift
    case ${1:-} in "" | -*)
        echo "usage: $0 CONFIG.yaml [--dry-run] [--cpu] [Megatron's flags ...]" >&2
        exit 2
        ;;
    esac
    config=$1
    shift
    for argument in "$@"; do
        case $argument in
            --dry-run) dry_run=yes ;;
            --cpu) cpu=--cpu ;;
            *) flags+=("$argument") ;;
        esac
    done
    arguments=$("${PYTHON:-python}" "$examples/model_args.py" "$config")
    local -a model=()
    mapfile -t model <<<"$arguments"
    local output=${OUTPUT:-build/$(basename "$config" .yaml)}

    command=("${prefix[@]}" -m megatron_moe_spec.launch)
    [ -z "$cpu" ] || command+=("$cpu")
    command+=("${SCRIPT:-$examples/pretrain_gpt.py}" "${model[@]}")
    if [ -n "$cpu" ]; then
        command+=(--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion)
        command+=(--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion)
    fi
    if [ -n "${DATA_PATH:-}" ]; then
        command+=(--data-path "$DATA_PATH" --data-cache-path "$output/cache" --split 98,1,1)
    else
        command+=(--mock-data)
    fi
    if [ -n "${TOKENIZER:-}" ]; then
        command+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
    else
        command+=(--tokenizer-type NullTokenizer)
    fi
    # A run that was cut off goes on from its last checkpoint.
    command+=(--load "$output" --save "$output" --save-interval 1000 --tensorboard-dir "$output/tensorboard")
    command+=(--moe-specialization-loss-coeff "${SPECIALIZATION_COEFF:-2e-3}")
    command+=(--moe-coupling-loss-coeff "${COUPLING_COEFF:-1e-3}")
    command+=(${flags[@]+"${flags[@]}"})
    if [ -n "$dry_run" ]; then
        printf '%q ' "${command[@]}"
        echo
    else
        exec "${command[@]}"
    fi
}
