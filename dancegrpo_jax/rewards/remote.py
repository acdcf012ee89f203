"""Rewards that live behind HTTP: scorers on another machine, and vision-language models as judges.

| name | server | value of an image |
|---|---|---|
| `remote` | `launch/serve_reward.py`, or your own `/v1/score` | what the server's reward says |
| `judge` | OpenAI-compatible chat completions (vLLM, sglang, cloud) | a number parsed from the answer |
| `judge_yes` | the same, with log-probabilities | P(yes) / (P(yes) + P(no)) of the first token (RewardDance, OneReward) |
| `judge_pairs` | the same | share of won comparisons within the group (Pref-GRPO, arXiv:2508.20751) |

JSON both ways, images as PNG. A request is retried, with growing and jittered pauses, on refused or broken connections,
time-outs, 429, 5xx and answers that are no JSON; what fails for good masks its image (or comparison) and nothing else. After
several such failures in a row the server counts as down for a while and is not asked.
"""

import base64
import io
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import httpx
import numpy as np
from PIL import Image

from dancegrpo_jax.rewards.base import HostReward

log = logging.getLogger(__name__)
MAX_ANSWER = 1 << 24  # bytes


class RemoteError(RuntimeError):
    """A server did not give a usable answer; the message names its address and what happened."""


class Client:
    """Posts JSON to one server from many threads.

    Args:
      url: of the server, without the path of an endpoint.
      token: name of an environment variable that holds a bearer token. Its value goes into the header and nowhere else.
      timeout: seconds for one request as a whole, however slowly the answer drips in.
      retries: further attempts after a failed one.
      concurrency: requests at a time.
      patience: failed requests in a row (each with all its retries) after which the server counts as down ...
      cooldown: ... for this many seconds; then one request tries again.
    Raises: ValueError for a wrong url or an unset token variable.
    """

    def __init__(self, url: str, token: str = "", timeout: float = 120.0, retries: int = 3, concurrency: int = 16,
                 patience: int = 5, cooldown: float = 60.0):
        if not re.match(r"https?://[^/]+", url):
            raise ValueError(f"url {url!r} must start with http:// or https://")
        if token and not os.environ.get(token):
            raise ValueError(f"the environment variable {token} is not set; it should hold the bearer token for {url}")
        if min(timeout, concurrency, patience) <= 0 or retries < 0 or cooldown < 0:
            raise ValueError("timeout, concurrency and patience must be positive, retries and cooldown not negative")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.patience, self.cooldown, self.backoff = patience, cooldown, 0.5
        self._headers = {"Authorization": f"Bearer {os.environ[token]}"} if token else {}
        self._client = httpx.Client(timeout=timeout, limits=httpx.Limits(max_connections=concurrency))
        self._slots, self._lock = threading.Semaphore(concurrency), threading.Lock()
        self._failed, self._closed_until = 0, 0.0

    def post(self, path: str, payload: dict) -> dict:
        """The JSON object that the server answers. Raises: RemoteError when all attempts failed, or the server is down."""
        with self._lock:
            if time.monotonic() < self._closed_until:
                raise RemoteError(f"{self.url} counts as down after {self._failed} failed requests in a row")
            if self._failed >= self.patience:  # this request is the trial; others wait for what becomes of it
                self._closed_until = time.monotonic() + self.cooldown
        reason, pause = "", None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep((pause or self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5))
            try:
                with self._slots:
                    answer = self._once(path, payload)
            except _Retry as error:
                reason, pause = str(error), error.pause
            else:
                with self._lock:
                    self._failed, self._closed_until = 0, 0.0
                return answer
        with self._lock:
            self._failed += 1
            if self._failed >= self.patience:
                self._closed_until = time.monotonic() + self.cooldown
                log.warning("reward server %s: %d requests in a row failed (%s); not asked for %.0f s", self.url, self._failed,
                            reason, self.cooldown)
        raise RemoteError(f"{self.url}{path}: {reason} ({self.retries + 1} attempts)")

    def _once(self, path: str, payload: dict) -> dict:
        deadline = time.monotonic() + self.timeout
        try:
            with self._client.stream("POST", self.url + path, json=payload, headers=self._headers) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > deadline:
                        raise _Retry(f"no complete answer in {self.timeout:g} s")
                    if len(body) > MAX_ANSWER:
                        raise RemoteError(f"{self.url}{path}: answer larger than {MAX_ANSWER} bytes")
                status, wait = response.status_code, response.headers.get("retry-after", "")
        except httpx.TimeoutException as error:
            raise _Retry(f"no answer in {self.timeout:g} s ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise _Retry(f"{type(error).__name__}: {error}") from error
        if status == 429 or status >= 500:
            raise _Retry(f"status {status}", min(float(wait), 30.0) if wait.replace(".", "", 1).isdigit() else None)
        if status != 200:
            raise RemoteError(f"{self.url}{path}: status {status}: {bytes(body[:200]).decode(errors='replace')}")
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise _Retry(f"the answer is no JSON: {bytes(body[:60])!r}") from error
        if not isinstance(answer, dict):
            raise _Retry(f"the answer is no JSON object: {bytes(body[:60])!r}")
        return answer


class _Retry(Exception):
    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


def png(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


class RemoteReward(HostReward):
    """Common to all: one client (`Client` explains its options), and the parts of a group asked for side by side."""

    def __init__(self, url: str, token: str = "", timeout: float = 120.0, retries: int = 3, concurrency: int = 16,
                 patience: int = 5, cooldown: float = 60.0):
        self.client = Client(url, token, timeout, retries, concurrency, patience, cooldown)
        self._workers = ThreadPoolExecutor(concurrency, thread_name_prefix="remote")
        self._warned: set[str] = set()

    def ask_all(self, ask: Callable, arguments: list[tuple]) -> list:
        """[ask(*a) for a in arguments], in parallel; NaN where it raised RemoteError or ValueError, said once a kind."""
        def safely(args):
            try:
                return ask(*args)
            except (RemoteError, ValueError) as error:
                kind = re.sub(r"\d+", "#", str(error))[:80]
                if kind not in self._warned:
                    self._warned.add(kind)
                    log.warning("reward %r: %s (its images are masked; said once)", self.name, error)
                return float("nan")
        return list(self._workers.map(safely, arguments))


class Remote(RemoteReward):
    """A reward that `launch/serve_reward.py` (or anything with its protocol) computes elsewhere.

    Args: url; scorer: the name by which the server knows the reward, "" for its only one; the rest as for `Client`.
    """

    def __init__(self, url: str, scorer: str = "", **client):
        super().__init__(url, **client)
        self.scorer = scorer

    def score(self, images, prompts, metadata):
        items = [{"id": str(i), "prompt": prompt, "media": [{"kind": "image", "mime": "image/png", "b64": png(image)}],
                  "metadata": json_fields(fields)}
                 for i, (image, prompt, fields) in enumerate(zip(images, prompts, metadata, strict=True))]
        answer = self.client.post("/v1/score", {"reward": self.scorer, "items": items})
        results = answer.get("results")
        if not isinstance(results, list) or len(results) != len(items):
            raise RemoteError(f"{self.client.url}/v1/score: {len(items)} items got "
                              f"{len(results) if isinstance(results, list) else 'no'} results")
        found = {str(result.get("id")): result for result in results if isinstance(result, dict)}
        ordered = [found.get(item["id"], {}) for item in items]
        single = [_number(result, result.get("score")) for result in ordered]
        names = sorted({name for result in ordered for name in result.get("scores") or {}})
        several = {name: [_number(result, (result.get("scores") or {}).get(name)) for result in ordered] for name in names}
        return ({"score": single} if any("score" in result for result in ordered) else {}) | several if several else single


def json_fields(fields: Mapping) -> dict:
    """The fields of a row that JSON can hold: text, numbers, lists and objects of these. Others (pictures, files) stay here."""
    found = {}
    for name, value in fields.items():
        value = value.item() if isinstance(value, np.generic) else value
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            continue
        found[name] = value
    return found


def _number(result: dict, value) -> float:
    good = result.get("ok", True) is True and isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if good else float("nan")


class Chat(RemoteReward):
    """A vision-language model asked by chat completion; `template` is the question, in which {prompt} stands for the prompt."""

    def __init__(self, url: str, model: str, template: str, max_tokens: int = 1024, **client):
        super().__init__(url, **client)
        if "{prompt}" not in template:
            raise ValueError(f"reward {self.name!r}: template must hold {{prompt}}, which is replaced by the image's prompt")
        self.model, self.template, self.max_tokens = model, template, max_tokens

    def complete(self, images, prompt: str, **options) -> dict:
        """The first choice of the answer to the template with `images` (uint8 [H, W, 3] each) before it."""
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}} for image in images]
        content.append({"type": "text", "text": self.template.replace("{prompt}", prompt)})
        answer = self.client.post("/chat/completions", {
            "model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": self.max_tokens, **options})
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise RemoteError(f"{self.client.url}: an answer without choices") from error


def _text(choice: dict) -> str:
    content = (choice.get("message") or {}).get("content")
    if not isinstance(content, str):
        raise RemoteError("an answer without text")
    return content


class Judge(Chat):
    """A number that the model writes after thinking: the last match of `pattern`'s group, divided by `scale`.

    Several named groups, `Alignment: (?P<alignment>[0-5]).*Style: (?P<style>[0-5])`, give several values, which become
    rewards by `"weight": {"alignment": 1.0, "style": 0.5}`.

    Args: url: up to and with "/v1"; model: as the server names it; the rest as for `Client`.
    """

    def __init__(self, url: str, model: str, template: str = (
            "This picture should show: {prompt}\nJudge how well it does so and how well it is made. Think briefly, then end "
            "with a line 'Final Score: x' where x is a number from 1 (bad) to 5 (perfect)."),
                 pattern: str = r"Final Score:\s*([0-9]+(?:\.[0-9]+)?)", scale: float = 5.0, **chat):
        super().__init__(url, model, template, **chat)
        self.pattern, self.scale = re.compile(pattern, re.DOTALL), scale
        if self.pattern.groups not in (1, len(self.pattern.groupindex) or 1):
            raise ValueError(f"reward {self.name!r}: pattern {pattern!r} must have one group, the number, or only named groups")

    def score(self, images, prompts, metadata):
        def ask(image, prompt):
            matches = list(self.pattern.finditer(_text(self.complete([image], prompt))))
            if not matches:
                raise ValueError(f"an answer of {self.client.url} does not match {self.pattern.pattern!r}")
            return [float(number) / self.scale for number in matches[-1].groups()]
        failed = [float("nan")] * self.pattern.groups
        answers = np.array([answer if isinstance(answer, list) else failed
                            for answer in self.ask_all(ask, list(zip(images, prompts, strict=True)))])
        names = self.pattern.groupindex
        return {name: answers[:, index - 1] for name, index in names.items()} if names else answers[:, 0]


class JudgeYes(Chat):
    """P(yes) / (P(yes) + P(no)) of the first token of the answer, over all spellings among the 20 likeliest tokens."""

    def __init__(self, url: str, model: str, template: str = (
            "Does this picture show exactly: {prompt}? Answer yes or no."), **chat):
        super().__init__(url, model, template, **{"max_tokens": 1} | chat)

    def score(self, images, prompts, metadata):
        def ask(image, prompt):
            choice = self.complete([image], prompt, logprobs=True, top_logprobs=20)
            try:
                likely = choice["logprobs"]["content"][0]["top_logprobs"]
                mass = {"yes": 0.0, "no": 0.0}
                for entry in likely:
                    word = entry["token"].strip().lower()
                    if word in mass:
                        mass[word] += float(np.exp(entry["logprob"]))
            except (KeyError, IndexError, TypeError) as error:
                raise RemoteError(f"{self.client.url}: an answer without log-probabilities") from error
            if not sum(mass.values()):
                raise ValueError(f"neither yes nor no among the likeliest answers of {self.client.url}")
            return mass["yes"] / sum(mass.values())
        return self.ask_all(ask, list(zip(images, prompts, strict=True)))


class JudgePairs(Chat):
    """Win rate in [0, 1] of each image against the others of its group; unclear answers count half for both.

    A group of G images takes G (G - 1) / 2 questions, twice that with `both_orders`, which cancels a preference for the
    first picture. A question that failed counts for neither; an image without any answer is masked.
    """

    needs_group = True

    def __init__(self, url: str, model: str, template: str = (
            "Two pictures were made for: {prompt}\nCompare how well they match it and how well they are made. Think briefly, "
            "then end with <answer>Image 1 is better</answer> or <answer>Image 2 is better</answer>."),
                 both_orders: bool = False, **chat):
        super().__init__(url, model, template, **{"max_tokens": 2048} | chat)
        self.both_orders = both_orders

    def score(self, images, prompts, metadata):
        def ask(i, j):  # the share of the win that goes to i
            verdicts = re.findall(r"<answer>\s*Image ([12]) is better\s*</answer>", _text(self.complete(
                [images[i], images[j]], prompts[i])), re.IGNORECASE)
            return {"1": 1.0, "2": 0.0}[verdicts[-1]] if verdicts else 0.5

        pairs = list(combinations(range(len(images)), 2))
        if self.both_orders:
            pairs += [(j, i) for i, j in pairs]
        wins, asked = np.zeros(len(images)), np.zeros(len(images))
        for (i, j), share in zip(pairs, self.ask_all(ask, pairs), strict=True):
            if np.isfinite(share):
                wins[[i, j]] += share, 1 - share
                asked[[i, j]] += 1
        return np.where(asked > 0, wins / np.maximum(asked, 1), np.nan)
