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
from plumbing import command, fast
from plumbing.models import Chat, autocast, device, load_chat
from plumbing.plaintext import PlainText
from plumbing.records import read_queries
from plumbing.sampling import load_sampler, sample
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


def workload(n, chat, seed=0):
    """n examples of the generator, of random tokens, in realistic lengths: query 50-400 tokens,
    principle 100-200, response log-normal of mean 250 and standard deviation 200."""
    rng = random.Random(seed)

    def text(length):
        return rng.choices(range(chat.model.config.vocab_size), k=round(length))

    examples = []
    for _ in range(n):
        query = text(rng.uniform(50, 400))
        good, bad = [text(rng.uniform(100, 200)) + query for _ in range(2)]
        chosen, rejected, original = [text(rng.lognormvariate(5.274, 0.7034)) for _ in range(3)]
        examples.append([sso.Pair(good, chosen, rejected), sso.Pair(bad, original, chosen)])
    return examples


# ---- Measuring -----------------------------------------------------------------------------------

def timed(run):
    """[seconds, seconds of the processor] of a run."""
    began = time.perf_counter(), time.process_time()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return [time.perf_counter() - began[0], time.process_time() - began[1]]


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


def measure(works, repeats):
    """{name: row of a table} of {name: function}. The ratio is to the first one's time."""
    rows = {name: {"extra GiB": peak_memory(run)} for name, run in works.items()}
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, run in works.items():
            times[name].append(timed(run))
    for name, row in rows.items():
        row["s"], row["CPU-s"] = map(statistics.median, zip(*times[name]))
        row["ratio"] = row[CLOCK] / next(iter(rows.values()))[CLOCK]
    return rows


# ---- Training ------------------------------------------------------------------------------------

def library_logps(hidden, head, targets):
    """`fast.token_logps` by torch, 2.13 or later."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=fast.CHUNK)
    return -F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)


def by_library(*batch):
    """`fast.pair_logps` with torch's head."""
    with mock.patch.object(fast, "token_logps", library_logps):
        return fast.pair_logps(*batch)


FORMS = {"ours": fast.pair_logps, "F.linear_cross_entropy": by_library,
         "plain form": sso.pair_logps}


def gradient(chat, examples, form):
    """Log-probs by one of the forms, forward and backward, an example at a time."""
    for example in examples:
        with autocast():
            logps, _ = form(chat.model, [example], chat.pad_id)
        logps.sum().backward()


def make_step(chat, examples, settings, optimizer, backward=train.accumulate_gradient):
    """A function: one whole step of `train.fit` on examples. It returns the parts of the loss."""
    ref_logps, _ = score(chat, examples)

    def loss(group):
        logps, tokens = chat.pair_logps(chat.model, [examples[i] for i in group], chat.pad_id)
        return sso.sso_loss(logps, ref_logps[:, :, group], tokens, **settings)

    def step():
        optimizer.zero_grad()
        parts = backward(chat, examples, range(len(examples)), loss, settings)
        torch.nn.utils.clip_grad_norm_(chat.model.parameters(), settings["clip"])
        optimizer.step()
        return parts
    return step


def make_trl_step(chat, examples, settings, optimizer):
    """`make_step` by TRL, a pair at a time, at which it is fastest. The numbers are the same:
    tests/test_trl.py."""
    settings = settings | {"batch_size": len(examples)}
    config = trl_generator.make_config(tempfile.gettempdir(), settings)
    import trl.trainer.utils
    trl.trainer.utils._use_triton = lambda device: True     # or it scores all positions, on a CPU
    trainer = trl_generator.make_trainer(chat, trl_generator.make_rows(examples), config, settings)
    batches = trainer.get_train_dataloader()
    trainer.current_gradient_accumulation_steps = len(batches)

    def backward(*_):
        return {"loss": sum(trainer.training_step(chat.model, batch) for batch in batches)}

    return make_step(chat, examples, settings, optimizer, backward)


def training_works(chat, examples, settings, vs=None):
    """{name: function}: a step of the generator; and either TRL's, or the reference pass and the
    gradient by each form."""
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

def ours(chat, chats, settings):
    """Responses to a batch of chats."""
    return [response.text for response in sample(chat, chats, map(str, chats), settings).responses]


def library(chat, chats, settings):
    """`ours` by transformers' `generate`."""
    tokenizer = chat.tokenizer.tokenizer
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True,
                                          return_tensors="pt", return_dict=True).to(device)
    config = GenerationConfig(
        max_new_tokens=settings["max_new_tokens"], do_sample=settings["temperature"] > 0,
        temperature=settings["temperature"] or 1.0, top_p=settings["top_p"], top_k=0,
        eos_token_id=chat.stop_ids, pad_token_id=chat.pad_id)
    found = chat.model.generate(**batch, generation_config=config)
    return tokenizer.batch_decode(found[:, batch.input_ids.shape[1]:], skip_special_tokens=True)


def in_batches(function, chat, chats, settings):
    """Responses to all chats, in the batches of generate.py."""
    size = settings["batch_size"]
    responses = []
    for start in range(0, len(chats), size):
        responses += function(chat, chats[start:start + size], settings)
    return responses


def sampling_works(chat, chats, settings):
    """{name: function}: sampling and greedy choice. Ours has the longest chats first, as in
    plumbing/outputs.py."""
    longest_first = sorted(chats, key=lambda messages: -len(str(messages)))
    works = {}
    for name, temperature in (("sampling", settings["temperature"]), ("greedy", 0.0)):
        changed = settings | {"temperature": temperature}
        works[name] = partial(in_batches, ours, chat, longest_first, changed)
        works[f"{name}, transformers"] = partial(in_batches, library, chat, chats, changed)
    return works


# ---- Command line --------------------------------------------------------------------------------

command.CHOICES["vs"] = ["trl", "transformers"]


def bench(recipe, model=None, layers: int = 2, queries: int = 2, answers: int = 32,
          repeats: int = 3, vs=None, memory: int = 0, results_file=None):
    """Measure, and print a table."""
    if vs == "transformers":
        chats = [record["prompt"] for record in read_queries("data/queries.jsonl")[:answers]]
        works = sampling_works(load_sampler(model), chats, recipe["responses"])
    else:
        chat = load_chat(model, "fast") if model else random_chat("Qwen2.5-0.5B", layers)
        works = training_works(chat, workload(queries, chat), recipe["generator"], vs)
    if memory:
        ids = [i % chat.model.config.vocab_size for i in range(1500)]
        works = forms(chat, [[sso.Pair(ids, ids[:500], ids[1000:])]])
    rows = measure(works, repeats)
    print(f"{model}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print_table(rows, COLUMNS)
    if results_file:
        results.write(results_file, tables=[rows])


if __name__ == "__main__":
    command.run(__doc__, bench)
