from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cnnrnn.machine.memory import Budget


def test_never_more_than_the_total_is_out_and_all_get_theirs() -> None:
    budget, lock = Budget(10), threading.Lock()
    out, most = [0, 0], [0, 0]  # amounts and threads

    def take(amount: int) -> int:
        with budget.share(amount):
            with lock:
                out[0], out[1] = out[0] + min(amount, 10), out[1] + 1
                most[:] = map(max, most, out)
            time.sleep(0.001)
            with lock:
                out[0], out[1] = out[0] - min(amount, 10), out[1] - 1
        return amount

    amounts = random.Random(0).choices([0, 1, 2, 7, 10, 11, 500], k=300)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(take, amounts)) == amounts
    assert most[0] <= 10 and most[1] > 1 and out == [0, 0]


def test_what_is_larger_than_the_total_is_alone() -> None:
    budget, entered = Budget(10), threading.Event()

    def take() -> None:
        with budget.share(11):
            entered.set()

    with budget.share(1):
        thread = threading.Thread(target=take)
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()


def test_who_waits_for_much_is_not_overtaken() -> None:
    budget, order = Budget(10), []

    def take(amount: int) -> None:
        with budget.share(amount):
            order.append(amount)

    with budget.share(5):
        threads = [threading.Thread(target=take, args=(amount,)) for amount in (10, 1)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [10, 1]


def test_a_share_comes_back_after_an_error() -> None:
    budget = Budget(1)
    for _ in range(2):
        with pytest.raises(KeyError), budget.share(1):
            raise KeyError
    with budget.share(1):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_starts_with_all_of_it() -> None:
    budget, taken, go = Budget(10), threading.Event(), threading.Event()

    def take() -> None:
        with budget.share(10):
            taken.set()
            go.wait()

    thread = threading.Thread(target=take)
    thread.start()
    taken.wait()
    child = os.fork()
    if child == 0:
        with budget.share(10):
            os._exit(0)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
    go.set()
    thread.join()
    assert done and os.waitstatus_to_exitcode(status) == 0
