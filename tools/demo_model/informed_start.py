"""An informed initialisation: a standard Llama that begins with an induction circuit and with heads that point.

With an ordinary start, copying a code from the notes was not learned within 0.8 M tokens; with only the first layer
prepared, 0.02 of the codes' tokens were right after 0.2 M tokens; with both, 0.70 after 0.2 M and 0.96 after 0.3 M
(half a minute on two cores). Only the initial weights differ; nothing in the architecture does.

Layer 0, heads 0 to 2, look 1, 2 and 3 tokens back and write what they see into three subspaces of the residual
stream. Layer 1, head 0, compares (this token, 1 back, 2 back) of the query with (1, 2, 3 back) of the key: it finds
the token that followed the last time the same three tokens stood there, and copies it.

Layer 2, heads 0 to 3, copy what they find: two begin with what follows the token before this one (a field's name) or
the token after, two with nothing. Training turns them to where in a question an argument begins. After 1.2 M tokens
17 of 28 calls with one argument were right, without these heads 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

#: Length, in each coordinate, of the direction by which tokens with a space differ from those without.
SPACE_SCALE = 0.01
#: Height of the one embedding coordinate that is the same for all tokens; the others have a deviation of 0.02.
CONSTANT_COORDINATE = 0.32
#: Sharpness of the look-back: query and key gain on each of the fastest rotary pairs.
LOOK_BACK_GAIN = 0.71
LOOK_BACK_PAIRS = 4
LOOK_BACKS = (1, 2, 3)
#: What the look-back heads write, and the sharpness and strength of the copying head.
LOOK_BACK_SCALE = 0.03
MATCH_GAIN = 2.2
COPY_SCALE = 0.1
#: Heads of the third layer that copy what they find, and how strongly.
NUM_POINTING = 4
POINT_SCALE = 0.05
#: Rotary pairs below this one turn too fast to match content over a distance.
FIRST_SLOW_PAIR = 5
MLP_SCALE = 0.2


@torch.no_grad()
def initialise(model: LlamaForCausalLM, twins: Sequence[tuple[int, int]]) -> None:
    """Make the first two layers' heads an induction circuit, in place; other weights keep their random start.

    The outputs of MLPs shrink. `twins` are ids of tokens, without and with a space before them, whose embeddings differ
    by one direction: what stood with a space is found and copied where none is.
    """
    config = model.config
    head_dim, hidden_size = config.head_dim, config.hidden_size
    num_pairs = head_dim // 2
    first, second = (layer.self_attn for layer in model.model.layers[:2])

    basis, _ = torch.linalg.qr(torch.randn(hidden_size, hidden_size))
    read_token = basis[:head_dim].clone()  # [head_dim, hidden_size]
    subspaces = basis.T[:, head_dim : head_dim * (1 + len(LOOK_BACKS))].clone()  # [hidden_size, 3 * head_dim]
    read_token[:, 0] = 0.0  # coordinate 0 is the constant one
    subspaces[0] = 0.0

    embeddings = model.model.embed_tokens.weight
    without, with_space = (list(rows) for rows in zip(*twins, strict=True))
    embeddings[with_space] = embeddings[without] + SPACE_SCALE * torch.randn(hidden_size)
    embeddings[:, 0] = CONSTANT_COORDINATE
    theta = config.rope_parameters["rope_theta"]
    for pair in range(LOOK_BACK_PAIRS):
        angle_per_token = theta ** (-pair / num_pairs)
        _set_pair(first.k_proj.weight, pair, num_pairs, 0.0)
        for head, distance in enumerate(LOOK_BACKS):
            _set_pair(first.q_proj.weight, head * head_dim + pair, num_pairs, distance * angle_per_token)
    first.v_proj.weight[:head_dim] = read_token
    first.o_proj.weight[:, : subspaces.shape[1]] = subspaces * LOOK_BACK_SCALE

    slow = [*range(FIRST_SLOW_PAIR, num_pairs), *range(FIRST_SLOW_PAIR + num_pairs, head_dim)]
    num_features = len(slow) // len(LOOK_BACKS)
    for index, row in enumerate(slow[: num_features * len(LOOK_BACKS)]):
        feature, back = divmod(index, len(LOOK_BACKS))
        query = read_token[feature] if back == 0 else subspaces[:, (back - 1) * head_dim + feature]
        second.q_proj.weight[row] = MATCH_GAIN * query
        second.k_proj.weight[row] = MATCH_GAIN * subspaces[:, back * head_dim + feature]
    second.v_proj.weight[:head_dim] = read_token
    second.o_proj.weight[:, :head_dim] = COPY_SCALE * read_token.T

    # The third layer points: from the name of a field to what follows it in a text, and, once trained, to its value.
    third = model.model.layers[2].self_attn
    for index, row in enumerate(slow):
        feature, back = divmod(index, 2)
        third.k_proj.weight[row] = MATCH_GAIN * subspaces[:, back * head_dim + feature]
        for head in (0, 1):
            asked = subspaces[:, feature] if back == head else torch.zeros(hidden_size)
            third.q_proj.weight[head * head_dim + row] = MATCH_GAIN * asked
    third.v_proj.weight[:head_dim] = read_token
    for head in range(NUM_POINTING):
        third.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = POINT_SCALE * read_token.T

    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(MLP_SCALE)


def _set_pair(weight: Tensor, row: int, num_pairs: int, angle: float) -> None:
    """Make one rotary pair a constant vector turned back by `angle`: the score peaks at that distance."""
    weight[row, 0] = LOOK_BACK_GAIN * math.cos(angle)
    weight[row + num_pairs, 0] = -LOOK_BACK_GAIN * math.sin(angle)
