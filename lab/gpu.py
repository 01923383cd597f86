"""What a GPU alone can show, in one call: log-probs in bf16, decoding, a step's share of the card.

    python -m lab.gpu --results-file results/gpu.json       # on a CPU: tiny, to see that it runs

Weights and tokens are random. `difference` is the largest relative error of log-probs against the
plain form in fp32. `equal` is the share of greedy answers, in fp32, that are the same in a batch as
alone.
A step's share of the peak counts 6 operations a weight and token and none for attention, as is
usual. The peak is that of a large matrix product.
"""

import random
from functools import partial

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import sso
import train
from lab import bench, results
from plumbing import command, memory, sampling
from plumbing.models import device
from plumbing.recipes import stage_settings
from plumbing.records import UserError
from plumbing.scoring import score
from plumbing.tables import print_table

SHAPES = ["tiny"]
ROWS = [4]          # of a batch of decoding
NEW = 4             # tokens of an answer
QUERIES = 1         # of a step
SIZE = 64           # of a large matrix
REQUESTS = 4        # of sampling, as vLLM's and nano-vllm's benchmarks have them
LENGTHS = (4, 16)   # tokens of a request's prompt, and of its answer: from, to
LAYERS = 2
if bench.CUDA:
    SHAPES = ["Qwen2.5-0.5B", "Qwen2.5-1.5B"]
    ROWS = [64, 256, 1024]
    NEW = 64
    QUERIES = 8
    SIZE = 8192
    REQUESTS = 256
    LENGTHS = (100, 1024)
    LAYERS = 28
COLUMNS = ["s", "extra GiB", "share of peak", "difference", "equal", "tokens/s"]


def work(shape):
    """A model of a shape, and examples for it."""
    chat = bench.random_chat(shape)
    return chat, bench.workload(QUERIES, chat)


def log_probs(name):
    """A row of a table: one form of log-probs and their gradient, in the precision of training."""
    chat, examples = work(SHAPES[0])
    with torch.no_grad():
        plain = [sso.pair_logps(chat.model, [example], 0)[0] for example in examples]
    row = f"gradient, {name}"
    rows = bench.measure({row: bench.forms(chat, examples)[row]}, 3)
    logps, _ = score(chat._replace(pair_logps=bench.FORMS[name]), examples, 1)
    rows[row]["difference"] = f"{(logps / torch.cat(plain, 2) - 1).abs().max():.1e}"
    return rows


def decoding():
    """Rows of a table: many rows at once, beside each alone in fp32, and in bf16."""
    chat, examples = work(SHAPES[0])
    prompts = [pair.prompt for pair in sum(examples, [])]

    def decode(prompts, temperature=0.0):
        randoms = [random.Random(row) for row in range(len(prompts))]

        def choose(logits, rows):
            return sampling.draw(logits, [randoms[i] for i in rows], temperature, top_p=0.8)
        return sampling.decode(chat, prompts, choose, lambda i, ids: len(ids) == NEW)

    alone = [decode([prompt])[0] for prompt in prompts]
    equal = sum(a == b for a, b in zip(decode(prompts), alone))
    rows = {"decoding, fp32": {"equal": equal / len(prompts)}}
    chat.model.bfloat16()
    for n in ROWS:
        name = f"decoding, bf16, {n} rows"
        rows |= bench.measure({name: partial(decode, (prompts * n)[:n], 0.7)}, 1)
        rows[name]["tokens/s"] = n * NEW / rows[name]["s"]
    return rows


def requests():
    """A row of a table: tokens a second of sampling requests, all of them at once, in bf16. Weights
    are random, of Qwen3-0.6B's shape. The published numbers: nano-vllm 1,434 and vLLM 1,362 on an
    RTX 4070 for laptops, nano-vllm 3,038 on an A10G."""
    with device:
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=LAYERS,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True))
    chat = bench.random_chat("tiny")._replace(model=model.bfloat16().eval())
    rng = random.Random(0)
    prompts = [rng.choices(range(10_000), k=rng.randint(*LENGTHS)) for _ in range(REQUESTS)]
    prompts.sort(key=len, reverse=True)
    limits = [rng.randint(*LENGTHS) for _ in range(REQUESTS)]
    randoms = [random.Random(i) for i in range(REQUESTS)]

    def sample():
        def choose(logits, rows):
            return sampling.draw(logits, [randoms[i] for i in rows], 0.6, top_p=1.0)
        sampling.decode(chat, prompts, choose, lambda i, ids: len(ids) == limits[i])

    rows = bench.measure({"requests": sample}, 1)
    rows["requests"]["tokens/s"] = sum(limits) / rows["requests"]["s"]
    return rows


def generator_step(shape, recipe, peak, limit=None):
    """A row of a table: a step with all layers, in micro-batches of what fits. The plan sees the
    whole card; with a limit they are halved until they fit."""
    name = f"generator step, {shape}"
    if limit:
        name += f", in {limit / 1e9:.0f} GB"
    if limit and bench.CUDA:
        torch.cuda.empty_cache()
        card = torch.cuda.get_device_properties(0)
        torch.cuda.set_per_process_memory_fraction(limit / card.total_memory)
    chat, examples = work(shape)
    settings = stage_settings(recipe, "generator")
    memory.plan(chat, examples, settings)
    optimizer = train.make_optimizer(chat.model, settings["weight_decay"])
    rows = bench.measure({name: bench.make_step(chat, examples, settings, optimizer)}, 3)
    head = chat.model.get_output_embeddings().weight.numel()
    operations = 0
    for prompt, winner, loser in sum(examples, []):
        operations += 6 * (chat.model.num_parameters() - head) * len(prompt + winner + loser)
        operations += 6 * head * len(winner + loser)
    rows[name]["share of peak"] = operations / rows[name]["s"] / peak
    return rows


def gpu(recipe, results_file=None):
    """Measure all of it. The table grows, and what fails is printed and left out."""
    matrix = torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16)
    rows = bench.measure({"matrix product": lambda: matrix @ matrix}, 5)
    peak = 2 * SIZE ** 3 / rows["matrix product"]["s"]
    parts = [partial(log_probs, name) for name in bench.FORMS] + [decoding]
    for shape in SHAPES:
        parts.append(partial(generator_step, shape, recipe, peak))
    parts.append(requests)
    parts.append(partial(generator_step, SHAPES[0], recipe, peak, 16e9))
    for part in parts:
        try:
            rows |= part()
        except (RuntimeError, UserError) as error:      # memory ran out; a head knows no bf16
            print(f"{part}: {error}")
        print(f"{device}, peak {peak / 1e12:.3g} TFLOP/s")
        print_table(rows, COLUMNS)
        if results_file:
            results.write(results_file, tables=[rows], peak=peak)


if __name__ == "__main__":
    command.run(__doc__, gpu)
