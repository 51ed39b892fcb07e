"""Worker processes that prepare batches, and what happens when one of them dies."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator

import torch

from plumbing.files import BadData

PREFETCH = 4  # batches that each worker prepares ahead; 2 if they are pinned for a GPU


def identity(batch):
    return batch


def start_worker(_: int) -> None:
    """Runs first in each worker process."""
    torch.set_num_threads(1)
    # Ctrl-C, and a SIGTERM that `timeout` sends to the whole process group, must reach only the
    # main process, which has a step to finish: so each worker leaves the group. A SIGTERM to the
    # worker itself still ends it.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_workers(
    dataset: torch.utils.data.Dataset, order: Iterator, workers: int, *, pin: bool = False
) -> Iterator:
    """`dataset.__getitems__(keys)` for each list of keys in `order`, prepared ahead by processes.

    A BadData that it returns is raised here. ChildProcessError: a worker died.
    """
    if workers and len(tempfile.gettempdir()) > 80 and os.path.isdir("/tmp"):
        tempfile.tempdir = "/tmp"  # tensors travel through sockets, whose paths have 108 bytes
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=identity,
        pin_memory=pin,
        worker_init_fn=start_worker,
        prefetch_factor=(2 if pin else PREFETCH) if workers else None,
        generator=torch.Generator(),  # else it would use up numbers of the global one
    )
    # PyTorch's SIGCHLD handler can raise anywhere, even while a checkpoint is being written.
    # So the handler from before goes back; waiting for a batch notices a dead worker within 5 s.
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    stream = iter(loader)
    if handler is not None and main_thread:
        signal.signal(signal.SIGCHLD, handler)
    try:
        for batch in stream:
            if isinstance(batch, BadData):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        ours = "DataLoader worker", "Pin memory thread"
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in ours):
            raise
        raise ChildProcessError(
            f"a data worker died ({repr(error).splitlines()[0]}). If it was killed, memory or "
            f"/dev/shm ran out: use fewer --workers (now {workers}) or a smaller --batch-size"
        ) from error
