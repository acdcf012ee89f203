"""Serves rewards over HTTP: `python launch/serve_reward.py --rewards='{"hps": {}}' --port=8900`.

A run elsewhere then names `{"hps": {"reward": "remote", "url": "http://host:8900", "scorer": "hps"}}`. The protocol is JSON:
`POST /v1/score {"reward": name, "items": [{"id", "prompt", "media": [{"b64": image}], "metadata"}]}` answers
`{"results": [{"id", "score", "ok"}]}`, with `"scores": {component: number}` where a reward has several; `GET /healthz` and
`GET /v1/info` tell whether and what it serves. It listens on the loopback interface unless `--host` says otherwise;
`--token=NAME` demands the bearer token in that environment variable.
"""

import argparse
import base64
import contextlib
import hmac
import io
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MAX_REQUEST = 1 << 28  # bytes


def make_server(rewards: dict, host: str = "127.0.0.1", port: int = 0, token: str = "") -> "RewardServer":
    """A server of a `RewardSet` config, ready for `serve_forever`; port 0 picks a free one."""
    if token and not os.environ.get(token):
        raise ValueError(f"--token={token}: this environment variable is not set")
    return RewardServer((host, port), rewards, os.environ[token] if token else "")


class RewardServer(ThreadingHTTPServer):
    """The rewards of a config, each a set of its own, and how they answer; "" for `secret` lets everyone ask."""

    def __init__(self, address: tuple[str, int], rewards: dict, secret: str):
        from dancegrpo_jax.rewards import RewardSet

        self.rewards, self.secret = rewards, secret
        self.sets = {name: RewardSet({name: options}) for name, options in rewards.items()}
        super().__init__(address, Handler)

    def score(self, request: dict) -> dict:
        """The answer to a request. Raises: ValueError, KeyError or TypeError if it is not one of the protocol's."""
        name = request.get("reward") or next(iter(self.sets))
        if name not in self.sets:
            raise ValueError(f"unknown reward {name!r}; served are {', '.join(self.sets)}")
        results = []
        for item in request["items"]:  # one by one: they may differ in size, and one bad image harms no other
            try:
                results.append(self.result(name, item))
            except Exception as error:
                results.append({"id": item.get("id"), "score": None, "ok": False, "detail": f"{type(error).__name__}: {error}"})
        return {"results": results}

    def result(self, name: str, item: dict) -> dict:
        """What reward `name` says of one item. Raises: whatever is wrong with the item."""
        import numpy as np
        from PIL import Image

        from dancegrpo_jax.data import Row
        from dancegrpo_jax.media import from_images

        image = Image.open(io.BytesIO(base64.b64decode(item["media"][0]["b64"], validate=True))).convert("RGB")
        row = Row(0, item["prompt"], item.get("metadata") or {})
        if not isinstance(row.fields, dict):
            raise ValueError(f"metadata is {row.fields!r}, expected an object")
        found = {label.removeprefix(f"{name}."): float(np.asarray(values)[0, 0]) if np.asarray(ok)[0, 0] else None
                 for label, (values, ok) in self.sets[name](from_images(np.asarray(image)[None, None]), [row]).items()}
        scores = {"score": found[name]} if name in found else {"scores": found}
        return {"id": item["id"], "ok": any(value is not None for value in found.values())} | scores


class Handler(BaseHTTPRequestHandler):
    """One request to a `RewardServer`."""

    timeout = 60  # seconds for a request to come in

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def allowed(self) -> bool:
        given, secret = self.headers.get("Authorization", ""), self.server.secret
        if secret and not hmac.compare_digest(given.encode(), f"Bearer {secret}".encode()):
            self.answer(401, {"error": "bearer token missing or wrong"})
            return False
        return True

    def do_GET(self):
        pages = {"/healthz": {"ok": True}, "/v1/info": {"rewards": self.server.rewards, "version": 1}}
        if self.allowed():
            self.answer(200 if self.path in pages else 404, pages.get(self.path, {"error": "no such page"}))

    def do_POST(self):
        if not self.allowed():
            return
        try:
            length = int(self.headers.get("Content-Length", 0))
            if self.path != "/v1/score" or not 0 < length <= MAX_REQUEST:
                raise ValueError(f"POST {self.path} of {length} bytes: expected /v1/score with a JSON body")
            content = self.server.score(json.loads(self.rfile.read(length)))
        except (ValueError, KeyError, TypeError) as error:
            self.answer(400, {"error": f"{type(error).__name__}: {error}"})
        else:
            self.answer(200, content)

    def log_message(self, *args):
        pass


def serve(args: argparse.Namespace) -> None:
    try:
        rewards = json.loads(args.rewards)
    except ValueError as error:
        raise ValueError(f"--rewards={args.rewards}: not JSON ({error})") from error
    server = make_server(rewards, args.host, args.port, args.token)
    print(f"serving {', '.join(rewards)} at http://{args.host}:{server.server_port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status, program

    parser = argparse.ArgumentParser(prog=program(argv[0]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", required=True, help="as config.rewards, JSON")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8900)
    parser.add_argument("--token", default="", help="environment variable with the bearer token that clients must send")
    return exit_status(serve, parser.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
