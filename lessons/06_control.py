"""Exercise 6: the control. 45 minutes, and once `python run.py`.

If SSO helps because it makes rejected responses on-policy, then it cannot help where they are
on-policy already. So make them so: write bad principles that ask for what the toy model does anyway.

1. Ask the toy model some plain queries (runs/toy/heldout.jsonl; runs/toy/answers_base.jsonl has its
   answers). Which mistake does it make again and again?
2. Write `bad_principle`. The model knows 149 words, and follows principles like those of
   runs/toy/principles.jsonl: look which of its bad ones is closest to what you need.
3. Predict, in PREDICTION: is SSO's lead over PBAA in quality "kept" or "lost"? The table of the
   control world "on-policy" in docs/RESULTS.md has the answer: write it into SEEN.

Hand in: this file; and that table, explained in three sentences.

    python -m pytest lessons -k 06
"""

PREDICTION, SEEN = None, None


def bad_principle(query):
    """A principle's text for a query's text, like "sort these words : fox axe plum dog"."""
    raise NotImplementedError("your code")
