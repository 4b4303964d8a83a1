"""A batch of tokens in, next tokens out: model, paged attention, scheduler, sampler, and the worker around them."""
