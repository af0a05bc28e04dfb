"""ray job submit --address ... --working-dir . -- python jobs/train.py --config s3://bucket/run.yaml

Arguments, output and exit codes are those of `eclipse-ray train`.
"""

import sys

from eclipse_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
