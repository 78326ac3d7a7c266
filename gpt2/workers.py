"""A pool of processes that leaves nobody behind: Ctrl-C is the parent's to handle, and when the parent dies, so do they."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def pool(count, initializer, *arguments):
    """A ProcessPoolExecutor of `count` fresh interpreters, the same on Linux, macOS and Windows; each first calls initializer(*arguments)."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start, (initializer, arguments))


def start(initializer, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    initializer(*arguments)


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
