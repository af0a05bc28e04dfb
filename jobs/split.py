"""The verb that this file is named after, as a Ray job: `ray job submit ... -- python jobs/VERB.py ARGUMENTS`.

Arguments, output and exit codes are those of `eclipse-ray VERB`.
"""

import sys
from pathlib import Path

from eclipse_ray.__main__ import main

if __name__ == "__main__":
    main([Path(__file__).stem, *sys.argv[1:]])
