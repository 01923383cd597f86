"""Exercise 5, solved."""

import eval as evaluation

PREDICTION = {"Eq. 4": "higher", "Eq. 3": "lower"}      # half wrong, and so be it
SEEN = {"Eq. 4": "higher", "Eq. 3": "as it was"}
EXPLANATION = """Eq. 4 lets yo win under x-: the generator learns to answer a bad principle as the policy
answers nobody, so its y- are what the policy says anyway, and p(rejected) comes up to p(original).
Eq. 3 lets y- win: it only widens a gap that was there. Nothing in it knows of the policy, so y- stay
where the bad principle put them."""


def p_rejected(pairs, policy, recipe):
    measures = evaluation.measure_pairs(pairs, policy, None, recipe)
    return measures["p(rejected)"]["mean"]
