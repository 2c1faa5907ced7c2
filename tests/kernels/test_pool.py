"""The pool for CPU tensors: in a process of its own, since it is there to stay."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lorica.kernels.pool import has_pool

# Each function is an experiment, in this order: the first one needs a pool without holes.
EXPERIMENTS = """
import gc, json, os, random, resource, signal, threading
import torch
from lorica.kernels.pool import install_pool, pool_bytes
from lorica.training.heap import filled_bytes
old = torch.arange(5.0)
assert install_pool() and install_pool()

def replay():
    random.seed(0)
    sizes, events, held = [], [], {}
    before = pool_bytes()
    for _ in range(3000):
        if held and random.random() < 0.5:
            number = random.choice(list(held))
            events.append((number, -1)); del held[number]
        else:
            sizes.append(random.choice([1, 64, 1000, 4097, 70_000, 1_000_000]))
            events.append((len(sizes) - 1, 1)); held[len(sizes) - 1] = torch.empty(sizes[-1], dtype=torch.uint8)
    return [pool_bytes() - before, filled_bytes(sizes, events, len(events), 0)]

def contents():
    random.seed(0)
    held, wrong = {}, 0
    for i in range(4000):
        key = random.randrange(60)
        if key in held:
            value, size = held.pop(key)
            wrong += not (bool((value == key).all()) and value.numel() == size and value.data_ptr() % 64 == 0)
        else:
            size = random.randrange(1, 60_000)
            held[key] = (torch.full((size,), key, dtype=torch.int32), size)
    return [wrong, old.tolist(), torch.empty(0).numel(), torch.ones(5).numpy().sum().item()]

def steps():
    def step():
        kept = [torch.empty(1_000_000 + 64 * (i % 7)).fill_(1) for i in range(50)]
    step()
    faults, filled = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, pool_bytes()
    step()
    return [resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, pool_bytes() - filled]

def too_much():
    try:
        torch.empty(1 << 50, dtype=torch.uint8)
    except RuntimeError as error:
        return str(error)

def threads():
    wrong, passed_on = [], []
    def work(seed):
        generator = random.Random(seed)
        for _ in range(500):
            tensor = torch.full((generator.randrange(1, 20_000),), seed)
            if not bool((tensor == seed).all()):
                wrong.append(seed)
            # Freed by another thread, most of them.
            passed_on.append(tensor)
            if len(passed_on) > 20:
                passed_on.pop(0)
    workers = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    [t.start() for t in workers]; [t.join() for t in workers]
    return [wrong, torch.nn.functional.linear(torch.ones(300, 300), torch.ones(300, 300)).sum().item()]

def forks():
    stop, many = threading.Event(), [torch.ones(1) for _ in range(3000)]
    def work():
        while not stop.is_set():
            torch._foreach_add(many, 1.0)  # thousands of tensors without Python's lock
    worker = threading.Thread(target=work)
    worker.start()
    codes = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            torch.empty(1000)
            os._exit(0)
        codes.append(os.waitpid(child, 0)[1])
        if codes[-1]:
            break
    stop.set()
    worker.join()
    return codes

print(json.dumps({f.__name__: f() for f in (replay, contents, steps, too_much, threads, forks)}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What each experiment gave."""
    if not has_pool():
        pytest.skip("the pool cannot be built here")
    done = subprocess.run([sys.executable, "-c", EXPERIMENTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def test_it_fills_as_the_replay_says(found: dict[str, Any]) -> None:
    got, want = found["replay"]
    assert got == want > 1_000_000


def test_tensors_keep_what_they_hold(found: dict[str, Any]) -> None:
    assert found["contents"] == [0, [0, 1, 2, 3, 4], 0, 5]


def test_a_step_finds_the_memory_of_the_one_before(found: dict[str, Any]) -> None:
    faults, grown = found["steps"]
    assert faults < 1000 and grown == 0


def test_more_than_the_machine_has_is_refused_as_torch_refuses_it(found: dict[str, Any]) -> None:
    assert "DefaultCPUAllocator: can't allocate memory" in found["too_much"]


def test_threads_share_it(found: dict[str, Any]) -> None:
    assert found["threads"] == [[], 300**3]


def test_a_process_forked_while_another_thread_allocates_can_allocate(found: dict[str, Any]) -> None:
    """As a DataLoader's worker does; else the lock of a thread that is not there any more would never open."""
    assert found["forks"] == [0] * 20
