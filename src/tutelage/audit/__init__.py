"""Audit: is what training will see worth training on?

    tokens      kinds, turns and weights of whole sets -> faults per example, a million tokens at a time
    texts       columns of the records as read -> system turns, unfinished answers, copies
    findings    the catalogue: what each finding means and what to do; counts and thresholds -> error, warning or note
    stage       the box `audit`: measures every planned example, writes audit.json and findings.parquet

The box measures and knows no threshold; the gate judges. So a changed threshold costs nothing.
"""
