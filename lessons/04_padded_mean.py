"""Exercise 4: a bug that raises no error. 30 minutes.

L_sft is minus the mean log-probability of a token of the winner. In the authors' released code the
sum is right, but it is divided by the width of the padded row. Training runs, the loss falls.

You get a function sft(token_logps, is_response), both (T,), and may call it as you like. Find out
whether it is wrong without reading it.

1. Write `is_wrong`. What may a mean over the response never depend on?
2. Find a second fault that your test also catches, and one that it does not. (The tests try some.)

Hand in: this file; and two sentences: what does this bug do to the weight of L_sft in a batch of one
long and many short responses?

    python -m pytest lessons -k 04
"""

import torch


def is_wrong(sft):
    """True if sft(token_logps, is_response) is not minus the mean over the tokens of a response."""
    raise NotImplementedError("your code")
