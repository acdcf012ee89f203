"""Every setting of a run: its default, meaning and allowed values in one table; loading, overriding, checking.

A config file is a Python module with `get_config()`, which starts from `default()` and changes keys. The result is a
locked `ml_collections.ConfigDict`, so a typo is an error, in the file and on the command line alike.
"""

import ast
import difflib
import functools
import json
import math
import operator
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dancegrpo_jax import registry
from dancegrpo_jax.options import (
    ANY,
    NOT_EMPTY,
    POSITIVE,
    TYPE_NAMES,
    ConfigError,
    Rule,
    at_least,
    between,
    build,
    check,
    check_type,
    fail,
    one_of,
    options_of,
)

# ------------------------------------------------------------------------------------------ the table


class Key(NamedTuple):
    """One setting. Its type is the type of its default.

    changeable: whether it may differ when a run is resumed, since it changes how long, where and what is looked at, not what
    is trained.
    """

    default: Any
    rule: Rule
    help: str
    changeable: bool = False


_AXIS = Rule(lambda value: value == -1 or value >= 1, ">= 1, or -1 for the rest of the devices")
_KERNELS = (*registry.FLOW_KERNELS, *registry.DIFFUSION_KERNELS)
_KERNEL = Rule(lambda value: ":" in value or value in _KERNELS, f"one of {', '.join(map(repr, _KERNELS))}, or an import path")
_ONE = Rule(lambda value: len(value) == 1, "a dict of one entry, {name: {options}}")
_PIPELINE = Rule(lambda value: not value or value in registry.PIPELINES or ":" in value,
                 f"empty, one of {', '.join(registry.PIPELINES)}, or 'package.module:Class'")

KEYS: dict[str, Key] = {
    "seed": Key(0, at_least(0), "all randomness derives from it"),
    "run_dir": Key("runs/run", NOT_EMPTY, "folder of metrics, images, checkpoints and the report", True),
    "steps": Key(100, at_least(1), "iterations; one is a rollout and its updates", True),

    "model.folder": Key("", NOT_EMPTY, "pipeline in the diffusers layout: a folder, or a hub id owner/name[@revision]"),
    "model.pipeline": Key("", _PIPELINE, "kind of the pipeline; empty = as its model_index.json says"),
    "model.parts": Key({}, ANY, "parts that come from elsewhere: {part: folder or hub id}"),
    "model.dtype": Key("float32", one_of("float32", "bfloat16"), "compute dtype of the networks; what is trained is float32"),
    "model.remat": Key("full", one_of(*registry.REMAT), "what the backward pass recomputes: full = all (least memory, about "
                       "1/3 more compute), attention = all but attention, dots = all but products with weights, none", True),
    "model.height": Key(0, at_least(0), "of the images, pixels; 0 = as the model is usually sampled"),
    "model.width": Key(0, at_least(0), "of the images, pixels; 0 = as the model is usually sampled"),
    "model.guidance_scale": Key(1.0, at_least(0), "classifier-free guidance in rollout and update; 1 = off"),
    "model.negative_prompt": Key("", ANY, "what guidance leads away from; a field negative_prompt of a row comes first"),
    "model.embedded_guidance": Key(3.5, at_least(0), "guidance that distilled models (FLUX dev) take as an input"),
    "model.text_length": Key(0, at_least(0), "tokens of the longest text encoder (T5); 0 = as its tokenizer says"),
    "model.decode_batch": Key(0, at_least(0), "latents decoded at a time on each device, to bound memory; 0 = all"),
    "model.decode_tile": Key(0, at_least(0, 8), "side of the VAE's tiles in pixels; larger images are decoded in "
                             "overlapping tiles; 0 = never"),
    "model.lora.rank": Key(0, at_least(0), "of the adapters; 0 trains all weights of the denoiser"),
    "model.lora.alpha": Key(0.0, at_least(0), "adapters are scaled by alpha / rank; 0 = 2 * rank"),
    "model.lora.targets": Key((r".*attn.*\.to_(q|k|v|out\.0)",), ANY, "regexes of layer names that get adapters"),

    "sampler.kernel": Key("ddim", _KERNEL, f"transition: {', '.join(registry.FLOW_KERNELS)} (rectified flow) or "
                          f"{', '.join(registry.DIFFUSION_KERNELS)} (diffusion); your own: package.module:function"),
    "sampler.eta": Key(1.0, POSITIVE, "strength of the sampling noise; 0.3 for dance, 0.7 for flow, 1.0 for ddim"),
    "sampler.steps": Key(50, between(2, 1000), "denoising steps of the rollout (T)"),
    "sampler.shift": Key(1.0, at_least(0), "of the rectified-flow schedule towards noise; 3 for FLUX; 0 = as the "
                         "checkpoint's scheduler says"),
    "sampler.time_rounding": Key("exact", one_of(*registry.TIME_ROUNDING), "of the times that flow models see, as in the "
                                 "PyTorch reference: int truncates, bf16_ref also rounds times and guidance to bfloat16"),
    "sampler.shared_noise": Key(True, ANY, "all samples of a prompt start from the same noise"),
    "sampler.eval_steps": Key(50, between(1, 1000), "steps of the deterministic sampler in evaluation"),

    "data.train": Key("", NOT_EMPTY, "prompts for training: .txt (one a line), .jsonl, .csv, or a TFDS folder; all fields of a "
                      "row reach rewards and pipeline"),
    "data.embeddings": Key("", ANY, "prompts encoded by launch/precompute.py; empty = encode them while training"),
    "data.prompts_per_step": Key(8, at_least(1), "prompts in an iteration (P)"),
    "data.group_size": Key(16, at_least(1), "samples of each prompt (G)"),
    "data.chunks": Key(1, at_least(1), "pieces of a rollout, so that host rewards overlap with sampling; divides P"),

    "rewards": Key({}, NOT_EMPTY, 'what to maximise: {name: {"weight": w, ...options}}'),
    "algorithm": Key({"grpo": {}}, _ONE, f"how: {{name: {{options}}}} or a name alone, {', '.join(registry.ALGORITHMS)}; "
                     'your own: {name: {"type": "package.module:Class", ...}}'),

    "optim.learning_rate": Key(1e-5, POSITIVE, "of AdamW, at its highest"),
    "optim.schedule": Key("constant", one_of(*registry.SCHEDULES), "of the learning rate after the warm-up; all but constant "
                          "end at 0"),
    "optim.b1": Key(0.9, between(0, 1, ends="[)"), "decay of the gradient average"),
    "optim.b2": Key(0.999, between(0, 1, ends="[)"), "decay of the squared-gradient average"),
    "optim.eps": Key(1e-8, POSITIVE, "of AdamW"),
    "optim.weight_decay": Key(1e-4, at_least(0), "decoupled"),
    "optim.grad_clip": Key(1.0, at_least(0), "limit of the global gradient norm; 0 = off"),
    "optim.warmup_steps": Key(0, at_least(0), "updates of linear warm-up"),
    "optim.ema_decay": Key(0.0, between(0, 1, ends="[)"), "moving average of the weights, for evaluation; 0 = off"),
    "optim.updates_per_rollout": Key(1, at_least(1), "optimizer updates in an iteration"),
    "optim.microbatch": Key(8, at_least(1), "examples in one accumulation step, e.g. (sample, timestep) pairs"),

    "evals": Key({}, ANY, 'evaluations: {name: {"rows": file, "count": n, "every": iterations, "rewards": {...}}}; their '
                 "numbers are logged as name/reward", True),

    "checkpoint.every": Key(25, at_least(1), "iterations between checkpoints", True),
    "checkpoint.keep": Key(2, at_least(1), "newest checkpoints to keep", True),

    "mesh.data": Key(-1, _AXIS, "devices that each hold all weights and share the batch", True),
    "mesh.fsdp": Key(1, _AXIS, "devices that share weights and batch", True),
    "mesh.seq": Key(1, _AXIS, "devices that share the tokens of each sample (FLUX), for long sequences", True),
    "mesh.tensor": Key(1, _AXIS, "devices that share the features of each layer", True),

    "log.tensorboard": Key(True, ANY, "write TensorBoard events into run_dir", True),
    "log.wandb": Key("", ANY, "project name at Weights & Biases; empty = off", True),
    "log.images_every": Key(10, at_least(0), "iterations between grids of training samples; 0 = never", True),
    "log.profile": Key(0, at_least(0), "iteration to trace into run_dir/profile, for xprof; 0 = none. The first compiles: take "
                       "a later one", True),
    "log.prompts_in_grid": Key(8, at_least(1), "rows of an image grid", True),
}
FREE_FORM = tuple(name for name, key in KEYS.items() if isinstance(key.default, dict))
RESERVED = ("train", "time", "perf")  # what metrics begin with already


def default() -> ConfigDict:
    """Every key of `KEYS` with its default, locked, but for the free-form ones, which take any name.

    `model.folder`, `data` and `rewards` must still be given.
    """
    nested: dict = {}
    for name, key in KEYS.items():
        *sections, last = name.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = key.default
    config = ConfigDict(nested).lock()
    for name in FREE_FORM:
        *sections, last = name.split(".")
        functools.reduce(operator.getitem, sections, config)[last].unlock()
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{dotted key: value}; free-form keys stay whole, as plain dicts."""
    flat: dict[str, Any] = {}

    def walk(node, prefix):
        for name in node:
            value, dotted = node[name], prefix + name
            if isinstance(value, (ConfigDict, Mapping)) and dotted not in FREE_FORM:
                walk(value, dotted + ".")
            else:
                flat[dotted] = value.to_dict() if isinstance(value, ConfigDict) else value
    walk(config, "")
    return flat


def algorithm_of(config: ConfigDict):
    """The algorithm that a config names, its options checked. Raises: ConfigError."""
    (name, options), = config.algorithm.to_dict().items()
    return _build(registry.ALGORITHMS, name, options, "algorithm", f"algorithm.{name}")


def evaluators_of(config: ConfigDict) -> dict:
    """{name: evaluator} of `config.evals`, their options checked. Raises: ConfigError."""
    found = {}
    for name, options in config.evals.to_dict().items():
        found[name] = _build(registry.EVALUATORS, "heldout", options, f"evals.{name}.type", f"evals.{name}")
        if name in RESERVED or "/" in name:
            raise ConfigError(f"config.evals.{name}: its numbers would be mixed with other metrics; choose another name")
        _check_rewards(f"evals.{name}.rewards", found[name].rewards)
    return found


def _build(table: dict[str, str], kind: str, options, key: str, where: str):
    """What is registered as `kind`, or what the option `type` names, with the other options."""
    if not isinstance(options, Mapping | None):
        fail(where, options, "must be a dict of options")
    options = dict(options or {})
    kind = options.pop("type", kind)
    check_type(f"{where}.type", kind, str)
    return build(registry.resolve(table, kind, key), options, where)


# ------------------------------------------------------------------------------------------ checking


def _nearest(name: str) -> str:
    """The end of an unknown key's message: the nearest dotted key, or failing that the nearest last part of one."""
    known = [*KEYS, *{key.rpartition(".")[0] for key in KEYS if "." in key}]
    found = difflib.get_close_matches(name, known, 1, cutoff=0.75)
    if not found:
        ends = {key.split(".")[-1]: key for key in reversed(known)}
        found = [ends[end] for end in difflib.get_close_matches(name.split(".")[-1], ends, 1)]
    return f"; did you mean config.{found[0]}?" if found else "; --help lists all keys"


def _check_rewards(name: str, rewards: dict) -> None:
    for reward, options in rewards.items():
        if options is not None and not isinstance(options, Mapping):
            fail(f"{name}.{reward}", options, 'must be a dict of options like {"weight": 1.0}')
        for weight in _weights(options):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                fail(f"{name}.{reward}.weight", weight, "must be a finite number, or {component: number}; 0 means logged only")


def _weights(options: dict | None) -> list:
    """The weights of one reward: a single one, or one for each of its components."""
    weight = (options or {}).get("weight", 1.0)
    return list(weight.values()) if isinstance(weight, dict) else [weight]


def _divisors_near(total: int, value: int) -> str:
    divisors = sorted({d for i in range(1, math.isqrt(total) + 1) if total % i == 0 for d in (i, total // i)})
    below, above = [d for d in divisors if d < value][-3:], [d for d in divisors if d > value][:3]
    return ", ".join(map(str, below + above))


def validate(config: ConfigDict, devices: int | None = None) -> None:
    """Checks every key alone and against the others, before anything is compiled.

    Args: devices: number of devices, to check what must divide over them; None leaves that to the mesh.
    Raises: ConfigError, for the first wrong key.
    """
    flat = flatten(config)
    for name in flat:
        if name not in KEYS:
            raise ConfigError(f"config.{name}: unknown key{_nearest(name)}")
    for name, key in KEYS.items():
        if name not in flat:
            raise ConfigError(f"config.{name}: missing; start from dancegrpo_jax.config.default()")
        check(name, flat[name], key.default, key.rule, key.help)
    _check_rewards("rewards", flat["rewards"])
    algorithm = algorithm_of(config)
    algorithm.check(config.sampler.steps, config.data.group_size, f"algorithm.{next(iter(config.algorithm))}")
    if config.sampler.shared_noise and not algorithm.noisy_rollouts:
        fail("sampler.shared_noise", True, f"rollouts of {next(iter(config.algorithm))} are deterministic, so that all samples "
             "of a prompt would be the same picture; set --config.sampler.shared_noise=false")
    evaluators_of(config)
    if not any(weight for options in flat["rewards"].values() for weight in _weights(options)):
        fail("rewards", flat["rewards"], "at least one weight must differ from 0")
    _check_sampler(config)
    _check_lora(config)
    _check_batch(config, algorithm, devices)


def _check_sampler(config) -> None:
    sampler = config.sampler
    if sampler.kernel in ("cps", "ddim") and sampler.eta > 1:
        fail("sampler.eta", sampler.eta, f"must be in (0, 1] for the kernel {sampler.kernel!r}, whose noise cannot "
              "exceed the noise level; lower it")


def _check_lora(config) -> None:
    lora = config.model.lora
    if lora.rank and not lora.targets:
        fail("model.lora.targets", lora.targets, "must name at least one layer when config.model.lora.rank > 0")
    for target in lora.targets:
        try:
            re.compile(target)
        except re.error as error:
            fail("model.lora.targets", target, f"not a regular expression ({error}); escape special characters by \\")


def _check_batch(config, algorithm, devices: int | None) -> None:
    data, optim = config.data, config.optim
    if data.prompts_per_step % data.chunks:
        fail("data.chunks", data.chunks, f"must divide config.data.prompts_per_step={data.prompts_per_step}; "
             f"near are {_divisors_near(data.prompts_per_step, data.chunks)}")
    rows = data.prompts_per_step * algorithm.samples_per_prompt(data.group_size)
    each = algorithm.examples_per_sample(config.sampler.steps)
    if rows % optim.updates_per_rollout:
        fail("optim.updates_per_rollout", optim.updates_per_rollout, f"must divide the {rows} trained samples of an "
             f"iteration (prompts * samples each); near are {_divisors_near(rows, optim.updates_per_rollout)}")
    pairs = rows // optim.updates_per_rollout * each
    if pairs % optim.microbatch:
        fail("optim.microbatch", optim.microbatch, f"must divide the {pairs} (sample, timestep) pairs of an update "
             f"({rows // optim.updates_per_rollout} samples x {each} timesteps); near are "
             f"{_divisors_near(pairs, optim.microbatch)}")

    axes = dict(config.mesh)
    rest = [name for name, size in axes.items() if size == -1]
    if len(rest) > 1:
        fail(f"mesh.{rest[1]}", -1, f"only one axis may be -1, and config.mesh.{rest[0]} is; give a number of devices")
    known = math.prod(size for size in axes.values() if size != -1)
    if devices is not None:
        if devices % known or (not rest and devices != known):
            fail("mesh", axes, f"the axes must multiply to the {devices} devices; set one axis to -1")
        if rest:
            axes[rest[0]] = devices // known
    parts = axes["data"] * axes["fsdp"]
    if parts > 0 and optim.microbatch % parts:
        fail("optim.microbatch", optim.microbatch, f"must be a multiple of the {parts} devices that share the batch "
              "(config.mesh.data * config.mesh.fsdp)")
    if parts > 0 and rows % (parts * optim.updates_per_rollout):
        fail("data.prompts_per_step", data.prompts_per_step, f"the {rows} trained samples of an iteration must divide "
              f"over {parts} devices and {optim.updates_per_rollout} updates")


def exit_status(command: Callable, *args) -> int:
    """Runs a command of `launch/`: 0, or for bad input one line on stderr and 2.

    What is named "package.module:attribute" (rewards, pipelines, ...) may also lie in the working directory.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides an installed module
    try:
        command(*args)
    except (ValueError, OSError, FloatingPointError) as error:  # ConfigError and CheckpointError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------ loading


def program(name: str) -> str:
    """How the script or installed command `name` (argv[0]) is called, for help texts."""
    return f"python {name}" if name.endswith(".py") else Path(name).name


def usage(program: str = "python launch/train.py") -> str:
    """The help text: how to call, and every key with its default and meaning."""
    lines = [f"usage: {program} --config=configs/NAME.py [--config.KEY=VALUE ...]", "",
             "Keys, with the default of a config file that does not set them:"]
    for name, key in KEYS.items():
        value = json.dumps(key.default) if not isinstance(key.default, tuple) else repr(key.default)
        allowed = f" [{key.rule.text}]" if key.rule.text and key.rule.text not in key.help else ""
        lines.append(f"  --config.{name}={value}\n      {key.help}{allowed}")
    for section, table in (("algorithm", registry.ALGORITHMS), ("evals.NAME", registry.EVALUATORS)):
        for name in table:
            kind = registry.resolve(table, name, section)
            place = f"{section}.{name}" if section == "algorithm" else section
            lines += ["", f"{name}: {' '.join(kind.__doc__.split())}"]
            lines += [f"  --config.{place}.{each.name}={json.dumps(each.default)}\n      {each.help}"
                      + (f" [{each.rule.text}]" if each.rule.text and each.rule.text not in each.help else "")
                      for each in options_of(kind)]
    return "\n".join(lines)


def load(argv: Sequence[str]) -> ConfigDict:
    """Reads `--config=path.py` and `--config.a.b=value` overrides, which win over the file in the order given.

    Values are converted to the key's type: true / false, numbers, strings as they are, tuples as a Python literal or
    comma-separated, dicts (rewards) as JSON or a Python literal. One option of a reward can be set alone:
    `--config.rewards.clip.weight=0.5`. Ranges are left to `validate`.

    Args: argv: as in sys.argv, with or without the program's name. `--help` prints `usage` and exits.
    Raises: ConfigError for a missing or broken file, an unknown key (naming the nearest), a value of the wrong type.
    """
    path, overrides, rest = None, [], list(argv)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "launch/train.py"
    while rest:
        flag = rest.pop(0)
        if flag in ("-h", "--help"):
            print(usage(program(name)))
            raise SystemExit(0)
        key, given, value = flag.partition("=")
        if key != "--config" and not key.startswith("--config."):
            raise ConfigError(f"{flag}: unknown argument; use --config=path.py and --config.KEY=VALUE, or --help")
        if not given:
            if not rest or rest[0].startswith("--config"):
                raise ConfigError(f"{key}: a value is missing; write {key}=VALUE")
            value = rest.pop(0)
        if key == "--config":
            path = value
        else:
            overrides.append((key.removeprefix("--config."), value))
    if path is None:
        raise ConfigError("--config=path.py is missing; see configs/ for examples and --help for all keys")
    config = load_file(path)
    for key, value in overrides:
        override(config, key, value)
    return config


def load_file(path: str) -> ConfigDict:
    """The config that `get_config()` of a Python file returns; a relative path is also looked up beside the package.

    Raises: ConfigError naming the file, and the line where it failed.
    """
    given, beside = Path(path), Path(__file__).parents[1] / path
    if not given.is_file() and not beside.is_file():
        names = [file.name for each in (given, beside) for file in each.parent.glob("*.py")]
        near = difflib.get_close_matches(given.name, names, 1)
        hint = f"; did you mean {given.parent / near[0]}?" if near else ""
        raise ConfigError(f"--config={path}: no such file{hint}")
    path = str(given if given.is_file() else beside)
    try:
        module = runpy.run_path(path)
        if not callable(module.get("get_config")):
            raise ConfigError(f"--config={path}: it must define get_config(), which returns a config from default()")
        config = module["get_config"]()
    except ConfigError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where, source = (f"{path}:{frames[-1].lineno}", frames[-1].line or "") if frames else (path, "")
        unknown = re.search(r'"(\w+)"\W* does not exist|instead of "(\w+)"', str(error))
        if isinstance(error, (AttributeError, KeyError)) and unknown:
            name = unknown[1] or unknown[2]
            written = re.search(rf"\w+\.([\w.]*\b{name})\b", source)  # with its sections, as the file spells it
            name = written[1] if written else name
            raise ConfigError(f"{where}: config.{name}: unknown key{_nearest(name)}") from error
        text = " ".join(str(error).split()) + (source and f" in `{source}`")
        raise ConfigError(f"{where}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: get_config() must return a config made by default(), "
                          f"not {type(config).__name__}")
    return config.lock()


def run_config(run_dir) -> ConfigDict:
    """The config that a run has left in its folder; keys that are newer than the run have their defaults.

    Raises: ConfigError if there is none.
    """
    file = Path(run_dir) / "config.json"
    try:
        stored = flatten(ConfigDict(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: not the config of a run ({error}); name the run_dir of a training run") from error
    config = default()
    for name, value in stored.items():
        if name in KEYS:
            _assign(config, name, tuple(value) if isinstance(value, list) else value)
    return config


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets one dotted key from its text on the command line.

    Raises: ConfigError for an unknown key or a value of the wrong type.
    """
    if name in KEYS:
        _assign(config, name, _parse(name, text, type(KEYS[name].default)))
        return
    free = next((key for key in FREE_FORM if name.startswith(key + ".")), None)
    if free:
        value, (*parts, last) = flatten(config)[free], name.removeprefix(free + ".").split(".")
        node = value
        for part in parts:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                fail(name, text, f"{part!r} is not a dict")
        node[last] = _literal(text, text)
        _assign(config, free, value)
        return
    inside = [key for key in KEYS if key.startswith(name + ".")]
    if inside:
        raise ConfigError(f"config.{name}: is a section; set one of its keys, e.g. --config.{inside[0]}=VALUE")
    raise ConfigError(f"config.{name}: unknown key{_nearest(name)}")


def _assign(config: ConfigDict, name: str, value) -> None:
    check_type(name, value, type(KEYS[name].default))
    *sections, last = name.split(".")
    node = config
    for section in sections:
        node = node[section]
    try:
        node[last] = value
    except (TypeError, ValueError, KeyError) as error:  # e.g. a reward's name with a dot in it
        raise ConfigError(f"config.{name}={value!r}: {' '.join(str(error).split())}") from error


def _literal(text: str, otherwise):
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            pass
    return otherwise


def _parse(name: str, text: str, kind: type):
    if kind is str:
        return text
    if name == "algorithm" and re.fullmatch(r"\w+", text):
        return {text: {}}
    if kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    elif kind is tuple:
        value = _literal(text, None)
        if not isinstance(value, (list, tuple)):
            value = text.split(",") if text else ()
        value = tuple(value)
    elif kind is dict:
        value = _literal(text, None)
    else:
        try:
            value = kind(text)
        except ValueError:
            value = None
    if value is None:
        fail(name, text, f"must be {TYPE_NAMES[kind]}")
    return value
