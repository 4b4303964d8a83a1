"""What the engine alone does, in this process, without Ray and HTTP: `kvray bench engine`.

shapes   models to draw, by name             work      bytes and operations that a model's tokens take: pure
machine  what the device can do at best      batch     prompts that are all there at once, and what came of them: pure
steps    times of steps, host and device     figures   what is told of a repeat: pure
ours     the engine                          theirs    transformers' continuous batching
running  repeats of both in turn             report    JSON and the table
"""
