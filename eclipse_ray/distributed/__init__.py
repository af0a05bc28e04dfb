"""Everything that imports Ray."""

import os

# Read when Ray is first imported. A thread of a run that was just stopped would otherwise start Ray anew, or join
# whatever cluster of somebody else it finds on the machine.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
