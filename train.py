"""Steps 3 and 4 of SSO: train the data generator, then the policy.

    python train.py generator --model M --data responses.jsonl --out runs/NAME/generator
    python train.py policy    --model M --data pairs.jsonl     --out runs/NAME/policy

Both run the one loop in `fit`. They differ in settings and in their entry of the table `sso.PAIRS`.
The policy's data may be any standard preference file. The result is a `from_pretrained` folder with
the log of its training. An interrupted command, given again, continues to the same weights.

Simpler than the paper's set-up: one device, no evaluation on held-out queries meanwhile. The
reference is scored once, before the first update, so no second model is kept.
"""

import math
import random
import time

import torch
from tqdm import tqdm

import sso
from plumbing import command
from plumbing.checkpoint import Progress, uninterrupted
from plumbing.examples import read_examples
from plumbing.lora import add_adapters, merge_adapters
from plumbing.memory import in_micro_batches, plan
from plumbing.models import (autocast, choose_logps, inspect_chat, load_weights,
                             recompute_layers)
from plumbing.outputs import Output
from plumbing.recipes import stage_settings
from plumbing.scoring import score
from plumbing.watch import make_watch


# ---- Order, learning rate, optimizer -------------------------------------------------------------

def make_batches(n_examples, batch_size, epochs, seed):
    """The indices of each step's examples. Every epoch has its own order."""
    batches = []
    for epoch in range(epochs):
        order = random.Random(f"{seed} {epoch}").sample(range(n_examples), n_examples)
        for start in range(0, n_examples, batch_size):
            batches.append(order[start:start + batch_size])
    return batches


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first share `warmup` of the steps, then a cosine to zero."""
    first = math.ceil(warmup * steps)
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))


def make_optimizer(model, weight_decay):
    """AdamW. Weight decay acts on matrices only, not on norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], fused=True)


# ---- One step ------------------------------------------------------------------------------------

def accumulate_gradient(chat, examples, batch, loss, settings):
    """Forward and backward pass of a batch, given by the indices of its B examples, one micro-batch
    of b examples at a time. The loss is a mean over the batch, so the split changes nothing.
    Returns {part: (R, B)}."""
    def forward_backward(group):
        with autocast():
            losses, parts = loss(group)                             # (b,), {part: (R, b)}
        # Divided by B, not by b: the gradients of the micro-batches add up to that of the mean.
        (losses.sum() / len(batch)).backward()
        return parts

    groups = in_micro_batches(forward_backward, chat.model, examples, batch, settings)
    return {name: torch.cat([parts[name] for parts in groups], 1) for name in groups[0]}


def summarize(parts, terms):
    """One line of the log: the means of {part: (R, B)} over the batch. If there are several terms,
    each also has its own mean. The loss is the sum of the terms, Eq. 1."""
    row = {}
    # Rewards are β log π_θ/π_ref. Watch both: a falling rejected reward alone widens the margin.
    if "chosen_rewards" in parts:
        margin = parts["chosen_rewards"] - parts["rejected_rewards"]
        parts = parts | {"margin": margin, "reward_accuracy": margin > 0}
    for name, values in parts.items():
        row[name] = values.float().mean().item()
        for term, value in zip(terms, values):
            if len(values) > 1:
                row[f"{name} {term}"] = value.float().mean().item()
    row["loss"] = parts["loss"].sum(0).mean().item()
    return row


# ---- The loop ------------------------------------------------------------------------------------

def fit(chat, examples, loss, out, settings, terms=("L",), watch=None):
    """The loop: zero, forward, loss, backward, clip, step, log. It trains by any function
    loss(indices of b examples) -> losses (b,) and their detached parts, {name: (R, b)}."""
    optimizer = make_optimizer(chat.model, settings["weight_decay"])
    batches = make_batches(len(examples), settings["batch_size"], settings["epochs"],
                           settings["seed"])
    progress = Progress(out, chat.model, optimizer)         # from its checkpoint, if there is one
    bar = tqdm(batches[progress.step:], initial=progress.step, total=len(batches), desc=str(out))
    try:
        for batch in bar:                                   # indices of B examples
            began = time.time()
            optimizer.zero_grad()
            parts = accumulate_gradient(chat, examples, batch, loss, settings)
            norm = torch.nn.utils.clip_grad_norm_(chat.model.parameters(), settings["clip"])
            row = {"step": progress.step, **summarize(parts, terms), "grad_norm": norm.item()}
            if progress.step == 0:
                tqdm.write(f"{out}: {len(examples)} examples, {len(batches)} steps; "
                           f"{step_zero(row, settings)}")
            progress.check(row)     # a loss that is not finite stops here, and spoils no weights
            lr = learning_rate(progress.step, len(batches), settings["lr"], settings["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Ctrl-C waits here: an update and its line of the log are made together or not at all.
            with uninterrupted():
                optimizer.step()
                row |= {"lr": lr, "seconds": time.time() - began}
                if watch:
                    row |= watch(progress.step, len(batches))
                progress.log(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
    except KeyboardInterrupt:
        progress.save()
        raise
    merge_adapters(chat.model)          # if it has any
    progress.finish(chat)


def step_zero(row, settings):
    """The loss before the first update. Policy = reference then, so L_base is known beforehand."""
    known = {"dpo": f" (ln 2 = {math.log(2):.4f})",
             "ipo": f" (1/(4β²) = {1 / (4 * settings.get('beta', 1) ** 2):.4f})"}
    if "base" not in row:
        return f"loss at step zero: {row['loss']:.4f}"
    return f"L_base at step zero: {row['base']:.4f}{known.get(settings['base_loss'], '')}"


# ---- Steps 3 and 4 -------------------------------------------------------------------------------

def prepare(model, data, out, settings, prompts):
    """Load and check everything before anything is written. Returns (chat model, examples), or None
    if OUT is complete. Prints the first example, decoded, to show what is trained on."""
    objective = settings["objective"]
    roles = {pair.prompt: prompts[pair.prompt] for pair in sso.PAIRS[objective].values()}
    output = Output(out, settings | roles, {"model": model, "data": data})
    if output.is_complete():
        print(f"{out}: complete")
        return None
    chat = inspect_chat(model)
    examples, skipped = read_examples(data, objective, chat, settings["max_length"], prompts,
                                      settings["examples"])
    print(f"{data}: {len(examples)} examples; skipped: {dict(skipped) or 'none'}")
    for term, pair in zip(sso.PAIRS[objective], examples[0]):
        prompt, winner, loser = map(chat.tokenizer.decode, pair)
        print(f"{term}: prompt {prompt!r} | winner {winner!r} | loser {loser!r}")
    chat = choose_logps(load_weights(chat, model), settings["logps"])
    output.write_note()
    return chat, examples


def train(stage, model, data, out, recipe):
    """Train MODEL on the pairs of a file with the settings of a stage, generator or policy."""
    settings = stage_settings(recipe, stage)
    prepared = prepare(model, data, out, settings, recipe["prompts"])
    if prepared is None:
        return
    chat, examples = prepared
    if settings["lora_rank"]:
        add_adapters(chat.model, settings)
    plan(chat, examples, settings)
    if settings["recompute_layers"]:
        recompute_layers(chat.model)
    # The reference is this very model before its first update. It is scored once. That saves a
    # second model in memory, and a second forward pass in every step.
    ref_logps = torch.zeros(2, len(examples[0]), len(examples))                         # (2, R, N)
    if settings["base_loss"] not in sso.REFERENCE_FREE:
        ref_logps, _ = score(chat, examples, settings["micro_batch_tokens"], name="reference")

    def loss(group):
        """L_SSO of b examples, by their indices."""
        logps, tokens = chat.pair_logps(chat.model, [examples[i] for i in group],
                                        chat.pad_id)                                    # (2, R, b)
        return sso.sso_loss(logps, ref_logps[:, :, group], tokens, **settings)

    watch = None
    if stage == "policy":
        watch = make_watch(chat, data, settings, recipe["prompts"])
    fit(chat, examples, loss, out, settings, terms=sso.PAIRS[settings["objective"]], watch=watch)
    print(f"{out}: trained. Chosen rewards in its log may fall: docs/GUIDE.md says why")


def generator(model, data, out, recipe):
    """Step 3: train the data generator on responses."""
    train("generator", model, data, out, recipe)


def policy(model, data, out, recipe):
    """Step 4: train the policy on pairs."""
    train("policy", model, data, out, recipe)


if __name__ == "__main__":
    command.run(__doc__, generator, policy)
