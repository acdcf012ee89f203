"""Remote rewards against real servers on loopback, well-behaved and not: nothing hangs, what fails is masked and counted."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from dancegrpo_jax.data import rows_of
from dancegrpo_jax.media import from_images
from dancegrpo_jax.rewards import RewardSet, build
from dancegrpo_jax.rewards.remote import Client, RemoteError, png
from launch.serve_reward import make_server

IMAGES = np.random.default_rng(0).random((2, 4, 8, 8, 3), dtype=np.float32)
PROMPTS = ["a red circle", "two blue squares"]
MEDIA, ROWS = from_images(IMAGES), rows_of(PROMPTS)
FAST = {"timeout": 0.5, "retries": 2}


class Server:
    """A server whose answers a function decides: respond(path, payload, count) -> (status, bytes) or an act on the socket."""

    def __init__(self, respond):
        owner, self.requests, self.headers, self.lock = self, [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append((self.path, payload))
                    owner.headers.append(dict(self.headers))
                    count = len(owner.requests)
                answer = respond(self.path, payload, count)
                if callable(answer):
                    return answer(self)
                status, body = answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(respond):
        servers.append(Server(respond))
        return servers[-1]
    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses between retries a hundred times shorter."""
    sleep = time.sleep
    monkeypatch.setattr("dancegrpo_jax.rewards.remote.time.sleep", lambda seconds: sleep(seconds / 100))


def scored(payload):
    results = [{"id": item["id"], "score": float(item["id"]), "ok": True} for item in payload["items"]]
    return 200, json.dumps({"results": results}).encode()


def slow_drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            threading.Event().wait(0.1)
    except OSError:
        pass


def hang(handler):
    threading.Event().wait(3)


def hang_up(handler):
    handler.connection.close()


def first(bad):
    """The bad answer to the first request, good ones after."""
    return lambda path, payload, count: bad if count == 1 else scored(payload)


@pytest.mark.parametrize("bad", [(500, b""), (503, b"busy"), (429, b""), (200, b"<html>"), (200, b"[1]"), hang, hang_up,
                                 slow_drip],
                         ids=["500", "503", "429", "html", "list", "timeout", "hang up", "drip"])
def test_passing_faults_are_retried(serve, bad):
    server = serve(first(bad))
    rewards = RewardSet({"remote": {"url": server.url, **FAST}})
    values, ok = rewards(MEDIA, ROWS)["remote"]
    assert ok.all() and len(server.requests) == 3
    np.testing.assert_array_equal(values, [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("bad", [(500, b""), (404, b"nowhere"), (200, b"{}"), (200, b'{"results": []}'), hang, slow_drip],
                         ids=["500", "404", "no results", "wrong count", "timeout", "drip"])
def test_lasting_faults_mask_one_group(serve, bad):
    """The group of the first prompt fails for good; the other is scored, and the count is right."""
    server = serve(lambda path, payload, count: bad if payload["items"][0]["prompt"] == PROMPTS[0] else scored(payload))
    rewards = RewardSet({"remote": {"url": server.url, **FAST}})
    start = time.monotonic()
    values, ok = rewards(MEDIA, ROWS)["remote"]
    assert time.monotonic() - start < 10
    np.testing.assert_array_equal(ok, [[False] * 4, [True] * 4])
    assert not values[0].any() and rewards.failures == {"remote": 4}


def test_single_items_may_fail(serve):
    odd = [{"id": "0", "score": 1.0, "ok": True}, {"id": "2", "score": 5.0, "ok": False}, {"id": "1", "score": None},
           {"id": "3", "score": 3}]
    server = serve(lambda *args: (200, json.dumps({"results": odd}).encode()))
    values, ok = RewardSet({"remote": {"url": server.url}})(MEDIA, ROWS)["remote"]
    np.testing.assert_array_equal(ok, [[True, False, False, True]] * 2)
    np.testing.assert_array_equal(values, [[1, 0, 0, 3]] * 2)


def test_down_servers_are_left_alone_and_tried_again(serve):
    broken = threading.Event()
    broken.set()
    server = serve(lambda path, payload, count: (500, b"") if broken.is_set() else (200, b'{"x": 1}'))
    client = Client(server.url, retries=1, patience=2, cooldown=0.4)
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"status 500 \(2 attempts\)"):
            client.post("/v1/score", {})
    with pytest.raises(RemoteError, match="counts as down after 2"):
        client.post("/v1/score", {})
    assert len(server.requests) == 4  # the last was not sent
    broken.clear()
    threading.Event().wait(0.5)
    assert client.post("/v1/score", {}) == {"x": 1} == client.post("/v1/score", {})


def test_connection_refused_and_a_server_that_comes_back(serve):
    server = serve(lambda path, payload, count: scored(payload))
    url, port = server.url, server.http.server_port
    rewards = RewardSet({"remote": {"url": url, **FAST, "cooldown": 0.0}})
    assert rewards(MEDIA, ROWS)["remote"][1].all()
    server.close()
    assert not rewards(MEDIA, ROWS)["remote"][1].any() and rewards.failures["remote"] == 8
    again = make_server({"color": {}}, port=port)
    threading.Thread(target=again.serve_forever, daemon=True).start()
    try:
        assert rewards(MEDIA, ROWS)["remote"][1].all()
    finally:
        again.shutdown()
        again.server_close()


def test_no_more_requests_at_a_time_than_allowed(serve):
    lock, now, most = threading.Lock(), [0], [0]

    def respond(path, payload, count):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.05)
        with lock:
            now[0] -= 1
        return 200, b"{}"

    client = Client(serve(respond).url, concurrency=3)
    threads = [threading.Thread(target=client.post, args=("/x", {})) for _ in range(12)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert most[0] == 3


def test_served_rewards_are_the_rewards(monkeypatch):
    """Our server and our client: the values of the reward itself (PNG is exact for 8-bit pixels); a token is demanded."""
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    two = {"reward": "tests.test_rewards:two_components", "weight": {"level": 1.0, "count": 1.0}}
    server = make_server({"color": {}, "jpeg": {"quality": 50}, "two": two}, token="JUDGE_TOKEN")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    media = from_images(np.round(IMAGES * 255) / np.float32(255))
    try:
        config = {name: {"reward": "remote", "url": url, "scorer": name, "token": "JUDGE_TOKEN"} for name in ("color", "jpeg")}
        config["two"] = {"reward": "remote", "url": url, "scorer": "two", "token": "JUDGE_TOKEN", "weight": {"level": 1.0}}
        remote = RewardSet(config)(media, ROWS)
        local = RewardSet({"color": {}, "jpeg": {"quality": 50}, "two": two})(media, ROWS)
        assert list(remote) == ["color", "jpeg", "two.level"]
        for name, (values, ok) in remote.items():
            assert ok.all()
            np.testing.assert_allclose(values, np.asarray(local[name][0]), atol=1e-6)
        for options in ({}, {"token": "JUDGE_TOKEN", "scorer": "nothing"}):
            rewards = RewardSet({"remote": {"url": url, **options}})
            assert not rewards(media, ROWS)["remote"][1].any() and rewards.failures == {"remote": 8}
    finally:
        server.shutdown()
        server.server_close()


def tagged(images, prompts, metadata):
    return [fields["tag"] + len(fields) for fields in metadata]


def test_fields_of_a_row_reach_the_server(serve):
    """What JSON can hold is sent and arrives as metadata of the served reward; pictures and files stay."""
    fields = {"tag": np.int64(5), "boxes": [[1, 2]], "image": np.zeros((2, 2)), "file": b"x", "score": float("nan")}
    rows = [row._replace(fields=fields if row.index == 0 else {"tag": 40.0}) for row in ROWS]
    server = serve(lambda path, payload, count: scored(payload))
    RewardSet({"remote": {"url": server.url}})(MEDIA, rows)
    sent = {item["prompt"]: item["metadata"] for _, payload in server.requests for item in payload["items"]}
    assert sent == {PROMPTS[0]: {"tag": 5, "boxes": [[1, 2]]}, PROMPTS[1]: {"tag": 40.0}}

    ours = make_server({"tagged": {"reward": f"{__name__}:tagged"}})
    threading.Thread(target=ours.serve_forever, daemon=True).start()
    try:
        client = RewardSet({"remote": {"url": f"http://127.0.0.1:{ours.server_port}"}})
        values, ok = client(MEDIA, rows)["remote"]
        assert ok.all()
        np.testing.assert_array_equal(values, [[7] * 4, [41] * 4])
        item = {"id": "0", "prompt": "x", "media": [{"b64": png(np.zeros((2, 2, 3), np.uint8))}], "metadata": [1]}
        answer = client.rewards["remote"].client.post("/v1/score", {"items": [item]})["results"][0]
        assert not answer["ok"] and "metadata is [1], expected an object" in answer["detail"]
    finally:
        ours.shutdown()
        ours.server_close()


def test_a_server_may_give_one_score_and_several(serve):
    def respond(path, payload, count):
        results = [{"id": item["id"], "score": 2.0, "scores": {"a": 3.0, "b": 4.0}} for item in payload["items"]]
        return 200, json.dumps({"results": results}).encode()

    url = serve(respond).url
    scores = RewardSet({"one": {"reward": "remote", "url": url},
                        "two": {"reward": "remote", "url": url, "weight": {"b": 1.0}}})(MEDIA, ROWS)
    assert list(scores) == ["one", "two.b"] and (scores["one"][0] == 2).all() and (scores["two.b"][0] == 4).all()


def test_tokens_stay_out_of_sight(serve, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    server = serve(lambda *args: (500, b"no"))
    rewards = RewardSet({"remote": {"url": server.url, "token": "JUDGE_TOKEN", **FAST, "patience": 1}})
    rewards(MEDIA, ROWS)
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "500" in caplog.text and "s3cret" not in caplog.text + repr(rewards.__dict__) + json.dumps(server.requests)
    with pytest.raises(ValueError, match="NO_SUCH_VARIABLE is not set"):
        build("remote", {"url": server.url, "token": "NO_SUCH_VARIABLE"})


# ------------------------------------------------------------------------------------------------- judges


def chat(answer):
    """Chat completions: answer(text of the question, number of images) -> the choice."""
    def respond(path, payload, count):
        assert path == "/v1/chat/completions" and payload["temperature"] == 0
        *pictures, text = payload["messages"][0]["content"]
        assert all(picture["image_url"]["url"].startswith("data:image/png;base64,") for picture in pictures)
        return 200, json.dumps({"choices": [answer(text["text"], pictures)]}).encode()
    return respond


def brightness(picture) -> float:
    import base64
    import io

    from PIL import Image
    data = base64.b64decode(picture["image_url"]["url"].split(",")[1])
    return float(np.asarray(Image.open(io.BytesIO(data)), np.float64).mean())


LADDER = from_images(np.broadcast_to(np.array([0.2, 0.8, 0.4, 0.6], np.float32)[None, :, None, None, None], (2, 4, 8, 8, 3)))


def test_judge_reads_the_last_number(serve):
    def answer(text, pictures):
        assert re.search("a red circle|two blue squares", text) and "{prompt}" not in text
        level = round(brightness(pictures[0]) / 51)
        text = f"It might be Final Score: 5 but no.\nFinal Score: {level}" if level != 4 else "I cannot say"
        return {"message": {"content": text}}

    rewards = RewardSet({"judge": {"url": serve(chat(answer)).url + "/v1", "model": "m", "scale": 5.0}})
    values, ok = rewards(LADDER, ROWS)["judge"]
    np.testing.assert_array_equal(ok, [[True, False, True, True]] * 2)
    np.testing.assert_allclose(values, [[0.2, 0, 0.4, 0.6]] * 2)


def test_judge_with_several_scores(serve):
    def answer(text, pictures):
        level = round(brightness(pictures[0]) / 51)
        return {"message": {"content": f"Alignment: {level}\nbecause ...\nStyle: 5"}}

    options = {"pattern": r"Alignment: (?P<alignment>\d).*Style: (?P<style>\d)", "weight": {"style": 1.0, "alignment": 0.5}}
    rewards = RewardSet({"judge": {"url": serve(chat(answer)).url + "/v1", "model": "m", **options}})
    scores = rewards(LADDER, ROWS)
    assert list(scores) == ["judge.style", "judge.alignment"]
    np.testing.assert_allclose(scores["judge.style"][0], 1)
    np.testing.assert_allclose(scores["judge.alignment"][0], [[0.2, 0.8, 0.4, 0.6]] * 2)


def test_yes_probability_sums_spellings(serve):
    def answer(text, pictures):
        dark = brightness(pictures[0]) < 200
        likely = [("Yes", 0.3), (" yes", 0.2), ("No", 0.1), ("Maybe", 0.3)] if dark else [("Maybe", 0.9)]
        return {"logprobs": {"content": [{"top_logprobs": [{"token": t, "logprob": float(np.log(p))} for t, p in likely]}]}}

    server = serve(chat(answer))
    values, ok = RewardSet({"judge_yes": {"url": server.url + "/v1", "model": "m"}})(LADDER, ROWS)["judge_yes"]
    np.testing.assert_array_equal(ok, [[True, False, True, True]] * 2)
    np.testing.assert_allclose(values[:, 0], 0.5 / 0.6, rtol=1e-6)
    assert server.requests[0][1]["logprobs"] is True and server.requests[0][1]["top_logprobs"] == 20


@pytest.mark.parametrize("both_orders", [False, True])
def test_win_rates_within_the_group(serve, both_orders):
    """The brighter picture wins: rates 0, 1, 1/3, 2/3. One comparison fails for good and counts for neither."""
    def answer(text, pictures):
        first, second = map(brightness, pictures)
        if {round(first), round(second)} == {51, 204}:
            return {}  # no message
        return {"message": {"content": f"<answer>Image {1 if first > second else 2} is better</answer>"}}

    server = serve(chat(answer))
    rewards = RewardSet({"judge_pairs": {"url": server.url + "/v1", "model": "m", "both_orders": both_orders}})
    values, ok = rewards(LADDER, ROWS)["judge_pairs"]
    assert ok.all() and len(server.requests) == 2 * 6 * (1 + both_orders)
    np.testing.assert_allclose(values, [[0, 1, 1 / 3, 2 / 3]] * 2, atol=1e-6)


def test_both_orders_cancel_a_position_bias(serve):
    server = serve(chat(lambda *args: {"message": {"content": "<answer>Image 1 is better</answer>"}}))
    config = {"model": "m", "url": server.url + "/v1"}
    biased = RewardSet({"judge_pairs": config})(LADDER, ROWS)["judge_pairs"][0]
    fair = RewardSet({"judge_pairs": config | {"both_orders": True}})(LADDER, ROWS)["judge_pairs"][0]
    assert biased[0, 0] == 1 and biased[0, 3] == 0 and (fair == 0.5).all()


@pytest.mark.parametrize(("name", "options", "message"), [
    ("remote", {"url": "localhost:80"}, "must start with http"),
    ("remote", {"url": "http://x", "timeout": 0}, "must be positive"),
    ("judge", {"url": "http://x", "model": "m", "template": "how good?"}, "template must hold {prompt}"),
    ("judge", {"url": "http://x", "model": "m", "pattern": "[0-9]"}, "must have one group"),
])
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, options)
