"""Training with a reward behind HTTP, whose server falls silent for two iterations: the run goes on and counts the loss."""

import json
import threading

from dancegrpo_jax.metrics import read_metrics
from launch import train
from launch.serve_reward import make_server
from tests.e2e.test_train import command
from tests.pipelines import write_pipeline


def test_a_silent_server_costs_its_scores_and_not_the_run(tmp_path):
    write_pipeline(tmp_path / "flow", "flow")
    server = make_server({"color": {}})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scored, respond = [], server.RequestHandlerClass.do_POST

    def sometimes(handler):
        scored.append(1)
        if 4 < len(scored) <= 12:  # one request a prompt, four prompts an iteration
            handler.connection.close()
        else:
            respond(handler)

    server.RequestHandlerClass.do_POST = sometimes
    remote = {"far": {"reward": "remote", "url": f"http://127.0.0.1:{server.server_port}", "retries": 0, "patience": 99}}
    try:
        _, *argv = command(tmp_path, "run", f"--config.rewards={json.dumps(remote)}", "--config.steps=4",
                           "--config.evals.eval.every=0")
        assert train.main(argv) == 0
    finally:
        server.shutdown()
        server.server_close()
    valid = [record["train/reward/far/valid_ratio"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")
             if "train/loss" in record]
    assert valid == [1, 0, 0, 1]
