"""What a config can name, as import paths "module:attribute". Plain strings, so that reading a config imports nothing heavy."""

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
