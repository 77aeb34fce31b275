"""Cleaning: what is said of a record, never what is done to the text as read.

    rules.py         pure: bounds, repeated sentences, refusals   -> Verdict (keep=False drops, keep=True only flags)
    boilerplate.py   pure: preambles and closings                 -> Rewrite (before, after), a slice of the text
    near.py          pure: equal and near-equal records           -> which record each is a copy of
    copies.py        pure: who wins among copies, and leaks       -> Verdict
    stage.py         the room's door to the store: rewrite, screen, copies

Rewrites come first, so every verdict judges the text that will be trained;
the plan joins verdicts, so a new bound renders nothing.
"""
