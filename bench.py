"""What a step costs: time, FLOPs, memory; with each trick switched off in turn; beside peers.

    python bench.py                          # Qwen2.5-0.5B's shape, two of its layers, random weights
    python bench.py --layers 24 --vs trl     # all layers, beside TRL's DPOTrainer (pip install trl==1.16.0)
    python bench.py --model M                # a checkpoint: its answers end where it ends them
    python bench.py --memory                 # peak memory of one pair: 2,500 tokens, 1,000 of them response

Lengths are quantiles of a realistic distribution, shuffled: query 50-400 tokens, principle 100-200, response
log-normal of mean 250 and sd 200, 2,048 at most. Repeats of all rows take turns; medians are printed.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import math
import random
import re
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

import generate
import sso
import toy
import train
from eval import print_table
from generate import device

SHAPES = {"qwen2.5-0.5b": (896, 4864, 24, 14), "qwen2.5-1.5b": (1536, 8960, 28, 12)}    # two key-value heads
CUDA, aten = device.type == "cuda", torch.ops.aten
COUNTED = {     # what torch's counter leaves out
    aten.addmm_: lambda c, a, b, **_: addmm_flop(c, a, b),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}


# ---- The work ------------------------------------------------------------------------------------

def load(name, layers):
    """A checkpoint, or a Qwen2.5 of a named shape with random weights, as `generate.load_chat` gives it. Of random
    answers every 250th token of the vocabulary is an end, for a mean length of about 250."""
    if name not in SHAPES:
        return generate.load_chat(name)
    width, inner, depth, heads = SHAPES[name]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=151_936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768))
    return generate.Chat(model.to(device).eval(), None, list(range(0, 151_936, 250)), 0, 0, 32_768, {})


def workload(n, chat, seed):
    """n queries, each {"prompt": {role: ids}, "response": {role: ids}}, of random tokens; shorter for a toy."""
    rng, shrink, vocabulary = random.Random(seed), min(1, chat.context / 5000), chat.model.config.vocab_size
    def lengths(count, quantile):
        return rng.sample([math.ceil(shrink * quantile((i + 0.5) / count)) for i in range(count)], count)
    x, principles = lengths(n, lambda u: 50 + 350 * u), lengths(2 * n, lambda u: 100 + 100 * u)
    y = lengths(3 * n, lambda u: min(2048, math.exp(statistics.NormalDist(5.274, 0.7034).inv_cdf(u))))
    queries = []
    for row in zip(x, principles[:n], principles[n:], y[:n], y[n:2 * n], y[2 * n:]):
        x, good, bad, *responses = ([rng.randrange(vocabulary) for _ in range(size)] for size in row)
        queries.append({"prompt": {"original": x, "good": good + x, "bad": bad + x},
                        "response": dict(zip(("good", "bad", "original"), responses))})
    return queries


def encoded(queries, objective):
    """Examples of encoded pairs, as `sso.encode_pairs` makes them."""
    return [[(query["prompt"][prompt], query["response"][winner], query["response"][loser])
             for prompt, winner, loser in sso.PAIRS[objective].values()] for query in queries]


# ---- The tricks, each switched off by stand-ins for what is in sso.py ----------------------------

def prompt_twice(model, examples, pad_id):
    """A row for each response; a second response of one token costs next to nothing, and is not looked at."""
    pairs = [pair for example in zip(*examples) for pair in example]
    rows = [[(pair[0], pair[side], pair[side][:1])] for side in (1, 2) for pair in pairs]
    logps, tokens = pair_logps(model, rows, pad_id)
    return logps[0].view(2, -1, len(examples)), tokens[0].view(2, -1, len(examples))


def every_position(model, examples, pad_id):
    """Logits of all positions, prompt and padding too."""
    hidden, rows = sso.read_pairs(model, examples, pad_id)
    token_logps = model.get_output_embeddings()(hidden).float().log_softmax(1)[rows.sources, rows.targets]
    logps = torch.stack([response.sum() for response in token_logps.split(rows.lengths)])
    return sso.by_pair(logps, examples), sso.by_pair(torch.tensor(rows.lengths, device=device), examples)


def alone(examples, budget):
    return [[i] for i in range(len(examples))]


pair_logps = sso.pair_logps
autograd = SimpleNamespace(apply=lambda hidden, head, targets: (
    hidden @ head.T.to(hidden.dtype)).float().log_softmax(1).gather(1, targets[:, None])[:, 0])
library = SimpleNamespace(apply=lambda hidden, head, targets: -F.linear_cross_entropy(
    hidden, head.to(hidden.dtype), targets, reduction="none"))
WITHOUT = {"prompt read twice": {"pair_logps": prompt_twice},
           "logits of every position": {"pair_logps": every_position},
           "response logits by autograd": {"TokenLogps": autograd}, "one query at a time": {"micro_batches": alone}}


@contextlib.contextmanager
def stand_ins(parts):
    before = {name: getattr(sso, name) for name in parts}
    try:
        [setattr(sso, name, part) for name, part in parts.items()]
        yield
    finally:
        [setattr(sso, name, part) for name, part in before.items()]


def authors_scheme(chat, examples, s):
    """The scheme of the released code, not its code: the un-steered prompt is read, too, and not used; each of three
    prompts is a padded batch of its own, in policy and reference; all logits. `examples` are of the rows "joint"."""
    def logps(pairs):
        rows = [(prompt, y) for side in (1, 2) for prompt, y in ((pair[0], pair[side]) for pair in pairs)]
        ids = pad_sequence([torch.tensor(p + y) for p, y in rows], True).to(device)
        labels = pad_sequence([torch.tensor([-100] * len(p) + y) for p, y in rows], True, -100).to(device)
        logits = chat.model(ids, use_cache=False).logits[:, :-1].float()
        token_logps = logits.log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
        return (token_logps * (labels[:, 1:] != -100)).sum(1)
    for example in examples:
        with torch.no_grad(), generate.autocast():
            reference = [logps([pair]) for pair in example]
        with generate.autocast():
            policy = [logps([pair]) for pair in example]
        ratios = [s["beta"] * (p - r) for p, r in zip(policy, reference)][1:]       # L+ and L-
        sft = [-p[0] / sum(map(len, pair[:2])) for p, pair in zip(policy, example)][1:]
        loss = sum(-F.logsigmoid(each[0] - each[1]) for each in ratios) + s["gamma"] * sum(sft)
        (loss / len(examples)).backward()


# ---- Measuring -----------------------------------------------------------------------------------

def timed(work):
    torch.cuda.synchronize() if CUDA else None
    began = time.perf_counter()
    work()
    torch.cuda.synchronize() if CUDA else None
    return time.perf_counter() - began


def resident(key):
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_memory(work):
    """Bytes at the peak of `work` above those before it: of torch's allocator on CUDA, else of the process."""
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**17)         # tensors in pages of their own, given back at once: what is held is in use
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")           # resets the high-water mark
    before = resident("VmRSS")
    work()
    libc.mallopt(-3, 2**25)         # as it comes to be by itself
    return resident("VmHWM") - before


def peak_flops():
    """FLOP/s of a large matrix product in the dtype of training, the best of five."""
    size = 8192 if CUDA else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if CUDA else torch.float32)
    return 2 * size ** 3 / min(timed(lambda: a @ a) for _ in range(5))


def measure(works, repeats, unit="tokens"):
    """{name: (work, units)} -> {name: row}: the first run of each is for FLOPs and memory, the others take turns."""
    rows, times, peaks = {}, {name: [] for name in works}, []
    for name, (work, _) in works.items():
        counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
        with counter:
            memory = peak_memory(work)
        rows[name] = {"TFLOP": counter.get_total_flops() / 1e12, "extra GiB": memory / 2**30}
    for _ in range(repeats):
        peaks.append(peak_flops())
        for name, (work, _) in works.items():
            times[name].append(timed(work))
    first = statistics.median(next(iter(times.values())))
    for name, (_, units) in works.items():
        seconds = statistics.median(times[name])
        rows[name] = {"ms": round(1000 * seconds), "ratio": seconds / first, f"{unit}/s": units / seconds,
                      "share of peak": 1e12 * rows[name]["TFLOP"] / seconds / max(peaks)} | rows[name]
    print(f"\na large matrix product: {max(peaks) / 1e12:.3g} TFLOP/s\n")
    return rows


# ---- What is measured ----------------------------------------------------------------------------

def make_step(chat, optimizer, examples, s, parts={}, backward=None):
    """One whole step of `train.train` on `examples`; `backward` in place of train.accumulate_gradient."""
    ref_logps = generate.score(chat, examples, 4 * s["micro_batch_tokens"])[0]
    def step():
        optimizer.zero_grad()
        with stand_ins(parts):
            if backward:
                backward(chat, examples, s)
            else:
                step.loss = train.accumulate_gradient(chat, examples, ref_logps, s)["loss"].mean().item()   # a pair
        torch.nn.utils.clip_grad_norm_(chat.model.parameters(), s["clip"])
        optimizer.step()
    return step


def training(chat, n, s, seed):
    """{name: (work, tokens)} of training: the steps, the reference pass, the tricks, the authors' scheme."""
    queries, s, policy = workload(n, chat, seed), s["generator"], s["policy"]
    pairs, policy_pairs = encoded(queries, "sso"), encoded(queries, "policy")
    tokens, policy_tokens = (sum(len(y) for example in examples for pair in example for y in pair[1:])
                             for examples in (pairs, policy_pairs))
    optimizer = train.make_optimizer(chat.model, s)
    for p in chat.model.parameters():       # so that AdamW has its state before the first measurement
        p.grad = torch.zeros_like(p)
    optimizer.step()
    step = functools.partial(make_step, chat, optimizer)
    works = {"generator step": (step(pairs, s), tokens),
             "policy step": (step(policy_pairs, policy), policy_tokens),
             "reference pass": (lambda: generate.score(chat, pairs, 4 * s["micro_batch_tokens"]), tokens)}
    works |= {f"generator step: {name}": (step(pairs, s, parts), tokens) for name, parts in WITHOUT.items()}
    authors = step(encoded(queries, "joint"), s, backward=authors_scheme)
    return works | {"generator step: the authors' scheme, with its reference": (authors, tokens)}


def sampling(chat, answers, seed):
    """{name: (work, answers)}: as generate.py samples, and by a plain loop over `generate` in batches of 16."""
    s = generate.resolve(chat.model.name_or_path, "responses", {})
    if chat.tokenizer:
        queries = toy.make_queries(seed)[0] if chat.prompts is toy.PROMPTS else [
            r["prompt"][0]["content"] for r in generate.read_jsonl(Path(__file__).parent / "data/queries.jsonl")]
        rows = [sso.encode_prompt(chat.tokenizer, [{"role": "user", "content": q}]) for q in queries[:answers]]
    else:
        rows = [query["prompt"]["original"] for query in workload(answers, chat, seed)]
    how = {"do_sample": True, "temperature": s["temperature"], "top_p": s["top_p"], "top_k": 0,
           "eos_token_id": chat.stop_ids, "pad_token_id": chat.pad_id}
    def decode(rows, by, size):
        for i in range(0, len(rows), size):
            by(chat, rows[i:i + size], seed, s["max_new_tokens"], how)
    longest_first, size = sorted(rows, key=len)[::-1], s["batch_size"] * generate.BATCHES
    return {"sampling": (lambda: decode(longest_first, generate.decode, size), len(rows)),
            "sampling, naive": (lambda: decode(rows, generate.decode_static, 16), len(rows))}


def peer(chat, steps, s, micro_batch, between, completion_only=True):
    """TRL's DPOTrainer on `steps`, lists of examples, `micro_batch` pairs at a time; `between` runs after each
    step. Returns seconds and losses, by step. The reference is given."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    import trl.trainer.utils
    if not CUDA:        # where it would score every position
        trl.trainer.utils._use_triton = lambda device: completion_only
    records = []
    for examples in steps:
        ref = generate.score(chat, examples, 4 * s["micro_batch_tokens"])[0]
        records += [{"prompt": "", "prompt_ids": pair[0], "chosen_ids": pair[1], "rejected_ids": pair[2],
                     "ref_chosen_logps": ref[0, r, b].item(), "ref_rejected_logps": ref[1, r, b].item()}
                    for b, example in enumerate(examples) for r, pair in enumerate(example)]
    prepared = lambda self, dataset, *_: dataset
    Peer = type("Peer", (DPOTrainer,), {"_prepare_dataset": prepared, "_precompute_ref_logps": prepared})
    seconds = []
    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.timer = time.perf_counter()
        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize() if CUDA else None
            seconds.append(time.perf_counter() - self.timer)
            between()
    losses = {"loss_type": ["sigmoid"]}
    if s["gamma"]:      # its mean over the tokens of a micro-batch, ours over those of a response: the same work
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, s["gamma"]]}
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            folder, per_device_train_batch_size=micro_batch, max_steps=len(steps),
            gradient_accumulation_steps=len(records) // len(steps) // micro_batch, learning_rate=s["lr"],
            lr_scheduler_type="constant", weight_decay=s["weight_decay"],
            max_grad_norm=s["clip"], beta=s["beta"], max_length=None, gradient_checkpointing=False, bf16=CUDA,
            precompute_ref_log_probs=True, train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **losses)
        trainer = Peer(chat.model, args=config, train_dataset=Dataset.from_list(records),
                       processing_class=toy.make_tokenizer(), callbacks=[Clock()])
        trainer.train()
    return seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def beside_trl(a, s, n):
    """Fail unless both give the same losses over five steps with γ = 0; then {name: seconds} of both, in turns."""
    if 2 * n % 4:
        raise sso.UserError("--queries: TRL needs an even number, to try micro-batches of 1, 2 and 4 pairs")
    plain = s | {"gamma": 0.0, "lr": 1e-5, "clip": 1e9}
    chat = load(a.model, a.layers)
    steps = [encoded([query], "sso") for query in workload(5, chat, a.seed)]
    _, theirs = peer(load(a.model, a.layers), steps, plain, 1, lambda: None)
    optimizer, ours = train.make_optimizer(chat.model, plain), []
    reference = [make_step(chat, optimizer, examples, plain) for examples in steps]    # before the first update
    for step in reference:
        step()
        ours.append(step.loss)
    for name, losses in (("ours", ours), ("TRL", theirs)):
        print(f"losses over five steps, γ = 0, {name}:", " ".join(f"{loss:.5f}" for loss in losses))
    if max(abs(x - y) for x, y in zip(ours, theirs)) > 1e-4:
        raise sso.UserError("the losses differ: the comparison is worth nothing")
    examples, rows = encoded(workload(n, chat, a.seed), "sso"), {}
    step, times = make_step(chat, optimizer, examples, s), []
    best = min((peer(load(a.model, a.layers), [examples], s, m, lambda: None)[0][0], m) for m in (1, 2, 4))[1]
    seconds, _ = peer(load(a.model, a.layers), [examples] * a.repeats, s, best, lambda: times.append(timed(step)))
    rows["generator step"] = statistics.median(times)
    rows[f"TRL, micro-batches of {best}"] = statistics.median(seconds)
    if not CUDA:
        default, _ = peer(load(a.model, a.layers), [examples], s, best, lambda: None, completion_only=False)
        rows["TRL as it is on the CPU, once"] = default[0]
    return {name: {"ms": round(1000 * row), "ratio": row / rows["generator step"]} for name, row in rows.items()}


def memory(chat):
    """Peak bytes of forward and backward of one pair, above weights and gradients, for each way to the log-probs."""
    ids = [random.Random(0).randrange(chat.model.config.vocab_size) for _ in range(2500)]
    examples, rows = [[(ids[:1500], ids[1500:2000], ids[2000:])]], {}
    def run():
        sso.pair_logps(chat.model, examples, chat.pad_id)[0].sum().backward()
    run()
    ways = {"ours": {}, "response logits by autograd": {"TokenLogps": autograd},
            "every position": {"pair_logps": every_position}}
    if hasattr(F, "linear_cross_entropy"):
        ways["F.linear_cross_entropy"] = {"TokenLogps": library}
    for name, parts in ways.items():
        with stand_ins(parts):
            rows[name] = {"extra GiB": peak_memory(run) / 2**30}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b", metavar="M", help=f"checkpoint, or {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of a named shape (2; 0: all)")
    parser.add_argument("--queries", type=int, default=2, metavar="N", help="of a step (2)")
    parser.add_argument("--answers", type=int, default=16, metavar="N", help="to sample; 0: none (16)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each measurement (3)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, metavar="N",
                        help="padded tokens at once (4096)")
    parser.add_argument("--vs", choices=["trl"], help="beside this peer, instead")
    parser.add_argument("--memory", action="store_true", help="peak memory of one pair, instead")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    s = {stage: sso.SETTINGS[stage] | {"micro_batch_tokens": a.micro_batch_tokens}
         for stage in ("generator", "policy")}
    print(f"{a.model}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if a.vs:
        return print_table(beside_trl(a, s["generator"], a.queries), ["ms", "ratio"])
    chat = load(a.model, a.layers)
    if a.memory:
        return print_table(memory(chat), ["extra GiB"])
    for works, unit in ((training(chat, a.queries, s, a.seed), "response tokens"),
                        (a.answers and sampling(chat, a.answers, a.seed), "answers")):
        columns = ["ms", "ratio", f"{unit}/s", "TFLOP", "share of peak", "extra GiB"]
        print_table(measure(works, a.repeats, unit), columns) if works else None


if __name__ == "__main__":
    generate.run(main)
