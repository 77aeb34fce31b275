"""Conversations to tokens, each token with its kind, proved per example.

    template    a chat template in its sandbox: messages -> text
    provenance  which characters of that text come from which message, found with sentinels and checked (pure)
    cells       that text cut into cells of one kind; the stop of each answer, learnt from the template (pure)
    behaviour   what a template does with conversations (trims, drops, refuses ...), found out by showing it a few (pure)
    tokenizer   a tokenizer folder -> the Rust tokenizer, its special tokens, its end tokens, its templates
    tokens      texts -> ids and byte spans in batches; byte spans + provenance -> one kind and turn per token
    examples    the whole way for a batch of conversations; `overlong` shortens by whole exchanges
    stage       the room's door to the store: `render` for every record as read, `rerender` for rewritten ones

Nothing here knows what will be trained: kinds are facts, loss weights are a policy over them, decided in the plan.
"""
