"""Forks of processes with threads: what they used works in the child or raises at once, and the parent goes on."""

from __future__ import annotations

import fcntl
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from campaign import generator, trials
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from scenarioclip_fast import forks
from scenarioclip_fast.data import LoaderConfig, scene_loader
from scenarioclip_fast.data.decode import DECODERS, DecodeError, make_decoder
from scenarioclip_fast.data.decode.run_decoder import RunDecoder
from scenarioclip_fast.data.images import image_batches
from scenarioclip_fast.data.shard_cache import ShardCache
from scenarioclip_fast.data.shards import ShardSet
from scenarioclip_fast.errors import MissingDependencyError
from scenarioclip_fast.forks import ForkedError
from scenarioclip_fast.ops import contrastive_loss
from scenarioclip_fast.train.metrics import MetricsLog, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of os.fork, since Python 3.12
CHILD_S = 60  # a child that takes longer hangs, also on a busy machine
FORKS = trials(8, 300)


def in_child(work: Callable[[], Any]) -> Any:
    """Return `work()` of a forked process, or its exception."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_S)
        try:
            result: Any = work()
        except BaseException as error:
            result = RuntimeError(f"{type(error).__name__}: {error}")
            result.kind = type(error).__name__
        with os.fdopen(sending, "wb") as file:
            pickle.dump(result, file)
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as file:
        data = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code != -signal.SIGALRM, "the child hangs"
    assert code == 0, f"the child ended with {code}"
    return pickle.loads(data)


def assert_forked_error(result: Any) -> None:
    assert getattr(result, "kind", None) == ForkedError.__name__, result


def pixels(batches: Iterator[Any], number: int = 2) -> list[Any]:
    """The keys and pixels of the next batches."""
    return [(batch.keys, batch.pixels.numpy().copy()) for batch, _ in zip(batches, range(number), strict=False)]


def assert_equal(a: list[Any], b: list[Any]) -> None:
    assert [keys for keys, _ in a] == [keys for keys, _ in b]
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """OpenMP with two threads, whatever the environment says: with one, it starts none that a fork could lose."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[0, 2], ids=["on request", "prefetched"])
def make_loader(request: pytest.FixtureRequest, shards: Path, two_threads: None) -> Iterator[Callable[[], Any]]:
    opened = []

    def make() -> Any:
        config = LoaderConfig(threads=2, prefetch=request.param, decoder="torch")
        opened.append(scene_loader(shards, 4, config, size=32))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def in_fork(loader: Any) -> list[Any]:
    return [in_child(lambda: pixels(iter(loader)))]


def in_multiprocessing(loader: Any) -> list[Any]:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sending.send(pixels(iter(loader))))
    process.start()
    try:
        assert receiving.poll(CHILD_S), "the child hangs"
        return [receiving.recv()]
    finally:
        process.kill()
        process.join()


class Batches(IterableDataset[Any]):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(pixels(iter(self.loader)))


def in_workers(loader: Any) -> list[Any]:
    workers = 2
    found = [*DataLoader(Batches(loader), None, num_workers=workers, timeout=CHILD_S, multiprocessing_context="fork")]
    return [[(keys, np.asarray(x)) for keys, x in found[i::workers]] for i in range(workers)]


@pytest.mark.parametrize("way", [in_fork, in_multiprocessing, in_workers])
def test_a_loader_iterates_again_in_the_child(make_loader: Callable[[], Any], way: Callable[[Any], list[Any]]) -> None:
    loader, reference = make_loader(), make_loader()
    batches, expected = iter(loader), iter(reference)
    assert_equal(pixels(batches, 1), pixels(expected, 1))
    for child in way(loader):
        again = make_loader()
        again.load_state_dict(reference.state_dict())
        assert_equal(child, pixels(iter(again)))
    assert_equal(pixels(batches, 4), pixels(expected, 4))  # the parent's iteration, across an epoch


def test_an_iteration_under_way_raises_in_the_child(make_loader: Callable[[], Any]) -> None:
    loader = make_loader()
    batches = iter(loader)
    next(batches)
    assert_forked_error(in_child(lambda: next(batches)))
    assert in_child(loader.close) is None
    assert len(pixels(batches, 3)) == 3


def test_forks_at_any_time_never_hang(make_loader: Callable[[], Any]) -> None:
    rng = generator("forks")
    loader = make_loader()
    pixels(iter(make_loader()), 1)  # PyTorch's imports, which would take each child seconds
    stop = threading.Event()
    counts = [0]

    def consume() -> None:
        for _ in loader:
            counts[0] += 1
            if stop.is_set():
                return

    consumer = threading.Thread(target=consume)
    consumer.start()
    try:
        for _ in range(FORKS):
            time.sleep(rng.random() * 0.05)
            assert len(in_child(lambda: pixels(iter(loader), 1))) == 1
        before, end = counts[0], time.monotonic() + CHILD_S
        while counts[0] == before:
            assert time.monotonic() < end and consumer.is_alive()
            time.sleep(0.01)
    finally:
        stop.set()
        consumer.join()


def jpeg(size: int = 64) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)).save(file, "JPEG")
    return file.getvalue()


def test_batches_of_image_files_raise_in_the_child() -> None:
    decoder = make_decoder("torch", threads=2)
    images = [(str(i), jpeg()) for i in range(12)]
    batches = image_batches(iter(images), decoder, batch_size=2, size=32, on_skip=print)
    next(batches)
    assert_forked_error(in_child(lambda: next(batches)))
    assert [batch.keys for batch in batches] == [[str(i), str(i + 1)] for i in range(2, 12, 2)]
    decoder.close()


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    if name == "torchvision":
        pytest.skip("decodes on a GPU, and CUDA itself raises in a forked process")
    try:
        decoder = make_decoder(name, threads=2)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    images = [jpeg()] * 4
    (expected, *_) = decoder.decode(images)
    assert isinstance(expected, Tensor)

    def decode(used: Any) -> Any:
        return [x.numpy() if isinstance(x, Tensor) else x for x in used.decode(images)]

    if name == "torch":
        assert all(np.array_equal(x, expected) for x in in_child(lambda: decode(decoder)))
    else:
        assert_forked_error(in_child(lambda: decode(decoder)))
        assert_forked_error(in_child(lambda: type(decoder)(threads=2)))
    assert in_child(decoder.close) is None
    assert all(np.array_equal(x, expected) for x in decode(decoder))
    decoder.close()


class HangingDecoder(RunDecoder):
    """A library whose calls and destructors hang in forked processes."""

    name, library, module = "hanging", "a library", "json"

    def _open(self) -> None:
        self.pid = os.getpid()

    def _run(self, images: list[bytes]) -> list[Tensor | DecodeError]:
        self._close()
        return [torch.zeros(1, 1, 3, dtype=torch.uint8) for _ in images]

    def _close(self) -> None:
        if os.getpid() != self.pid:
            time.sleep(3600)


def test_the_base_of_decoders_with_a_library_raises_in_the_child() -> None:
    decoder = HangingDecoder()
    assert isinstance(decoder.decode([jpeg()])[0], Tensor)
    assert_forked_error(in_child(lambda: decoder.decode([jpeg()])))
    assert_forked_error(in_child(HangingDecoder))
    assert in_child(decoder.close) is None
    assert isinstance(decoder.decode([jpeg()])[0], Tensor)


def test_a_loader_with_such_a_decoder_raises_in_the_child(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than to report every scene as unusable."""
    monkeypatch.setitem(DECODERS, "nvimgcodec", HangingDecoder)
    with scene_loader(shards, 4, LoaderConfig(threads=1, decoder="nvimgcodec", augment=False), size=32) as loader:
        assert_forked_error(in_child(lambda: next(iter(loader))))


def test_the_kernels_on_a_cpu_and_pytorch(two_threads: None) -> None:
    def work() -> list[Any]:
        torch.manual_seed(0)
        a, b = (torch.randn(512, 256, requires_grad=True) for _ in range(2))
        loss = contrastive_loss(a, b, torch.tensor(10.0), backend="cpu")
        loss.backward()
        assert a.grad is not None
        large = torch.ones(1 << 22)
        return [loss.detach().numpy(), a.grad.numpy(), (large * 2).sum().item()]

    expected = work()
    for found in (in_child(work), work()):
        # Threads change the order of sums.
        assert all(np.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(found, expected, strict=True))


def test_openmp_has_all_its_threads_in_the_child(two_threads: None) -> None:
    large = torch.ones(1 << 22)

    def threads() -> int:
        large.mul(2)
        return len(os.listdir("/proc/self/task"))

    threads()
    assert in_child(lambda: (torch.get_num_threads(), threads())) == (2, 2)


def test_a_lock_held_by_another_thread_is_free_in_the_child() -> None:
    lock, held, done = forks.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def take() -> str:
        with lock:
            return "free"

    assert in_child(take) == "free"
    assert not lock._lock.acquire(blocking=False)  # still held in the parent
    done.set()
    thread.join()


def test_a_module_that_another_thread_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=lambda: importlib.import_module("slow_module"))
    thread.start()
    time.sleep(0.2)
    assert in_child(lambda: importlib.import_module("slow_module").__name__) == "slow_module"
    thread.join()


def test_shards_read_by_threads(shards: Path) -> None:
    opened = ShardSet(shards)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for i in range(len(opened)):
                opened.read(i)
            opened.close()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for _ in range(FORKS):
            keys = in_child(lambda: [opened.read(i).key for i in range(len(opened))])
            assert keys == opened.keys
    finally:
        stop.set()
        for thread in readers:
            thread.join()


@pytest.mark.parametrize("fetched", [False, True], ids=["while fetching", "fetched"])
def test_remote_shards(shards: Path, tmp_path: Path, fetched: bool) -> None:
    cache = tmp_path / "cache"
    remote = ShardSet(f"file://{shards}", shard_cache_dir=cache, shard_cache_gib=1)
    images = [remote.read(i).image for i in range(len(remote))]
    if fetched:
        wait_until(lambda: len([*cache.glob("*.tar")]) == len(remote.manifest["splits"]["train"]["shards"]))
    claims = max(cache.glob("*.claims"), key=lambda path: path.stat().st_size)  # the other one claims the index

    def read() -> Any:
        found = [remote.read(i).image for i in range(len(remote))]
        remote.close()
        return found

    assert in_child(read) == images
    assert claims.exists() and is_locked(claims)  # the child has left the parent's claims
    wait_until(lambda: [*cache.glob("*.tar")] and not [*cache.glob("*.part")])
    wait_until(lambda: claims.read_text() != "")
    ShardCache(cache, 0).trim()
    assert [*cache.glob("*.tar")], "evicted, although the parent uses it"
    assert [remote.read(i).image for i in range(len(remote))] == images
    remote.close()
    assert not claims.exists()


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + CHILD_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_claims_of_a_cache_after_a_fork(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)
    digest, other = "a" * 64, "b" * 64
    for name in (digest, other):
        descriptor = cache.reserve(name, 10)
        assert descriptor is not None
        cache.commit(name, descriptor)
    before = cache._claims.read_text()

    def claim() -> tuple[dict[str, bool], set[str], str]:
        own = ShardCache(tmp_path, 100)  # as another object would see the claims
        found = cache.claim({digest: 10})
        claimed = own._claimed()
        cache.close()
        return found, claimed, cache._claims.name

    found, claimed, name = in_child(claim)
    assert found == {digest: True} and claimed == {digest, other}
    assert name != cache._claims.name and not (tmp_path / name).exists()
    assert cache._claims.read_text() == before and is_locked(cache._claims)
    cache.close()


def test_a_fork_while_the_cache_is_locked_does_not_keep_it_locked(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)
    with cache._locked():
        # The fork copies the open descriptor, whose lock it shares. The hooks are left out, as in a fork by C code.
        process = subprocess.Popen(["sleep", "60"], pass_fds=[*cache._descriptors])
    trimmed = threading.Thread(target=cache.trim, daemon=True)
    trimmed.start()
    trimmed.join(CHILD_S)
    hangs = trimmed.is_alive()
    process.kill()
    process.wait()
    assert not hangs
    cache.close()


ORPHAN = """
import os, sys, time
from pathlib import Path
from scenarioclip_fast.data.shard_cache import ShardCache
cache = ShardCache(Path(sys.argv[1]), 100)
part = cache.reserve("a" * 64, 10)
if (child := os.fork()) == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def test_a_child_that_survives_its_parent_holds_none_of_its_locks(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ORPHAN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    (claims,) = tmp_path.glob("*.claims")
    assert is_locked(claims)
    try:
        wait_until(lambda: not held(child, tmp_path))
        process.kill()
        process.wait()
        assert not is_locked(claims)
        cache = ShardCache(tmp_path, 100)
        assert cache.reserve("a" * 64, 10) is not None  # the file that the dead process was fetching
        cache.close()
    finally:
        os.kill(child, signal.SIGKILL)


def held(pid: int, directory: Path) -> list[str]:
    """The files of a directory that a process has open; none if it has ended."""
    links = []
    with suppress(FileNotFoundError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                links.append(os.readlink(path))
    return [link for link in links if link.startswith(str(directory))]


def test_the_metrics_log_belongs_to_the_parent(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, 0, 10, tensorboard=True, file=io.StringIO())
    row = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "scenes_per_s": 1.0, "views_per_s": 1.0, "tflop_per_s": 1.0}
    row |= {"data_wait": 0.0, "bad_samples": 0}
    metrics.write([{"step": 1, **row}])
    metrics._unwritten = b'{"step": 99}\n'  # pending, as on a full disk
    assert_forked_error(in_child(lambda: metrics.write([{"step": 2, **row}])))
    assert in_child(metrics.close) is None
    metrics._unwritten = b""
    metrics.write([{"step": 2, **row}])
    metrics.close()
    assert [found["step"] for found in read_metrics(metrics.path)] == [1, 2]


FAILING_CHILD = """
import os, signal, sys
from scenarioclip_fast import distributed
os.environ["RANK"] = "0" if os.fork() else "1"
with distributed.join_world("cpu", timeout_s=8) as world:
    if (child := os.fork()) == 0:
        signal.alarm(20)
        raise ValueError("a mistake of the child")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    world.barrier()
    print("went on")
"""


def test_a_failing_child_of_a_rank_leaves_the_run_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FAILING_CHILD],
        env={**os.environ, **place, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("went on") == 2 and "cannot continue" not in done.stderr
