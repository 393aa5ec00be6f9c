"""The objective alone, on two Hugging Face models: no Megatron, no vLLM, no configuration.

python examples/objective/two_models.py STUDENT TEACHER "a text"     # models with one vocabulary; prints what changes
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opsd.objective import Divergence, linear_divergence

student_path, teacher_path, text = sys.argv[1:]
student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (student_path, teacher_path))
ids = AutoTokenizer.from_pretrained(student_path)(text, return_tensors="pt").input_ids  # [1, s]
spec = Divergence("forward_kl", clip=0.05, clip_mode="saturate")
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
for step in range(5):
    hidden = student.model(ids).last_hidden_state[0]  # [s, h]
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state[0]
    loss, out = linear_divergence(
        hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, torch.ones(len(hidden)) / len(hidden),
        spec, vocab_size=student.config.vocab_size, tp_group=None,
    )  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: divergence {out.unclipped.mean():.6f}, same first choice {out.agree.mean():.2f}")
