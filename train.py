"""Steps 3 and 4 of SSO: train the data generator, then the policy.

    python train.py generator --model M --data responses.jsonl --out runs/NAME/generator
    python train.py policy    --model M --data pairs.jsonl     --out runs/NAME/policy

Both are the one loop in `train`; they differ in the rows of the table `sso.PAIRS`, and in settings.
The policy's data may be any standard preference file. What is written is a `from_pretrained`
folder, with the log of its training; an interrupted command, given again, continues to the same
weights.

Simpler than the paper's set-up: one device, full fine-tuning, no evaluation during training. The
reference is scored once, before the first update, and no second model is kept.
"""

import math
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

import sso
from plumbing import cli, files, memory
from plumbing.chat import autocast, load_chat, micro_batches, score, spare
from plumbing.checkpoint import Progress, check_space, save_model
from plumbing.guard import uninterrupted
from plumbing.watch import Watch


# ---- Order, learning rate, optimizer -------------------------------------------------------------

def make_batches(n_examples, batch_size, epochs, seed):
    """The indices of each step's examples. Every epoch has an order of its own."""
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
    """AdamW; weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], fused=True)


# ---- One step ------------------------------------------------------------------------------------

def accumulate_gradient(chat, batch, ref_logps, settings):
    """Forward and backward of B examples, with ref_logps (2, R, B), a micro-batch of b at a time:
    the loss is a mean over the batch, so that the split changes nothing. Returns {part: (R, B)}."""
    parts = []
    for group in micro_batches(batch, settings["micro_batch_tokens"]):
        examples = [batch[i] for i in group]
        # Log π_θ of every winner and loser, as in sso.pair_logps; chat.pair_logps may be its faster
        # twin in plumbing/fast.py.
        with autocast():
            logps, tokens = chat.pair_logps(chat.model, examples, chat.pad_id)          # (2, R, b)
        weights = 1.0               # of the terms of Eq. 1
        if settings["objective"] == "joint":
            weights = sso.joint_weights(logps, tokens)                                  # (3, b)
        losses, part = sso.sso_loss(logps, ref_logps[:, :, group], tokens, weights=weights,
                                    **settings)                                         # (b,)
        # Divided by B and not by b: the gradients of the micro-batches add up to that of the mean.
        (losses.sum() / len(batch)).backward()
        parts.append(part | {"tokens": tokens.sum(0)})
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def summarize(parts, objective):
    """One line of the log: means over the batch of {part: (R, B)}, over all terms and, if there are
    several, of each; the loss is their sum, Eq. 1."""
    # Rewards are β log π_θ/π_ref. Watch both: the margin may grow by the rejected one falling
    # alone.
    margin = parts["chosen_rewards"] - parts["rejected_rewards"]
    parts = parts | {"margin": margin, "accuracy": margin > 0}
    row = {}
    for name, values in parts.items():
        row[name] = values.float().mean().item()
        for term, value in zip(sso.PAIRS[objective], values):
            if len(values) > 1:
                row[f"{name} {term}"] = value.float().mean().item()
    row["loss"] = parts["loss"].sum(0).mean().item()
    return row


# ---- The loop ------------------------------------------------------------------------------------

def prepare(model, data, out, settings, prompts):
    """Load and check everything before anything is written: (chat model, examples), or None if OUT
    is complete. Prints the first example, decoded: what is trained on."""
    objective = settings["objective"]
    roles = {pair.prompt: prompts[pair.prompt] for pair in sso.PAIRS[objective].values()}
    files.read_jsonl(data)
    output = files.Output(out, settings | roles, {"model": model, "data": data}, folder=True)
    if output.is_complete():
        print(f"{out}: complete")
        return None
    chat = load_chat(model)
    examples, skipped = files.read_examples(data, objective, chat, settings["max_length"], prompts,
                                            settings["examples"])
    print(f"{data}: {len(examples)} examples; skipped: {dict(skipped) or 'none'}")
    for term, pair in zip(sso.PAIRS[objective], examples[0]):
        prompt, winner, loser = map(chat.tokenizer.decode, pair)
        print(f"{term}: prompt {prompt!r} | winner {winner!r} | loser {loser!r}")
    output.write_note()
    check_space(out, chat.model)
    return chat, examples


def train(stage, model, data, out, recipe):
    """Train MODEL on the pairs of a file, by the settings of a stage: generator or policy."""
    settings = cli.stage_settings(recipe, stage)
    prepared = prepare(model, data, out, settings, recipe["prompts"])
    if prepared is None:
        return
    chat, examples = prepared
    memory.plan(chat, examples, settings)
    spare(chat.model, settings)
    # The reference is this very model before its first update. Scored once, it needs no second
    # model in memory, and no second forward pass a step. Without gradient, four times as much fits
    # at once.
    ref_logps = torch.zeros(2, len(examples[0]), len(examples))                         # (2, R, N)
    if settings["base_loss"] not in sso.REFERENCE_FREE:
        ref_logps, _ = score(chat, examples, 4 * settings["micro_batch_tokens"], name="reference")
    watch = Watch(chat, data, settings, recipe["prompts"])
    optimizer = make_optimizer(chat.model, settings["weight_decay"])
    with Progress(out, chat.model, optimizer) as progress:      # at its checkpoint, if it has one
        run_steps(chat, examples, ref_logps, watch, optimizer, settings, progress)
        save_model(chat, out)


def run_steps(chat, examples, ref_logps, watch, optimizer, settings, progress):
    """The loop: zero, forward, loss, backward, clip, step, log."""
    batches = make_batches(len(examples), settings["batch_size"], settings["epochs"],
                           settings["seed"])
    bar = tqdm(batches[progress.step:], initial=progress.step, total=len(batches),
               desc=str(progress.out))
    for batch in bar:                                           # indices of B examples
        began = time.time()
        optimizer.zero_grad()
        parts = memory.retry(accumulate_gradient, chat, [examples[i] for i in batch],
                             ref_logps[:, :, batch], settings)  # forward, loss, backward
        grad_norm = torch.nn.utils.clip_grad_norm_(chat.model.parameters(), settings["clip"])
        row = {"step": progress.step, **summarize(parts, settings["objective"]),
               "grad_norm": grad_norm.item()}
        if progress.step == 0:      # where policy = reference, the loss is known beforehand
            tqdm.write(f"{progress.out}: {len(examples)} examples, {len(batches)} steps; "
                       f"{step_zero(row, settings)}")
        progress.check(row)         # a loss that is not finite stops here, before it spoils weights
        lr = learning_rate(progress.step, len(batches), settings["lr"], settings["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Ctrl-C waits: an update and its line of the log come together, or neither does.
        with uninterrupted():
            optimizer.step()
            speed = parts["tokens"].sum().item() / (time.time() - began)
            looked = watch.look(progress.step, len(batches))
            progress.log(row | looked | {"lr": lr, "tokens_per_second": speed})
        bar.set_postfix_str(f"loss {row['loss']:.3f} margin {row['margin']:.3f}", refresh=False)


def step_zero(row, settings):
    """The base loss before the first update, and what it has to be, since policy = reference."""
    known = {"dpo": f" (ln 2 = {math.log(2):.4f})",
             "ipo": f" (1/(4β²) = {1 / (4 * settings['beta'] ** 2):.4f})"}
    return f"L_base at step zero: {row['base']:.4f}{known.get(settings['base_loss'], '')}"


def train_generator(model, data, out: Path, recipe):
    """Step 3: train the data generator on responses."""
    train("generator", model, data, out, recipe)


def train_policy(model, data, out: Path, recipe):
    """Step 4: train the policy on pairs."""
    train("policy", model, data, out, recipe)


if __name__ == "__main__":
    cli.run(__doc__, ("generator", train_generator, ["generator"]),
            ("policy", train_policy, ["policy"]))
