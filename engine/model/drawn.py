"""Models whose weights are drawn, not read: for measurements, which ask for a shape and not for words."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from messages.errors import ConfigError, first_line


def draw_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
    """Return a decoder of that configuration, on `device`, with weights as its family begins training with.

    They are drawn where they lie: nothing of the model's size is read, written or copied. The same seed gives the same
    weights on the same kind of device; torch's own generators are left as they were.

    Raises:
        ConfigError: transformers cannot make such a model, or there is too little memory for it.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.device(device):
            torch.manual_seed(seed)
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # torch's out of memory is a RuntimeError
        raise ConfigError(f"no {config.model_type} can be drawn on {device}: {first_line(error)}") from error
    return model.eval()
