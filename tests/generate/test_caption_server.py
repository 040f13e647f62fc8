"""Captions by a server, and everything that goes wrong with one."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.caption import server as caption_server
from scenarioclip_fast.generate.caption.prompt import answer_schema, prompt_text
from scenarioclip_fast.generate.caption.server import ServerCaptions
from scenarioclip_fast.generate.caption.stage import make
from scenarioclip_fast.generate.config import GIVEN, PUBLISHED, CaptionConfig, GenerateConfig
from scenarioclip_fast.generate.drawn.vlm_server import Fault, StubServer
from scenarioclip_fast.generate.images import Item
from scenarioclip_fast.generate.pipeline import generate
from scenarioclip_fast.generate.records import results
from scenarioclip_fast.generate.stages import REASONS, Outcome, Stage, Work

pytest.importorskip("openai", reason="openai is not installed")

TRUTH = {
    "action": "riding a horse",
    "caption": "A man rides.",
    "objects": ["man", "horse"],
    "relations": [["man", "riding", "horse"]],
}
RESULT = {"size": [40, 60], **TRUTH}


def encode(seed: int, size: tuple[int, int] = (40, 60), kind: str = "JPEG") -> bytes:
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, kind)
    return buffer.getvalue()


def write_image(folder: Path, name: str, data: bytes) -> Work:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return Work(Item(path.stem, name, str(path), -1, len(data)))


@pytest.fixture
def works(tmp_path: Path) -> list[Work]:
    return [write_image(tmp_path / "images", f"{i:03d}.jpg", encode(i)) for i in range(40)]


def answers_for(works: list[Work]) -> dict[str, dict[str, Any]]:
    return {hashlib.sha256(work.item.read()).hexdigest(): TRUTH for work in works}


class Sleeps:
    """Records the delays, and does not wait."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.delays.append(seconds)


def captions(server: StubServer | str, sleep: Any = None, **options: Any) -> ServerCaptions:
    url = server if isinstance(server, str) else server.url
    options = {"url": url, "model": "stub", "concurrency": 4} | options
    return ServerCaptions(CaptionConfig(**options), sleep=sleep or Sleeps())


def run(stage: ServerCaptions, works: list[Work]) -> dict[str, Outcome]:
    return {outcome.key: outcome for outcome in stage.run(iter(works))}


def test_right_answers(works: list[Work]) -> None:
    with StubServer(answers_for(works)) as server:
        stage = captions(server, price_in=2.0, price_out=10.0)
        assert isinstance(stage, Stage)
        stage = pickle.loads(pickle.dumps(captions(server, price_in=2.0, price_out=10.0)))
        found = run(stage, works)
    assert found == {work.key: Outcome(work.key, RESULT) for work in works}
    counts = stage.counts
    assert counts["requests"] == 40 and counts["prompt tokens"] == 40_000 and counts["answer tokens"] > 1000
    assert counts["cost"] == pytest.approx(40_000 * 2e-6 + counts["answer tokens"] * 10e-6)  # a sum of 40 floats
    assert not counts.get("retries")


def test_make_chooses_by_the_url() -> None:
    config = GenerateConfig.of({"caption": {"url": "http://localhost:1/v1", "model": "m"}})
    assert isinstance(make(config, "cpu"), ServerCaptions)
    assert not isinstance(make(GenerateConfig.of({"caption": {"model": "m"}}), "cpu"), ServerCaptions)
    assert GIVEN == "given"  # handled by the factory


def test_the_request(works: list[Work]) -> None:
    with StubServer(answers_for(works)) as server:
        stage = captions(server, max_tokens=77)
        run(stage, works[:1])
        body = server.last_request
        assert body["max_tokens"] == 77 and body["temperature"] == 0 and "seed" not in body
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
        config = CaptionConfig(url=server.url, model="stub")
        assert text == {"type": "text", "text": prompt_text(config)}
        assert body["response_format"]["json_schema"]["schema"] == answer_schema(config)
        for schema, expected in (("json_object", {"type": "json_object"}), ("none", None)):
            run(captions(server, schema=schema), works[:1])
            assert server.last_request.get("response_format") == expected
        seeds = []
        for work in (works[0], works[0], works[1]):
            run(captions(server, temperature=0.5), [work])
            seeds.append(server.last_request["seed"])
        assert seeds[0] == seeds[1] != seeds[2]


def sent(work: Work, tmp_path: Path, **options: Any) -> tuple[bytes, Outcome]:
    """What is sent of an image."""
    with StubServer({}, faults=lambda *_: Fault.completion("{}")) as server:
        outcome = run(captions(server, **options), [work])[work.key]
        url = server.last_request["messages"][0]["content"][0]["image_url"]["url"]
        return base64.b64decode(url.partition(",")[2]), outcome


@pytest.mark.parametrize(
    ("kind", "size", "options", "width", "height"),
    [
        ("JPEG", (40, 60), {}, 60, 40),
        ("PNG", (40, 60), {}, 60, 40),
        ("JPEG", (400, 300), {"image_side": 200}, 150, 200),
        ("PNG", (300, 400), {"image_side": 200}, 200, 150),
        ("PNG", (40, 60), PUBLISHED["caption"], 448, 448),
        ("JPEG", (600, 500), {"prompt": "published"}, 448, 448),
        ("JPEG", (448, 448), {"prompt": "published"}, 448, 448),
        ("PNG", (1000, 1), {"image_side": 100}, 1, 100),
    ],
)
def test_the_picture(
    tmp_path: Path, kind: str, size: tuple[int, int], options: dict[str, Any], width: int, height: int
) -> None:
    data = encode(0, size, kind)
    found, _ = sent(write_image(tmp_path, f"a.{kind.lower()}", data), tmp_path, **options)
    with Image.open(io.BytesIO(found)) as image:
        assert (image.format, image.size) == ("JPEG", (width, height))
    unchanged = kind == "JPEG" and size == (height, width)
    assert (found == data) == unchanged


def test_the_size_is_that_of_the_image(tmp_path: Path) -> None:
    with StubServer({}, faults=lambda *_: Fault.completion(json.dumps(TRUTH))) as server:
        found = run(captions(server, image_side=50), [write_image(tmp_path, "a.png", encode(0, (200, 300), "PNG"))])
    assert found["a"].result["size"] == [200, 300]


def test_the_prompts() -> None:
    for prompt in ("default", "published"):
        config = CaptionConfig(prompt=prompt, max_objects=7)  # type: ignore[arg-type]
        text, schema = prompt_text(config), answer_schema(config)
        assert "at most 7" in text and schema["properties"]["objects"]["maxItems"] == 7
        assert all(f'"{name}"' in text for name in schema["required"])
        assert not text.count("{{")


def test_nothing_is_paid_for_images_that_pack_rejects(tmp_path: Path, works: list[Work]) -> None:
    bad = [
        write_image(tmp_path, "cut.jpg", encode(1)[:-300]),
        write_image(tmp_path, "text.jpg", b"hello"),
        Work(Item("gone", "gone.jpg", str(tmp_path / "gone.jpg"), -1, 5)),
    ]
    with StubServer(answers_for(works)) as server:
        found = run(captions(server), [*bad, works[0]])
        assert server.requests == 1
    assert found["text"].reason == "image_not_an_image" and found["cut"].reason.startswith("image_")
    assert found["gone"].reason == "image_changed" and found["gone"].retry
    assert not found[works[0].key].reason


PASSING = [Fault.error(status) for status in (408, 409, 429, 500, 502, 503)]
GARBLED = [
    Fault(200, "<html>gateway</html>"),
    Fault(200, '{"choi', {"Content-Type": "application/json"}),
    Fault(200, "[]", {"Content-Type": "application/json"}),
    Fault(200, "null", {"Content-Type": "application/json"}),
    Fault(200, {"error": "overloaded"}),
    Fault(200, {"choices": []}),
    Fault(200, {"choices": "none"}),
    Fault(200, {"choices": [None]}),
    Fault(200, {"choices": [{"message": None}]}),
    Fault.completion(None),
    Fault.completion(""),
]


@pytest.mark.parametrize("fault", [*PASSING, *GARBLED, Fault(drop=True)], ids=lambda f: str(f.body)[:40] or f.status)
def test_passing_failures_are_repeated(works: list[Work], fault: Fault) -> None:
    sleeps = Sleeps()
    with StubServer(answers_for(works), faults=[fault, fault]) as server:
        stage = captions(server, sleeps, concurrency=1)
        assert run(stage, works[:2]) == {work.key: Outcome(work.key, RESULT) for work in works[:2]}
    assert stage.counts["retries"] == 2 and stage.counts["requests"] == 4
    assert 0.5 <= sleeps.delays[0] <= 1 and 1 <= sleeps.delays[1] <= 2
    assert stage.counts["seconds waited"] == pytest.approx(sum(sleeps.delays))


@pytest.mark.parametrize("fault", [*PASSING, *GARBLED], ids=lambda f: str(f.body)[:40] or f.status)
def test_exhausted_retries_are_tried_again_by_the_next_run(works: list[Work], fault: Fault) -> None:
    broken = next(iter(answers_for(works[:1])))
    with StubServer(answers_for(works), faults=lambda _, sha: fault if sha == broken else None) as server:
        stage = captions(server, retries=2)
        found = run(stage, works)
    outcome = found.pop(works[0].key)
    assert (outcome.reason, outcome.retry) == ("server_error", True) and outcome.detail
    assert "\n" not in outcome.detail
    assert stage.counts["retries"] == 2
    assert all(not one.reason for one in found.values())


def test_timeout(works: list[Work]) -> None:
    slow = next(iter(answers_for(works[:1])))
    with StubServer(answers_for(works), faults=lambda _, sha: Fault.slow(1.5) if sha == slow else None) as server:
        found = run(captions(server, timeout_s=0.5, retries=1), works[:3])
    assert found[works[0].key] == Outcome(
        works[0].key, reason="server_timeout", detail="no answer within 0.5 s", retry=True
    )
    assert not found[works[1].key].reason


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("7", 7, 7.7), ("0", 0.5, 1), ("soon", 0.5, 1), ("-5", 0.5, 1), ("nan", 0.5, 1), ("1e9", 600, 660)],
)
def test_retry_after(works: list[Work], header: str, low: float, high: float) -> None:
    sleeps = Sleeps()
    with StubServer(answers_for(works), faults=[Fault.error(429, retry_after=header)]) as server:
        run(captions(server, sleeps), works[:1])
    assert len(sleeps.delays) == 1 and low <= sleeps.delays[0] <= high


def test_retry_after_a_date(works: list[Work]) -> None:
    sleeps = Sleeps()
    fault = Fault.error(503, retry_after=formatdate(time.time() + 30, usegmt=True))
    with StubServer(answers_for(works), faults=[fault]) as server:
        run(captions(server, sleeps), works[:1])
    assert 25 <= sleeps.delays[0] <= 33  # the date has whole seconds, and the jitter is up to a tenth


def test_delays_grow_up_to_a_minute() -> None:
    delays = [caption_server._delay(attempt, 0) for attempt in range(12)]
    assert all(min(60, 2**i) / 2 <= delay <= min(60, 2**i) for i, delay in enumerate(delays))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.context_exceeded(), "context_exceeded"),
        (Fault.error(400, "too long", code="context_length_exceeded"), "context_exceeded"),
        (
            Fault.error(
                400, "'max_tokens' or 'max_completion_tokens' is too large: 9. The maximum context length is 5"
            ),
            "context_exceeded",
        ),
        (Fault.error(400, "At most 0 image(s) may be provided"), "request_refused"),
        (Fault(413, "<html>too large</html>"), "request_refused"),
        (Fault.error(422), "request_refused"),
        (Fault.completion(None, refusal="I cannot help with that."), "request_refused"),
        (Fault.completion(None, "content_filter"), "request_refused"),
        (Fault.completion(None, "length"), "answer_truncated"),
        (Fault.completion('{"objects": ["dog"', "length"), "answer_truncated"),
        (Fault.completion("A dog."), "answer_not_json"),
        (Fault.completion('{"objects": [], "relations": []}'), "no_objects"),
    ],
)
def test_rejections_are_final(works: list[Work], fault: Fault, reason: str) -> None:
    with StubServer(answers_for(works), faults=[fault]) as server:
        stage = captions(server, concurrency=1)
        found = run(stage, works[:2])
    assert (found[works[0].key].reason, found[works[0].key].retry) == (reason, False)
    assert found[works[0].key].detail and reason in REASONS
    assert stage.counts["requests"] == 2 and not found[works[1].key].reason


def test_a_truncated_answer_is_kept_as_far_as_it_is_complete(works: list[Work]) -> None:
    text = '{"objects": ["man", "horse"], "relations": [["man", "riding", "horse"], ["horse", "ne'
    with StubServer({}, faults=[Fault.completion(text, "length")]) as server:
        found = run(captions(server), works[:1])[works[0].key]
    assert found.result["relations"] == [["man", "riding", "horse"]]
    assert found.result["rejected"][0]["part"] == "relation 1"


def test_a_server_without_schemas(works: list[Work], capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(answers_for(works), refuse=["response_format"]) as server:
        stage = captions(server)
        found = run(stage, works)
        assert "response_format" not in server.last_request
    assert all(not one.reason for one in found.values())
    assert not stage.counts.get("retries")
    assert stage.counts["requests"] <= 40 + 4  # those in flight at the first refusal
    assert capsys.readouterr().err.count("the server refuses caption.schema=json_schema") == 1


def test_a_server_with_another_name_for_the_length(works: list[Work]) -> None:
    with StubServer(answers_for(works), refuse=["max_tokens"]) as server:
        found = run(captions(server, max_tokens=99), works)
        assert server.last_request["max_completion_tokens"] == 99
    assert all(not one.reason for one in found.values())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_no_server(works: list[Work], capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    stage = captions(url, retries=3)
    outcomes: list[Outcome] = []
    with pytest.raises(
        UserError, match=r"caption: cannot reach http.*refused.*start the server, then re-run"
    ) as caught:
        outcomes.extend(stage.run(iter(works)))
    assert "\n" not in str(caught.value)
    assert all((one.reason, one.retry) == ("server_error", True) for one in outcomes)
    assert len(outcomes) <= 8
    assert capsys.readouterr().err.count("trying again up to 3 times") == 1


def test_a_server_that_goes_away_and_comes_back(tmp_path: Path, works: list[Work]) -> None:
    """Answers are kept, and the second run asks for the rest only."""
    answers = answers_for(works)
    config = GenerateConfig.of({"caption": {"model": "stub", "concurrency": 4, "retries": 0}})
    images, out = tmp_path / "images", tmp_path / "out"

    def caption(server: StubServer) -> None:
        options = GenerateConfig.of({"caption": {"url": server.url, "model": "stub", "concurrency": 4, "retries": 0}})
        generate(images, out, options, stages=["caption"], unit_size=8, progress=False)

    def dies(number: int, _: str) -> Fault | None:
        return Fault(drop=True) if number >= 20 else None

    assert config.caption.model == "stub"
    with StubServer(answers, faults=dies) as server, pytest.raises(UserError, match="cannot reach"):
        caption(server)
    with StubServer(answers) as server:
        caption(server)
        assert server.requests == 20
        caption(server)
        assert server.requests == 20
    found = {}
    for path in sorted((out / "caption").glob("*.jsonl")):
        found |= results(path)
    assert found == {key: Outcome(key, RESULT) for key in found} and len(found) == 40


def test_isolated_connection_errors_do_not_end_the_stage(works: list[Work]) -> None:
    with StubServer(answers_for(works), faults=lambda n, _: Fault(drop=True) if n % 4 == 3 else None) as server:
        found = run(captions(server, retries=0, concurrency=2), works)
    assert sum(one.reason == "server_error" for one in found.values()) == 10


def test_a_server_that_fails_for_every_image(tmp_path: Path, works: list[Work]) -> None:
    with StubServer({}, faults=lambda *_: Fault.error(500, "CUDA error")) as server:
        stage = captions(server, retries=1)
        with pytest.raises(UserError, match=r"failed for 32 images in a row.*status 500: CUDA error"):
            run(stage, works)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": "other"}, r"The model `other` does not exist.*it has stub"),
        ({"api_key": "secret"}, r"status 401: Unauthorized: set the environment variable OPENAI_API_KEY"),
    ],
)
def test_errors_that_end_the_stage(works: list[Work], options: dict[str, str], text: str) -> None:
    api_key = options.pop("api_key", "")
    with StubServer(answers_for(works), api_key=api_key) as server:
        stage = captions(server, **options)
        with pytest.raises(UserError, match=text):
            run(stage, works)
        assert server.requests <= 4


def test_a_wrong_path(works: list[Work]) -> None:
    with StubServer(answers_for(works)) as server:
        stage = captions(server.url.removesuffix("/v1"))
        with pytest.raises(UserError, match=r"status 404: Not Found: expected --vlm-url http://HOST:PORT/v1"):
            run(stage, works)


def test_the_api_key(works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    with StubServer(answers_for(works), api_key="secret") as server:
        monkeypatch.setenv("MY_KEY", " secret\n")
        assert not run(captions(server, api_key_env="MY_KEY"), works[:1])[works[0].key].reason
        monkeypatch.setenv("MY_KEY", "secr\x01et\u00e9")
        with pytest.raises(UserError, match="MY_KEY: not an API key") as caught:
            run(captions(server, api_key_env="MY_KEY"), works[:1])
        assert "secr" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/v1"])
def test_a_url_that_is_none(works: list[Work], url: str) -> None:
    with pytest.raises(UserError, match=r"caption\.url: got http"):
        run(captions(url), works[:1])


def test_a_proxy_is_not_asked_for_this_machine(works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with StubServer(answers_for(works)) as server:
        assert not run(captions(server, retries=0), works[:1])[works[0].key].reason


def test_requests_in_flight(works: list[Work]) -> None:
    """All 8 threads wait at once, and works are pulled only as they are needed."""
    pulled = 0

    def source() -> Iterator[Work]:
        nonlocal pulled
        for work in works:
            pulled += 1
            yield work

    with StubServer(answers_for(works), faults=lambda *_: Fault.slow(0.2)) as server:
        outcomes = captions(server, concurrency=8).run(source())
        start = time.perf_counter()
        next(outcomes)
        assert pulled <= 16
        assert len(list(outcomes)) == 39
        # 40 answers of .2 s, 8 at a time: 1 s; 8 s one by one.
        assert time.perf_counter() - start < 4
        assert server.most_in_flight == 8


def test_outcomes_come_as_they_are_finished(works: list[Work]) -> None:
    first = next(iter(answers_for(works[:1])))
    with StubServer(answers_for(works), faults=lambda _, sha: Fault.slow(0.5) if sha == first else None) as server:
        keys = [one.key for one in captions(server).run(iter(works))]
    assert keys[-1] == works[0].key


def wait_for_threads() -> None:
    deadline = time.monotonic() + 20
    while any(thread.name == "caption" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "threads of a stage that ended"
        time.sleep(0.02)


def test_closing_does_not_wait_for_answers(works: list[Work], capsys: pytest.CaptureFixture[str]) -> None:
    slow = set(list(answers_for(works))[1:])
    with StubServer(answers_for(works), faults=lambda _, sha: Fault.slow(5) if sha in slow else None) as server:
        outcomes = captions(server).run(iter(works))
        assert next(outcomes).key == works[0].key
        start = time.perf_counter()
        outcomes.close()  # type: ignore[attr-defined]
        assert time.perf_counter() - start < 1.5  # half a second for the threads
        assert server.requests <= 5
    wait_for_threads()
    assert not capsys.readouterr().err  # they end without a word


def test_an_error_of_the_source_ends_the_threads(works: list[Work]) -> None:
    def source() -> Iterator[Work]:
        yield from works[:5]
        raise UserError("no more")

    with StubServer(answers_for(works)) as server, pytest.raises(UserError, match="no more"):
        list(captions(server).run(source()))
    wait_for_threads()


def test_backoff_ends_with_the_stage(works: list[Work]) -> None:
    """Threads that wait before a retry end at once."""
    with StubServer(answers_for(works), faults=[Fault.error(429, retry_after="60")] * 3) as server:
        outcomes = ServerCaptions(CaptionConfig(url=server.url, model="stub", concurrency=4)).run(iter(works))
        next(outcomes)
        start = time.perf_counter()
        outcomes.close()  # type: ignore[attr-defined]
        assert time.perf_counter() - start < 0.5


_SCRIPT = """
import sys
from pathlib import Path
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.pipeline import generate
config = GenerateConfig.of({"caption": {"url": sys.argv[1], "model": "stub", "concurrency": 4}})
generate(sys.argv[2], sys.argv[3], config, stages=["caption"], progress=False)
"""


def test_ctrl_c(tmp_path: Path, works: list[Work]) -> None:
    """The process ends soon, though requests are in flight, and keeps the answers that came."""
    fast = set(list(answers_for(works))[:10])
    out = tmp_path / "out"
    with StubServer(answers_for(works), faults=lambda _, sha: None if sha in fast else Fault.slow(20)) as server:
        command = [sys.executable, "-c", _SCRIPT, server.url, str(tmp_path / "images"), str(out)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        partial = out / "caption" / "000000.jsonl.partial"
        deadline = time.monotonic() + 120
        while not (partial.is_file() and partial.read_bytes().count(b"\n") == 11 and server.requests == 14):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert time.monotonic() - start < 3  # half a second for the threads, the rest to unload torch
        assert process.returncode != 0
        assert partial.read_bytes().count(b"\n") == 11
