"""The thread pool: same sums for any number of threads, from many callers at once, and on both sides of a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from irlvla import _C


def run(script: str, timeout: float = 60.0) -> None:
    """In a process of its own, so that what hangs or dies is a failed test and not the end of the tests."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [-1, 0, *range(1, 9)])
def test_every_task_runs_once(threads: int) -> None:
    for tasks in (0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 100_003):
        assert _C.parallel_selftest(tasks, threads) == tasks * (tasks - 1) // 2


def test_many_small_jobs() -> None:
    for job in range(20_000):
        tasks = job % 13
        assert _C.parallel_selftest(tasks, 1 + job % 8) == tasks * (tasks - 1) // 2


def test_callers_at_once() -> None:
    def call(caller: int) -> bool:
        return all(_C.parallel_selftest(tasks, 1 + (caller + tasks) % 8) == tasks * (tasks - 1) // 2 for tasks in range(500))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(16)))


def test_available_threads() -> None:
    assert 1 <= _C.available_threads() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_available_threads_follow_the_affinity_mask() -> None:
    run("""
        import os
        from irlvla import _C
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert _C.available_threads() == 1
    """)


def test_fork_while_the_pool_works() -> None:
    """Each child finds a pool in some state or other that it can never use: it must build its own, and so must its child."""
    run("""
        import os, threading, warnings
        from irlvla import _C

        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what we are here for
        SUM = 1000 * 999 // 2
        done = threading.Event()

        def work():
            while not done.is_set():
                assert _C.parallel_selftest(1000, 4) == SUM

        def check_in_child(depth):
            pid = os.fork()
            if pid == 0:
                try:
                    assert all(_C.parallel_selftest(1000, threads) == SUM for threads in range(1, 9))
                    if depth:
                        check_in_child(depth - 1)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        try:
            for _ in range(50):
                check_in_child(1)
        finally:
            done.set()
        assert _C.parallel_selftest(1000, 4) == SUM
    """)


def test_forked_workers_use_it() -> None:
    """As a DataLoader's workers do."""
    run("""
        import multiprocessing
        from irlvla import _C

        def call(tasks):
            return _C.parallel_selftest(tasks, 4)

        assert call(1000) == 1000 * 999 // 2
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert pool.map(call, range(300)) == [n * (n - 1) // 2 for n in range(300)]
    """)


def test_exit_while_the_pool_works() -> None:
    """A daemon thread in the middle of a job neither keeps the interpreter from ending nor brings it down."""
    run("""
        import threading, time
        from irlvla import _C

        def work():
            while True:
                _C.parallel_selftest(100_000, 4)

        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
    """)
