"""`flashvl eval run` as a job for a Ray cluster.

ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
    python ray_jobs/evaluate.py /data/LMUData --output /data/scores
"""

import sys

from flashvl.cli import app

if __name__ == "__main__":
    app(["eval", "run", *sys.argv[1:]], prog_name="flashvl")
