"""Write the examples in this folder, as `mmlm VERB STORY --on slurm|kuberay --print` shows them with these settings.

python infra/render.py            # print them
python infra/render.py --write    # put them into infra/slurm and infra/kuberay
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmlm.launch import kuberay, slurm

HERE = Path(__file__).parent
RUN = ["run", "stamps", "--out", "/runs/stamps", "--data", "/runs/corpora"]

SLURM = """\
#!/usr/bin/env bash
# Train a story on two nodes of four GPUs, one rank a GPU, after `mmlm scan` and `mmlm shard`. Made by
#
#   mmlm train stamps --out /shared/runs/stamps --on slurm --print --cluster nodes=2 --cluster gpus_per_node=4
#
# Two minutes before the time limit, and when the job is preempted, the step is finished and saved, and the job goes
# back into the queue, where it continues.
"""
KUBERAY = """\
# One story on a cluster of its own: a head, two workers, one shared volume (KubeRay 1.4 or newer). Made by
#
#   mmlm run stamps --data /runs/corpora --on kuberay --print --tracking-uri http://mlflow.mlflow.svc:5000
#
# Without --print it is applied with kubectl. Each submission has a name of its own: one that has ended is not run again by
# applying it once more. For GPUs: --cluster gpus=1.
"""


def examples() -> dict[Path, str]:
    """File → what it holds."""
    command = ["mmlm", "train", "stamps", "--out", "/shared/runs/stamps"]
    tracking = {"MLFLOW_TRACKING_URI": "http://mlflow.mlflow.svc:5000"}
    batch = slurm.render(slurm.SlurmConfig(nodes=2, gpus_per_node=4), command, "mmlm-train-stamps")
    config = kuberay.KubeRayConfig()
    title = kuberay.Title("mmlm-run-stamps-0a1b2c", kuberay.title(config, "run", "stamps", "/runs/stamps").labels)
    job = kuberay.render(config, ["mmlm", *RUN, "--inside-ray"], title, tracking)
    return {
        HERE / "slurm" / "train.sbatch": SLURM + batch.removeprefix("#!/usr/bin/env bash\n"),
        HERE / "kuberay" / "rayjob.yaml": KUBERAY + job,
    }


if __name__ == "__main__":
    for path, text in examples().items():
        if "--write" in sys.argv:
            path.write_text(text, encoding="utf-8")
        else:
            print(text)
