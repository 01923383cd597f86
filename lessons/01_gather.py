"""Exercise 1: log-probabilities by hand. 30 minutes.

A model reads T token ids, [prompt | response], and gives logits (T, V). Those at position t predict
token t + 1. From them `response_logp` computes log π(y|x), the log-probability of the whole response
in nats. `pair_logps` does this for many pairs at once, padded to one length.

1. Write `response_logp`. Which positions predict a token of the response? Which one predicts its
   first token? Which predict nothing that is there?
2. Write `pair_logps`, without a loop over tokens. Pad on the right. `sso.pair_logps` is the same
   for several pairs an example: look at it only when the tests are green.

Hand in: this file; and two sentences: what would padding on the left break?

    python -m pytest lessons -k 01
"""

import torch


def response_logp(logits, ids, prompt_length):
    """log π(y|x), in nats, of a row: logits (T, V), ids (T,), whose first prompt_length are x."""
    raise NotImplementedError("your code")


def pair_logps(model, examples, pad_id):
    """log π(y|x) of every response of B examples, and its number of tokens: two tensors (2, B).

    An example is (prompt, winner, loser), three lists of token ids; the leading 2 stands for
    (winner, loser). `model(input_ids=...)` has `.logits` (N, T, V) of ids (N, T).
    """
    raise NotImplementedError("your code")
