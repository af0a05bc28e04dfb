"""ray job submit --address ... --working-dir . -- python jobs/audit.py --config s3://bucket/run.yaml

Arguments, output and exit codes are those of `eclipse-ray audit`.
"""

import sys

from eclipse_ray.cli import main

if __name__ == "__main__":
    main(["audit", *sys.argv[1:]])
