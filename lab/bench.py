"""What a step costs in time and memory: ours beside the plain form, torch, transformers and TRL.

    python -m lab.bench                         # Qwen2.5-0.5B's shape, two layers, random weights
    python -m lab.bench --model M               # a checkpoint
    python -m lab.bench --layers 24 --vs trl    # all layers, beside TRL (pip install trl==1.16.0)
    python -m lab.bench --memory 1              # a pair of 2,500 tokens, 1,000 of them response
    python -m lab.bench --model M --vs transformers --set responses.max_new_tokens=96    # sampling

What is compared takes turns, and medians are printed. On a busy machine trust CPU-s, seconds of the
processor, more than s, and set OMP_NUM_THREADS=1. Memory is the peak above what was held before, in
a pass of its own.
"""

import ctypes
import gc
import random
import statistics
import tempfile
import time
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import sso
import train
from lab import results, trl_generator
from plumbing import command, fast, sampling
from plumbing.models import Chat, autocast, device, load_chat
from plumbing.plaintext import PlainText
from plumbing.recipes import stage_settings
from plumbing.records import UserError, read_queries
from plumbing.scoring import score
from plumbing.tables import print_table
from toy import world

CUDA = device.type == "cuda"
CLOCK = "s" if CUDA else "CPU-s"         # what the ratio is of
COLUMNS = ["s", "CPU-s", "ratio", "extra GiB"]
SHAPES = {      # hidden size, intermediate size, layers, heads, vocabulary
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 151_936), "Qwen2.5-1.5B": (1536, 8960, 28, 12, 151_936),
    "tiny": (64, 128, 2, 4, 500)}


# ---- The work ------------------------------------------------------------------------------------

def random_chat(shape, layers=None):
    """A Qwen2 of a shape, or of so many of its layers, with random weights."""
    hidden, intermediate, depth, heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
            num_hidden_layers=layers or depth, num_attention_heads=heads, num_key_value_heads=2,
            tie_word_embeddings=True))
    return Chat(model.eval(), PlainText(world.make_tokenizer()), stop_ids=[], end_id=0, pad_id=0,
                context=32_768, window=0, pair_logps=fast.pair_logps)


def workload(n, chat):
    """n examples of the generator with random tokens. Prompts have 150 to 600 tokens, responses 50
    to 450."""
    rng = random.Random(0)

    def text(least, most):
        return rng.choices(range(chat.model.config.vocab_size), k=rng.randint(least, most))

    examples = []
    for _ in range(n):
        y_good = text(50, 450)
        examples.append([sso.Pair(text(150, 600), winner=y_good, loser=text(50, 450)),      # L+
                         sso.Pair(text(150, 600), winner=text(50, 450), loser=y_good)])     # L-
    return examples


# ---- Measuring -----------------------------------------------------------------------------------

def peak_memory(run):
    """How many GiB the peak of a run takes above what was held before it."""
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


def measure(works, repeats):
    """{name: row of a table} for {name: function}. The ratio is to the time of the first one."""
    rows = {name: {"extra GiB": peak_memory(run)} for name, run in works.items()}
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, run in works.items():
            began = time.perf_counter()
            cpu_began = time.process_time()
            run()
            if CUDA:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began, time.process_time() - cpu_began))
    for name, row in rows.items():
        row["s"], row["CPU-s"] = map(statistics.median, zip(*times[name]))
        row["ratio"] = row[CLOCK] / next(iter(rows.values()))[CLOCK]
    return rows


# ---- Training ------------------------------------------------------------------------------------

def by_checkpoints(*batch):
    """`fast.pair_logps` as it is under autocast, and with torch before 2.13."""
    with mock.patch.dict(vars(F)):      # what is taken out comes back
        vars(F).pop("linear_cross_entropy", None)
        return fast.pair_logps(*batch)


FORMS = {"ours": fast.pair_logps, "ours, head by checkpoints": by_checkpoints,
         "plain form": sso.pair_logps}


def gradient(chat, examples, form):
    """Log-probs by one of the forms, forward and backward, an example at a time."""
    for example in examples:
        with autocast():
            logps, _ = form(chat.model, [example], chat.pad_id)
        logps.sum().backward()


def make_step(chat, examples, settings, optimizer, backward=train.accumulate_gradient):
    """A function: one whole step of `train.fit` on examples."""
    ref_logps, _ = score(chat, examples)

    def loss(group):
        logps, tokens = chat.pair_logps(chat.model, [examples[i] for i in group], chat.pad_id)
        return sso.sso_loss(logps, ref_logps[:, :, group], tokens, **settings)

    def step():
        optimizer.zero_grad()
        backward(chat, examples, range(len(examples)), loss, settings)
        torch.nn.utils.clip_grad_norm_(chat.model.parameters(), settings["clip"])
        optimizer.step()
    return step


def make_trl_step(chat, examples, settings, optimizer):
    """`make_step` by TRL, one pair at a time, at which it is fastest. The numbers are the same
    (tests/test_trl.py)."""
    settings = settings | {"batch_size": len(examples)}
    config = trl_generator.make_config(tempfile.gettempdir(), settings)
    import trl.trainer.utils
    trl.trainer.utils._use_triton = lambda device: True     # or it scores all positions, on a CPU
    trainer = trl_generator.make_trainer(chat, trl_generator.make_rows(examples), config, settings)
    batches = list(trainer.get_train_dataloader())
    trainer.current_gradient_accumulation_steps = len(batches)

    def backward(*_):
        for batch in batches:
            trainer.training_step(chat.model, batch)

    return make_step(chat, examples, settings, optimizer, backward)


def training_works(chat, examples, settings, vs=None):
    """{name: function}: a step of the generator, and beside it TRL's step, or else the reference
    pass and the gradient by each form."""
    optimizer = train.make_optimizer(chat.model, settings["weight_decay"])
    works = {"generator step": make_step(chat, examples, settings, optimizer)}
    works["generator step"]()       # so that AdamW's state is there before memory is measured
    if vs == "trl":
        return works | {"TRL": make_trl_step(chat, examples, settings, optimizer)}
    return works | {"reference pass": partial(score, chat, examples)} | forms(chat, examples)


def forms(chat, examples):
    """{name: function}: the gradient of log-probs by each form."""
    gradient(chat, examples[:1], fast.pair_logps)   # so that there are gradients beforehand
    return {f"gradient, {name}": partial(gradient, chat, examples, form)
            for name, form in FORMS.items()}


# ---- Sampling ------------------------------------------------------------------------------------

def by_generate(settings, chat, prompts, *others):
    """`sampling.decode` by transformers' `generate`, which samples by the settings."""
    batch = chat.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    temperature = settings["temperature"]
    config = GenerationConfig(
        max_new_tokens=settings["max_new_tokens"], do_sample=temperature > 0, top_k=0,
        temperature=temperature or 1.0, top_p=settings["top_p"], eos_token_id=chat.stop_ids,
        pad_token_id=chat.pad_id)
    found = chat.model.generate(**batch.to(device), generation_config=config)
    answers = []
    for ids in found[:, batch.input_ids.shape[1]:].tolist():
        ends = [i + 1 for i, token in enumerate(ids) if token in chat.stop_ids]
        answers.append(ids[:min(ends, default=len(ids))])
    return answers


def respond(chat, chats, settings, decode=sampling.decode):
    """Responses to all chats, in batches."""
    size = settings["batch_size"]
    responses = []
    with mock.patch.object(sampling, "decode", decode):
        for start in range(0, len(chats), size):
            batch = chats[start:start + size]
            responses += sampling.sample(chat, batch, map(str, batch), settings)
    return responses


def sampling_works(chat, chats, settings):
    """{name: function}. Ours samples the longest chats first, as plumbing/outputs.py does."""
    longest_first = sorted(chats, key=lambda messages: -len(str(messages)))
    peer = partial(by_generate, settings)
    return {"sampling": partial(respond, chat, longest_first, settings),
            "sampling, generate": partial(respond, chat, chats, settings, peer)}


# ---- Command line --------------------------------------------------------------------------------

command.CHOICES["vs"] = ["trl", "transformers"]


def bench(recipe, model=None, layers: int = 2, count: int = 2, answers: int = 32,
          repeats: int = 3, vs=None, memory: int = 0, results_file=None):
    """Measure, and print a table."""
    if vs == "transformers" and not model:
        raise UserError("--vs transformers goes with --model")
    if vs == "transformers":
        chats = [record["prompt"] for record in read_queries("data/queries.jsonl")[:answers]]
        works = sampling_works(sampling.load_sampler(model), chats, recipe["responses"])
    else:
        chat = load_chat(model, "fast") if model else random_chat("Qwen2.5-0.5B", layers)
        if memory:
            ids = [i % 200 for i in range(1500)]
            works = forms(chat, [[sso.Pair(ids, ids[:500], ids[1000:])]])
        else:
            settings = stage_settings(recipe, "generator")
            works = training_works(chat, workload(count, chat), settings, vs)
    rows = measure(works, repeats)
    print(f"{model}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print_table(rows, COLUMNS)
    if results_file:
        results.write(results_file, tables=[rows])


if __name__ == "__main__":
    command.run(__doc__, bench)
