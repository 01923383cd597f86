"""Exercise 1, solved."""

import torch


def response_logp(logits, ids, prompt_length):
    logps = logits.log_softmax(-1)                                  # (T, V)
    total = 0.0
    for position in range(prompt_length, len(ids)):
        total = total + logps[position - 1, ids[position]]          # it was predicted one before
    return total


def pair_logps(model, examples, pad_id):
    rows = []
    for prompt, winner, loser in examples:
        rows += [(prompt, winner), (prompt, loser)]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id)                                      # (N, T)
    is_response = torch.zeros(len(rows), width, dtype=torch.bool)                           # (N, T)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        is_response[row, len(prompt):end] = True
    logps = model(input_ids=input_ids).logits[:, :-1].log_softmax(-1)                  # (N, T-1, V)
    token_logps = logps.gather(2, input_ids[:, 1:, None])[:, :, 0]                        # (N, T-1)
    sums = (token_logps * is_response[:, 1:]).sum(1)                                         # (N,)
    return sums.view(-1, 2).T, is_response.sum(1).view(-1, 2).T
