"""Writes a Llama of a given shape with random weights: `make_llama.py DIRECTORY '{"hidden_size": ...}'`."""

from __future__ import annotations

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

directory, shape = sys.argv[1:]
torch.manual_seed(0)
config = LlamaConfig(**json.loads(shape), max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
