"""One training iteration against PyTorch: `python benchmarks/against_torch.py --config=configs/shapes_flow.py`.

The other side is torch_grpo.py: the same weights, samples, sampler steps, trained timesteps, float32 and cores, once as the
published scripts loop (one sample, one (sample, timestep) pair at a time) and once batched. First both compute one iteration
from the same noise and must agree; then they are timed in turns, after a warm-up. Needs tests/requirements.txt. All keys of
the config can be overridden as for launch/train.py: `--config.model.lora.rank=0` trains all weights.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PHASES = ("rollout", "decode", "reward", "update")


class Ours:
    """The iteration of `trainer.py` without its logging and checkpoints."""

    def __init__(self, config):
        import jax
        import numpy as np
        from dancegrpo_jax.update import Objective, make_optimizer

        from dancegrpo_jax import data
        from dancegrpo_jax.pipelines.base import configured_policy, lora_settings
        from dancegrpo_jax.rewards.base import RewardSet
        from dancegrpo_jax.sde import window

        self.config, self.policy = config, configured_policy(config)
        trainable, self.frozen = self.policy.load(lora_settings(config), config.seed)
        schedule = self.policy.schedule(config.sampler.steps, config.sampler.shift)
        self.schedule = window(schedule, 0, config.sampler.window) if config.sampler.window else schedule
        self.rewards = RewardSet(config.rewards.to_dict())
        prompts = data.read_prompts(config.data.train)
        self.prompts = (prompts * config.data.prompts_per_step)[:config.data.prompts_per_step]
        self.objective = Objective(config.grpo.clip_range, 0.0, config.optim.ema_decay, on_policy=True)
        if lora_settings(config):  # fresh adapters are zero: move them, so that the comparison sees both matrices
            rng = np.random.default_rng(5)
            trainable = {name: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32)
                         for name, leaf in jax.device_get(trainable).items()}
        self.start(make_optimizer(config.optim, config.steps), trainable)

    def start(self, tx, trainable):
        import jax
        from dancegrpo_jax.update import init_state

        trainable = jax.device_put(trainable, jax.devices()[0])  # where updates leave it: nothing compiles twice
        ema = bool(self.config.optim.ema_decay)
        self.tx, self.state = tx, init_state(trainable, tx=tx, with_ema=ema, rules=self.policy.sharding)

    def iteration(self, key, lap, score=None) -> dict:
        """Calls `lap(phase, arrays)` after each phase; `score(images, prompts)` replaces the rewards."""
        import jax
        from dancegrpo_jax.evaluate import decode, encode
        from dancegrpo_jax.update import make_examples, update

        from dancegrpo_jax.config import trained_steps
        from dancegrpo_jax.rollout import rollout
        from dancegrpo_jax.trainer import select

        config, policy = self.config, self.policy
        cond = encode(policy, self.frozen, policy.tokenize(self.prompts))
        trajectory = rollout(policy, self.state.trainable, self.frozen, cond, key, self.schedule,
                             group_size=config.data.group_size, shared_noise=config.sampler.shared_noise)
        lap("rollout", trajectory)
        images = decode(policy, self.frozen, trajectory.latents[-1])
        images = images.reshape(len(self.prompts), config.data.group_size, *images.shape[1:])
        lap("decode", images)
        scores = score(images) if score else self.rewards.submit(images, self.prompts).result()
        lap("reward", None)
        advantage, chosen, time_index, _ = select(
            jax.random.fold_in(key, 1), scores, self.schedule.stochastic, weights=tuple(self.rewards.weights.items()),
            combine=config.combine, clip=config.grpo.advantage_clip, k=config.data.group_size, steps=trained_steps(config))
        examples = make_examples(trajectory, self.schedule, cond, advantage, chosen, time_index, updates=1,
                                 microbatch=config.grpo.microbatch)
        self.state, metrics = update(policy, self.tx, self.objective, self.state, self.frozen, {}, examples, 0)
        lap("update", self.state.trainable)
        return {"trajectory": trajectory, "images": images, "scores": scores, "advantage": advantage, "metrics": metrics,
                "time_index": time_index}


class Theirs:
    """The same with `TorchGRPO`, from the same weights."""

    def __init__(self, ours: Ours):
        import numpy as np
        import torch

        from benchmarks.torch_grpo import TorchGRPO
        from dancegrpo_jax.pipelines.base import lora_settings

        self.ours, config = ours, ours.config
        optim, sampler = config.optim, config.sampler
        self.loop = TorchGRPO(
            ours.policy.folder, steps=sampler.steps, shift=sampler.shift, eta=sampler.eta, window=sampler.window,
            lora=lora_settings(config), grad_clip=optim.grad_clip, clip_range=config.grpo.clip_range, ema_decay=optim.ema_decay,
            optim={"lr": optim.learning_rate, "betas": (optim.b1, optim.b2), "eps": optim.eps, "weight_decay": optim.weight_decay})
        with torch.no_grad():
            for name, value in torch_tensors(ours.state.trainable).items():
                self.loop.trained[name].copy_(torch.from_numpy(value.copy()))
        self.tokens = torch.from_numpy(ours.policy.tokenize(ours.prompts)["text_encoder"]).long()
        self.shape = np.array(ours.policy.latent_shape)[[2, 0, 1]].tolist()

    def iteration(self, batch: int, lap, draw=None, score=None, steps=None) -> dict:
        """As `Ours.iteration`. draw: (z, noise) in place of fresh ones; score and steps (int [B, K]) likewise."""
        import torch

        from dancegrpo_jax.config import trained_steps

        config, loop = self.ours.config, self.loop
        group, total = config.data.group_size, len(self.tokens) * config.data.group_size
        cond = [c.repeat_interleave(group, 0) for c in loop.encode(self.tokens)]
        if draw is None:
            start = torch.randn(len(self.tokens), *self.shape).repeat_interleave(group, 0)
            draw = start, torch.randn(config.sampler.steps, total, *self.shape)
        latents, log_probs = loop.rollout(cond, *draw, batch)
        lap("rollout", None)
        images = loop.decode(latents[-1], batch).reshape(len(self.tokens), group, config.model.height, config.model.width, 3)
        lap("decode", None)
        scores = score(images.numpy()) if score else self.ours.rewards.submit(images.numpy(), self.ours.prompts).result()
        lap("reward", None)
        advantage = loop.advantages([torch.tensor(scores[name][0]) for name in self.ours.rewards.weights],
                                    self.ours.rewards.weights.values(), config.grpo.advantage_clip)
        if steps is None:
            eligible = torch.nonzero(loop.noisy[:-1]).flatten()
            steps = torch.stack([eligible[torch.randperm(len(eligible))[:trained_steps(config)]] for _ in range(total)])
        loss = loop.accumulate(cond, latents, log_probs, advantage.flatten(), steps, batch)
        gradients = {name: p.grad.clone() for name, p in loop.trained.items()} if score else None
        loop.apply()
        lap("update", None)
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

    key, nothing = jax.random.key(7), lambda *_: None
    config, size = ours.config, ours.policy.latent_shape
    prompts, group = len(ours.prompts), config.data.group_size
    key_init, key_noise = jax.random.split(key)  # as the rollout draws
    start = np.repeat(np.asarray(jax.random.normal(key_init, (prompts, *size))), group, axis=0)
    noise = np.stack([np.asarray(jax.random.normal(jax.random.fold_in(key_noise, i), (prompts * group, *size)))
                      for i in range(config.sampler.steps)])
    rng = np.random.default_rng(3)
    scores = {name: (rng.standard_normal((prompts, group), dtype=np.float32), np.ones((prompts, group), bool))
              for name in ours.rewards.weights}

    kept = ours.tx, jax.tree.map(np.asarray, ours.state.trainable)
    ours.start(optax.chain(optax.trace(0.0), optax.scale(0.0)), kept[1])  # the trace keeps the gradient
    mine = ours.iteration(key, nothing, lambda images: scores)
    gradients = torch_tensors(ours.state.opt_state[0].trace)
    ours.start(*kept)
    trained = {name: p.detach().clone() for name, p in theirs.loop.trained.items()}
    optimizer = theirs.loop.optimizer
    theirs.loop.optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    other = theirs.iteration(batch, nothing, [torch.from_numpy(np.moveaxis(np.asarray(a), -1, -3).copy()) for a in (start, noise)],
                             lambda images: scores, torch.from_numpy(np.array(mine["time_index"])).long())
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
    errors = {
        "latents": difference(np.moveaxis(mine["trajectory"].latents, -1, 2), other["latents"]),
        "log-probabilities": difference(mine["trajectory"].log_probs, other["log_probs"]),
        "images": difference(mine["images"], other["images"]),
        "advantages": difference(mine["advantage"], other["advantage"]),
        "gradients": difference(*flat)}
    assert np.linalg.norm(flat[1]) > 0 and max(errors.values()) <= tolerance, errors
    return errors


class Clock:
    """Seconds of each phase, by the wall and of the processor."""

    def __init__(self):
        self.wall, self.cpu = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self.mark = time.perf_counter(), time.process_time()

    def lap(self, phase, arrays):
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
    import numpy as np
    import torch

    from dancegrpo_jax.config import load, validate

    torch.set_num_threads(len(cpus))
    config = load([f"--config={args.config}", *overrides])
    validate(config)
    ours = Ours(config)
    theirs = {f"PyTorch, {size} at a time": (Theirs(ours), int(size)) for size in args.batches.split(",")}
    samples = len(ours.prompts) * config.data.group_size
    print(f"{samples} samples of {config.sampler.steps} steps, {config.grpo.microbatch} pairs in a micro-batch, "
          f"cores {args.cores}, jax {jax.__version__}, torch {torch.__version__}", flush=True)
    for name, (loop, size) in theirs.items():
        errors = prove_equal(ours, loop, size)
        print(f"same iteration ({name}): " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()), flush=True)
        if args.compile and size > 1:
            loop.loop.model.compile(dynamic=False)
            loop.loop.vae.decoder.compile(dynamic=False)

    runs = {"ours": lambda turn, lap: ours.iteration(jax.random.key(turn), lap)}
    runs |= {name: lambda turn, lap, loop=loop, size=size: loop.iteration(size, lap) for name, (loop, size) in theirs.items()}
    clocks = {name: [] for name in runs}
    for turn in range(1 + args.repeats):  # the first compiles and warms up
        for name, run in runs.items():
            clock = Clock()
            run(turn, clock.lap)
            if turn:
                clocks[name].append(clock)
    print("\n| ms a sample, median (min..max) of wall time | " + " | ".join((*PHASES, "iteration", "processor time")) + " |")
    print("|---" * (len(PHASES) + 3) + "|")

    def cell(seconds):
        low, middle, high = (1000 * f(seconds) / samples for f in (np.min, np.median, np.max))
        return f"{middle:.1f} ({low:.1f}..{high:.1f})"
    for name, many in clocks.items():
        cells = [cell([clock.wall[phase] for clock in many]) for phase in PHASES]
        cells += [cell([sum(getattr(clock, kind).values()) for clock in many]) for kind in ("wall", "cpu")]
        print(f"| {name} | " + " | ".join(cells) + " |")
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
