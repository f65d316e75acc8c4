"""`flashvl caption` as a job for a Ray cluster.

ray job submit --working-dir . -- python ray_jobs/caption.py /data/images --output /data/out
"""

import typer

from flashvl.cli import caption

if __name__ == "__main__":
    typer.run(caption)
