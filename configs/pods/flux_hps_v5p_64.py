"""flux_hps.py on 64 v5p chips (`v5p-128`).

    python launch/train.py --config=configs/pods/flux_hps_v5p_64.py --config.data.train=hpdv2_train.txt

Fits, by launch/compile_check.py --topology=v5p:4x4x4; docs/compile_reports.md has its predictions.
"""

from configs import flux_hps


def get_config():
    config = flux_hps.get_config()
    config.mesh.data, config.mesh.fsdp = 4, 16  # fsdp fills two axes of the torus; over all three gathers become all-reduces
    config.data.chunks, config.optim.microbatch = 1, 192
    config.model.remat = "dots"
    config.evals.eval.count = config.evals.eval.batch = 64
    return config
