"""ray job submit --address ... --working-dir . -- python jobs/sweep.py --config s3://bucket/run.yaml

Arguments, output and exit codes are those of `eclipse-ray sweep`.
"""

import sys

from eclipse_ray.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
