"""Write a file in results/, with numbers and where they come from. And measure peak memory."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from plumbing.models import device
from plumbing.records import write_text

PROCESS = Path("/proc/self")        # what Linux tells about this process; nobody else does


def write(path, **numbers):
    """Write a file of results. Its command is the one that runs now."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                         capture_output=True, text=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    origin = {"command": " ".join(["python", *sys.orig_argv[1:]]), "machine": machine,
              "commit": git.stdout.strip() or "unknown", "versions": versions}
    write_text(path, json.dumps(origin | numbers, indent=1) + "\n")


def sha256(model):
    """{name: SHA-256} of a checkpoint's files of weights."""
    digests = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def begin_peak():
    """Forget the peak of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")


def peak_bytes():
    """The most memory since `begin_peak`: of torch's allocator on CUDA, else the resident memory of
    the process. None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if PROCESS.exists():
        found = re.search(r"VmHWM:\s+(\d+)", (PROCESS / "status").read_text())
        return 1024 * int(found[1])
