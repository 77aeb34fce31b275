"""The report and the terminal: what happened, shown the same way on both.

    artefacts --fates, gather--> ReportData --tables, verdict, look, charts, flow--> page, card, summary, screen

`data` holds the facts, frozen and plain. `tables` turns facts into typed tables and is the only place where numbers become
text, `verdict` puts them into a sentence that claims no more than was measured, `look` turns one rendered example into
coloured runs: all pure, and the same for the page and the terminal. `charts` (Altair, offline) and `flow` draw SVG. `page`
(with page.html.j2, page.css, page.js) and `card` put it together; `screen` prints; `stage` is the door to the store.
"""
