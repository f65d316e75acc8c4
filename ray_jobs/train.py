"""`flashvl train` as a job for a Ray cluster.

ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
    python ray_jobs/train.py ray_jobs/configs/static/stage1.yaml
"""

import sys

from flashvl.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]], prog_name="flashvl")
