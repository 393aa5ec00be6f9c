"""Memory that is computed by formula: activations, the loss, vLLM, the refit. docs/plan.md has the sources.

Plain arithmetic on sizes. All results are bytes on one rank unless a name says otherwise.
"""

from dataclasses import dataclass
from math import prod

from megatron_opsd.config import Config, ParallelConfig
from megatron_opsd.data.prompts import context_tokens
from megatron_opsd.weights.architecture import Architecture
from megatron_opsd.weights.tables import FAMILIES

GIB = 2**30
ELEMENT = {"bfloat16": 2, "float32": 4}

CHAT_TOKENS = 64  # for what a chat template adds around a turn, an empty think block and preflight's seam
VLLM_BATCHED_TOKENS = 16384  # vLLM's max_num_batched_tokens on a GPU of 70 GiB or more; 8192 on smaller ones
SAMPLER_BYTES = 20  # per sequence and vocabulary entry: float32 logits, probabilities, sorted logits; int64 order
CUDA_GRAPHS = 1 * GIB  # assumed for vLLM without enforce_eager
RESERVED = 3 * GIB  # assumed for CUDA's context, NCCL's buffers, cuBLAS workspaces and fragmentation


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest sequences that the configuration allows, padded as in a batch.

    student, teacher: a micro-batch's tokens, divided by train.micro_batch_size. rollout: prompt and response.
    """

    student: int
    teacher: int
    rollout: int


def longest_sequences(config: Config) -> Lengths:
    """Upper bounds that need no tokenizer: byte-level BPE makes at most one token from each byte of the templates."""
    prompts, data, layout = config.prompts, config.data, config.parallel
    multiple = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    response, written = config.longest_response, config.rollout.max_response_tokens
    alone = len(prompts.student_template.encode()) + CHAT_TOKENS + data.max_problem_tokens
    student, longest, teacher = alone + response, alone + written, 0
    if config.method.writes_in_sight:
        shown = len(prompts.teacher_template.encode()) + CHAT_TOKENS + data.max_problem_tokens
        longest = max(longest, shown + data.max_solution_tokens + written)
    if config.teacher_kind:
        templates = {"solution": prompts.teacher_template, "answer": prompts.answer_template}
        if template := templates.get(config.method.teacher_sees):
            words = len(template.encode()) + len((prompts.teacher_prefix or "").encode()) + CHAT_TOKENS
            teacher = words + data.max_problem_tokens + context_tokens(config) + response
        else:
            teacher = student
    if config.train.packing and teacher:  # a row has room for the longest sequence of either side
        student = teacher = max(student, teacher)
    student, teacher = (-(-length // multiple) * multiple for length in (student, teacher))
    return Lengths(student, teacher, longest)


def layer_saved(arch: Architecture, layout: ParallelConfig, dtype: str, tokens: int) -> int:
    """What autograd keeps of one layer for ``tokens`` = s·b tokens, without recompute.

    After Korthikanti et al. 2022 (arXiv 2205.05198, section 4), counted again for this layer. Attention keeps its
    output and one log-sum-exp per head instead of the matrix. There are grouped queries, SwiGLU, fused norms and no
    dropout. Sequence parallelism splits the inputs of the linear layers.
    """
    e, tp = ELEMENT[dtype], layout.tensor_model_parallel_size
    split = tp if layout.sequence_parallel else 1
    h, heads, groups, d = arch.hidden_size, arch.num_attention_heads, arch.num_query_groups, arch.kv_channels
    norms = 2 * 2 * h / split  # two norms' inputs and outputs, which are the linear layers' inputs
    # The QKV product (values are a view of it), queries and keys after the rotary embedding, and the output.
    attention = ((heads + 2 * groups) + (heads + groups) + heads) * d / tp
    if arch.has("self_attention.q_layernorm.weight") and groups > tp:
        attention += heads * d / tp  # the norm's input: the queries of several groups, copied from the QKV product
    rotary = 4 * d  # cosines and sines, for queries and for keys, on every rank
    total = e * (norms + attention + rotary) + 4 * heads / tp
    if arch.moe is None:
        # Gate and up in one product, silu(gate), a copy of up, and silu(gate)·up, which is the last matrix's input.
        return round(tokens * (total + e * 5 * arch.ffn_hidden_size / tp))
    k, m = arch.moe.moe_router_topk, arch.moe.moe_ffn_hidden_size
    router = 5 * arch.moe.num_moe_experts + 24 * k  # float32 softmax and routing map; chosen indices, probabilities
    # For each of a token's k copies, spread evenly over ranks: the same, plus the product before the router's
    # probability scales it, plus the experts' input. Experts are not split by tensor parallelism.
    return round(tokens * (total + (router + k * e * (h + 6 * m)) / split))


def layer_temporaries(arch: Architecture, layout: ParallelConfig, dtype: str, tokens: int) -> int:
    """Gradients that exist at once while a layer's backward pass is in its MLP, the widest part."""
    tp = layout.tensor_model_parallel_size
    split = tp if layout.sequence_parallel else 1
    widest = 4 * arch.ffn_hidden_size / tp
    if arch.moe is not None:
        widest = arch.moe.moe_router_topk * (arch.hidden_size + 4 * arch.moe.moe_ffn_hidden_size) / split
    return round(tokens * ELEMENT[dtype] * (2 * arch.hidden_size + widest))


def boundary(arch: Architecture, layout: ParallelConfig, dtype: str, tokens: int) -> int:
    """Hidden states between two layers."""
    split = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    return ELEMENT[dtype] * tokens * arch.hidden_size // split


def student_activations(
    config: Config, arch: Architecture, layers: int, stage: int, tokens: int, microbatches: int
) -> dict[str, int]:
    """What one stage keeps for its micro-batches in flight, and what one layer's backward pass adds.

    Under 1F1B stage i of P holds at most P - i micro-batches. For each it also keeps the stage's output.
    """
    layout, dtype = config.parallel, config.model.dtype
    in_flight = min(layout.pipeline_model_parallel_size - stage, microbatches)
    layer, between = layer_saved(arch, layout, dtype, tokens), boundary(arch, layout, dtype, tokens)
    temporaries = layer_temporaries(arch, layout, dtype, tokens)
    if config.model.recompute == "full":
        return {"activations": in_flight * (layers + 1) * between, "one layer's backward": layer + temporaries}
    return {"activations": in_flight * (layers * layer + between), "one layer's backward": temporaries}


def teacher_activations(config: Config, arch: Architecture, tokens: int) -> int:
    """Without gradients one layer's tensors exist at a time. What autograd would keep of the layer is a bound."""
    layout, dtype = config.parallel, config.model.dtype
    return layer_saved(arch, layout, dtype, tokens) + 2 * ELEMENT[dtype] * tokens * arch.hidden_size


def loss(config: Config, arch: Architecture, tokens: int, response: int) -> dict[str, int]:
    """The last stage's loss for s·b ``tokens`` of which ``response`` are trained on.

    It counts a chunk's logits of both sides in float32 and their gradient (bfloat16; that of float32 models overwrites
    the logits), the head's gradient in float32, and hidden states, whole and selected, with the gradients of both.
    """
    e, h = ELEMENT[config.model.dtype], arch.hidden_size
    tp = config.parallel.tensor_model_parallel_size
    width = arch.padded_vocab_size(tp) // tp
    chunk = min(config.objective.chunk_size, response)
    return {
        "loss: logits": chunk * width * (4 + 4 + (e if e == 2 else 0)),
        "loss: head gradient": 4 * width * h,
        "loss: hidden states": e * h * 2 * (tokens + response),
    }


def vllm_weights(config: Config, arch: Architecture) -> int:
    """Weights on one of vLLM's ranks. vLLM shards heads, MLPs and the vocabulary, and replicates key-value heads."""
    tp, moe = config.rollout.tensor_model_parallel_size, arch.moe
    split = {
        "v": -(-arch.vocab_size // 64) * 64 / tp,
        "q": arch.num_attention_heads * arch.kv_channels / tp,
        "k": max(1, arch.num_query_groups // tp) * arch.kv_channels,
        "f": arch.ffn_hidden_size / tp,
        "m": moe.moe_ffn_hidden_size / tp if moe else 0,
    }
    whole = {"h": arch.hidden_size, "d": arch.kv_channels, "e": moe.num_moe_experts if moe else 0}
    sizes, total = split | whole, 0.0
    for row in FAMILIES[arch.family]:
        if row.megatron == "output_layer.weight" and arch.share_embeddings_and_output_weights:
            continue
        copies = (arch.num_layers if "{layer}" in row.megatron else 1) * (
            whole["e"] if "{expert}" in row.megatron else 1
        )
        total += copies * sum(prod(sizes[letter] for letter in shape) for shape in row.hf.values())
    return round(total) * ELEMENT[config.model.dtype]


def vllm_activations(config: Config, arch: Architecture) -> int:
    """vLLM's largest forward pass, its sampler and its CUDA graphs; gpu_memory_utilization includes them."""
    rollout = config.rollout
    layout = ParallelConfig(tensor_model_parallel_size=rollout.tensor_model_parallel_size)
    if arch.moe is None:
        forward = layer_temporaries(arch, layout, config.model.dtype, VLLM_BATCHED_TOKENS)
    else:  # in vLLM tensor parallelism also splits the experts
        per_copy = arch.hidden_size + 3 * arch.moe.moe_ffn_hidden_size / rollout.tensor_model_parallel_size
        per_token = 2 * arch.hidden_size + arch.moe.moe_router_topk * per_copy
        forward = round(VLLM_BATCHED_TOKENS * ELEMENT[config.model.dtype] * per_token)
    sampler = rollout.max_num_seqs * arch.vocab_size * SAMPLER_BYTES
    return forward + sampler + (0 if rollout.enforce_eager else CUDA_GRAPHS)


def kv_bytes_per_token(config: Config, arch: Architecture) -> int:
    """Bytes of one token's keys and values in all layers, on one of vLLM's ranks."""
    groups = max(1, arch.num_query_groups // config.rollout.tensor_model_parallel_size)
    return 2 * arch.num_layers * groups * arch.kv_channels * ELEMENT[config.model.dtype]


def refit_staging(config: Config, arch: Architecture) -> int:
    """A gathered bucket, this rank's part of it, one assembled tensor, and what vLLM keeps of a layer's experts.

    A tensor larger than a bucket gets its own bucket. vLLM keeps incoming tensors until a module is complete, and all
    experts of a layer are one module.
    """
    e, layout, h = ELEMENT[config.model.dtype], config.parallel, arch.hidden_size
    tp = layout.tensor_model_parallel_size
    largest = e * h * max(arch.padded_vocab_size(tp), 0 if arch.moe else 2 * arch.ffn_hidden_size)
    bucket = max(int(config.rollout.refit_bucket_mib * 2**20), largest)
    experts = 3 * e * h * arch.moe.moe_ffn_hidden_size * arch.moe.num_moe_experts if arch.moe else 0
    return bucket + bucket // tp + largest + experts
