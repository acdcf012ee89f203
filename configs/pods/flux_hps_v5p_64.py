"""flux_hps.py on 64 v5p chips (`v5p-128`).

    python launch/train.py --config=configs/pods/flux_hps_v5p_64.py --config.data.train=hpdv2_train.txt

Predicted by launch/compile_check.py for v5p:4x4x4, not measured: 60 of 103 GB a chip, 20.6 s an iteration (MFU 51 %), 1.7 hours and 110 chip-hours
for the 300 iterations (docs/compile_reports.md).
"""

from configs import flux_hps


def get_config():
    config = flux_hps.get_config()
    config.mesh.data, config.mesh.fsdp = 4, 16  # fsdp fills two axes of the torus; over all three gathers become all-reduces
    config.data.chunks, config.grpo.microbatch = 1, 192
    config.model.remat = "dots"
    config.eval.num_prompts = config.eval.batch = 64
    return config
