"""One training iteration against PyTorch: `python benchmarks/against_torch.py --config=configs/shapes_flow.py`.

The other side is torch_grpo.py: the same weights, samples, sampler steps, trained timesteps, float32 and cores, once as the
published scripts loop (one sample, one (sample, timestep) pair at a time) and once batched. First both compute one iteration
from the same noise and must agree; then they are timed in turns, after a warm-up. Needs tests/requirements.txt. All keys of
the config can be overridden as for launch/train.py: `--config.model.lora.rank=0` trains all weights.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PHASES = ("rollout", "decode", "reward", "update")


class Ours:
    """The iteration that training runs, on one device, without its logging and checkpoints."""

    def __init__(self, config):
        import jax
        import numpy as np

        from dancegrpo_jax import sharding
        from dancegrpo_jax.options import ConfigError
        from dancegrpo_jax.session import Session

        if (config.optim.updates_per_rollout, config.data.chunks) != (1, 1) or "grpo" not in config.algorithm:
            raise ConfigError("only GRPO with config.data.chunks=1 and config.optim.updates_per_rollout=1 can be compared")
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self.session = session = Session(config, self.mesh)
        self.config, self.rows = config, session.rows[0]
        (self.part,) = session.pipeline.named("denoiser")
        with jax.set_mesh(self.mesh):
            self.plan = session.replicated(session.algorithm.plan(session.schedule, 0))
            trainable = jax.device_get(session.load().trainable)
        if session.pipeline.lora_scale:  # fresh adapters are zero: move them, so that the comparison sees both matrices
            rng = np.random.default_rng(5)
            trainable = jax.tree.map(lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32), trainable)
        self.start(session.learner.tx, trainable)

    def start(self, tx, trainable):
        import jax

        from dancegrpo_jax.learner import init_state

        session = self.session
        session.learner = dataclasses.replace(session.learner, tx=tx)
        memory = session.algorithm.memory(len(self.rows), session.weights)
        with jax.set_mesh(self.mesh):
            self.state = init_state(session.learner, session.replicated(trainable), session.replicated(memory))

    def iteration(self, key, timer, scores=None) -> dict:
        """What was collected, the examples made of it, and the scalars; `scores` replace the rewards' for learning."""
        import jax

        from dancegrpo_jax.iteration import collect, learn

        made = {}

        def call(name, function, *args, **kwargs):
            made[name] = function(*args, **kwargs)
            return made[name]
        with jax.set_mesh(self.mesh):
            collected = collect(self.session, self.state, self.rows, self.plan, key, timer=timer)
            if scores:
                collected = collected._replace(scores=self.session.replicated(scores))
            self.state, scalars = learn(self.session, self.state, collected, self.plan, key, call=call, timer=timer)
        batch, *_ = made["examples"]
        return {"collected": collected, "batch": batch, "scalars": scalars}


class Theirs:
    """The same with `TorchGRPO`, from the same weights."""

    def __init__(self, ours: Ours):
        import numpy as np
        import torch

        from benchmarks.torch_grpo import TorchGRPO

        self.ours, config, pipeline, algorithm = ours, ours.config, ours.session.pipeline, ours.session.algorithm
        optim, sampler, lora = config.optim, config.sampler, config.model.lora
        adamw = {"lr": optim.learning_rate, "betas": (optim.b1, optim.b2), "eps": optim.eps, "weight_decay": optim.weight_decay}
        scaled = {"rank": lora.rank, "alpha": pipeline.lora_scale * lora.rank, "targets": lora.targets} if lora.rank else None
        self.loop = TorchGRPO(
            pipeline.folder, steps=sampler.steps, shift=sampler.shift, eta=sampler.eta, window=algorithm.window, lora=scaled,
            grad_clip=optim.grad_clip, clip_range=algorithm.clip_range, ema_decay=optim.ema_decay, optim=adamw)
        with torch.no_grad():
            for name, value in torch_tensors(ours.state.trainable[ours.part]).items():
                self.loop.trained[name].copy_(torch.from_numpy(value.copy()))
        self.tokens = torch.from_numpy(pipeline.inputs(ours.rows)["positive"]["text_encoder"]).long()
        self.shape = np.array(pipeline.latent_shape)[[2, 0, 1]].tolist()

    def iteration(self, batch: int, timer, draw=None, scores=None, steps=None) -> dict:
        """As `Ours.iteration`. draw: (z, noise) in place of fresh ones; scores and steps (int [B, K]) likewise."""
        import torch

        from dancegrpo_jax.media import from_images

        session, loop = self.ours.session, self.loop
        pipeline, algorithm, rewards = session.pipeline, session.algorithm, session.rewards
        group, total = session.group, len(self.tokens) * session.group
        cond = [c.repeat_interleave(group, 0) for c in loop.encode(self.tokens)]
        if draw is None:
            start = torch.randn(len(self.tokens), *self.shape).repeat_interleave(group, 0)
            draw = start, torch.randn(len(session.schedule.times), total, *self.shape)
        latents, log_probs = loop.rollout(cond, *draw, batch)
        timer.wait("rollout", None)
        images = loop.decode(latents[-1], batch).reshape(len(self.tokens), group, pipeline.height, pipeline.width, 3)
        timer.wait("decode", None)
        found = scores or rewards(from_images(images.numpy()), self.ours.rows)
        timer.wait("reward", found)
        advantage = loop.advantages([torch.tensor(found[name][0]) for name in rewards.weights], rewards.weights.values(),
                                    algorithm.advantage_clip)
        if steps is None:
            eligible, count = torch.nonzero(loop.noisy[:-1]).flatten(), algorithm.examples_per_sample(len(loop.noisy))
            steps = torch.stack([eligible[torch.randperm(len(eligible))[:count]] for _ in range(total)])
        loss = loop.accumulate(cond, latents, log_probs, advantage.flatten(), steps, batch)
        gradients = {name: p.grad.clone() for name, p in loop.trained.items()} if scores else None
        loop.apply()
        timer.wait("update", None)
        return {"latents": latents, "log_probs": log_probs, "images": images, "advantage": advantage, "loss": loss,
                "gradients": gradients}


def torch_tensors(params) -> dict:
    """Our trained parameters, or their gradients, under the torch module's names and in its layout."""
    from dancegrpo_jax.models.files.convert import to_torch

    names = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    tensors = {}
    for key, value in to_torch(params).items():
        stem, _, leaf = key.rpartition(".")
        tensors[f"{stem}.{names[leaf]}" if leaf in names else key] = value.T if leaf in names else value
    return tensors


def prove_equal(ours: Ours, theirs: Theirs, batch: int, tolerance: float = 5e-5) -> dict[str, float]:
    """One iteration of both from the same noise and scores: {what: rms of the difference over the rms of PyTorch's}.

    Neither side's weights change. Raises: AssertionError where they differ by more than `tolerance`.
    """
    import jax
    import numpy as np
    import optax
    import torch

    from dancegrpo_jax.iteration import Untimed

    session, key = ours.session, jax.random.key(7)
    size, prompts, group = session.pipeline.latent_shape, len(ours.rows), session.group
    key_init, key_noise = jax.random.split(jax.random.fold_in(key, 0))  # as the rollout of the first chunk draws
    start = np.repeat(np.asarray(jax.random.normal(key_init, (prompts, *size))), group, axis=0)
    noise = np.stack([np.asarray(jax.random.normal(jax.random.fold_in(key_noise, i), (prompts * group, *size)))
                      for i in range(len(session.schedule.times))])
    rng = np.random.default_rng(3)
    scores = {name: (rng.standard_normal((prompts, group), dtype=np.float32), np.ones((prompts, group), bool))
              for name in session.rewards.weights}

    kept = session.learner.tx, jax.tree.map(np.asarray, ours.state.trainable)
    ours.start(optax.chain(optax.trace(0.0), optax.scale(0.0)), kept[1])  # the trace keeps the gradient
    mine = ours.iteration(key, Untimed(), scores)
    gradients = torch_tensors(ours.state.opt_state[0].trace[ours.part])
    ours.start(*kept)
    batch_time = np.asarray(mine["batch"].pairs.time).reshape(prompts * group, -1)  # one device keeps the samples' order
    steps = np.abs(batch_time[..., None] - session.schedule.times).argmin(-1)
    trained = {name: p.detach().clone() for name, p in theirs.loop.trained.items()}
    optimizer = theirs.loop.optimizer
    theirs.loop.optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    draw = [torch.from_numpy(np.moveaxis(np.asarray(a), -1, -3).copy()) for a in (start, noise)]
    other = theirs.iteration(batch, Untimed(), draw, scores, torch.from_numpy(steps).long())
    theirs.loop.optimizer = optimizer
    for p in theirs.loop.trained.values():
        p.grad = None

    def difference(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (a.shape, b.shape)
        return float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel()))

    assert gradients.keys() == other["gradients"].keys()
    flat = [np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in sorted(gradients)])
            for tree in (gradients, other["gradients"])]
    collected = mine["collected"]
    errors = {
        "latents": difference(np.moveaxis(collected.trajectory.latents, -1, 2), other["latents"]),
        "log-probabilities": difference(collected.trajectory.log_probs, other["log_probs"]),
        "images": difference(collected.shown.pixels[:, :, 0], other["images"]),
        "advantages": difference(mine["batch"].samples["advantage"].reshape(prompts, group), other["advantage"]),
        "gradients": difference(*flat)}
    assert np.linalg.norm(flat[1]) > 0 and max(errors.values()) <= tolerance, errors
    return errors


class Clock:
    """A timer of an iteration: seconds of each phase, by the wall and of the processor."""

    def __init__(self):
        self.wall, self.cpu = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self.mark = time.perf_counter(), time.process_time()

    def wait(self, phase, arrays):
        import jax

        jax.block_until_ready(arrays)
        now = time.perf_counter(), time.process_time()
        self.wall[phase] += now[0] - self.mark[0]
        self.cpu[phase] += now[1] - self.mark[1]
        self.mark = now


def compare(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints the differences of the proof and a table of times and ratios."""
    cpus = [int(core) for core in args.cores.split(",")]
    os.sched_setaffinity(0, cpus)  # before the libraries count their threads
    import jax
    import torch

    from dancegrpo_jax.config import load, validate

    torch.set_num_threads(len(cpus))
    config = load([f"--config={args.config}", *overrides])
    validate(config)
    ours = Ours(config)
    theirs = {f"PyTorch, {size} at a time": (Theirs(ours), int(size)) for size in args.batches.split(",")}
    samples = len(ours.rows) * config.data.group_size
    print(f"{samples} samples of {config.sampler.steps} steps, {config.optim.microbatch} pairs in a micro-batch, "
          f"cores {args.cores}, jax {jax.__version__}, torch {torch.__version__}", flush=True)
    for name, (loop, size) in theirs.items():
        errors = prove_equal(ours, loop, size)
        print(f"same iteration ({name}): " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()), flush=True)
        if args.compile and size > 1:
            loop.loop.model.compile(dynamic=False)
            loop.loop.vae.decoder.compile(dynamic=False)

    runs = {"ours": lambda turn, clock: ours.iteration(jax.random.key(turn), clock)}
    runs |= {name: lambda turn, clock, loop=loop, size=size: loop.iteration(size, clock)
             for name, (loop, size) in theirs.items()}
    clocks = {name: [] for name in runs}
    for turn in range(1 + args.repeats):  # the first compiles and warms up
        for name, run in runs.items():
            clock = Clock()
            run(turn, clock)
            if turn:
                clocks[name].append(clock)
    print_times(clocks, samples)
    print_ratios(clocks)


def print_times(clocks: dict[str, list[Clock]], samples: int) -> None:
    """A table of milliseconds a sample."""
    import numpy as np

    print("\n| ms a sample, median (min..max) of wall time | " + " | ".join((*PHASES, "iteration", "processor time")) + " |")
    print("|---" * (len(PHASES) + 3) + "|")

    def cell(seconds):
        low, middle, high = (1000 * f(seconds) / samples for f in (np.min, np.median, np.max))
        return f"{middle:.1f} ({low:.1f}..{high:.1f})"
    for name, many in clocks.items():
        cells = [cell([clock.wall[phase] for clock in many]) for phase in PHASES]
        cells += [cell([sum(getattr(clock, kind).values()) for clock in many]) for kind in ("wall", "cpu")]
        print(f"| {name} | " + " | ".join(cells) + " |")


def print_ratios(clocks: dict[str, list[Clock]]) -> None:
    """How much longer the others take than ours, which come first."""
    import numpy as np

    for name, many in list(clocks.items())[1:]:
        for kind, what in (("wall", "wall"), ("cpu", "processor")):
            pairs = [(getattr(theirs, kind), getattr(mine, kind)) for theirs, mine in zip(many, clocks["ours"], strict=True)]
            text = []
            for phase in (*PHASES, "iteration"):
                ratio = [sum(a.values()) / sum(b.values()) if phase == "iteration" else a[phase] / b[phase] for a, b in pairs]
                text.append(f"{phase} {np.median(ratio):.2f} ({min(ratio):.2f}..{max(ratio):.2f})")
            print(f"{name}, {what} time over ours: " + ", ".join(text))


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status

    parser = argparse.ArgumentParser(prog="python benchmarks/against_torch.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--cores", default="0", help="which to use, e.g. 0,1")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--batches", default="1,48", help="PyTorch's batch sizes; 1 is the published loop")
    parser.add_argument("--compile", action="store_true", help="PyTorch's batched loop through torch.compile")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return exit_status(compare, *parser.parse_known_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
