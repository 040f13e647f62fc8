"""The server that knows the answers."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import time
from typing import Any

import pytest

from scenarioclip_fast.generate.caption.answer import BadAnswer, read_answer
from scenarioclip_fast.generate.drawn.vlm_server import KINDS, Corruption, Fault, StubServer

TRUTH = {
    "action": "playing football",
    "caption": "A girl plays.",
    "objects": ["girl", "ball", "bench", "puppy"],
    "relations": [["girl", "kicking", "ball"], ["puppy", "chasing", "ball"]],
}
ANSWERS = {hashlib.sha256(b"%d" % i).hexdigest(): TRUTH for i in range(400)}


def request(data: bytes, model: str = "stub", **options: Any) -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "objects"}]
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}], **options}).encode()


class Client:
    def __init__(self, server: StubServer) -> None:
        self.connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=10)

    def post(self, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
        self.connection.request("POST", path, body, headers)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())


def test_the_truth() -> None:
    with StubServer(ANSWERS) as server:
        client = Client(server)
        status, body = client.post(request(b"7"))
        assert status == 200 and body["choices"][0]["finish_reason"] == "stop"
        assert json.loads(body["choices"][0]["message"]["content"]) == TRUTH
        assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
        socket = client.connection.sock
        assert client.post(request(b"8"))[0] == 200
        assert client.connection.sock is socket  # kept alive
        client.connection.request("GET", "/v1/models")
        assert json.loads(client.connection.getresponse().read())["data"][0]["id"] == "stub"
        assert server.requests == 2


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (request(b"unknown"), 400, "no answer for the image"),
        (request(b"1", model="other"), 404, "`other` does not exist"),
        (b"{", 400, "not JSON"),
        (b"[]", 400, "no image"),
        (b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "x;base64,?"}}]}]}', 400, "no image"),
        (request(b"1", response_format={}), 400, "response_format"),
    ],
)
def test_bad_requests(body: bytes, status: int, text: str) -> None:
    with StubServer(ANSWERS, refuse=["response_format"]) as server:
        found, answer = Client(server).post(body)
        assert found == status and text in answer["error"]["message"]
        assert Client(server).post(body, "/v1/other")[0] == 404


def test_the_api_key() -> None:
    with StubServer(ANSWERS, api_key="secret") as server:
        assert Client(server).post(request(b"1"))[0] == 401
        assert Client(server).post(request(b"1"), Authorization="Bearer secret")[0] == 200


def test_faults() -> None:
    faults = [Fault.error(429, retry_after="7"), Fault(503, "<html>"), Fault(drop=True), None]
    with StubServer(ANSWERS, faults=faults) as server:
        connection = Client(server).connection
        for status, kind in ((429, "application/json"), (503, "text/html")):
            connection.request("POST", "/v1/chat/completions", request(b"1"))
            response = connection.getresponse()
            response.read()
            assert (response.status, response.headers["Content-Type"]) == (status, kind)
            assert response.headers["Retry-After"] == ("7" if status == 429 else None)
        connection.request("POST", "/v1/chat/completions", request(b"1"))
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
        assert Client(server).post(request(b"1"))[0] == 200
    by_image = StubServer(ANSWERS, faults=lambda number, sha: Fault.error(500) if sha == next(iter(ANSWERS)) else None)
    with by_image as server:
        assert [Client(server).post(request(data))[0] for data in (b"0", b"1", b"0")] == [500, 200, 500]


def test_corruption_is_known_and_reproducible() -> None:
    server, again = (StubServer(ANSWERS, corrupt=0.3) for _ in range(2))
    other = StubServer(ANSWERS, corrupt=0.3, seed=1)
    corruptions = {sha: server.corruption_of(sha) for sha in ANSWERS}
    corrupted = [one for one in corruptions.values() if one is not None]
    # 400 draws with p = .3: 120 expected, standard deviation 9; five of them.
    assert abs(len(corrupted) - 120) < 46
    assert {one.kind for one in corrupted} == set(KINDS)
    assert all(server.answer(sha) == again.answer(sha) for sha in ANSWERS)
    assert any(server.corruption_of(sha) != other.corruption_of(sha) for sha in ANSWERS)
    for sha, corruption in corruptions.items():
        check_answer(server.answer(sha), corruption)


def check_answer(text: str, corruption: Corruption | None) -> None:
    if corruption is not None and corruption.kind == "bad_json":
        with pytest.raises(BadAnswer, match="answer_not_json"):
            read_answer(text, max_objects=10)
        return
    found = json.loads(text)
    names, triplets = TRUTH["objects"], TRUTH["relations"]
    if corruption is None:
        assert found == TRUTH
    elif corruption.kind == "wrong_name":
        (old,), (new,) = corruption.before, corruption.after
        assert new not in names
        assert found["objects"] == [new if name == old else name for name in names]
        assert found["relations"] == [[new if end == old else end for end in triplet] for triplet in triplets]
    elif corruption.kind == "extra_object":
        assert found["objects"] == [*names, *corruption.after] and not {*names} & {*corruption.after}
    else:
        (triplet,) = corruption.after
        assert found["relations"] == [*triplets, list(triplet)] and list(triplet) not in triplets
        assert found["objects"] == names and triplet[0] in names
        assert (triplet[2] in names) == (corruption.kind == "false_relation")


def test_variation_keeps_the_meaning() -> None:
    server = StubServer(ANSWERS, vary=True)
    texts = [server.answer(sha) for sha in ANSWERS]
    assert sum("```" in text for text in texts) > 100
    seen = set()
    for text in texts:
        found = read_answer(text, max_objects=10)
        seen |= {found["action"], *found["objects"]}
        singular = [
            {"girls": "girl", "balls": "ball", "benches": "bench", "puppies": "puppy"}.get(n, n)
            for n in found["objects"]
        ]
        assert singular == TRUTH["objects"]
        ends = {end for s, _, o in found["relations"] for end in (s, o)}
        assert ends <= set(found["objects"])
    assert seen == {*TRUTH["objects"], "girls", "balls", "benches", "puppies", "playing football", "played football"}


def test_corrupt_must_be_a_fraction() -> None:
    with pytest.raises(ValueError, match=r"corrupt: got 2, expected 0 to 1"):
        StubServer({}, corrupt=2)


def test_speed() -> None:
    """Far above 100 requests/s on one core with images of 50 kB: about 1,100 were measured, client included."""
    data = bytes(50_000)
    with StubServer({hashlib.sha256(data).hexdigest(): TRUTH}) as server:
        client, body = Client(server), request(data)
        client.post(body)
        start = time.process_time()  # of all threads; other processes do not count
        for _ in range(100):
            assert client.post(body)[0] == 200
        assert time.process_time() - start < 0.5
