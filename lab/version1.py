"""Version 1 of the paper (arXiv 2410.17131v1): an objective and a base loss of one's own.

    python -m lab.version1 --objective v1 --set policy.base_loss=v1-ipo --set policy.beta=0.2 \\
        --rounds 3 --out runs/v1

It has no data generator. One model learns all three terms at once, in three rounds, by
W·(L + g·(L+ + L-)), as in its figure. Importing this file adds a row to `sso.PAIRS` and a function
to `sso.BASE_LOSSES`; the command above is run.py with these two.
"""

import torch

import run
import sso
from plumbing import command


def v1_ipo_loss(policy_logps, ref_logps, tokens, beta, g=0.1, alpha=0.66, **others):
    """IPO's losses (3, B) of L, L+ and L-, weighted. W = σ(-(α m(y+|x) + (1-α) m(y-|x))), where m
    is the mean log-prob of a token. W has a gradient."""
    losses, rewards = sso.ipo_loss(policy_logps, ref_logps, tokens, beta)
    chosen, rejected = (policy_logps / tokens)[:, 0]        # m(y+|x), m(y-|x): (B,), of the term L
    W = torch.sigmoid(-(alpha * chosen + (1 - alpha) * rejected))   # (B,): large if both are rare
    return torch.stack([W, g * W, g * W]) * losses, rewards


sso.PAIRS["v1"] = {"L": sso.L, "L+": sso.L_PLUS, "L-": sso.L_MINUS}
sso.BASE_LOSSES["v1-ipo"] = v1_ipo_loss

if __name__ == "__main__":
    command.run(__doc__, run.run, default_recipe=run.default_recipe)
