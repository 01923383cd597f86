"""Steps 3 and 4 of SSO: train the data generator, then the policy. Without a stage: all four steps and the report.

    python train.py                                                       # the toy world, offline
    python train.py --model M --queries Q.jsonl --out runs/NAME           # a chat model from a folder or the hub
    python train.py generator --model M --data responses.jsonl --out runs/NAME/generator
    python train.py policy    --model M --data pairs.jsonl     --out runs/NAME/policy

Both stages are the one loop in `train`: they differ in the rows of the pair table. `policy` takes any standard
preference file. A folder with a config.json is complete; any other is continued by the same command.

Simpler than the paper and its released code: one device, no packing, no LoRA, no evaluation during training.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
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
    """The indices of each step's examples; every epoch has an order of its own. Depends on its arguments alone."""
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


@torch.no_grad()
def reference_logps(model, examples, pad_id, budget):
    """log π_ref of every example's pairs, scored once: (2, R, examples). No reference model is kept."""
    logps = torch.zeros(2, len(examples[0]), len(examples), device=device)
    for group in tqdm(sso.micro_batches(examples, budget), desc="reference", leave=False):
        with generate.autocast():
            logps[:, :, group] = sso.pair_logps(model, [examples[i] for i in group], pad_id)[0]
    return logps


def accumulate_gradient(policy, batch, ref_logps, s, pad_id):
    """Forward and backward of B examples, whose ref_logps are (2, R, B), in micro-batches. The loss is the mean over
    the batch, so the split changes nothing. Returns the parts of the loss and the tokens, each (R, B)."""
    parts = []
    for group in sso.micro_batches(batch, s["micro_batch_tokens"]):                                     # b of the B
        with generate.autocast():
            logps, tokens = sso.pair_logps(policy, [batch[i] for i in group], pad_id)                   # (2, R, b)
        losses, part = sso.sso_loss(logps, ref_logps[:, :, group], tokens, s["beta"], s["gamma"])       # (b,)
        (losses.sum() / len(batch)).backward()
        parts.append(part | {"tokens": tokens.sum(0)})
    return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}


def metrics(terms, parts):
    """The loss, and means over the batch of its parts: "name" over all terms, "name term" for each of several."""
    margin = parts["chosen_rewards"] - parts["rejected_rewards"]                                        # (R, B)
    row = {}
    for name, values in (parts | {"margin": margin, "accuracy": margin > 0}).items():
        values = values.float()
        row[name] = values.mean().item()
        row |= {f"{name} {term}": value.mean().item() for term, value in zip(terms, values) if len(terms) > 1}
    return row | {"loss": parts["loss"].sum(0).mean().item()}       # the terms add up: Eq. 1


def make_optimizer(model, s):
    """AdamW; weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": s["weight_decay"]},
                              {"params": vectors, "weight_decay": 0.0}], lr=s["lr"], fused=True)


@contextlib.contextmanager
def deferred_interrupt():
    """A list that Ctrl-C fills, instead of breaking off in the middle of an update."""
    interrupted = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def save_checkpoint(out, step, model, optimizer):
    """What continuing at `step` needs. The order of the data and the reference come from the settings."""
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "checkpoint.tmp")
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")


def load_checkpoint(out, model, optimizer):
    """The step to start at: that of the checkpoint, with its state loaded, or 0. Later lines of the log go."""
    step, log = 0, out / "log.jsonl"
    if (out / "checkpoint.pt").exists():
        checkpoint = torch.load(out / "checkpoint.pt", map_location=device)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    lines = log.read_text().split("\n")[:step] if log.exists() else []
    generate.write_text(log, "".join(line + "\n" for line in lines))
    return step


def save(model, tokenizer, out):
    """Save a `from_pretrained` folder. config.json comes last: it proves the folder complete."""
    staging = out / "saving"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, out / file.name)
    staging.rmdir()
    (out / "checkpoint.pt").unlink(missing_ok=True)


# ---- The loop ------------------------------------------------------------------------------------

def train(stage, model, data, out, **given):
    """Train `model` on the pairs that the stage makes of `data`: L_SSO for the generator, L_base for the policy."""
    s, out, terms = generate.resolve(model, stage, given), Path(out), sso.PAIRS[OBJECTIVES[stage]]
    made_of = {"model": model, "data": data}
    generate.read_jsonl(data)
    if generate.claim(out, s, made_of, proof="config.json", write=False):
        return print(f"{out}: complete")
    policy, tokenizer, end_id = generate.load_model(model)      # in eval mode, so without dropout
    _, examples = generate.read_pairs(data, OBJECTIVES[stage], model, tokenizer, end_id, s["max_length"])
    examples, pad_id = examples[:s["examples"]], tokenizer.pad_token_id
    generate.claim(out, s, made_of, proof="config.json")        # only now, when the data has proved good
    for term, (prompt, winner, loser) in zip(terms, examples[0]):
        print(f"{term}: " + " | ".join(f"{name} {tokenizer.decode(ids)!r}" for name, ids in (
            ("prompt", prompt), ("winner", winner), ("loser", loser))))
    ref_logps = reference_logps(policy, examples, pad_id, s["micro_batch_tokens"])      # (2, R, examples)
    optimizer = make_optimizer(policy, s)
    schedule = batches(len(examples), s["batch_size"], s["epochs"], s["seed"])
    start = load_checkpoint(out, policy, optimizer)
    saved = time.time()
    bar = tqdm(range(start, len(schedule)), initial=start, total=len(schedule), desc=str(out), unit="step")
    with (out / "log.jsonl").open("a", buffering=1) as log, deferred_interrupt() as interrupted:
        for step in bar:
            began, batch = time.time(), schedule[step]
            optimizer.zero_grad()
            parts = accumulate_gradient(policy, [examples[i] for i in batch], ref_logps[:, :, batch], s, pad_id)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), s["clip"]).item()
            row = {"step": step, **metrics(terms, parts), "grad_norm": grad_norm}
            if not math.isfinite(row["loss"] + grad_norm):
                kept = out / "checkpoint.pt" if (out / "checkpoint.pt").exists() else f"{model}, where it started"
                raise UserError(f"{out}: the loss became {row['loss']} (gradient norm {grad_norm}) at step {step}; "
                                f"the last good state is {kept}. Try a lower --lr")
            if step == 0:    # the policy is the reference yet: DPO's loss is ln 2 for every pair of any data
                tqdm.write(f"{out}: {len(examples)} examples, {len(schedule)} steps; "
                           f"L_base at step zero: {row['base']:.4f} a pair (ln 2 = {math.log(2):.4f})")
            if interrupted or time.time() - saved > SAVE_SECONDS:    # here the loss has proved the weights good
                save_checkpoint(out, step, policy, optimizer)
                saved = time.time()
            if interrupted:
                raise KeyboardInterrupt
            row["lr"] = learning_rate(step, len(schedule), s["lr"], s["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = row["lr"]
            optimizer.step()
            row["tokens_per_second"] = parts["tokens"].sum().item() / (time.time() - began)
            log.write(json.dumps(row) + "\n")
            bar.set_postfix({key: f"{row[key]:.3f}" for key in ("loss", "margin", "accuracy")}, refresh=False)
    save(policy, tokenizer, out)


# ---- All four steps ------------------------------------------------------------------------------

def pipeline(model, queries, out, seed, toy_world, given):
    """The whole paper in one folder, each step from the files of the one before; complete steps are skipped."""
    out, base = Path(out), model or Path(out, "base")
    settings = given | {"seed": seed} | ({} if model else {"toy_world": toy_world})
    records = generate.read_jsonl(queries) if model else None
    if not generate.claim(out, settings, {"model": model, "queries": queries} if model else {}, proof="report.json"):
        write_queries(out, *(split(records, seed) if model else toy.make_queries(seed)))
        if not model and not base.exists():
            toy.build(base, seed, toy_world)
        stage = {name: {"seed": seed} | {key.split(".")[1]: value for key, value in given.items()
                                         if key.startswith(f"{name}.")} for name in sso.SETTINGS}
        # 1. Principles and 2. responses, by the policy.
        generate.principles(base, out / "queries.jsonl", out / "principles.jsonl", **stage["principles"])
        generate.responses(base, out / "principles.jsonl", out / "responses.jsonl", **stage["responses"])
        # 3. The data generator: L_SSO, Eq. 1.
        train("generator", base, out / "responses.jsonl", out / "generator", **stage["generator"])
        # 4. Fresh pairs from the generator train the original policy: L_base(x, y+, y-).
        generate.responses(out / "generator", out / "principles.jsonl", out / "pairs.jsonl", ("good", "bad"),
                           **stage["responses"])
        train("policy", base, out / "pairs.jsonl", out / "policy", **stage["policy"])
        # The baseline PBAA: no step 3, pairs straight from the policy.
        train("policy", base, out / "responses.jsonl", out / "pbaa", **stage["policy"])
        evaluation.write_report(out, base, stage["responses"])
    evaluation.print_report([out])


def split(records, seed):
    """(queries, held-out queries): a tenth of the records is held out for the report, 200 at most."""
    if len(records) < 2:
        raise UserError("--queries: at least two are needed, since one is held out for the report")
    records = random.Random(seed).sample(records, len(records))
    held = min(200, max(1, len(records) // 10))
    return [r["prompt"] for r in records[held:]], [r["prompt"] for r in records[:held]]


def write_queries(out, queries, heldout):
    for name, prompts in (("queries", queries), ("heldout", heldout)):
        if not (out / f"{name}.jsonl").exists():
            generate.write_text(out / f"{name}.jsonl",
                                "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or Hugging Face id of a chat model (default: the toy world)")
    parser.add_argument("--queries", metavar="FILE", help="JSONL file with a 'prompt' a line; needed with --model")
    parser.add_argument("--out", default="runs/toy", metavar="DIR", help="folder of the run (default: runs/toy)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy-world", choices=toy.WORLDS, default="default",
                        help="on-policy is the control: no bad principle asks for anything unusual")
    for name, settings in sso.SETTINGS.items():
        for key, default in settings.items():
            if key != "seed":
                parser.add_argument(f"--{name}.{key}", type=type(default), metavar="V",
                                    help=f"default {default}, toy {toy.SETTINGS[name][key]}")
    stages = parser.add_subparsers(dest="stage", metavar="[generator | policy]")
    for name in OBJECTIVES:
        stage = stages.add_parser(name, help=f"the {name} alone")
        stage.add_argument("--model", required=True, help="checkpoint folder or Hugging Face id to start from")
        stage.add_argument("--data", required=True, metavar="FILE", help="JSONL file of responses or preference pairs")
        stage.add_argument("--out", required=True, metavar="DIR", help="folder to save the trained model in")
        for key, default in sso.SETTINGS[name].items():
            stage.add_argument(f"--{key.replace('_', '-')}", type=type(default),
                               help=f"default {default}, toy {toy.SETTINGS[name][key]}")
    args = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    if stage := args.pop("stage", None):
        for key in [key for key in args if "." in key or key == "toy_world"]:
            args.pop(key)
        train(stage, **args)
    elif ("model" in args) != ("queries" in args):
        parser.error("--model and --queries go together; with neither, the toy world is used")
    else:
        pipeline(args.pop("model", None), args.pop("queries", None), args.pop("out"), args.pop("seed"),
                 args.pop("toy_world"), args)


if __name__ == "__main__":
    generate.run(main)
