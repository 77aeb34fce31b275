"""How good the model is on records that it was never trained on.

    held_out  which records are measured (a seeded subset per task), and which of their tokens count     (no torch)
    stats     sums of nll per record -> means and changes with 95 % intervals                            (pure)
    samples   fixed prompts cut from held-out records, and what the model answers
    measure   a model -> nll per record and samples, leaving the model as it was; training calls it too
    stage     the boxes `held_out` and `measure` (before and after) of the pipeline

What counts is what the model must produce: answers, reasoning, tool calls and their stops, whatever the training loss was,
so that recipes with different losses are compared on the same tokens.
"""
