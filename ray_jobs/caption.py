"""`flashvl caption` as a job for a Ray cluster.

ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
    python ray_jobs/caption.py /data/images --output /data/out
"""

import sys

from flashvl.cli import app

if __name__ == "__main__":
    app(["caption", *sys.argv[1:]], prog_name="flashvl")
