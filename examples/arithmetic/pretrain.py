"""Make the tiny Qwen3 that the example starts from: `python examples/arithmetic/pretrain.py --out DIR`.

Half of the demonstrations show the problem alone and are sloppy: carries get forgotten. The other half also show the
reference solution, in the teacher's prompt, and are right. The model learns both habits, so it can add, and mostly
does not unless it sees the solution: the gap between student and teacher that self-distillation closes.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from problems import Addition, as_example, draw, draw_distinct, work_out
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_opsd.data.grading import is_correct
from megatron_opsd.data.prompts import STUDENT_TEMPLATE, TEACHER_TEMPLATE, PromptBuilder, fill
from megatron_opsd.types import Example

VOCAB_SIZE = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
PAD_ID, EOS_ID = SPECIAL_TOKENS.index("<|endoftext|>"), SPECIAL_TOKENS.index("<|im_end|>")

# ChatML as Qwen3 speaks it: with thinking off, the assistant's turn opens with an empty think block.
CHAT_TEMPLATE = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".strip()

Render = Callable[[Example], list[int]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the prompts and solutions of this task; every digit stays a token of its own."""
    examples = [as_example(problem) for problem in draw_distinct(300, seed=0, held_out=False)]
    corpus = [
        fill(template, {"problem": example.problem, "solution": example.solution})
        for template in (STUDENT_TEMPLATE, TEACHER_TEMPLATE)
        for example in examples
    ]
    corpus += ["user\n", "assistant\n", "system\n"] * 50
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 32768
    return tokenizer


def build_model() -> Qwen3ForCausalLM:
    """Build the tiny Qwen3 in float32 with random weights."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config)


def demonstration_loss(model: Qwen3ForCausalLM, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy over the responses of (prompt ids, response ids) pairs; the prompts carry no loss."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.full((len(pairs), longest), PAD_ID)  # [b, s], padded on the right
    labels = torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def pretrain(model: Qwen3ForCausalLM, prompts: PromptBuilder, args: argparse.Namespace) -> None:
    """Train on demonstrations, half sloppy without the solution, half right with it."""
    tokenizer = prompts.tokenizer
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def demonstrate(problem: Addition, render: Render, slip: float) -> tuple[list[int], list[int]]:
        response = tokenizer.encode(work_out(problem, rng, slip), add_special_tokens=False)
        return render(as_example(problem)), [*response, EOS_ID]

    def batch_of(count: int, render: Render, slip: float) -> list[tuple[list[int], list[int]]]:
        return [demonstrate(draw(rng, held_out=False), render, slip) for _ in range(count)]

    started = time.monotonic()
    for step in range(1, args.steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / args.warmup) * (0.1 + 0.9 * cosine)
        model.train()
        # Prompts differ in length between the halves: two passes waste no work on padding.
        halves = ((prompts.student, args.slip), (prompts.teacher, 0.0))
        loss = torch.zeros(())
        for render, slip in halves:
            half = demonstration_loss(model, batch_of(args.batch_size // 2, render, slip)) / 2
            half.backward()
            loss += half.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a Hugging Face directory that transformers 4 and 5 both load."""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # transformers makes it readable by its owner alone
    tokenizer.save_pretrained(out)
    # transformers 5 writes its new name of this class, which transformers 4 does not know; both know the old one.
    path = out / "tokenizer_config.json"
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, render: Render, count: int, *, sample: bool = False
) -> float:
    """Share of `count` held-out problems answered right, greedily or sampled at temperature 1."""
    model.eval()
    examples = [as_example(problem) for problem in draw_distinct(count, seed=0, held_out=True)]
    solved = 0
    for start in range(0, count, 100):
        some = examples[start : start + 100]
        inputs = tokenizer.pad(
            {"input_ids": [render(example) for example in some]}, padding_side="left", return_tensors="pt"
        )
        # top_k=0 switches transformers' default of 50 off: sampling is from the whole distribution.
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]  # a mixin that transformers types loosely
            **inputs, max_new_tokens=48, do_sample=sample, top_k=0 if sample else None
        )
        responses = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        solved += sum(is_correct(text, str(ex.answer), "exact") for text, ex in zip(responses, some, strict=True))
    return solved / count


def main() -> None:
    """Pretrain, save as a Hugging Face directory, and measure what was saved."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny Qwen3 of the arithmetic example.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the Hugging Face checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--slip", type=float, default=0.7, help="chance that a sloppy demonstration forgets a carry")
    parser.add_argument("--test", type=int, default=500, help="held-out problems to measure on")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the order of summation, and so the weights, must not depend on the number of cores
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model()
    pretrain(model, PromptBuilder(tokenizer, teacher_thinking=False), args)
    save(model, tokenizer, args.out)

    saved = AutoTokenizer.from_pretrained(args.out)
    prompts = PromptBuilder(saved, teacher_thinking=False)
    for label, render, sample in (
        ("alone, greedy", prompts.student, False),
        ("alone, sampled at temperature 1", prompts.student, True),
        ("shown the solution, greedy", prompts.teacher, False),
    ):
        print(f"{label}: {accuracy(model, saved, render, args.test, sample=sample):.1%} right", flush=True)


if __name__ == "__main__":
    main()
