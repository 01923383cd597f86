"""Exercise 2, solved."""

import math

FAULTS = ["none", "the reference is another model", "L_base is a sum over pairs, not a mean"]


def expected_loss(base_loss, beta, gamma, sft):
    margin = 0.0                            # policy = reference
    if base_loss == "dpo":
        base = math.log(2)                  # -log σ(0)
    else:
        base = (margin - 1 / (2 * beta)) ** 2
    return base + gamma * sft


def what_is_wrong(row, beta):
    if abs(row["chosen_rewards"]) > 1e-4 or abs(row["rejected_rewards"]) > 1e-4:
        return FAULTS[1]
    if abs(row["base"] - math.log(2)) > 1e-3:
        return FAULTS[2]
    return FAULTS[0]
