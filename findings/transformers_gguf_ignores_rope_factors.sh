#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0 and torch 2.13.0, CPU build.
#
# Llama 3.1 and later scale rotary frequencies (rope_type "llama3"). llama.cpp's converter writes that into a GGUF file
# as a tensor of factors, rope_freqs.weight, and no setting. from_pretrained(gguf_file=...) loads such a file without a
# word and leaves the tensor out: the configuration says "default", and the model computes other positions than the
# original, by more the longer the context. Two files that differ in nothing but that tensor give the same logits.
#
# Seen:
#   rope_type: default
#   frequencies are those without factors: True
#   largest difference of logits at 4,096 tokens, with and without the tensor: 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cat > "$work/run.py" <<'P'
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
HIDDEN, INNER, HEADS, HEAD_DIM, VOCAB, BASE = 64, 128, 2, 32, 64, 500_000.0


def write(path, factors):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN), "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,),
        **{f"blk.0.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


work = sys.argv[1]
# As for Llama 3.1: the fast half turns as it did, the slow half eight times slower.
factors = np.where(np.arange(HEAD_DIM // 2) < HEAD_DIM // 4, 1.0, 8.0).astype(np.float32)
logits = []
for name, tensor in (("plain.gguf", None), ("scaled.gguf", factors)):
    write(f"{work}/{name}", tensor)
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=name, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits.append(model(torch.arange(4096).remainder(VOCAB)[None]).logits[0, -1])
plain = BASE ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
rope_type = model.config.rope_parameters["rope_type"]
is_plain = torch.allclose(model.model.rotary_emb.inv_freq, plain)
difference = float((logits[0] - logits[1]).abs().max())
print(f"rope_type: {rope_type}")
print(f"frequencies are those without factors: {is_plain}")
print(f"largest difference of logits at 4,096 tokens, with and without the tensor: {difference}")
assert rope_type == "default" and is_plain and difference == 0.0
P
"$work/venv/bin/python" "$work/run.py" "$work"
