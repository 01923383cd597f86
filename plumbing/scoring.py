"""Log-probs of many examples, without gradient."""

import torch
from tqdm import tqdm

import sso
from plumbing import memory
from plumbing.models import autocast, device


@torch.no_grad()
def score(chat, examples, budget=0, function=None, name="scoring"):
    """`chat.pair_logps`, or another function like it, of all examples: two (2, R, examples)."""
    function = function or chat.pair_logps
    budget = budget or memory.MOST
    if function is not sso.pair_logps:      # no activations are kept; the plain form's logits are
        budget *= 4
    settings = {"micro_batch_tokens": budget}
    scores = torch.zeros(2, len(examples[0]), len(examples), device=device)
    tokens = torch.zeros_like(scores, dtype=torch.long)
    bar = tqdm(total=len(examples), desc=name, leave=False)

    def score_group(group):
        with autocast():
            values, counts = function(chat.model, [examples[i] for i in group], chat.pad_id)
        scores[:, :, group] = values
        tokens[:, :, group] = counts
        bar.update(len(group))

    memory.in_micro_batches(score_group, chat.model, examples, range(len(examples)), settings)
    bar.close()
    return scores, tokens
