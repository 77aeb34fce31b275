"""Sources: from files to conversations, and the one split.

    read.py    finds and opens files (globs, URLs, .gz, .zst) and cuts them into raw records, a block at a time
    scan.py    byte blocks to lines, byte blocks of a JSON array to its elements; parse.py: one line to one object, strictly
    shapes.py  one object to turns (chat.py for lists of messages); detect.py decides the shape of a file from a sample
    bulk.py    many ordinary objects to columns of texts at once; whatever is not ordinary goes singly through shapes.py, chat.py
    gather.py  the loop: raw record -> turns + labels + keys, or a line in dropped.parquet with the reason (reasons.py)
    split.py   held out or not, by hash of the normalised first request; stage.py is the door to the store

Memory is bounded by a block and a row group, whatever the size of a file. Nothing in a record is edited: what cannot be
kept as it is, is set aside with file, line and reason, and the rest goes on.
"""
