"""Log-probs of many examples, without gradient."""

import torch
from tqdm import tqdm

import sso
from plumbing import memory
from plumbing.models import autocast, device


@torch.no_grad()
def score(chat, examples, budget=0, name="scoring"):
    """`chat.pair_logps` of all examples: two (2, R, examples)."""
    budget = budget or memory.MOST
    # Without gradients no activations are kept; the plain form's logits are.
    if chat.pair_logps is not sso.pair_logps:
        budget *= 4
    settings = {"micro_batch_tokens": budget}
    scores = torch.zeros(2, len(examples[0]), len(examples), device=device)
    tokens = torch.zeros_like(scores, dtype=torch.long)
    bar = tqdm(total=len(examples), desc=name, leave=False)

    def score_group(group):
        with autocast():
            scores[:, :, group], tokens[:, :, group] = chat.pair_logps(
                chat.model, [examples[i] for i in group], chat.pad_id)
        bar.update(len(group))

    memory.in_micro_batches(score_group, chat.model, examples, range(len(examples)), settings)
    bar.close()
    return scores, tokens
