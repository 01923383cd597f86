"""Exercise 5: where does y- go? 45 minutes, and once `python run.py`.

Before step 3, the toy model would hardly ever give its y- to a plain query: p(rejected) is about .3,
and p(original) about .7. (p is exp of the mean log-probability of a token, under the policy and
without any principle.) Step 3 trains a generator by Eq. 1, with Eq. 4 or with Eq. 3 as its L-. Then
the generator samples new y-.

1. Predict first, from the rows of exercise 3, and write it down in PREDICTION: against the y- of the
   policy itself, is the generator's p(rejected) "higher", "lower" or "as it was" (within 0.1)?
2. Write `p_rejected`: it measures a file of pairs. Which function of eval.py does, on which model?
3. Run the tests: they train the generator of Eq. 3, and say what they measured. Write it into SEEN,
   in the same words, and leave your prediction as it was: a wrong one is worth an explanation.
4. Explain in EXPLANATION what you saw, in 40 words or more.

Hand in: this file.

    python -m pytest lessons -k 05
"""

PREDICTION = {"Eq. 4": None, "Eq. 3": None}
SEEN = {"Eq. 4": None, "Eq. 3": None}
EXPLANATION = ""


def p_rejected(pairs, policy, recipe):
    """The mean p(rejected) of a file of pairs, under a policy."""
    raise NotImplementedError("your code")
