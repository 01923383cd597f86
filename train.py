"""Steps 3 and 4 of SSO: train the data generator, then the policy. Without a stage: all four steps.

    python train.py                                                 # the toy world, offline
    python train.py --model M --queries Q.jsonl --out runs/NAME     # a chat model from a folder or the hub
    python train.py generator --model M --data responses.jsonl --out runs/NAME/generator
    python train.py policy    --model M --data pairs.jsonl     --out runs/NAME/policy
    python train.py reward    --model M --data pairs.jsonl     --out runs/NAME/reward

All stages are the one loop in `train`. Generator and policy differ in the rows of the pair table alone; a
reward model's score comes off a head, and its loss is Bradley-Terry. `policy` and `reward` take any standard
preference files. A folder with a config.json is complete; any other is continued by the same command.

Simpler than the paper's set-up: one device, full fine-tuning, no evaluation during training.
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

STAGES = ("generator", "policy", "reward")     # steps 3 and 4; Section 5.3
# --objective of all four steps -> its data generators, each by its rows of the pair table and the roles that
# it answers in; and the rows of the policy.
PLANS = {rows: ({rows: ("good", "bad")}, "policy") for rows in ("sso", "plus", "minus", "eq3")} | {
    "two": ({"plus": ("good",), "minus": ("bad",)}, "policy"),      # Limitations: a generator for each term
    "pbaa": ({}, "policy"), "original": ({}, "original"), "joint": ({}, "joint")}    # none
SAVE_SECONDS = 600      # between checkpoints


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


def spare(model, s):
    """Save time by compiling, memory by computing the inside of layers again in the backward pass."""
    if s["compile"]:
        model.base_model.compile(dynamic=True)      # else it would compile anew for every width of a micro-batch
    if s["recompute_layers"]:
        newer, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"      # before 5.23
        getattr(model, newer if hasattr(model, newer) else older)({"use_reentrant": False})
        for module in model.modules():              # transformers heeds it in training, which is dropout, too
            module.training = hasattr(module, "gradient_checkpointing")


def losses_of(chat, examples, ref_logps, s):
    """Losses (b,) of b examples, whose ref_logps are (2, R, b), and their parts and tokens, each (R, b)."""
    score = sso.pair_logps if "base" in s else sso.pair_rewards
    with generate.autocast():
        scores, tokens = score(chat.model, examples, chat.pad_id)           # (2, R, b)
    if "base" not in s:
        losses, parts = sso.reward_loss(scores)
    else:
        weights = sso.joint_weights(scores, tokens) if s["objective"] == "joint" else 1.0
        losses, parts = sso.sso_loss(scores, ref_logps, tokens, s["beta"], s["gamma"], s["base"], weights)
    return losses, parts | {"tokens": tokens.sum(0)}


def accumulate_gradient(chat, batch, ref_logps, s):
    """Forward and backward of B examples, whose ref_logps are (2, R, B), in micro-batches; the loss is the mean
    over the batch, so the split changes nothing. Returns the parts of the loss and the tokens, each (R, B)."""
    parts = []
    for group in sso.micro_batches(batch, s["micro_batch_tokens"]):         # b of the B
        losses, part = losses_of(chat, [batch[i] for i in group], ref_logps[:, :, group], s)
        (losses.sum() / len(batch)).backward()
        parts.append(part)
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


# ---- The loop ------------------------------------------------------------------------------------

def prepare(stage, model, data, out, s):
    """Load and check all before anything is written: (chat model, examples), or None if `out` is complete."""
    for path in data:
        generate.read_jsonl(path)
    made_of, rows = {"data" + i * "+": path for i, path in enumerate(data)}, s.get("objective", "policy")
    if not (note := generate.claim(out, s, {"model": model} | made_of, folder=True)):
        return print(f"{out}: complete")
    torch.manual_seed(s["seed"])            # a reward model's head starts at random
    chat = generate.load_chat(model, **({} if "base" in s else {"of": generate.REWARD}))
    examples = []
    for path in data:
        _, more, dropped = generate.read_pairs(path, rows, chat, s["max_length"])
        examples += more
        print(f"{path}: {len(more)} examples; skipped: {dict(dropped) or 0}")
    if len(data) > 1:                       # so that --examples takes some of every file
        random.Random(s["seed"]).shuffle(examples)
    generate.write_text(*note)
    # The model and two checkpoints, each three times as large (AdamW).
    needed, free = 7 * sum(p.nbytes for p in chat.model.parameters()), shutil.disk_usage(out).free
    if free < needed:
        raise UserError(f"{out}: no disk space: {needed / 1e9:.2g} GB needed, {free / 1e9:.2g} GB free")
    for term, pair in zip(sso.PAIRS[rows], examples[0]):                    # show what is trained on
        prompt, winner, loser = (chat.tokenizer.decode(ids) for ids in pair)
        print(f"{term}: prompt {prompt!r} | winner {winner!r} | loser {loser!r}")
    return chat, examples[:s["examples"]]


def step_zero(row, s):
    """What the loss is before the first update, when the policy is the reference: known for any data."""
    known = {None: f"a random head: about ln 2 = {math.log(2):.4f}", "dpo": f"ln 2 = {math.log(2):.4f}",
             "ipo": "1/(4β²)" + f" = {1 / (4 * s.get('beta', 1) ** 2):.4f}"}[s.get("base")]
    return f"loss a pair at step zero: {row.get('base', row['loss']):.4f} ({known})"


def train(stage, model, data, out, **given):
    """Train `model` on the pairs of `data`, a file or several, by the stage's loss: L_SSO, L_base, Bradley-Terry."""
    s, out, data = generate.resolve(model, stage, given), Path(out), data if isinstance(data, list) else [data]
    if not (prepared := prepare(stage, model, data, out, s)):
        return
    chat, examples = prepared
    spare(chat.model, s)
    terms, ref_logps = list(sso.PAIRS[s.get("objective", "policy")]), torch.zeros(2, 1, len(examples))
    if "base" in s:                                         # scored once; no reference model is kept
        ref_logps = generate.score(chat, examples, 4 * s["micro_batch_tokens"], name="reference")[0]   # (2, R, N)
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
            if step == 0:
                tqdm.write(f"{out}: {len(examples)} examples, {len(schedule)} steps; {step_zero(row, s)}")
            check_finite(row, model, out)
            if time.time() - saved > SAVE_SECONDS:      # only now, when the loss has proved the weights good
                save_checkpoint(out, step, chat.model, optimizer)
                saved = time.time()
            row["lr"] = learning_rate(step, len(schedule), s["lr"], s["warmup"])
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = row["lr"]
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
    prompts = [record["prompt"] for record in generate.read_jsonl(path, queries=True)]
    if len(prompts) < 2:
        raise UserError(f"{path}: at least two queries are needed, since one is held out for the report")
    random.Random(seed).shuffle(prompts)
    held = min(200, math.ceil(len(prompts) / 10))
    return prompts[held:], prompts[:held]


def make_pairs(objective, model, principles, responses, out, of):
    """Step 3 and the sampling of step 4, in folder `out`: the file of the pairs for the policy."""
    generators = PLANS[objective][0]
    pairs, source = responses, principles           # without a generator: the policy's own pairs
    for number, (rows, roles) in enumerate(generators.items(), 1):
        alone, last = len(generators) == 1, number == len(generators)
        generator = out / ("generator" if alone else f"generator-{rows}")
        train("generator", model, responses, generator, **of["generator"], objective=rows)     # L_SSO, Eq. 1
        pairs = out / ("pairs.jsonl" if last else f"responses-{rows}.jsonl")
        generate.responses(generator, source, pairs, roles, **of["responses"])
        source = pairs
    return pairs


def start(a, base, folders):
    """Write the run's held-out queries and the queries of each round, or check that they are this run's."""
    queries, heldout = split(a.queries, a.seed) if a.model else toy.make_queries(a.seed, len(folders))
    if len(queries) < len(folders):
        raise UserError(f"--iterations {len(folders)}: more rounds than the {len(queries)} queries to train on")
    settings = {name: getattr(a, name) for name in ("seed", "objective", "base", "iterations")}
    settings |= {} if a.model else {"toy_world": a.toy_world}
    names = ("model", "queries", "principles", "principle_model")
    made_of = {name: getattr(a, name) for name in names if getattr(a, name)}
    files = {folder / "queries.jsonl": queries[i::len(folders)] for i, folder in enumerate(folders)}
    for file, prompts in (files | {Path(a.out, "heldout.jsonl"): heldout}).items():
        generate.write_once(file, settings, made_of, [{"prompt": prompt} for prompt in prompts])
    if not a.model and a.toy_world != "default":
        a.principles = Path(a.out, "written.jsonl")
        by_hand = [toy.write_principles(query, a.toy_world, a.seed) for query in queries]
        generate.write_once(a.principles, settings, made_of, by_hand)
    if not a.model and not base.exists():
        toy.build(base, a.seed)


def pipeline(a):
    """The whole paper in one folder, each step from the files of those before; complete ones are skipped."""
    out, base = Path(a.out), a.model or Path(a.out, "base")
    of = {stage: {"seed": a.seed} | {key.split(".")[1]: value for key, value in vars(a).items()
                                     if key.startswith(f"{stage}.") and value is not None}
          for stage in sso.SETTINGS}
    for stage in of:                # refuse bad settings, queries and models before anything is written
        generate.resolve(base, stage, of[stage])
    for model in filter(None, (a.model, a.principle_model, a.judge)):
        generate.load_tokenizer(model)
    folders = [out / f"round{i + 1}" if a.iterations > 1 else out for i in range(a.iterations)]
    start(a, base, folders)
    of["generator"]["base"] = of["policy"]["base"] = a.base
    policy, rows, name = base, {"base": (None, None, None, base)}, a.objective.upper()
    for number, folder in enumerate(folders, 1):
        queries, principles, responses = (folder / f"{name}.jsonl" for name in (
            "queries", "principles", "responses"))
        # 1. Principles, by the first policy or another model, or written by hand; 2. responses, by the policy.
        if a.principles:
            generate.written_principles(a.principles, queries, principles, a.seed)
        else:
            generate.principles(a.principle_model or base, queries, principles, **of["principles"])
        generate.responses(policy, principles, responses, **of["responses"])
        # The baseline PBAA has no step 3: the policy's own pairs.
        if number == 1 and a.objective != "pbaa":
            train("policy", policy, responses, out / "pbaa", **of["policy"])
            rows["PBAA" if a.iterations == 1 else "PBAA 1"] = (responses, "policy", policy, out / "pbaa")
        # 3. The data generator. 4. The policy, by L_base(x, y+, y-) on fresh pairs of the generator.
        pairs = make_pairs(a.objective, policy, principles, responses, folder, of)
        used_in = PLANS[a.objective][1]
        train("policy", policy, pairs, folder / "policy", **of["policy"], objective=used_in)
        rows[name if a.iterations == 1 else f"{name} {number}"] = (pairs, used_in, policy, folder / "policy")
        policy = folder / "policy"      # where the next round starts
    evaluation.write_report(out, rows, of["responses"], a.judge)
    evaluation.print_report([out])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    if stage := next((word for word in sys.argv[1:2] if word in STAGES), None):
        parser.add_argument("stage", choices=STAGES)
        parser.add_argument("--model", required=True, help="checkpoint folder or Hugging Face id")
        parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="JSONL: responses or pairs")
        parser.add_argument("--out", required=True, metavar="DIR", help="folder to save the trained model in")
        generate.add_settings(parser, stage)
        return train(**vars(parser.parse_args()))
    parser.add_argument("--model", help="chat model: checkpoint folder or Hugging Face id (default: the toy)")
    parser.add_argument("--queries", metavar="FILE", help="JSONL, a 'prompt' a line; needed with --model")
    parser.add_argument("--out", default="runs/toy", metavar="DIR", help="folder of the run (runs/toy)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", choices=PLANS, default="sso", help="pbaa, original, joint: no generator")
    parser.add_argument("--two-generators", action="store_const", const="two", dest="objective",
                        help="L+ and L- train one each: --objective two")
    parser.add_argument("--base", choices=sso.BASE_LOSSES, default="dpo", help="L_base of generator and policy")
    parser.add_argument("--iterations", type=int, default=1, metavar="N", help="rounds, each from the policy before")
    parser.add_argument("--principle-model", metavar="M", help="writes the principles (default: the policy)")
    parser.add_argument("--principles", metavar="FILE", help="JSONL: written principles, in place of step 1")
    parser.add_argument("--judge", metavar="M", help="chat model that judges pairs and answers for the report")
    parser.add_argument("--toy-world", choices=toy.WORLDS, default="default",
                        help="whose bad principles ask for other things than the default's: controls")
    for name in ("principles", "responses", "generator", "policy"):
        generate.add_settings(parser, name, prefix=f"--{name}.")
    args = parser.parse_args()
    sources = [args.principles, args.principle_model, args.toy_world != "default"]
    for wrong, why in ((bool(args.model) != bool(args.queries), "--model and --queries go together"),
                       (sum(map(bool, sources)) > 1, "--principles, --principle-model, --toy-world exclude each other"),
                       (args.model and sources[2], "--toy-world is for the toy world, without --model"),
                       (args.iterations < 1, "--iterations is at least 1")):
        parser.error(why) if wrong else None
    pipeline(args)


if __name__ == "__main__":
    generate.run(main)
