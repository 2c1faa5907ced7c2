"""The paged AdamW against torch's own and bitsandbytes' 8-bit one, wherever the pages live."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.data import layouts
from lorica.errors import ConfigError, DoesNotFitError, LoricaError
from lorica.methods.attach import adapt
from lorica.methods.full import FullFineTuning
from lorica.models.loss import make_loss
from lorica.training import paged, pages
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.moments import BLOCK, saved_moment, unsigned_dynamic_map
from lorica.training.paged import PagedAdamW, Tiers
from lorica.training.pages import CudaLane, Page, PageFile, make_fields
from lorica.training.rehearsal import rehearse
from tests.training.conftest import make_dataset, make_order
from tests.training.lazy_streams import LazyStream

bnb = pytest.importorskip("bitsandbytes")

SHAPES = {"matrix": (40, 200), "vector": (300,), "table": (50, 91), "unused": (50, 10), "scalar": ()}
FILED = 256 * 16
"""A budget that the buffers use up."""


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "SMALLEST_PAGE", 256)


def make_parameters(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def make_groups(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups that differ in all that a group may have."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.3, "lr": 0.02}, {"params": others, "weight_decay": 0.0, "lr": 0.1}]


def make_paged(
    parameters: Mapping[str, nn.Parameter], folder: Path | None, *, device: int | None, bits: int = 32
) -> PagedAdamW:
    tiers = Tiers(device=device, folder=folder)
    return PagedAdamW(make_groups(parameters), lr=1.0, betas=(0.9, 0.99), eps=1e-6, bits=bits, tiers=tiers)


def make_plain(parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(make_groups(parameters), betas=(0.9, 0.99), eps=1e-6, fused=True)


def step(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Gradients of very different sizes; `unused` has none, and in every other step neither has `table`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        gradient = torch.randn(parameter.shape, generator=generator).pow(3)
        parameter.grad = None if name == "unused" or (name == "table" and seed % 2) else gradient
    optimizer.step()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def homes(optimizer: PagedAdamW) -> tuple[int, int]:
    """How many pages (stay on the device, travel)."""
    return len(optimizer._held), len(optimizer._travelling)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("device", [None, 60_000, FILED], ids=["held", "mixed", "filed"])
def test_parameters_and_moments_are_those_of_torch_bit_for_bit(tmp_path: Path, device: int | None) -> None:
    plain, ours = make_parameters(), make_parameters()
    reference, optimizer = make_plain(plain), make_paged(ours, tmp_path, device=device)
    num_held, num_travelling = homes(optimizer)
    assert (num_held > 0) == (device != FILED)
    assert (num_travelling > 4) == (device is not None)
    for seed in range(4):
        step(plain, reference, seed)
        step(ours, optimizer, seed)
    assert same(plain, ours)
    expected = {f"{n}.{key}": t for n, p in plain.items() for key, t in reference.state[p].items()}
    state = dict(optimizer.tensors(ours))
    assert same(expected, {name: state[name] for name in expected})
    assert all(not state[name].any() for name in state.keys() - expected.keys())


@pytest.mark.parametrize("slow", ["read", "write"])
def test_the_result_does_not_depend_on_how_long_the_copies_take(
    tmp_path: Path, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_speed = getattr(PageFile, slow)

    def dawdle(self: PageFile, offset: int, tensor: Tensor) -> None:
        time.sleep(0.002)
        at_speed(self, offset, tensor)

    plain, ours = make_parameters({"matrix": (40, 100)}), make_parameters({"matrix": (40, 100)})
    reference, optimizer = make_plain(plain), make_paged(ours, tmp_path, device=FILED)
    monkeypatch.setattr(PageFile, slow, dawdle)
    for seed in range(3):
        step(plain, reference, seed)
        step(ours, optimizer, seed)
    assert same(plain, ours)


@pytest.mark.parametrize("device", [None, 40_000, 256 * 32], ids=["held", "mixed", "filed"])
@pytest.mark.parametrize("elements", [4096, 4096 * 3 + 5])
def test_8_bits_are_those_of_bitsandbytes(tmp_path: Path, device: int | None, elements: int) -> None:
    """Its fused arithmetic rounds elsewhere, so a moment on the edge between two levels may get the next one."""
    shapes = {"large": (elements,), "small": (4095,)}
    theirs, ours = make_parameters(shapes), make_parameters(shapes)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    oracle = bnb.optim.AdamW8bit(list(theirs.values()), **options)
    del options["weight_decay"]
    groups = [{"params": list(ours.values()), "weight_decay": 0.3}]
    optimizer = PagedAdamW(groups, **options, bits=8, tiers=Tiers(device=device, folder=tmp_path))
    for seed in range(5):
        step(theirs, oracle, seed)
        step(ours, optimizer, seed)
    state = optimizer.tensors(ours)
    found = oracle.state[theirs["large"]]
    for key, codes, absmax in (("exp_avg", "state1", "absmax1"), ("exp_avg_sq", "state2", "absmax2")):
        ours_8 = state[f"large.{key}"]
        assert ours_8.dtype == torch.uint8
        difference = (ours_8.int() - found[codes].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01
        torch.testing.assert_close(state[f"large.{key}_absmax"], found[absmax], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            state[f"small.{key}"], oracle.state[theirs["small"]][codes], rtol=1e-5, atol=1e-7, check_dtype=True
        )
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_8_bits_paged_are_8_bits_held(tmp_path: Path) -> None:
    results = []
    for device in (None, 40_000, 256 * 32):
        parameters = make_parameters()
        optimizer = make_paged(parameters, tmp_path, device=device, bits=8)
        for seed in range(4):
            step(parameters, optimizer, seed)
        results.append({**parameters, **optimizer.tensors(parameters)})
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_the_map_without_a_sign_is_that_of_bitsandbytes() -> None:
    assert torch.equal(unsigned_dynamic_map(), bnb.functional.create_dynamic_map(signed=False))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("before", "after"), [(None, 30_000), (30_000, None), (FILED, 60_000)])
def test_state_that_was_put_back_elsewhere_goes_on_bit_for_bit(
    tmp_path: Path, bits: int, before: int | None, after: int | None
) -> None:
    straight = make_parameters()
    optimizer = make_paged(straight, tmp_path, device=before and 2 * before, bits=bits)
    for seed in range(2):
        step(straight, optimizer, seed)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in straight.items()}
    again = make_paged(resumed, tmp_path, device=after and 2 * after, bits=bits)
    again.load(resumed, optimizer.tensors(straight))
    assert same(optimizer.tensors(straight), again.tensors(resumed))
    for seed in (2, 3):
        step(straight, optimizer, seed)
        step(resumed, again, seed)
    assert same(straight, resumed)


@pytest.mark.parametrize(("before", "after"), [(32, 8), (8, 32)])
def test_state_of_other_bits_is_put_back_as_near_as_the_map_allows(tmp_path: Path, before: int, after: int) -> None:
    shapes = {"matrix": (64, 128)}
    parameters = make_parameters(shapes)
    optimizer = make_paged(parameters, tmp_path, device=None, bits=before)
    step(parameters, optimizer, 0)
    again = make_paged(parameters, tmp_path, device=200_000, bits=after)
    again.load(parameters, optimizer.tensors(parameters))
    for moment in ("exp_avg", "exp_avg_sq"):
        old, new = (saved_moment(o.tensors(parameters), "matrix", moment, 0, 8192) for o in (optimizer, again))
        largest = old.view(-1, BLOCK).abs().amax(1, keepdim=True)
        # The levels near the largest magnitude are 0.9 / 64 (with a sign) or 0.9 / 128 of it apart.
        assert ((old - new).view(-1, BLOCK).abs() <= 0.5 * 0.9 / 64 * largest * 1.01).all()
    assert again.state[parameters["matrix"]]["step"] == 1


def test_forgotten_moments_are_zero_and_others_stay(tmp_path: Path) -> None:
    parameters = make_parameters()
    optimizer = make_paged(parameters, tmp_path, device=100_000)
    step(parameters, optimizer, 0)
    before = dict(optimizer.tensors(parameters))
    optimizer.forget([parameters["matrix"], parameters["vector"]])
    for name, tensor in optimizer.tensors(parameters).items():
        forgotten = name.startswith(("matrix.", "vector."))
        assert torch.equal(tensor, torch.zeros_like(tensor) if forgotten else before[name])


MEMORY = """
import sys
from pathlib import Path
import torch
from torch import nn
from lorica.training import paged
from lorica.training.tensor_file import TensorFile, write_tensor_file

paged.SMALLEST_PAGE, folder = 4096, Path(sys.argv[1])

def status(key):
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def train(num_elements):
    parameters = {"large": nn.Parameter(torch.ones(num_elements))}
    parameters["large"].grad = torch.ones(num_elements)
    before = status("VmRSS:")
    tiers = paged.Tiers(device=4 << 20, folder=folder)
    groups = [{"params": list(parameters.values())}]
    optimizer = paged.PagedAdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-6, bits=32, tiers=tiers)
    for _ in range(2):
        optimizer.step()
    write_tensor_file(folder / "state", optimizer.tensors(parameters))
    optimizer.load(parameters, TensorFile(folder / "state"))
    return status("VmHWM:") - before

train(1 << 20)  # the libraries' own pages come in with the first use
print(train(8 << 20))
"""


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """64 MB of moments in 4 MB. What is measured is the process, one that nothing else has used: the most that was ever
    resident.
    """
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < (4 << 20) + (1 << 20)


def test_the_file_has_no_name_and_goes_with_the_optimizer(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    parameters = make_parameters()
    optimizer = make_paged(parameters, tmp_path, device=FILED)
    step(parameters, optimizer, 0)
    assert open_files() == before + 1
    assert os.listdir(tmp_path) == []
    del optimizer
    assert open_files() == before


@pytest.mark.parametrize("bits", [32, 8])
def test_a_budget_below_the_buffers_is_refused(tmp_path: Path, bits: int) -> None:
    for device in (0, 256 * paged.WORKING_BYTES[bits] - 1):
        with pytest.raises(ConfigError, match=r"train\.optimizer_memory .* take"):
            make_paged(make_parameters(), tmp_path, device=device, bits=bits)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be paged to .*file/run.*train\.output"):
        make_paged(make_parameters(), tmp_path / "file" / "run", device=FILED)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"needs 8,796,093,022,208 bytes of disk.*Free some space"):
        PageFile(tmp_path, 1 << 43)


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = make_parameters()
    optimizer = make_paged(parameters, tmp_path, device=FILED)

    def fail(descriptor: int, buffers: list[Any], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(LoricaError, match=r"Input/output error.*Resume from the last checkpoint"):
        step(parameters, optimizer, 0)


@pytest.mark.parametrize("hosted", [set(), {0, 1, 2, 3, 4, 5, 6}, {1, 2, 5}], ids=["filed", "hosted", "both"])
def test_copies_of_the_gpu_lane_wait_for_what_they_need(
    tmp_path: Path, hosted: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On streams that do nothing before they must: a wait too few leaves a page as it was, or garbage in it."""
    mine, threads_stream = LazyStream(), threading.local()

    @contextmanager
    def inside(stream: LazyStream) -> Iterator[None]:
        threads_stream.now = stream
        yield
        threads_stream.now = mine

    def copy(out: Tensor, source: Tensor) -> None:
        threads_stream.now.enqueue(lambda: out.copy_(source))

    monkeypatch.setattr(torch.cuda, "Stream", LazyStream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mine)
    monkeypatch.setattr(pages, "copy_later", copy)
    monkeypatch.setattr(pages, "pinned_memory", lambda sizes: [torch.zeros(size, dtype=torch.uint8) for size in sizes])
    owner, fields = nn.Parameter(torch.zeros(1)), make_fields({"exp_avg": (torch.uint8, 64)})
    travelling = [Page(owner, 0, 64, fields, offset=64 * number) for number in range(7)]
    file = PageFile(tmp_path, 0 if len(hosted) == 7 else 64 * 7)
    for number, page in enumerate(travelling):
        contents = torch.full((64,), number, dtype=torch.uint8)
        if number in hosted:
            page.memory = contents
        else:
            file.write(page.offset, contents)
    lane = CudaLane(torch.device("cpu"), 64, file)
    for _ in range(2):
        for page, buffer in lane.visit(travelling):
            number = travelling.index(page)
            mine.enqueue(lambda buffer=buffer, number=number: buffer.mul_(3).add_(number))
    mine.synchronize()
    for number, page in enumerate(travelling):
        found = page.memory
        if found is None:
            found = torch.empty(64, dtype=torch.uint8)
            file.read(page.offset, found)
        assert found.tolist() == [3 * (3 * number + number) + number] * 64


@pytest.mark.parametrize("bits", [32, 8])
def test_a_full_fine_tuning_is_the_same_wherever_its_moments_live(
    train: Callable[..., Any],
    tmp_path: Path,
    tiny_llama: Callable[..., Any],
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if it begins in one way and goes on in the other; weights, moments and clipped gradients alike."""
    monkeypatch.setattr(paged, "SMALLEST_PAGE", 1024)
    dataset = make_dataset()

    def run(name: str, device: int | None, resume: Path | None = None) -> list[Path]:
        model = adapt(tiny_llama(num_hidden_layers=1, intermediate_size=256), FullFineTuning())
        assert 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad) * bits // 32 > 1.5 * budget
        torch.manual_seed(1)
        train(
            folder=tmp_path / name,
            model=model,
            loss_fn=make_loss(model),
            dataset=dataset,
            order=make_order(dataset, epochs=1),
            resume=None if resume is None else read_checkpoint(resume),
            clip=0.5,
            weight_decay=0.1,
            keep_checkpoints=99,
            layout=layouts.padded(3),
            optimizer_bits=bits,
            optimizer_memory=device,
        )
        return find_checkpoints(tmp_path / name / "checkpoints")

    def everything(path: Path) -> dict[str, Tensor]:
        tensors = read_checkpoint(path).tensors
        return {f"{stem}/{name}": tensors[stem][name] for stem in tensors for name in tensors[stem]}

    budget = 36_000
    held, paged_paths = run("held", None), run("paged", budget)
    assert len(held) == len(paged_paths) == 3
    expected = everything(held[-1])
    assert any(name.endswith("_absmax") for name in expected) == (bits == 8)
    assert same(everything(paged_paths[-1]), expected)
    assert same(everything(run("paged on", budget, held[1])[-1]), expected)
    assert same(everything(run("held on", None, paged_paths[1])[-1]), expected)


@pytest.mark.parametrize("bits", [32, 8])
def test_the_plan_counts_what_is_on_the_device(
    tiny_llama: Callable[..., Any], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "SMALLEST_PAGE", 1024)
    config, budget = tiny_llama(num_hidden_layers=1, intermediate_size=256).config, 36_000
    rehearsals = [
        rehearse(
            config,
            FullFineTuning(),
            dtype=torch.float32,
            lengths=[64],
            optimizer_bits=bits,
            optimizer_memory=device,
        )
        for device in (None, budget)
    ]
    trained = rehearsals[0].num_trainable
    # In 8 bits: the larger weights take two codes and two float32 a block of 256.
    assert rehearsals[0].parts.optimizer > trained * (8 if bits == 32 else 2)
    assert rehearsals[0].parts.optimizer < trained * 8.1
    assert budget // 2 < rehearsals[1].parts.optimizer <= budget
    assert rehearsals[0].live_bytes - rehearsals[1].live_bytes > rehearsals[0].parts.optimizer - budget - 20_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("host", [0, 100_000, 1 << 30], ids=["filed", "both", "hosted"])
@pytest.mark.parametrize("bits", [32, 8])
def test_on_a_gpu_the_tiers_change_nothing(tmp_path: Path, host: int, bits: int) -> None:
    results = []
    for tiers in (Tiers(), Tiers(device=100_000, host=host, folder=tmp_path)):
        parameters = {name: nn.Parameter(p.detach().cuda()) for name, p in make_parameters().items()}
        optimizer = PagedAdamW(make_groups(parameters), lr=1.0, betas=(0.9, 0.99), eps=1e-6, bits=bits, tiers=tiers)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            optimizer.step()
        results.append({**{n: p.cpu() for n, p in parameters.items()}, **optimizer.tensors(parameters)})
    assert same(results[0], results[1])
