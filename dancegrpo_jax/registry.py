"""What can be named in a config, and where it is: names and import paths only, so that this imports nothing."""

import importlib

from dancegrpo_jax.options import ConfigError, nearest

# By the `_class_name` of model_index.json.
PIPELINES = {
    "FluxPipeline": "dancegrpo_jax.pipelines.flux:Flux",
    "StableDiffusionPipeline": "dancegrpo_jax.pipelines.stable_diffusion:StableDiffusion",
}

ALGORITHMS = {
    "grpo": "dancegrpo_jax.algorithms.grpo:GRPO",
    "ddpo": "dancegrpo_jax.algorithms.ddpo:DDPO",
    "nft": "dancegrpo_jax.algorithms.nft:DiffusionNFT",
}

EVALUATORS = {
    "heldout": "dancegrpo_jax.evaluators.heldout:HeldOut",
}

REWARDS = {
    "aesthetic": "dancegrpo_jax.rewards.clip:Aesthetic",
    "clip_score": "dancegrpo_jax.rewards.clip:ClipScore",
    "color": "dancegrpo_jax.rewards.color:Color",
    "geneval": "dancegrpo_jax.rewards.geneval:GenEval",
    "hps": "dancegrpo_jax.rewards.clip:HPS",
    "image_reward": "dancegrpo_jax.rewards.image_reward:ImageReward",
    "incompressibility": "dancegrpo_jax.rewards.jpeg:Incompressibility",
    "jpeg": "dancegrpo_jax.rewards.jpeg:Compressibility",
    "judge": "dancegrpo_jax.rewards.remote:Judge",
    "judge_pairs": "dancegrpo_jax.rewards.remote:JudgePairs",
    "judge_yes": "dancegrpo_jax.rewards.remote:JudgeYes",
    "ocr": "dancegrpo_jax.rewards.ocr:OCR",
    "pickscore": "dancegrpo_jax.rewards.clip:PickScore",
    "remote": "dancegrpo_jax.rewards.remote:Remote",
    "verifier": "dancegrpo_jax.rewards.world:Verifier",
}

# Transition kernels, by paradigm.
FLOW_KERNELS = {
    "dance": "dancegrpo_jax.sde:dance",
    "flow": "dancegrpo_jax.sde:flow",
    "cps": "dancegrpo_jax.sde:cps",
}

DIFFUSION_KERNELS = {
    "ddim": "dancegrpo_jax.sde:ddim",
    "sde": "dancegrpo_jax.sde:sde",
}

TIME_ROUNDING = ("exact", "int", "bf16_ref")
PREDICTIONS = ("velocity", "epsilon", "v_prediction", "sample")
COMBINE = ("advantages", "rewards", "gdpo")
SCHEDULES = ("constant", "linear", "cosine")
REMAT = ("full", "attention", "dots", "none")


def resolve(table: dict[str, str], name: str, where: str):
    """What a registered name, or an import path "package.module:attribute" of your own, stands for.

    Args: where: the config key, for messages.
    Raises: ConfigError naming the nearest registered name, or why the path cannot be imported.
    """
    path = table.get(name, name)
    if ":" not in path:
        raise ConfigError(f"config.{where}={name!r}: known are {', '.join(table)} or 'package.module:Class'"
                          f"{nearest(name, table)}")
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"config.{where}={name!r} cannot be imported: {error}") from error
