"""`flashvl eval contamination` as a job for a Ray cluster.

ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
    python ray_jobs/contamination.py /data/tables/stage4 --benchmarks /data/LMUData \\
    --output /data/contamination
"""

import sys

from flashvl.cli import app

if __name__ == "__main__":
    app(["eval", "contamination", *sys.argv[1:]], prog_name="flashvl")
