"""What others feel while a call runs: for tests that no input of a stranger stops everybody else.

with watch() as ticks:       # in this process: how long the interpreter's lock was kept
    load(hostile)
assert ticks.longest_s < 0.2

with watch(lambda: httpx.get(f"{url}/livez"), clock=time.perf_counter) as ticks:  # of a server, from outside
    send(hostile)
"""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PERIOD_S = 0.01


@dataclass
class Ticks:
    """Seconds from one tick to the next, at their longest, and how many there were."""

    longest_s: float = 0.0
    count: int = 0


@contextmanager
def watch(
    beat: Callable[[], object] = lambda: None, *, clock: Callable[[], float] = time.process_time
) -> Iterator[Ticks]:
    """Call `beat` every 10 ms in a thread of its own while the block runs.

    Objects from before are left out of collections of garbage meanwhile: these would take as long as there are many.
    The default clock counts the CPU time of this process, so that a busy machine does no harm: between two ticks it
    grows by more than a few milliseconds only when the tick could not run, since another thread kept the lock.
    """
    ticks, stop = Ticks(), threading.Event()

    def tick() -> None:
        last = clock()
        while not stop.is_set():
            time.sleep(PERIOD_S)
            beat()
            now = clock()
            ticks.longest_s, ticks.count, last = max(ticks.longest_s, now - last), ticks.count + 1, now

    thread = threading.Thread(target=tick)
    gc.freeze()
    thread.start()
    try:
        yield ticks
        time.sleep(2 * PERIOD_S)  # a tick that was held up is counted
    finally:
        stop.set()
        thread.join()
        gc.unfreeze()
