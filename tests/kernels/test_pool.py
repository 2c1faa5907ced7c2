"""The pool for CPU tensors: in processes of their own, since it is there to stay."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lorica.kernels.pool import has_pool

START = """
import gc, json, random, resource, threading
import torch
from lorica.kernels.pool import install_pool, pool_bytes
old = torch.arange(5.0)
assert install_pool() and install_pool()
"""


def run(code: str) -> object:
    if not has_pool():
        pytest.skip("the pool cannot be built here")
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_fills_as_the_replay_says() -> None:
    code = """
from lorica.training.heap import filled_bytes
random.seed(0)
sizes, events, held, key = [], [], {}, 0
before = pool_bytes()
for _ in range(3000):
    if held and random.random() < 0.5:
        number = random.choice(list(held))
        events.append((number, -1)); del held[number]
    else:
        sizes.append(random.choice([1, 64, 1000, 4097, 70_000, 1_000_000]))
        events.append((len(sizes) - 1, 1)); held[len(sizes) - 1] = torch.empty(sizes[-1], dtype=torch.uint8)
print(json.dumps([pool_bytes() - before, filled_bytes(sizes, events, len(events), 0)]))
"""
    got, want = run(code)
    assert got == want > 1_000_000


def test_tensors_keep_what_they_hold() -> None:
    code = """
random.seed(0)
held = {}
for i in range(4000):
    key = random.randrange(60)
    if key in held:
        value, size = held.pop(key)
        assert bool((value == key).all()) and value.numel() == size and value.data_ptr() % 64 == 0
    else:
        size = random.randrange(1, 60_000)
        held[key] = (torch.full((size,), key, dtype=torch.int32), size)
assert old.tolist() == [0, 1, 2, 3, 4]
assert torch.empty(0).numel() == 0 and held
print(json.dumps(True))
"""
    assert run(code) is True


def test_a_step_finds_the_memory_of_the_one_before() -> None:
    code = """
def step():
    kept = [torch.empty(1_000_000 + 64 * (i % 7)).fill_(1) for i in range(50)]
step()
faults, filled = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, pool_bytes()
step()
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, pool_bytes() - filled]))
"""
    faults, grown = run(code)
    assert faults < 1000 and grown == 0


def test_more_than_the_machine_has_is_refused_as_torch_refuses_it() -> None:
    code = """
try:
    torch.empty(1 << 50, dtype=torch.uint8)
except RuntimeError as error:
    print(json.dumps(str(error).splitlines()[0]))
"""
    assert "DefaultCPUAllocator: can't allocate memory" in run(code)


def test_threads_share_it() -> None:
    code = """
def work(seed):
    generator = random.Random(seed)
    for _ in range(500):
        tensor = torch.full((generator.randrange(1, 20_000),), seed)
        assert bool((tensor == seed).all())
threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
print(json.dumps(torch.nn.functional.linear(torch.ones(300, 300), torch.ones(300, 300)).sum().item()))
"""
    assert run(code) == 300**3
