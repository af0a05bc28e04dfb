"""ray job submit --address ... --working-dir . -- python jobs/purify.py --config s3://bucket/run.yaml

Arguments, output and exit codes are those of `eclipse-ray purify`.
"""

import sys

from eclipse_ray.cli import main

if __name__ == "__main__":
    main(["purify", *sys.argv[1:]])
