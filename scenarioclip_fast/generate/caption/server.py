"""Captions by a vision-language model on an OpenAI-compatible server."""

from __future__ import annotations

import base64
import ipaddress
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Any, ClassVar
from urllib.parse import urlsplit

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.caption.answer import outcome_of
from scenarioclip_fast.generate.caption.prompt import answer_schema, encoded_picture, prompt_text
from scenarioclip_fast.generate.config import CaptionConfig
from scenarioclip_fast.generate.stages import Images, Outcome, Work
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import one_line, short, warn

_MAX_BACKOFF_S = 60.0
_MAX_RETRY_AFTER_S = 600.0
_CONNECT_S = 10.0
_WAKE_S = 0.5
_PASSING = (408, 409, 429)  # and 5xx

_CONTEXT = re.compile(r"context.?(length|size|window)|max_model_len|maximum model length", re.IGNORECASE)
_SCHEMA = re.compile(r"response_format|json.?schema|grammar", re.IGNORECASE)


class ServerCaptions:
    """The stage `caption` with a model on a server.

    Args:
        sleep: waits for so many seconds before a request is repeated; None: until then or until the stage ends.
    """

    name: ClassVar[str] = "caption"

    def __init__(self, config: CaptionConfig, *, sleep: Callable[[float], object] | None = None) -> None:
        self._config, self._sleep = config, sleep
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, float]:
        """Requests, retries, tokens, their cost, and seconds waited before retries, over all threads."""
        return dict(self._counts)

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield outcomes as answers arrive, with `caption.concurrency` requests in flight.

        Raises:
            UserError: the server is down, refuses the API key, or does not have the model.
        """
        session = _Session(self._config, self._counts, self._sleep)
        try:
            yield from session.run(works)
        finally:
            session.close()

    def close(self) -> None:
        """Do nothing: connections end with `run`."""


@dataclass
class _Failure(Exception):
    """A request failed for a passing reason.

    Attributes:
        retry_after: seconds that the server asks to wait.
        unreachable: there was no answer.
    """

    reason: str
    detail: str
    retry_after: float = 0.0
    unreachable: bool = False


@dataclass
class _Refusal(Exception):
    """The image cannot be answered."""

    reason: str
    detail: str


class _Stopped(Exception):
    """The stage ended while an image was in progress."""


class _Session:
    """The threads and connections of one run."""

    def __init__(
        self, config: CaptionConfig, counts: Counter[str], sleep: Callable[[float], object] | None = None
    ) -> None:
        self._config, self._counts = config, counts
        self._openai = require("openai")
        self._client = self._connect()
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[Work | None] = SimpleQueue()
        self._done: SimpleQueue[Outcome | BaseException] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._images = threading.local()
        self._decoding = threading.Semaphore(os.cpu_count() or 1)  # bounds the memory of decoded images
        self._prompt = prompt_text(config)
        self._format = _response_format(config)
        self._length = "max_tokens"
        self._failed = 0  # images in a row
        self._patience = max(4, config.concurrency // 2)
        self._warned = False

    def _connect(self) -> Any:
        config = self._config
        key = os.environ.get(config.api_key_env, "").strip()
        if not key.isascii() or not (key or "none").isprintable():
            raise UserError(f"{config.api_key_env}: not an API key: it contains control or non-ASCII characters")
        timeout = self._openai.Timeout(config.timeout_s, connect=min(_CONNECT_S, config.timeout_s))
        try:
            _ = urlsplit(config.url).port  # raises an error for one that does not exist
            # A proxy of the environment is for other machines.
            http = self._openai.DefaultHttpxClient(trust_env=not _is_loopback(config.url), timeout=timeout)
            return self._openai.OpenAI(
                base_url=config.url, api_key=key or "none", timeout=timeout, max_retries=0, http_client=http
            )
        except Exception as error:  # of httpx, under several names
            raise UserError(f"caption.url: got {config.url}: {error}; expected http://HOST:PORT/v1") from None

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        # Daemons: a thread that waits for the server must not delay the end of the process, as an executor's would.
        self._threads = [
            threading.Thread(target=self._work, name="caption", daemon=True) for _ in range(self._config.concurrency)
        ]
        for thread in self._threads:
            thread.start()
        pending = 0
        ahead = 2 * self._config.concurrency  # the rest is ready when the caller is slow
        for work in works:
            self._tasks.put(work)
            pending += 1
            while pending >= ahead or (pending and not self._done.empty()):
                yield from self._next()
                pending -= 1
        for _ in range(pending):
            yield from self._next()

    def _next(self) -> Iterator[Outcome]:
        result = self._wait()
        if isinstance(result, Outcome):
            yield result
            return
        self._stop.set()
        while not self._done.empty():  # what was paid for before the error
            if isinstance(other := self._done.get(), Outcome):
                yield other
        raise result

    def _wait(self) -> Outcome | BaseException:
        # A signal that comes just before the thread sleeps is handled only when it wakes: an interrupt would be lost.
        while True:
            try:
                return self._done.get(timeout=_WAKE_S)
            except Empty:
                continue

    def close(self) -> None:
        """End the threads; those that wait for the server are left behind, and end with their request."""
        self._stop.set()
        try:
            while True:
                self._tasks.get_nowait()
        except Empty:
            pass
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + 0.5
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._client.close()

    def _work(self) -> None:
        while (work := self._tasks.get()) is not None:
            try:
                self._done.put(self._caption(work))
            except _Stopped:
                return
            except BaseException as error:  # raised by `run`
                self._done.put(error)
                self._stop.set()
                return

    def _caption(self, work: Work) -> Outcome:
        with self._decoding:
            found = self._own_images().both(work)
            if isinstance(found, Outcome):
                return found
            data, pixels = found
            height, width = pixels.shape[:2]
            data = encoded_picture(data, pixels, self._config)
        del found, pixels
        try:
            text, truncated = self._answer(work.key, f"data:image/jpeg;base64,{base64.b64encode(data).decode()}")
        except _Refusal as error:
            return Outcome(work.key, reason=error.reason, detail=error.detail)
        except _Failure as error:
            self._record_failure(error)
            return Outcome(work.key, reason=error.reason, detail=error.detail, retry=True)
        return outcome_of(work.key, (height, width), text, self._config, truncated=truncated)

    def _own_images(self) -> Images:
        """A reader of this thread: decoders are not shared."""
        if not hasattr(self._images, "value"):
            self._images.value = Images()
        images: Images = self._images.value
        return images

    def _record_failure(self, error: _Failure) -> None:
        """Count an image that failed also when it was repeated; end the stage if many in a row did."""
        with self._lock:
            self._failed += 1
            failed = self._failed
        url = self._config.url
        if error.unreachable and failed >= self._patience:
            raise UserError(
                f"caption: cannot reach {url}: {error.detail}: start the server, then re-run the command to resume"
            )
        if failed >= 8 * self._patience:
            raise UserError(
                f"caption: {url} failed for {failed} images in a row, the last time with: {error.detail}: correct "
                "the cause, then re-run the command to resume"
            )

    def _answer(self, key: str, picture: str) -> tuple[str, bool]:
        """Ask until there is an answer: its text, and whether it was cut off.

        Raises:
            _Failure: also when the request was repeated.
            _Refusal, UserError: repeating it does not help.
        """
        attempt = 0
        while True:
            body = self._body(key, picture)
            try:
                answer = self._request(body)
            except _Failure as error:
                if self._stop.is_set():  # the connection was closed by `close`
                    raise _Stopped from None
                if attempt == self._config.retries:
                    raise
                delay = _delay(attempt, error.retry_after)
                self._announce(error)
                attempt += 1
            else:
                if answer is not None:
                    return answer
                continue  # without the option that was refused
            self._count(retries=1, **{"seconds waited": delay})
            self._sleep(delay)

    def _announce(self, error: _Failure) -> None:
        """Say once that the server is not reached: the first attempts take a while."""
        with self._lock:
            first, self._warned = error.unreachable and not self._warned, self._warned or error.unreachable
        if first:
            warn(f"caption: {self._config.url}: {error.detail}; trying again up to {self._config.retries} times")

    def _count(self, **amounts: float) -> None:
        with self._lock:
            self._counts.update(amounts)

    def _body(self, key: str, picture: str) -> dict[str, Any]:
        config = self._config
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": self._prompt}]
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": config.temperature,
            self._length: config.max_tokens,
        }
        if config.temperature:  # the same answer in every run
            body["seed"] = random.Random(key).getrandbits(31)
        return body if self._format is None else body | {"response_format": self._format}

    def _request(self, body: dict[str, Any]) -> tuple[str, bool] | None:
        """Send one request; None if an option was refused, which is then left out."""
        if self._stop.is_set():
            raise _Stopped
        self._count(requests=1)
        api = self._openai
        try:
            completion = self._client.chat.completions.create(**body)
        except api.APITimeoutError as error:
            connecting = type(error.__cause__).__name__ == "ConnectTimeout"
            detail = f"no {'connection' if connecting else 'answer'} within {self._config.timeout_s:g} s"
            raise _Failure("server_timeout", detail, unreachable=connecting) from None
        except api.APIConnectionError as error:
            raise _Failure("server_error", one_line(error.__cause__ or error), unreachable=True) from None
        except api.APIStatusError as error:
            self._refused(error, body)
            return None
        except (api.APIError, ValueError) as error:  # the body is not JSON
            raise _Failure("server_error", f"not a chat completion: {one_line(error)}") from None
        return self._content(completion)

    def _refused(self, error: Any, body: dict[str, Any]) -> None:
        """Handle a status that is an error; returns if an option was refused, which is then left out."""
        status, message = error.status_code, one_line(_message(error))
        detail = f"status {status}: {message}"
        if status in _PASSING or status >= 500:
            raise _Failure("server_error", detail, _retry_after(error.response.headers)) from None
        if status in (401, 403):
            raise UserError(
                f"caption: {self._config.url}: {detail}: set the environment variable {self._config.api_key_env} to a "
                f"valid API key (caption.api_key_env){self._models()}"
            ) from None
        if status == 404 or error.code == "model_not_found":
            raise UserError(
                f"caption: {self._config.url}: {detail}: expected --vlm-url http://HOST:PORT/v1, and --vlm-model NAME "
                f"of a model that it has{self._models()}"
            ) from None
        if error.code == "context_length_exceeded" or _CONTEXT.search(message):
            raise _Refusal("context_exceeded", detail) from None
        named = f"{message} {error.param or ''}"
        if "response_format" in body and _SCHEMA.search(named):
            with self._lock:
                first, self._format = self._format is not None, None
            if first:
                warn(f"caption: the server refuses caption.schema={self._config.schema} ({detail}); going on without")
            return
        if "max_tokens" in body and "max_completion_tokens" in named:
            self._length = "max_completion_tokens"  # newer models of OpenAI
            return
        raise _Refusal("request_refused", detail) from None

    def list_models(self) -> list[str]:
        """The names of the server's models; empty if it has no list. Raises UserError if it cannot be reached."""
        try:
            found = self._client.with_options(timeout=_CONNECT_S).models.list().data
        except self._openai.APIConnectionError as error:
            detail = one_line(error.__cause__ or error)
            raise UserError(f"caption: cannot reach {self._config.url}: {detail}: start the server") from None
        except Exception:  # of other kinds: the server has no list
            return []
        return [str(model.id) for model in found]

    def _models(self) -> str:
        try:
            names = [str(model.id) for model in self._client.with_options(timeout=_CONNECT_S).models.list().data]
        except Exception:  # the server has no list: the error says enough without it
            return ""
        return f"; it has {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""

    def _content(self, completion: Any) -> tuple[str, bool]:
        """The text of a chat completion, none of whose members is sure to exist."""
        usage = getattr(completion, "usage", None)
        prompt, answer = (_number(getattr(usage, name, 0)) for name in ("prompt_tokens", "completion_tokens"))
        cost = (prompt * self._config.price_in + answer * self._config.price_out) / 1e6
        self._count(cost=cost, **{"prompt tokens": prompt, "answer tokens": answer})
        choices = getattr(completion, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message, finish = getattr(choice, "message", None), getattr(choice, "finish_reason", None)
        text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
        if isinstance(text, str) and text.strip():
            with self._lock:
                self._failed = 0
            return text, finish == "length"
        if finish == "length":
            raise _Refusal("answer_truncated", "caption.max_tokens were used up before the answer")
        if refusal or finish == "content_filter":
            raise _Refusal("request_refused", one_line(refusal or "content filter"))
        raise _Failure("server_error", f"got no text in {one_line(completion)}")


def check_server(config: CaptionConfig) -> None:
    """Check that the server answers, and has the model if it lists its models.

    Raises:
        UserError: it cannot be reached, or has other models.
    """
    session = _Session(config, Counter(), None)
    try:
        names = session.list_models()
    finally:
        session.close()
    if names and config.model not in names:
        raise UserError(f"caption.model: got {short(config.model)}, but {config.url} has {', '.join(names[:10])}")


def _response_format(config: CaptionConfig) -> dict[str, Any] | None:
    if config.schema == "json_schema":
        schema = {"name": "scene", "strict": True, "schema": answer_schema(config)}
        return {"type": "json_schema", "json_schema": schema}
    return {"type": "json_object"} if config.schema == "json_object" else None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _delay(attempt: int, retry_after: float) -> float:
    """Seconds before the next attempt: doubled each time, with jitter, so that threads do not return all at once."""
    backoff = min(_MAX_BACKOFF_S, 2.0**attempt) * random.uniform(0.5, 1)
    return max(backoff, min(retry_after, _MAX_RETRY_AFTER_S) * random.uniform(1, 1.1))


def _retry_after(headers: Any) -> float:
    """Seconds of the header Retry-After: a number or a date; 0 without one."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text)) if text else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _message(error: Any) -> str:
    """What a server says in the body of an error."""
    body = error.body
    if isinstance(body, dict):
        return str(body.get("message") or body.get("detail") or body)
    return str(body) if body else str(error)


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
