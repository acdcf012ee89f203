"""Two processes with four devices each score one batch: every sample once, groups whole where a reward needs them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SPLITS = {"prompts": ((("data", "fsdp"),), (8, 4)), "samples": ((None, ("data", "fsdp")), (3, 8)), "replicated": ((), (3, 4)),
          "fsdp": (("fsdp",), (4, 4))}


def child(process: int, port: str) -> None:
    """Prints {split: {"mean": [P, G], "rank": [P, G], "calls": [...]}} of one process."""
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    from dancegrpo_jax import sharding
    from dancegrpo_jax.data import rows_of
    from dancegrpo_jax.media import Media
    from dancegrpo_jax.rewards import HostReward, RewardSet

    calls: list = []

    class Mean(HostReward):
        def score(self, images, prompts, metadata):
            calls.append((prompts[0], len(images)))
            return images.mean((1, 2, 3))

    class Rank(HostReward):
        needs_group = True

        def score(self, images, prompts, metadata):
            calls.append((f"group {prompts[0]}", len(images)))
            return images.mean((1, 2, 3)) - images.mean()

    mesh, found = sharding.make_mesh(data=2, fsdp=4), {}
    for name, (spec, shape) in SPLITS.items():
        pixels = batch(shape)
        where = jax.NamedSharding(mesh, jax.P(*spec))
        media = Media(jax.make_array_from_callback(pixels.shape, where, lambda index, pixels=pixels: pixels[index]))
        rewards = RewardSet({}, mesh)
        rewards.add("mean", Mean())
        rewards.add("rank", Rank())
        calls.clear()
        first, second = (rewards.submit(media, rows_of("abcdefgh"[:shape[0]])) for _ in range(2))  # two in flight
        assert all(ok.all() for handle in (first, second) for _, ok in handle.result().values())
        found[name] = {key: values.tolist() for key, (values, _) in second.result().items()} | {"calls": sorted(calls)[::2]}
        assert not rewards.failures
    print(json.dumps(found))


def batch(shape) -> np.ndarray:
    return np.random.default_rng(0).random((*shape, 1, 6, 6, 3), dtype=np.float32)


def test_two_processes_share_out_the_samples():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, __file__, str(i), str(port)], cwd=ROOT, env=environment, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    for name, (_, shape) in SPLITS.items():
        mean = np.round(batch(shape) * 255).mean((2, 3, 4, 5))
        for each in found:
            np.testing.assert_allclose(each[name]["mean"], mean, rtol=1e-5)
            np.testing.assert_allclose(each[name]["rank"], mean - mean.mean(1, keepdims=True), atol=1e-3)
        calls = [dict(map(tuple, each[name]["calls"])) for each in found]
        prompts = "abcdefgh"[:shape[0]]
        if name == "samples":  # each scores the half that it holds; of whole groups they take turns
            assert [{p: mine[p] for p in prompts} for mine in calls] == [dict.fromkeys(prompts, 4)] * 2
        else:
            assert sorted(p for mine in calls for p in mine if p in prompts) == list(prompts)
        assert sorted(p for mine in calls for p in mine if p not in prompts) == [f"group {p}" for p in prompts]
        assert all(size == shape[1] for mine in calls for p, size in mine.items() if p not in prompts)
        assert all(any(p not in prompts for p in mine) for mine in calls)


if __name__ == "__main__":
    child(int(sys.argv[1]), sys.argv[2])
