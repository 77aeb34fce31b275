"""The loop: what the plan promised is exactly what the optimizer sees, after any interruption.

    schedule   step -> learning rate                                     (pure)
    batching   rows of a step over devices and passes, solved and refused    (pure)
    remarks    learning rates: defaults by mode and the usual ranges         (pure)
    micro      Batch -> forward passes without padding; tallies by task, source and kind, from one pass (pure)
    step       one Batch -> its gradient, in any number of passes; what is not finite is named
    prepare    the model with its adapter or its frozen parts; what can be refused before it is loaded
    fitting    how many rows of a pass fit into memory
    optimizer  float32 weights and gradients behind whatever precision the model runs in; clipping
    choice     AdamW or any other torch optimizer, over groups with rates of their own
    memory     what such an optimizer remembers as named tensors, and back
    state      checkpoints that are whole or not there, and the one to resume from
    log        steps.parquet, events.jsonl, evals.parquet, samples.parquet
    trackers   TensorBoard and W&B behind one protocol
    loop       one step after another, the clock, measuring, early stopping, Ctrl-C
    stage      the door to the store: loads the model, runs the loop, leaves a folder plain peft can load

A step's gradient is sum_i w_i * grad nll_i / W, and W is known from the plan before the first forward pass: so it does
not matter how the rows are cut into passes. Where the run is, is one number: `Batches` is a pure sequence of steps.
"""
