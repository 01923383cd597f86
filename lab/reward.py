"""Reward models on preference pairs (Section 5.3, Table 2): Bradley-Terry, in the loop of train.py.

    python -m lab.reward train pairs.jsonl [more.jsonl] --model M --out runs/reward
    python -m lab.reward eval F.jsonl [G.jsonl] --model runs/reward

The result is an ordinary `AutoModelForSequenceClassification` folder. If a file has a column
`subset`, accuracies are also by subset, and for RewardBench by section.
"""

from pathlib import Path
from statistics import fmean

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

import sso
from plumbing import command
from plumbing.examples import encode_record, read_examples
from plumbing.memory import plan
from plumbing.models import device, inspect_chat, load_weights, recompute_layers
from plumbing.outputs import Output
from plumbing.recipes import stage_settings
from plumbing.records import UserError, read_jsonl
from plumbing.scoring import score
from plumbing.tables import print_table, stat
from train import fit

# RewardBench's sections: SUBSET_MAPPING in rewardbench/constants.py of
# github.com/allenai/reward-bench. The prompts of a line count alike, the lines of a section, too.
SECTIONS = {
    "Chat": ["alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med"],
    "Chat Hard": ["mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
                  "llmbar-adver-GPTOut llmbar-adver-manual"],
    "Safety": ["refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond "
               "donotanswer"],
    "Reasoning": ["math-prm", "hep-cpp hep-go hep-java hep-js hep-python hep-rust"],
}


def load_reward(path):
    """A chat model with a head for one number, and with `pair_rewards` in place of log-probs. The
    head is random if the checkpoint has none."""
    options = {"auto_class": AutoModelForSequenceClassification, "num_labels": 1}
    chat = load_weights(inspect_chat(path, **options), path, **options)
    # transformers reads a reward off the last token that is not padding.
    chat.model.config.get_text_config().pad_token_id = chat.pad_id
    head = chat.model.score
    head.forward = torch.autocast(device.type, enabled=False)(head.forward)     # the head in fp32
    return chat._replace(pair_logps=pair_rewards)


def pair_rewards(model, examples, pad_id):
    """Rewards r(x, y) of the responses of B examples, (2, 1, B), and ones in place of the numbers
    of tokens that `sso.pair_logps` returns."""
    rows = []                                           # winner and loser one after the other
    for [(prompt, winner, loser)] in examples:
        rows += [torch.tensor(prompt + winner), torch.tensor(prompt + loser)]
    # Attention is causal, so no token sees the padding behind it.
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id).to(model.device)
    rewards = model(input_ids=input_ids, use_cache=False).logits                        # (2B, 1)
    rewards = rewards.view(1, -1, 2).permute(2, 0, 1)                                   # (2, 1, B)
    return rewards, torch.ones_like(rewards, dtype=torch.long)


def train(files, model, out, recipe):
    """Train a reward model on preference files."""
    settings = stage_settings(recipe, "reward")
    inputs = {f"data {number}": path for number, path in enumerate(files)}
    output = Output(out, settings, inputs | {"model": model})
    if output.is_complete():
        print(f"{out}: complete")
        return
    torch.manual_seed(settings["seed"])                 # of the new head
    chat = load_reward(model)
    examples = []
    for path in files:
        more, skipped = read_examples(path, "policy", chat, settings["max_length"],
                                      limit=settings["examples"])
        print(f"{path}: {len(more)} examples; skipped: {dict(skipped)}")
        examples += more
    output.write_note()
    plan(chat, examples, settings)
    if settings["recompute_layers"]:
        recompute_layers(chat.model)

    def loss(group):
        """Bradley-Terry, -log σ(r(x, winner) - r(x, loser)), of b examples, by their indices. This
        is DPO's with rewards for log-probs, a reference of 0, and β = 1."""
        rewards, tokens = pair_rewards(chat.model, [examples[i] for i in group], chat.pad_id)
        losses, (chosen, rejected) = sso.dpo_loss(rewards, 0.0, tokens, beta=1.0)       # (1, b)
        return losses[0], {"loss": losses.detach(), "chosen_rewards": chosen,
                           "rejected_rewards": rejected}

    fit(chat, examples, loss, Path(out), settings)


# ---- Measuring -----------------------------------------------------------------------------------

def accuracies(model, path, recipe):
    """How often a reward model puts chosen above rejected, {"all": ...}. A tie counts as half. If a
    file has subsets, also for each of them, and for RewardBench's sections."""
    settings = stage_settings(recipe, "reward")
    chat = load_reward(model)
    if "SequenceClassification" not in str(chat.model.config.architectures):
        raise UserError(f"model {model}: it has no reward head; `python -m lab.reward train` "
                        "trains one")
    read_examples(path, "policy", chat, settings["max_length"])     # for its errors
    subsets = []
    examples = []
    for record in read_jsonl(path):
        example, _ = encode_record(record, "policy", chat, settings["max_length"])
        if example:
            subsets.append(record.get("subset", "all"))
            examples.append(example)
    (chosen, rejected), _ = score(chat, examples, settings["micro_batch_tokens"])       # (1, N)
    verdicts = (0.5 + 0.5 * (chosen - rejected)[0].sign()).tolist()
    marks = {}
    for subset, verdict in zip(subsets, verdicts):
        marks.setdefault(subset, []).append(verdict)
    marks["all"] = verdicts
    rows = {name: {"pairs": len(group), "accuracy": stat(group)} for name, group in marks.items()}
    return rows | section_rows(marks)


def section_rows(marks):
    """RewardBench's sections and their average, from {subset: marks}. Empty unless every section
    has prompts."""
    rows = {}
    for section, lines in SECTIONS.items():
        groups = []             # marks of each line
        for line in lines:
            group = sum([marks.get(name, []) for name in line.split()], [])
            if group:
                groups.append(group)
        if not groups:
            return {}
        rows[section] = {"accuracy": fmean(map(fmean, groups))}
    rows["average of sections"] = {"accuracy": fmean(row["accuracy"] for row in rows.values())}
    return rows


def eval(files, model, recipe):
    """Measure a reward model on preference files."""
    for path in files:
        print(f"\n{path}:\n")
        print_table(accuracies(model, path, recipe), ["pairs", "accuracy"])


if __name__ == "__main__":
    command.run(__doc__, train, eval)
