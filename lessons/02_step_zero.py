"""Exercise 2: the loss before the first update. 30 minutes.

The reference is the policy before its training. So at step zero the two are the same model, and
L_base is known without any data. Every training should print this number. It finds half of all bugs.

1. Write `expected_loss`. For DPO, -log σ(margin); for IPO, (margin - 1/(2β))². What is the margin?
2. Write `what_is_wrong`. It sees the first line of a log.jsonl. Think first: what can each fault do
   to the rewards, β (log π_θ - log π_ref), and what to L_base?

Hand in: this file, and a sentence on a fault that step zero cannot find.

    python -m pytest lessons -k 02
"""

FAULTS = ["none",
          "the reference is another model",             # or the same one with dropout
          "L_base is a sum over pairs, not a mean"]


def expected_loss(base_loss, beta, gamma, sft):
    """The loss of one pair, L_base + γ L_sft (Eq. 2), at step zero; base_loss is "dpo" or "ipo", and
    sft is the value of L_sft there, the one part that no one knows beforehand."""
    raise NotImplementedError("your code")


def what_is_wrong(row, beta):
    """One of FAULTS, from the first line of a log of DPO: a dict with `base`, `chosen_rewards` and
    `rejected_rewards`, means over pairs (as the code that wrote it believes)."""
    raise NotImplementedError("your code")
