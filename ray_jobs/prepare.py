"""`flashvl data convert` as a job for a Ray cluster.

ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
    python ray_jobs/prepare.py llava /data/mix665k.json --output OUT
"""

import sys

from flashvl.cli import app

if __name__ == "__main__":
    app(["data", "convert", *sys.argv[1:]], prog_name="flashvl")
