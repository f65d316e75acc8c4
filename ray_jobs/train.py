"""`flashvl train` as a job for a Ray cluster.

ray job submit --working-dir . -- python ray_jobs/train.py ray_jobs/configs/stage1.yaml
"""

import typer

from flashvl.cli import train

if __name__ == "__main__":
    typer.run(train)
