"""An OpenAI-compatible server that knows the answers: a vision-language model for tests and the demo.

It answers with the truth about each image, by the SHA-256 of the image's bytes, and can corrupt a known fraction of the
answers, so that curation can be scored, and fail in the ways in which servers fail.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal["bad_json", "wrong_name", "extra_object", "false_relation", "absent_relation"]
KINDS: tuple[Kind, ...] = ("bad_json", "wrong_name", "extra_object", "false_relation", "absent_relation")

# What no drawn scene has; predicates of places are left out, because one may hold though the truth does not list it.
_ABSENT = ("bathtub", "ladder", "lighthouse", "piano", "submarine", "telescope", "volcano", "windmill")
_PREDICATES = ("chasing", "eating", "feeding", "kissing", "painting", "pulling", "reading", "washing")
# Verbs whose past is "-ed" appended.
_REGULAR = (
    "climb",
    "cook",
    "greet",
    "jump",
    "kick",
    "look",
    "pack",
    "paint",
    "park",
    "perch",
    "play",
    "pull",
    "push",
    "rest",
    "talk",
    "wait",
    "walk",
    "wash",
    "watch",
)


@dataclass(frozen=True)
class Corruption:
    """How an answer differs from the truth.

    Attributes:
        kind: bad_json: it cannot be parsed; wrong_name: an object has the name of something else, in relations too;
            extra_object: it names an object that is not in the image; false_relation: a relation between two of its
            objects does not hold; absent_relation: a relation has an object that is not in the image.
        before, after: names or triplets that were replaced, and what replaces or joins them.
    """

    kind: Kind
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Fault:
    """How a request fails.

    Attributes:
        status: HTTP status; 200 with a `body` of any content.
        body: dict: sent as JSON; text: sent as text/html.
        headers: such as Retry-After, or another Content-Type.
        delay_s: seconds before the answer.
        drop: close the connection without an answer.
        answer: False: only the delay is a fault.
    """

    status: int = 200
    body: dict[str, Any] | str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drop: bool = False
    answer: bool = False

    @classmethod
    def error(cls, status: int, message: str = "out of order", *, retry_after: str = "", **members: str) -> Fault:
        """An error as OpenAI-compatible servers report it."""
        body = {"error": {"message": message, "type": "error", "param": None, "code": None, **members}}
        return cls(status, body, {"Retry-After": retry_after} if retry_after else {})

    @classmethod
    def slow(cls, delay_s: float) -> Fault:
        """A late, but right answer."""
        return cls(delay_s=delay_s, answer=True)

    @classmethod
    def context_exceeded(cls) -> Fault:
        """The error of vLLM for a prompt that is too long."""
        return cls.error(400, "The decoder prompt (length 5000) is longer than the maximum model length of 4096.")

    @classmethod
    def completion(cls, content: str | None, finish: str = "stop", **message: Any) -> Fault:
        """A chat completion with another text."""
        return cls(body=_completion("", content, finish, message))


Faults = Callable[[int, str], Fault | None] | Sequence[Fault | None]


class StubServer:
    """The server; a context manager.

    Args:
        answers: SHA-256 of the image's bytes (hex) -> the truth: "action", "caption", "objects" and "relations".
        model: the model that it has.
        corrupt: fraction of the answers that are corrupted, chosen by the image's hash and `seed`.
        vary: vary the form of answers, not their meaning: code fences, plurals, upper case, actions in "-ed".
        faults: of the number of a request (from 0) and the image's hash; or a list for the first requests.
        refuse: members of a request that are refused with status 400.
        api_key: required; empty: none.
        port: 0: any.

    Attributes:
        requests: number of chat completions so far.
        most_in_flight: of these, at the same time.
        last_request: its body.
    """

    def __init__(
        self,
        answers: Mapping[str, Mapping[str, Any]],
        *,
        model: str = "stub",
        corrupt: float = 0.0,
        vary: bool = False,
        seed: int = 0,
        faults: Faults = (),
        refuse: Sequence[str] = (),
        api_key: str = "",
        port: int = 0,
    ) -> None:
        if not 0 <= corrupt <= 1:
            raise ValueError(f"corrupt: got {corrupt}, expected 0 to 1")
        self._answers, self.model, self._seed = answers, model, seed
        self._corrupt, self._vary = corrupt, vary
        self._faults, self._refuse, self._api_key = faults, tuple(refuse), api_key
        self.requests = 0
        self.last_request: dict[str, Any] = {}
        self._in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._port = port
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """The base URL, http://127.0.0.1:PORT/v1, while the server runs."""
        assert self._server is not None, "use StubServer in a `with` statement"
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StubServer:
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.stub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.drop_connections()
        self._server = None

    def corruption_of(self, sha: str) -> Corruption | None:
        """How the answer for an image is corrupted; None: it is true."""
        return self._corrupted(sha)[1]

    def answer(self, sha: str) -> str:
        """The text of the answer for an image.

        Raises:
            KeyError: there is none.
        """
        record, corruption = self._corrupted(sha)
        rng = self._rng("vary", sha)
        if self._vary:
            record = _varied(record, rng)
        text = json.dumps(record, indent=rng.choice((None, 1)) if self._vary else None)
        if corruption is not None and corruption.kind == "bad_json":
            text = text.replace('"', "").replace("{", "(").replace("}", ")")
        if self._vary and rng.random() < 0.5:
            text = f"Here is the JSON:\n```json\n{text}\n```"
        return text

    def _rng(self, *parts: object) -> random.Random:
        return random.Random(hashlib.sha256(repr((self._seed, *parts)).encode()).digest())

    def _corrupted(self, sha: str) -> tuple[dict[str, Any], Corruption | None]:
        truth = self._answers[sha]
        record = {
            "caption": truth.get("caption"),
            "action": truth.get("action"),
            "objects": list(truth["objects"]),
            "relations": [list(triplet) for triplet in truth["relations"]],
        }
        rng = self._rng("corrupt", sha)
        return (record, None) if rng.random() >= self._corrupt else _corrupt(record, rng)

    def respond(self, body: Any, authorization: str) -> Fault:
        """The response to a chat completion request."""
        sha, image_problem = "", None
        try:
            sha = _image_hash(body)
        except (binascii.Error, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            image_problem = f"no image as a data URL in the first message: {type(error).__name__}: {error}"
        with self._lock:
            number, self.requests = self.requests, self.requests + 1
            self.last_request = body
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return self._respond(number, sha, image_problem, body, authorization)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _respond(self, number: int, sha: str, problem: str | None, body: Any, authorization: str) -> Fault:
        if self._api_key and authorization != f"Bearer {self._api_key}":
            return Fault.error(401, "Unauthorized")
        fault = self._fault(number, sha)
        if fault is not None:
            time.sleep(fault.delay_s)
            if not fault.answer:
                return fault
        if problem is not None:
            return Fault.error(400, problem)
        if body.get("model") != self.model:
            return Fault.error(404, f"The model `{body.get('model')}` does not exist.", type="NotFoundError")
        for name in self._refuse:
            if name in body:
                other = "; use max_completion_tokens instead" * (name == "max_tokens")
                return Fault.error(400, f"Unsupported parameter: '{name}'{other}", param=name)
        if sha not in self._answers:
            return Fault.error(400, f"no answer for the image with SHA-256 {sha}")
        return Fault(body=_completion(self.model, self.answer(sha), "stop", {}))

    def _fault(self, number: int, sha: str) -> Fault | None:
        if callable(self._faults):
            return self._faults(number, sha)
        return self._faults[number] if number < len(self._faults) else None


def _image_hash(body: Any) -> str:
    for part in body["messages"][0]["content"]:
        if part["type"] == "image_url":
            _, _, data = part["image_url"]["url"].partition(";base64,")
            return hashlib.sha256(base64.b64decode(data, validate=True)).hexdigest()
    raise ValueError("no image_url")


def _completion(model: str, content: str | None, finish: str, message: dict[str, Any]) -> dict[str, Any]:
    answer = len(content or "") // 4 + 1  # about four characters a token
    return {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, **message},
                "finish_reason": finish,
            }
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": answer, "total_tokens": 1000 + answer},
    }


def _corrupt(record: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], Corruption]:
    """Corrupt an answer in place, in one of the ways that it allows."""
    objects: list[str] = record["objects"]
    relations: list[list[str]] = record["relations"]
    absent = [name for name in _ABSENT if not any(name in one.split() for one in objects)]
    held = {tuple(triplet) for triplet in relations}
    pairs = [(a, b) for a in objects for b in objects if a != b]
    kinds = [kind for kind in KINDS if objects or kind == "bad_json"]
    kind = rng.choice([kind for kind in kinds if pairs or kind != "false_relation"])
    if kind == "wrong_name":
        old, new = rng.choice(objects), rng.choice(absent)
        objects[objects.index(old)] = new
        for triplet in relations:
            triplet[0], triplet[2] = (new if end == old else end for end in (triplet[0], triplet[2]))
        return record, Corruption(kind, (old,), (new,))
    if kind == "extra_object":
        extra = rng.sample(absent, rng.choice((1, 2)))
        objects += extra
        return record, Corruption(kind, (), tuple(extra))
    if kind == "bad_json":
        return record, Corruption(kind)
    subject, object_ = rng.choice(pairs) if kind == "false_relation" else (rng.choice(objects), rng.choice(absent))
    predicate = rng.choice([p for p in _PREDICATES if (subject, p, object_) not in held])
    relations.append([subject, predicate, object_])
    return record, Corruption(kind, (), ((subject, predicate, object_),))


def _varied(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    record = json.loads(json.dumps(record))
    plural = {name: _plural(name) for name in record["objects"] if rng.random() < 0.2}
    record["objects"] = [plural.get(name, name) for name in record["objects"]]
    record["relations"] = [[plural.get(s, s), p, plural.get(o, o)] for s, p, o in record["relations"]]
    if rng.random() < 0.3:
        record["objects"] = [name.capitalize() for name in record["objects"]]
    action = record["action"]
    if action and rng.random() < 0.3:
        verb, _, rest = action.partition(" ")
        if verb.removesuffix("ing") in _REGULAR:
            action = f"{verb.removesuffix('ing')}ed {rest}".strip()
        record["action"] = action
    elif action and rng.random() < 0.3:
        record["action"] = action.upper()
    return dict(record)


def _plural(name: str) -> str:
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x", "z", "ch", "sh")) else f"{name}s"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    stub: StubServer

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def server_bind(self) -> None:
        # Without the look-up of the host's name by HTTPServer, which takes seconds where there is no name server.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Close kept-alive connections, as the end of a process would."""
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that left."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # header and body in one packet
    server: _Server

    def do_GET(self) -> None:
        stub = self.server.stub
        if self.path.rstrip("/") != "/v1/models":
            self._send(Fault.error(404, "Not Found"))
        else:
            self._send(Fault(body={"object": "list", "data": [{"id": stub.model, "object": "model"}]}))

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.rstrip("/") != "/v1/chat/completions":
            self._send(Fault.error(404, "Not Found"))
            return
        try:
            body = json.loads(content)
        except ValueError as error:
            self._send(Fault.error(400, f"not JSON: {error}"))
            return
        self._send(self.server.stub.respond(body, self.headers.get("Authorization", "")))

    def _send(self, fault: Fault) -> None:
        if fault.drop:
            self.close_connection = True
            return
        is_json = isinstance(fault.body, dict)
        content = (json.dumps(fault.body) if is_json else str(fault.body)).encode()
        self.send_response(fault.status)
        headers = {"Content-Type": "application/json" if is_json else "text/html"} | dict(fault.headers)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
