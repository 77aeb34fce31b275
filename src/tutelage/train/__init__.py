"""The loop: what the plan promised is exactly what the optimizer sees, after any interruption.

    schedule   step -> learning rate                                     (pure)
    micro      Batch -> forward passes without padding; tallies by task, source and kind, from one pass (pure)
    step       one Batch -> its gradient, in any number of passes; what is not finite is named
    optimizer  float32 weights and gradients behind whatever precision the model runs in; clipping, AdamW
    state      checkpoints that are whole or not there, and the one to resume from
    log        steps.parquet, events.jsonl, evals.parquet, samples.parquet
    trackers   TensorBoard and W&B behind one protocol
    loop       one step after another, the clock, measuring, early stopping, Ctrl-C
    stage      the door to the store: loads the model, runs the loop, leaves a folder plain peft can load

A step's gradient is sum_i w_i * grad nll_i / W, and W is known from the plan before the first forward pass: so it does
not matter how the rows are cut into passes. Where the run is, is one number: `Batches` is a pure sequence of steps.
"""
