"""flux_hps.py on 64 v5e chips (`v5litepod-64`).

    python launch/train.py --config=configs/pods/flux_hps_v5e_64.py --config.data.train=hpdv2_train.txt

Fits, by launch/compile_check.py --topology=v5e:8x8; docs/compile_reports.md has its predictions.
"""

from configs import flux_hps


def get_config():
    config = flux_hps.get_config()
    config.mesh.data, config.mesh.fsdp = 1, 64
    config.data.chunks, config.optim.microbatch = 1, 192
    config.evals.eval.count = config.evals.eval.batch = 64
    return config
