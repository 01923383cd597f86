"""Reward models on preference pairs (Section 5.3, Table 2): Bradley-Terry, in a loop of its own.

    python -m lab.reward train pairs.jsonl [more.jsonl] --model M --out runs/reward
    python -m lab.reward eval F.jsonl [G.jsonl] --model runs/reward

What is written is an ordinary `AutoModelForSequenceClassification` folder. Of a file with a column
`subset`, RewardBench's or another, accuracies are by subset too; of RewardBench also by section.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from plumbing import cli, fast, memory
from plumbing.chat import autocast, load_chat, micro_batches, score, spare
from plumbing.checkpoint import Progress, check_space, save_model
from plumbing.files import Output, UserError, encode_record, read_examples, read_jsonl
from plumbing.guard import uninterrupted
from plumbing.tables import print_table, stat
from train import learning_rate, make_batches, make_optimizer

# RewardBench's sections: SUBSET_MAPPING in rewardbench/constants.py of
# github.com/allenai/reward-bench.
SECTIONS = {
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
                 "llmbar-adver-GPTOut llmbar-adver-manual",
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond "
              "donotanswer",
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust",
}


def load_reward(path):
    """A chat model with a head for one number, new at random if the checkpoint has none."""
    chat = load_chat(path, auto_class=AutoModelForSequenceClassification, num_labels=1)
    pad_id = chat.model.config.pad_token_id
    if pad_id is None or pad_id == chat.end_id:     # transformers reads a reward before the padding
        pad_id = chat.pad_id
    chat.model.config.pad_token_id = pad_id
    return chat._replace(pad_id=pad_id)


def pair_rewards(model, examples, pad_id):
    """Rewards r(x, y) of responses, off their last token, and numbers of tokens: two (2, R, B)."""
    hidden, rows = fast.read_rows(model, examples, pad_id)
    with torch.autocast(hidden.device.type, enabled=False):         # the head in fp32
        rewards = model.score(hidden.index_select(0, rows.ends).float())[:, 0]      # (2N,)
    tokens = torch.tensor(rows.lengths, device=rewards.device)                      # (2N,)
    return fast.by_pair(rewards, examples), fast.by_pair(tokens, examples)


def reward_loss(rewards):
    """Bradley-Terry, -log σ(r(x, winner) - r(x, loser)): losses (...) of rewards (2, ...)."""
    return -F.logsigmoid(rewards[0] - rewards[1])


def read_all(paths, chat, settings):
    """The examples of several preference files, mixed, so that --examples takes some of each."""
    examples = []
    for path in paths:
        more, skipped = read_examples(path, "policy", chat, settings["max_length"])
        print(f"{path}: {len(more)} examples; skipped: {dict(skipped) or 'none'}")
        examples += more
    if len(paths) > 1:
        random.Random(settings["seed"]).shuffle(examples)
    return examples[:settings["examples"]]


def train_reward(files, model, out: Path, recipe):
    """Train a reward model on preference files."""
    settings = cli.stage_settings(recipe, "reward")
    inputs = {f"data {number}": path for number, path in enumerate(files)}
    for path in files:
        read_jsonl(path)
    output = Output(out, settings, {"model": model} | inputs, folder=True)
    if output.is_complete():
        print(f"{out}: complete")
        return
    torch.manual_seed(settings["seed"])             # of the new head
    chat = load_reward(model)
    examples = read_all(files, chat, settings)
    output.write_note()
    check_space(out, chat.model)
    memory.plan(chat, examples, settings)
    spare(chat.model, settings)
    optimizer = make_optimizer(chat.model, settings["weight_decay"])
    batches = make_batches(len(examples), settings["batch_size"], settings["epochs"],
                           settings["seed"])
    with Progress(out, chat.model, optimizer) as progress:
        left = batches[progress.step:]
        for batch in tqdm(left, initial=progress.step, total=len(batches), desc=str(out)):
            optimizer.zero_grad()
            row = memory.retry(accumulate_gradient, chat, [examples[i] for i in batch], settings)
            row["step"] = progress.step
            if progress.step == 0:
                tqdm.write(f"{out}: loss {row['loss']:.4f} by a random head (about ln 2)")
            progress.check(row)
            row["lr"] = learning_rate(row["step"], len(batches), settings["lr"], settings["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = row["lr"]
            with uninterrupted():
                optimizer.step()
                progress.log(row)
        save_model(chat, out)


def accumulate_gradient(chat, batch, settings):
    """Forward and backward of B examples; clips the gradient. Returns what the log says of them."""
    rewards = []
    for group in micro_batches(batch, settings["micro_batch_tokens"]):
        with autocast():
            part, _ = pair_rewards(chat.model, [batch[i] for i in group], chat.pad_id)  # (2, 1, b)
        (reward_loss(part).sum() / len(batch)).backward()
        rewards.append(part.detach())
    rewards = torch.cat(rewards, 2)[:, 0]                                               # (2, B)
    grad_norm = torch.nn.utils.clip_grad_norm_(chat.model.parameters(), settings["clip"])
    margin = rewards[0] - rewards[1]
    return {"loss": reward_loss(rewards).mean().item(), "margin": margin.mean().item(),
            "accuracy": (margin > 0).float().mean().item(), "grad_norm": grad_norm.item()}


# ---- Measuring -----------------------------------------------------------------------------------

def measure_reward(model, path, recipe):
    """How often a reward model puts chosen above rejected, a tie a half: {"all": ...}; of a file
    with subsets also each, their mean, and RewardBench's sections with their mean, its
    "average"."""
    settings = cli.stage_settings(recipe, "reward")
    chat = load_reward(model)
    if "SequenceClassification" not in str(chat.model.config.architectures):
        raise UserError(f"model {model}: it has no reward head; `python -m lab.reward train` "
                              "trains one")
    examples, subsets = [], []
    for number, record in enumerate(read_jsonl(path), 1):
        useful, reason = encode_record(record, "policy", chat, settings["max_length"],
                                             f"{path}, line {number}")
        if useful:
            examples.append(useful)
            subsets.append(record.get("subset"))
    if not examples:
        raise UserError(f"{path}: no pair is left")
    rewards, _ = score(chat, examples, settings["micro_batch_tokens"], pair_rewards)
    chosen, rejected = rewards[:, 0]
    right = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).tolist()
    by_subset = {}
    for subset, value in zip(subsets, right):
        by_subset.setdefault(subset, []).append(value)
    by_subset.pop(None, None)
    rows = {name: {"pairs": len(values), "accuracy": stat(values)}
            for name, values in by_subset.items()}
    if rows:
        means = [row["accuracy"]["mean"] for row in rows.values()]
        rows["mean over subsets"] = {"accuracy": sum(means) / len(means)}
    rows |= section_rows(by_subset)
    return rows | {"all": {"pairs": len(right), "accuracy": stat(right)}}


def section_rows(by_subset):
    """Accuracy of RewardBench's sections, {subset: list of 0, 0.5, 1}, each a mean over its
    prompts; but math counts as much as all code, as there. None unless every section has
    prompts."""
    rows = {}
    for section, names in SECTIONS.items():
        groups = [by_subset[name] for name in names.split() if name in by_subset]
        if not groups:
            return {}
        if section == "Reasoning" and "math-prm" in by_subset and len(groups) > 1:
            math, code = groups[0], sum(groups[1:], [])
            mean = (sum(math) / len(math) + sum(code) / len(code)) / 2
        else:
            prompts = sum(groups, [])
            mean = sum(prompts) / len(prompts)
        rows[f"section {section}"] = {"pairs": sum(map(len, groups)), "accuracy": mean}
    average = sum(row["accuracy"] for row in rows.values()) / len(rows)
    return rows | {"average (of four sections)": {"accuracy": average}}


def print_rewards(files, model, recipe):
    """Measure a reward model on preference files."""
    for path in files:
        print(f"\n{path}:\n")
        print_table(measure_reward(model, path, recipe), ["pairs", "accuracy"])


if __name__ == "__main__":
    cli.run(__doc__, ("train", train_reward, ["reward"]), ("eval", print_rewards, ["reward"]))
