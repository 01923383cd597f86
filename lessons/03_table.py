"""Exercise 3: four equations as four rows. 15 minutes.

A preference pair says: under this prompt, the winner is preferred to the loser. The paper's losses
are one function of such a pair, L_base(prompt, winner, loser), and differ in what they fill in:

    step 4, PBAA    L  = L_base(x,  y+, y-)
    Eq. 2           L+ = L_base(x+, y+, y-)
    Eq. 3           L- = L_base(x-, y-, y+)      the obvious choice
    Eq. 4           L- = L_base(x-, yo, y+)      the paper's choice

1. Write the four rows of TABLE, as roles: "good" is x+ or y+, "bad" x- or y-, "original" x or yo.
2. Write `sentence`: what a row asks of the model, in words, as "under x+ say y+ rather than y-".

Hand in: this file; and three sentences: why does yo, and not y-, win in Eq. 4?

    python -m pytest lessons -k 03
"""

TABLE = {           # (prompt, winner, loser)
    "L": (None, None, None),
    "L+": (None, None, None),
    "L- of Eq. 3": (None, None, None),
    "L- of Eq. 4": (None, None, None),
}


def sentence(row):
    """What a row of TABLE asks for, in words."""
    raise NotImplementedError("your code")
