"""Steps 3 and 4 of SSO: train the data generator, then the policy. Without a stage: all four steps.

    python train.py                                                 # the toy world, offline
    python train.py --model M --queries Q.jsonl --out runs/NAME     # a chat model from a folder or the hub
    python train.py generator --model M --data responses.jsonl --out runs/NAME/generator
    python train.py policy    --model M --data pairs.jsonl     --out runs/NAME/policy

Both stages are the one loop in `train`: they differ in the rows of the pair table. `policy` takes any
standard preference file. A folder with a config.json is complete; any other is continued by the same
command.

Simpler than the paper's set-up: one device, full fine-tuning, no packing, no evaluation during training.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import eval as evaluation
import generate
import sso
import toy
from generate import device
from sso import UserError

OBJECTIVES = {"generator": "sso", "policy": "policy"}   # stage -> rows of the pair table
SAVE_SECONDS = 600                                      # between checkpoints


# ---- The pieces of the loop ----------------------------------------------------------------------

def batches(examples, batch_size, epochs, seed):
    """The indices of each step's examples; every epoch has its own order. Depends on its arguments alone."""
    steps = []
    for epoch in range(epochs):
        order = random.Random(f"{seed} {epoch}").sample(range(examples), examples)
        steps += [order[i:i + batch_size] for i in range(0, examples, batch_size)]
    return steps


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first share `warmup` of the steps, then a cosine to zero."""
    first = math.ceil(warmup * steps)
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))


def make_optimizer(model, s):
    """AdamW; weight decay on matrices only, not on norms and biases."""
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": s["weight_decay"]},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s["lr"], fused=True)


@torch.no_grad()
def reference_logps(chat, examples, budget):
    """log π_ref of every example's pairs, scored once: (2, R, examples). No reference model is kept."""
    logps = torch.zeros(2, len(examples[0]), len(examples), device=device)
    for group in tqdm(sso.micro_batches(examples, budget), desc="reference", leave=False):
        with generate.autocast():
            logps[:, :, group] = sso.pair_logps(chat.model, [examples[i] for i in group], chat.pad_id)[0]
    return logps


def accumulate_gradient(chat, batch, ref_logps, s):
    """Forward and backward of B examples, whose ref_logps are (2, R, B), in micro-batches. The loss is the
    mean over the batch, so the split changes nothing. Returns the parts of the loss and the tokens, each
    (R, B)."""
    parts = []
    for group in sso.micro_batches(batch, s["micro_batch_tokens"]):                             # b of the B
        with generate.autocast():
            logps, tokens = sso.pair_logps(chat.model, [batch[i] for i in group], chat.pad_id)  # (2, R, b)
        losses, part = sso.sso_loss(logps, ref_logps[:, :, group], tokens, s["beta"], s["gamma"])   # (b,)
        (losses.sum() / len(batch)).backward()
        parts.append(part | {"tokens": tokens.sum(0)})
    return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}


def metrics(terms, parts):
    """The loss, and means over the batch of its parts: over all terms, and by term if there are several."""
    margin = parts["chosen_rewards"] - parts["rejected_rewards"]    # (R, B)
    row = {}
    for name, values in (parts | {"margin": margin, "accuracy": margin > 0}).items():
        values = values.float()
        row[name] = values.mean().item()
        row |= {f"{name} {term}": value.mean().item() for term, value in zip(terms, values) if len(terms) > 1}
    return row | {"loss": parts["loss"].sum(0).mean().item()}       # the terms add up: Eq. 1


def check_finite(row, model, out):
    """Stop before an update that would spoil the weights."""
    if not math.isfinite(row["loss"] + row["grad_norm"]):
        kept = out / "checkpoint.pt" if (out / "checkpoint.pt").exists() else f"{model}, where it started"
        raise UserError(f"{out}: the loss became {row['loss']} (gradient norm {row['grad_norm']}) at step "
                        f"{row['step']}; the last good state is {kept}. Try a lower --lr, in another --out")


@contextlib.contextmanager
def uninterrupted():
    """Hold Ctrl-C back until the end of the block, so that an update is done wholly or not at all."""
    held, before = [], signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


# ---- What is kept on disk ------------------------------------------------------------------------

def save_checkpoint(out, step, model, optimizer):
    """What continuing at `step` needs. The order of the data and the reference follow from the settings."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    try:
        torch.save(state, out / "checkpoint.tmp")
    except RuntimeError as error:        # torch's way of saying that the disk is full
        raise OSError(f"{out / 'checkpoint.tmp'} cannot be written ({error})") from None
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")


def load_checkpoint(out, model, optimizer):
    """The step to start at: that of the checkpoint, whose state is loaded, or 0. The log is cut to it."""
    step, log = 0, out / "log.jsonl"
    if (out / "checkpoint.pt").exists():
        checkpoint = torch.load(out / "checkpoint.pt", map_location=device)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    lines = log.read_text().split("\n")[:step] if log.exists() else []
    generate.write_text(log, "".join(line + "\n" for line in lines))
    return step


def save_model(chat, out):
    """Save a `from_pretrained` folder. config.json comes last: it proves the folder complete."""
    staging = out / "saving"
    shutil.rmtree(staging, ignore_errors=True)
    chat.model.save_pretrained(staging)
    chat.tokenizer.save_pretrained(staging)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, out / file.name)
    staging.rmdir()
    (out / "checkpoint.pt").unlink(missing_ok=True)


def check_disk(out, model):
    """Refuse to start without room for the model and two checkpoints, each three times as large (AdamW)."""
    needed, free = 7 * sum(p.nbytes for p in model.parameters()), shutil.disk_usage(out).free
    if free < needed:
        raise UserError(f"{out}: no disk space: {needed / 1e9:.2g} GB needed, {free / 1e9:.2g} GB free")


# ---- The loop ------------------------------------------------------------------------------------

def prepare(stage, model, data, out, s):
    """Load and check all before anything is written: (chat model, examples), or None if `out` is complete."""
    generate.read_jsonl(data)
    made_of, begun = {"model": model, "data": data}, ("log.jsonl", "checkpoint.pt")
    if not (note := generate.claim(out, s, made_of, done="config.json", work=begun)):
        return print(f"{out}: complete")
    chat = generate.load_chat(model)
    examples = generate.read_pairs(data, OBJECTIVES[stage], chat, s["max_length"])[1][:s["examples"]]
    generate.write_text(*note)
    check_disk(out, chat.model)
    for term, pair in zip(sso.PAIRS[OBJECTIVES[stage]], examples[0]):       # show what is trained on
        prompt, winner, loser = (chat.tokenizer.decode(ids) for ids in pair)
        print(f"{term}: prompt {prompt!r} | winner {winner!r} | loser {loser!r}")
    return chat, examples


def train(stage, model, data, out, **given):
    """Train `model` on the pairs that a stage makes of `data`: generator by L_SSO, policy by L_base."""
    s, out, terms = generate.resolve(model, stage, given), Path(out), sso.PAIRS[OBJECTIVES[stage]]
    if not (prepared := prepare(stage, model, data, out, s)):
        return
    chat, examples = prepared
    ref_logps = reference_logps(chat, examples, s["micro_batch_tokens"])        # (2, R, examples)
    optimizer = make_optimizer(chat.model, s)
    schedule = batches(len(examples), s["batch_size"], s["epochs"], s["seed"])
    done, saved = load_checkpoint(out, chat.model, optimizer), time.time()      # done: a number of steps
    bar = tqdm(range(done, len(schedule)), initial=done, total=len(schedule), desc=str(out), unit="step")
    try:
        for step in bar:
            began, batch = time.time(), schedule[step]
            optimizer.zero_grad()
            parts = accumulate_gradient(chat, [examples[i] for i in batch], ref_logps[:, :, batch], s)
            grad_norm = torch.nn.utils.clip_grad_norm_(chat.model.parameters(), s["clip"]).item()
            row = {"step": step, **metrics(terms, parts), "grad_norm": grad_norm}
            if step == 0:    # the policy is the reference yet: DPO's loss is ln 2 for every pair of any data
                tqdm.write(f"{out}: {len(examples)} examples, {len(schedule)} steps; "
                           f"L_base at step zero: {row['base']:.4f} a pair (ln 2 = {math.log(2):.4f})")
            check_finite(row, model, out)
            if time.time() - saved > SAVE_SECONDS:      # only now, when the loss has proved the weights good
                save_checkpoint(out, step, chat.model, optimizer)
                saved = time.time()
            row["lr"] = learning_rate(step, len(schedule), s["lr"], s["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = row["lr"]
            with uninterrupted(), (out / "log.jsonl").open("a") as log:
                optimizer.step()
                row["tokens_per_second"] = parts["tokens"].sum().item() / (time.time() - began)
                log.write(json.dumps(row) + "\n")
                done = step + 1
            bar.set_postfix({key: f"{row[key]:.3f}" for key in ("loss", "margin", "accuracy")}, refresh=False)
        save_model(chat, out)
    except KeyboardInterrupt:
        with uninterrupted():
            save_checkpoint(out, done, chat.model, optimizer)
        raise


# ---- All four steps ------------------------------------------------------------------------------

def split(path, seed):
    """(queries, held-out queries): a tenth of the records is held out for the report, 200 at most."""
    prompts = [record["prompt"] for record in generate.read_queries(path)]
    if len(prompts) < 2:
        raise UserError(f"{path}: at least two queries are needed, since one is held out for the report")
    random.Random(seed).shuffle(prompts)
    held = min(200, math.ceil(len(prompts) / 10))
    return prompts[held:], prompts[:held]


def pipeline(model, queries, out, seed, toy_world, given):
    """The whole paper in one folder, each step from the files of those before; complete ones are skipped."""
    out, base = Path(out), model or Path(out, "base")
    of = {stage: {"seed": seed} | {key.split(".")[1]: value for key, value in given.items()
                                   if key.startswith(f"{stage}.")} for stage in sso.SETTINGS}
    for stage in of:                # refuse bad settings, queries and models before anything is written
        generate.resolve(base, stage, of[stage])
    parts = split(queries, seed) if model else toy.make_queries(seed)
    if model:
        generate.load_tokenizer(model)
    made_of = {"model": model, "queries": queries} if model else {}
    settings = {"seed": seed, "toy_world": None if model else toy_world}
    if note := generate.claim(out, settings, made_of, done="report.json", work=["queries.jsonl"]):
        generate.write_text(*note)
        for name, prompts in zip(("heldout", "queries"), reversed(parts)):      # the proof of work comes last
            if not (out / f"{name}.jsonl").exists():
                generate.write_text(out / f"{name}.jsonl", generate.as_lines({"prompt": p} for p in prompts))
    if not model and not base.exists():
        toy.build(base, seed, toy_world)
    # 1. Principles and 2. responses, by the policy.
    generate.principles(base, out / "queries.jsonl", out / "principles.jsonl", **of["principles"])
    generate.responses(base, out / "principles.jsonl", out / "responses.jsonl", **of["responses"])
    # 3. The data generator: L_SSO, Eq. 1.
    train("generator", base, out / "responses.jsonl", out / "generator", **of["generator"])
    # 4. Fresh pairs from the generator train the original policy: L_base(x, y+, y-).
    generate.responses(out / "generator", out / "principles.jsonl", out / "pairs.jsonl", ("good", "bad"),
                       **of["responses"])
    train("policy", base, out / "pairs.jsonl", out / "policy", **of["policy"])
    # The baseline PBAA: no step 3, the policy's own pairs.
    train("policy", base, out / "responses.jsonl", out / "pbaa", **of["policy"])
    if note:
        evaluation.write_report(out, base, of["responses"])
    evaluation.print_report([out])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    if stage := next((word for word in sys.argv[1:2] if word in OBJECTIVES), None):
        parser.add_argument("stage", choices=OBJECTIVES)
        parser.add_argument("--model", required=True, help="checkpoint folder or Hugging Face id")
        parser.add_argument("--data", required=True, metavar="FILE", help="JSONL: responses or pairs")
        parser.add_argument("--out", required=True, metavar="DIR", help="folder to save the trained model in")
        generate.add_settings(parser, stage)
        return train(**vars(parser.parse_args()))
    parser.add_argument("--model", help="chat model: checkpoint folder or Hugging Face id (default: the toy)")
    parser.add_argument("--queries", metavar="FILE", help="JSONL, a 'prompt' a line; needed with --model")
    parser.add_argument("--out", default="runs/toy", metavar="DIR", help="folder of the run (runs/toy)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy-world", choices=toy.WORLDS, default="default",
                        help="on-policy: the control, in which no bad principle asks for anything unusual")
    for name in sso.SETTINGS:
        generate.add_settings(parser, name, prefix=f"--{name}.")
    args = vars(parser.parse_args())
    if (args["model"] is None) != (args["queries"] is None):
        parser.error("--model and --queries go together; with neither, the toy world is used")
    names = ("model", "queries", "out", "seed", "toy_world")
    pipeline(*(args[name] for name in names),
             {key: value for key, value in args.items() if key not in names and value is not None})


if __name__ == "__main__":
    generate.run(main)
