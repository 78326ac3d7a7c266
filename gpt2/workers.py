"""A pool of processes that leaves nobody behind: signals are the parent's, and when the parent dies, so do they."""

import contextlib
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from gpt2.errors import UserError


class Worker(multiprocessing.context.SpawnProcess):
    """A process whose termination is a kill: it ignores SIGTERM, and a broken executor would wait for it for ever."""

    def terminate(self):
        self.kill()


class Context(multiprocessing.context.SpawnContext):
    Process = Worker


@contextlib.contextmanager
def pool(count, initializer=None, *arguments):
    """A ProcessPoolExecutor of `count` fresh interpreters, the same on every system; each first calls the initializer.

    Left by an exception, Ctrl-C among them, it kills the workers at once. UserError where one of them was killed.
    """
    executor = ProcessPoolExecutor(count, Context(), start, (initializer, arguments))
    results, calls = executor._result_queue, executor._call_queue
    try:
        yield executor
        executor.shutdown()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory: fewer workers need less") from None
    except BaseException:
        manager = executor._executor_manager_thread
        executor.shutdown(wait=False)  # cancelled futures would make its thread fail, with a traceback, over the killed
        for worker in multiprocessing.active_children():
            worker.kill()
        # Killed in the middle of a result, or with calls on their way, they would leave the executor's threads, and so
        # the exit, waiting for the rest of the one and for room for the others.
        results._writer.close()
        if manager:
            manager.join(1)
        calls._reader.close()
        raise


def start(initializer, arguments):
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if initializer:
        initializer(*arguments)


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
