"""What a step costs: time, FLOPs, memory; with each trick switched off in turn; beside TRL.

    python -m lab.bench              # Qwen2.5-0.5B's shape, two of its layers, random weights
    python -m lab.bench --layers 24 --vs trl    # all of them, beside TRL (pip install trl==1.16.0)
    python -m lab.bench --model M    # a checkpoint: its answers end where it ends them
    python -m lab.bench --model M --vs transformers     # sampling alone
    python -m lab.bench --memory 1   # peak memory of a pair: 2,500 tokens, 1,000 of them response

Lengths are quantiles of a realistic distribution, shuffled: query 50-400 tokens, principle 100-200,
response log-normal of mean 250 and sd 200, 2,048 at most. What is compared takes turns; medians are
printed.
"""

import copy
import ctypes
import gc
import math
import random
import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop, sdpa_flop
from transformers import (GenerationConfig, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM,
                          TemperatureLogitsWarper, TopPLogitsWarper)

import sso
import train
from lab import results, toy
from plumbing import cli, fast, files, sampling
from plumbing.chat import Chat, autocast, device, load_chat, score
from plumbing.tables import print_table

CUDA = device.type == "cuda"
COLUMNS = ["ms", "ratio", "TFLOP", "share of peak", "extra GiB"]


# ---- The work ------------------------------------------------------------------------------------

def load(path, layers):
    """The checkpoint; without one Qwen2.5-0.5B with so many layers, of random weights. Of its
    answers every 250th token of the vocabulary is an end, for a mean length of about 250."""
    if path:
        chat = load_chat(path)
    else:
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=151_936, hidden_size=896, intermediate_size=4864,
                             num_hidden_layers=layers, num_attention_heads=14,
                             num_key_value_heads=2, tie_word_embeddings=True)
        chat = Chat(Qwen2ForCausalLM(config).to(device).eval(), tokenizer=None,
                    stop_ids=list(range(0, config.vocab_size, 250)), end_id=0, pad_id=0,
                    context=32_768, pair_logps=fast.pair_logps)
    # None of the checkpoint's own sampling settings, as in `sampling.load_sampler`.
    chat.model.generation_config = GenerationConfig(eos_token_id=chat.stop_ids,
                                                    pad_token_id=chat.pad_id)
    return chat


def workload(n, chat, seed=0):
    """n queries of random tokens, each ({role: prompt ids}, {role: response ids})."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shrink = min(1, chat.context / 5000)        # a toy model has no room for such lengths

    def token_lists(count, quantile):
        lengths = [math.ceil(shrink * quantile((i + 0.5) / count)) for i in range(count)]
        return [torch.randint(chat.model.config.vocab_size, (length,)).tolist()
                for length in rng.sample(lengths, count)]

    log_length = statistics.NormalDist(5.274, 0.7034)   # of a log-normal of mean 250 and sd 200
    x = token_lists(n, lambda share: 50 + 350 * share)
    principles = token_lists(2 * n, lambda share: 100 + 100 * share)
    responses = token_lists(3 * n, lambda share: min(2048, math.exp(log_length.inv_cdf(share))))
    queries = []
    for i in range(n):
        prompts = {"good": principles[i] + x[i], "bad": principles[n + i] + x[i], "original": x[i]}
        queries.append((prompts, dict(zip(sso.COLUMNS, responses[i::n]))))     # every n-th: three
    return queries


def encoded(queries, objective):
    """Examples, each R pairs of token ids."""
    examples = []
    for prompts, responses in queries:
        examples.append([sso.Pair(prompts[roles.prompt], responses[roles.winner],
                                  responses[roles.loser])
                         for roles in sso.PAIRS[objective].values()])
    return examples


# ---- The tricks, each switched off ---------------------------------------------------------------

# Functions in place of `fast.pair_logps`: same signature, same numbers, same gradients.

def prompt_twice(model, examples, pad_id):
    """A row for each response. A row has to hold a pair: its second response is one token, which
    costs next to nothing, and is not looked at."""
    rows = []
    for example in examples:
        for prompt, *responses in example:
            for response in responses:
                rows.append([(prompt, response, response[:1])])
    logps, tokens = fast.pair_logps(model, rows, pad_id)                            # (2, 1, 2N)
    return fast.by_pair(logps[0, 0], examples), fast.by_pair(tokens[0, 0], examples)


def response_sums(token_logps, rows, examples):
    """What `fast.pair_logps` returns, from log-probs (K,) of response tokens."""
    logps = torch.stack([response.sum() for response in token_logps.split(rows.lengths)])   # (2N,)
    tokens = torch.tensor(rows.lengths, device=device)                                      # (2N,)
    return fast.by_pair(logps, examples), fast.by_pair(tokens, examples)


def by_autograd(model, examples, pad_id, every_position=False):
    """Logits of all response tokens at once, or of every position, prompt and padding too; they are
    kept until the backward pass."""
    hidden, rows = fast.read_rows(model, examples, pad_id)                          # (N·T, D)
    places = rows.sources
    if not every_position:
        hidden = hidden.index_select(0, places)                                     # (K, D)
        places = torch.arange(len(hidden), device=device)
    # In one expression: the logits are given back as soon as there are log-probs.
    logps = model.get_output_embeddings()(hidden).float().log_softmax(1)    # (N·T, V) or (K, V)
    return response_sums(logps[places, rows.targets], rows, examples)


def by_library(model, examples, pad_id):
    """torch's one call for what `fast.TokenLogps` does, with its default options."""
    hidden, rows = fast.read_rows(model, examples, pad_id)
    hidden = hidden.index_select(0, rows.sources)                                   # (K, D)
    head = model.get_output_embeddings().weight                                     # (V, D)
    losses = functional.linear_cross_entropy(hidden, head, rows.targets,
                                             reduction="none")                      # (K,)
    return response_sums(-losses, rows, examples)


SWITCHED_OFF = {"prompt read twice": prompt_twice,
                "logits of every position": partial(by_autograd, every_position=True),
                "response logits by autograd": by_autograd,
                "plain form, sso.pair_logps": sso.pair_logps}


def authors_scheme(chat, examples, _, settings):
    """The scheme of the released code, not its code, in place of `train.accumulate_gradient`. Each
    prompt is a padded batch of its own, in policy and reference, with all logits; the un-steered
    one is read, too, and not used. Examples are those of the objective "joint": L, L+, L-."""
    def read(pair):
        return sso.pair_logps(chat.model, [[pair]], chat.pad_id)                    # (2, 1, 1)

    for example in examples:
        with torch.no_grad(), autocast():
            reference = [read(pair) for pair in example]
        with autocast():
            policy = [read(pair) for pair in example]
        for (ref_logps, _), (logps, tokens) in zip(reference[1:], policy[1:]):      # L+ and L-
            loss, _ = sso.sso_loss(logps, ref_logps, tokens, **settings)
            (loss.sum() / len(examples)).backward()


# ---- Measuring -----------------------------------------------------------------------------------

def timed(run):
    """Seconds of a run."""
    began = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(run):
    """GiB at the peak of a run above those before it."""
    gc.collect()
    if not CUDA:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**17)     # tensors in pages of their own, given back as soon as they can
        libc.malloc_trim(0)
    results.begin_peak()
    before = results.peak_bytes()
    run()
    peak = results.peak_bytes()
    if not CUDA:
        libc.mallopt(-3, 2**25)     # as it comes to be by itself
    return (peak - before) / 2**30


def peak_flops():
    """FLOP/s of a large matrix product in the dtype of training, the best of five."""
    size = 8192 if CUDA else 2048
    dtype = torch.bfloat16 if CUDA else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size ** 3 / min(timed(lambda: matrix @ matrix) for _ in range(5))


def grouped(formula, query):
    """A formula of attention, also for keys and values of fewer heads than the query's, which that
    of torch 2.11 refuses. `query` is the query's place among the arguments."""
    def flop(*args, **others):
        args = list(args)
        heads = args[query].shape[1]
        for i in (query + 1, query + 2):
            batch, _, *rest = args[i].shape
            args[i] = torch.Size([batch, heads, *rest])
        return formula(*args, **others)
    return flop


aten = torch.ops.aten
COUNTED = {     # what torch's counter leaves out
    aten.addmm_: addmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: grouped(sdpa_flop, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: grouped(sdpa_backward_flop, 1)}


def measure(works, repeats):
    """{name: row of a table} of {name: function}. A first run of each is for FLOPs and memory; in
    the others, which are timed, they take turns."""
    rows = {}
    times = {}
    peak = 0
    for name, run in works.items():
        counter = FlopCounterMode(display=False)
        counter.flop_registry |= COUNTED
        with counter:
            memory = peak_memory(run)
        rows[name] = {"TFLOP": counter.get_total_flops() / 1e12, "extra GiB": memory}
        times[name] = []
    for _ in range(repeats):
        peak = max(peak, peak_flops() / 1e12)
        for name, run in works.items():
            times[name].append(timed(run))
    print(f"\na large matrix product: {peak:.3g} TFLOP/s\n")
    first = statistics.median(next(iter(times.values())))
    for name, row in rows.items():
        seconds = statistics.median(times[name])
        row["ms"] = round(1000 * seconds)
        row["ratio"] = seconds / first
        row["share of peak"] = row["TFLOP"] / seconds / peak
    return rows


# ---- What is measured ----------------------------------------------------------------------------

def make_step(chat, optimizer, examples, settings, backward=train.accumulate_gradient):
    """A function: one whole step of `train.train` on examples. It returns the parts of the loss."""
    ref_logps, _ = score(chat, examples, settings["micro_batch_tokens"])
    for group in optimizer.param_groups:
        group["lr"] = settings["lr"]

    def step():
        optimizer.zero_grad()
        parts = backward(chat, examples, ref_logps, settings)
        torch.nn.utils.clip_grad_norm_(chat.model.parameters(), settings["clip"])
        optimizer.step()
        return parts
    return step


def training_works(chat, queries, settings):
    """{name: function} of training: steps, the reference pass, and steps of the generator without
    each trick. All have the generator's settings: those of the policy cost the same."""
    optimizer = train.make_optimizer(chat.model, settings["weight_decay"])
    examples = encoded(queries, "sso")
    works = {"generator step": make_step(chat, optimizer, examples, settings),
             "policy step": make_step(chat, optimizer, encoded(queries, "policy"), settings),
             "reference pass": partial(score, chat, examples, 4 * settings["micro_batch_tokens"])}
    for name, pair_logps in SWITCHED_OFF.items():
        works[f"generator step: {name}"] = make_step(chat._replace(pair_logps=pair_logps),
                                                     optimizer, examples, settings)
    alone = settings | {"micro_batch_tokens": 1}        # one query is the least
    works["generator step: one query at a time"] = make_step(chat, optimizer, examples, alone)
    works["generator step: the authors' scheme, with its reference"] = make_step(
        chat, optimizer, encoded(queries, "joint"), settings, authors_scheme)
    works["policy step"]()      # gradients and AdamW's state are there before memory is measured
    return works


def prompts_to_sample(chat, count, templates, worked_examples=False):
    """Prompts of token ids: the queries of data/, or the toy world's, alone or behind the worked
    examples of step 1. Without a tokenizer they are random."""
    if chat.tokenizer is None:
        return [prompts["original"] for prompts, _ in workload(count, chat)]
    if templates == toy.PROMPTS:
        records, _ = toy.make_records()
    else:
        records = files.read_queries("data/queries.jsonl")
    prompts = []
    for record in records[:count]:
        messages = files.as_messages("prompt", record["prompt"])
        if worked_examples:
            messages = sso.principle_messages(messages[0]["content"], templates)
        prompts.append(sso.encode_prompt(chat.tokenizer, messages))
    return prompts


def growing(layer, n_rows, room):
    """In place of `sampling.for_rows`: the library's cache, copied for each token."""
    layer.batch_repeat_interleave(n_rows)
    return layer


def sampling_works(chat, prompts, settings):
    """{name: function} of sampling: as generate.py samples; the greedy choice instead; all in one
    batch; the library's cache; bf16; a plain loop over `generate` in batches of 16; top-p by
    transformers."""
    temperature, top_p = settings["temperature"], settings["top_p"]
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    whole_sort = LogitsProcessorList([TemperatureLogitsWarper(temperature),
                                      TopPLogitsWarper(top_p)])
    library = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
               "logits_processor": whole_sort}

    def run(decode, prompts, size, options, chat=chat):
        for start in range(0, len(prompts), size):
            decode(chat, prompts[start:start + size], 0, settings["max_new_tokens"], options)

    longest_first = sorted(prompts, key=len, reverse=True)
    size = settings["batch_size"] * sampling.batches_at_once
    static = sampling.decode_static
    copying = partial(static, for_rows=growing)
    works = {"sampling": partial(run, sampling.decode, longest_first, size, options),
             "greedy": partial(run, sampling.decode, longest_first, size, {"do_sample": False}),
             "sampling, in one batch": partial(run, static, longest_first, len(prompts), options),
             "sampling, a cache that is copied": partial(run, copying, longest_first, size, options),
             "sampling, naive": partial(run, copying, prompts, 16, options),
             "sampling, naive, top-p of transformers": partial(run, copying, prompts, 16, library),
             "sampling, top-p of transformers": partial(run, static, longest_first, size, library)}
    if not CUDA:
        halved = chat._replace(model=copy.deepcopy(chat.model).bfloat16())
        works["sampling, bf16"] = partial(run, static, longest_first, size, options, halved)
    return works


def pair_memory(chat):
    """Peak memory of forward and backward of one pair, above weights and gradients, by each way to
    its log-probs."""
    ids = [i % chat.model.config.vocab_size for i in range(1500)]
    pair = sso.Pair(ids, winner=ids[:500], loser=ids[1000:])

    def run(pair_logps):
        logps, _ = pair_logps(chat.model, [[pair]], chat.pad_id)
        logps.sum().backward()

    run(fast.pair_logps)                # from here on there are gradients
    ways = {"ours": fast.pair_logps, **SWITCHED_OFF}
    if hasattr(functional, "linear_cross_entropy"):         # torch >= 2.13
        ways["F.linear_cross_entropy"] = by_library
    return {name: {"extra GiB": peak_memory(partial(run, pair_logps))}
            for name, pair_logps in ways.items()}


# ---- Beside TRL ----------------------------------------------------------------------------------

def make_trl_step(chat, optimizer, examples, settings, micro_batch=1):
    """`make_step` with forward and backward by TRL's DPOTrainer, so many pairs at a time. It
    changes the model's forward, which `fast.pair_logps` does not call."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    import trl.trainer.utils

    class TokensGiven(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    records = []
    for example in examples:
        for prompt, winner, loser in example:
            records.append({"prompt_ids": prompt, "chosen_ids": winner, "rejected_ids": loser})
    # On the CPU it would score every position.
    trl.trainer.utils._use_triton = lambda device: True
    # Its L_sft is a mean over a micro-batch's tokens: other numbers, but the same work.
    config = DPOConfig(tempfile.gettempdir(), per_device_train_batch_size=micro_batch, bf16=CUDA,
                       loss_type=["sigmoid", "sft"], loss_weights=[1.0, settings["gamma"]],
                       beta=settings["beta"], max_length=None, gradient_checkpointing=False,
                       precompute_ref_log_probs=True, train_sampling_strategy="sequential")
    trainer = TokensGiven(chat.model, args=config, train_dataset=Dataset.from_list(records),
                          processing_class=toy.make_tokenizer())
    batches = trainer.get_train_dataloader()
    trainer.current_gradient_accumulation_steps = len(batches)

    def backward(*_):
        return {"loss": sum(trainer.training_step(chat.model, batch) for batch in batches)}

    return make_step(chat, optimizer, examples, settings, backward)


def check_losses(load_model, settings):
    """UserError unless TRL and ours have the same losses over five steps, with γ = 0."""
    settings = settings | {"gamma": 0.0, "lr": 1e-5, "clip": 1e9}
    losses = []
    for make in (make_step, make_trl_step):
        chat = load_model()
        optimizer = train.make_optimizer(chat.model, settings["weight_decay"])
        # All steps are made, and the reference scored, before the first update.
        steps = [make(chat, optimizer, encoded([query], "sso"), settings)
                 for query in workload(5, chat)]
        losses.append(torch.stack([step()["loss"].mean() for step in steps]))   # of a pair
    difference = (losses[0] - losses[1]).abs().max()
    print(f"losses over five steps, γ = 0: TRL's differ from ours by {difference:.1e} at most")
    if not difference <= 1e-4:              # nor is it, if NaN
        raise files.UserError("the losses differ: the comparison is worth nothing")


def trl_works(chat, queries, settings):
    """{name: function} of a step of the generator: ours, TRL's in micro-batches of some sizes."""
    optimizer = train.make_optimizer(chat.model, settings["weight_decay"])
    examples = encoded(queries, "sso")
    works = {"generator step": make_step(chat, optimizer, examples, settings)}
    works["generator step"]()       # gradients and AdamW's state are there before it is measured
    for size in (1, 2, 4):
        works[f"TRL, micro-batches of {size}"] = make_trl_step(chat, optimizer, examples,
                                                               settings, size)
    return works


# ---- Command line --------------------------------------------------------------------------------

cli.CHOICES["vs"] = ["trl", "transformers"]
cli.HELP |= {"layers": "of the random model (2)", "queries": "of a step (2)",
             "answers": "to sample; 0: none (16)", "repeats": "of each measurement (3)",
             "vs": "this peer alone: trl in training, transformers in sampling",
             "worked_examples": "1: sampling behind the worked examples of step 1",
             "memory": "1: peak memory of a pair, instead"}


def bench(recipe, model=None, layers: int = 2, queries: int = 2, answers: int = 16,
          repeats: int = 3, vs=None, worked_examples: int = 0, memory: int = 0, results_file=None):
    """Measure, and print tables."""
    if vs == "trl" and find_spec("trl") is None:
        raise files.UserError("--vs trl: TRL is not installed: pip install trl==1.16.0")
    print(f"{model}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    chat = load(model, layers)
    if memory:
        rows = pair_memory(chat)
        print_table(rows, ["extra GiB"])
        if results_file:
            results.write(results_file, tables=[rows])
        return
    generator = recipe["generator"]
    work = workload(queries, chat, recipe["run"]["seed"])
    tables = []
    if vs == "trl":
        check_losses(partial(load, model, layers), generator)
        tables.append(trl_works(chat, work, generator))
    if not vs:
        tables.append(training_works(chat, work, generator))
    if answers and vs != "trl":
        prompts = prompts_to_sample(chat, answers, recipe["prompts"], worked_examples)
        tables.append(sampling_works(chat, prompts, recipe["responses"]))
    tables = [measure(works, repeats) for works in tables]
    for rows in tables:
        print_table(rows, COLUMNS)
    if results_file:
        results.write(results_file, tables=tables)


if __name__ == "__main__":
    cli.run(__doc__, ("bench", bench, ["responses"]))
