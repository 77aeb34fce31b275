"""Plan: what the model will see, in which order, in which row of which step, and how much each token counts.

    rules      sizes and rates -> weights, in groups; pour divides an amount by them between floors and caps
    rates      supplies, weights and a budget -> exact integer counts per task; remarks says what happened to whom
    mixtures   the same for rates that change: schedule -> timetable of counts per stretch; online decides while training
    order      position -> (task, pass, example), computable anywhere, the mixture kept in every prefix
    weights    kinds and turns -> loss weight per token, and the one shift to next-token targets
    fit        lengths -> rows, best-fit decreasing; windows cuts rows into steps, 100 at a time
    assemble   joins these into a `Plan` (pure); stage joins it with verdicts and writes it to the store
    batch      a finished plan -> `Batches[step]`: NumPy arrays, no step depending on another

Nothing is drawn at random while training runs: the plan is data, and can be read before it is paid for. Only an
online mixture decides on the way: by rule, on record, and the same after a resume.
"""
