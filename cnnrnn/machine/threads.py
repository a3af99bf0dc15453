"""Batches whose items are read in threads while other batches are computed, in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from cnnrnn.machine.devices import usable_cores, use_one_thread_if_forked

MAX_WORKERS = 8

In = TypeVar("In")
Out = TypeVar("Out")
Result = TypeVar("Result")


def default_workers() -> int:
    """Return a thread per core, up to 8."""
    return min(usable_cores(), MAX_WORKERS)


def batches_in_order(
    items: Iterable[In],
    read: Callable[[In], Out],
    begin: Callable[[list[Out]], Callable[[], Result]],
    *,
    batch_size: int,
    workers: int,
    torch_threads: Callable[[], int],
) -> Iterator[tuple[list[Out], Callable[[], Result]]]:
    """Read items in threads, and begin batches of them ahead of the one that is asked for.

    On a CPU as many batches are computed at once as torch has threads: a batch on one thread never
    waits, a batch on all of them would. They are computed in the reading threads: more threads than
    cores cost a tenth.

    Args:
        items: advanced in the caller's thread. Batches before an error in it are still returned.
        read: called in a thread.
        begin: starts a batch, and returns the function that finishes it.
        batch_size: items per batch.
        workers: threads; 0 does everything in the caller's thread, one batch after another.
        torch_threads: how many torch threads the batches may share, called in this thread at
            the start; 0 to begin them one after another, as on a GPU.

    Returns:
        Each batch with the function that finishes it.
    """
    use_one_thread_if_forked()
    if not workers:
        yield from _begun_ahead(map(read, items), begin, batch_size, ahead=0)
        return
    before = torch.get_num_threads()
    threads = min(torch_threads(), usable_cores())
    at_once = min(workers, threads)
    share = partial(torch.set_num_threads, threads // max(at_once, 1))
    with _pool(workers, share if at_once else None) as pool:
        read_items = mapped_in_order(read, items, pool, ahead=2 * batch_size)

        def begin_in_pool(batch: list[Out]) -> Callable[[], Result]:
            return pool.submit(lambda: begin(batch)()).result

        if not at_once:
            ahead = 1
        elif workers == at_once:
            ahead = at_once  # the last one waits for a thread
        else:
            ahead = at_once - 1
        try:
            started = begin_in_pool if at_once else begin
            yield from _begun_ahead(read_items, started, batch_size, ahead)
        finally:
            read_items.close()
            if at_once:
                torch.set_num_threads(before)  # a part of it is common to all threads


@contextmanager
def _pool(workers: int, begin: Callable[[], None] | None) -> Iterator[ThreadPoolExecutor]:
    """Start threads, and wait for them at the end, but not after Ctrl-C."""
    pool = ThreadPoolExecutor(workers, "cnnrnn", begin)
    interrupted = False
    try:
        yield pool
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        pool.shutdown(wait=not interrupted, cancel_futures=interrupted)


def mapped_in_order(
    function: Callable[[In], Out], items: Iterable[In], pool: ThreadPoolExecutor, *, ahead: int
) -> Generator[Out, None, None]:
    """Yield function(item) of each item in order, computed in threads.

    Args:
        function: called in a thread.
        items: advanced in the caller's thread.
        pool: the threads.
        ahead: at most this many items are taken before their turn.
    """
    pending: deque[Future[Out]] = deque()
    source = iter(items)
    try:
        failure = None
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:  # what came before it is answered first
                failure = error
                break
            pending.append(pool.submit(function, item))
            while pending and (len(pending) > ahead or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        for future in pending:
            future.cancel()


def _begun_ahead(
    items: Iterator[Out],
    begin: Callable[[list[Out]], Callable[[], Result]],
    batch_size: int,
    ahead: int,
) -> Iterator[tuple[list[Out], Callable[[], Result]]]:
    """Begin up to `ahead` batches before the one that is yielded."""
    begun: deque[tuple[list[Out], Callable[[], Result]]] = deque()
    failure: Exception | None = None
    while failure is None:
        batch: list[Out] = []
        try:
            batch.extend(itertools.islice(items, batch_size))
        except Exception as error:  # what came before it is answered first
            failure = error
        if batch:
            begun.append((batch, begin(batch)))
        elif failure is None:
            break
        if len(begun) > ahead:
            yield begun.popleft()
    while begun:
        yield begun.popleft()
    if failure is not None:
        raise failure
