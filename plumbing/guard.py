"""What stands around a command: one process a folder, signals that end it in good order, and errors
of one line."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from safetensors import SafetensorError

from plumbing import memory
from plumbing.files import UserError

try:
    import fcntl                # Windows has none
except ImportError:
    fcntl = None

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# ---- One process a folder ------------------------------------------------------------------------

def holder(file):
    """The process that has locked an open file or folder, in words: Linux knows its number."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(os.fstat(file).st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].split(":")[-1] == inode:
                return f"process {words[4]}"
    return "another process"


@contextlib.contextmanager
def locked(out, is_folder):
    """Hold the folder OUT and what is in it, or the file OUT, while a command writes there.
    UserError if another process does, or nothing can be written. The kernel ends a lock with its
    process, however that dies."""
    folder = Path(out) if is_folder else Path(out).parent
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(remove_empty, made)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--out {out}: nothing can be written there ({error.strerror})"
                            ) from None
        if fcntl and int(os.environ.get("RANK", 0)) == 0:       # of one training's processes, one
            lock_all(folder, None if is_folder else Path(out), cleanup)
        try:
            yield
        except (OSError, SafetensorError) as error:
            if "No space" in str(error) or "File too large" in str(error):
                raise UserError(f"{out}: no disk space ({error}); what was finished is kept, the "
                                "same command continues") from None
            raise


def lock_all(folder, file, cleanup):
    """The folder, or the file by a lock file beside it, for this process alone; and a share of each
    folder above, which a command there may hold as its own."""
    above = list(folder.resolve().parents)
    if file is None:
        lock(folder, os.open(folder, os.O_RDONLY), fcntl.LOCK_EX, cleanup)
    else:
        beside = folder / f".{file.name}.lock"
        lock(folder, os.open(beside, os.O_CREAT | os.O_RDONLY), fcntl.LOCK_EX, cleanup)
        cleanup.callback(beside.unlink, missing_ok=True)
        above.insert(0, folder)
    for place in above:
        with contextlib.suppress(PermissionError):      # a folder that may not be read
            lock(place, os.open(place, os.O_RDONLY), fcntl.LOCK_SH, cleanup)


def lock(folder, file, share, cleanup):
    cleanup.callback(os.close, file)
    try:
        fcntl.flock(file, share | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{holder(file)} is at work in {folder}; wait for its end, or choose "
                        "another --out") from None
    except OSError:                     # a file system without locks, as some that are mounted
        pass


def remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):              # it holds something
            folder.rmdir()


# ---- Signals -------------------------------------------------------------------------------------

def interrupt(*_):
    raise KeyboardInterrupt


@contextlib.contextmanager
def handled(handler):
    """Signals that stop a program go to a handler, but for those that it was told to ignore, as by
    nohup."""
    before = {stop: signal.getsignal(stop) for stop in STOPS}
    if threading.current_thread() is not threading.main_thread():
        before = {}                     # signals are the main thread's
    taken = [stop for stop in before if before[stop] != signal.SIG_IGN]
    try:
        for stop in taken:
            signal.signal(stop, handler)
        yield
    finally:
        for stop in taken:
            signal.signal(stop, before[stop])


@contextlib.contextmanager
def uninterrupted():
    """Hold Ctrl-C and its kin back until the end of the block, so that it is done wholly or not at
    all."""
    held = []
    with handled(lambda *_: held.append(True)):
        yield
    if held:
        raise KeyboardInterrupt


# ---- Errors --------------------------------------------------------------------------------------

def reason(error):
    """What went wrong, in one line, and what to do."""
    if isinstance(error, UserError):
        return str(error)
    if memory.ran_out(error):
        return f"{error}; lower --micro-batch-tokens (training), --batch-size (sampling)"
    if isinstance(error, (OSError, SafetensorError)):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where; a bug of this project, likely)"


@contextlib.contextmanager
def guarded(debug):
    """Bad input, a full disk, Ctrl-C, SIGTERM and SIGHUP end in one line, and a code that is not
    zero; what is no bad input has its traceback with --debug."""
    for stream in (sys.stdout, sys.stderr):     # a terminal that cannot show y- shows something
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with handled(interrupt):
            yield
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command continues where it stopped")
    except Exception as error:
        if debug:
            raise
        sys.exit("error: " + " ".join(reason(error).split()))
