"""DanceGRPO in JAX: reinforcement-learning post-training of visual generative models on TPU pods."""
