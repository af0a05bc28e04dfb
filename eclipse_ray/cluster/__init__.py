"""Everything that talks to a Ray cluster."""

import os

from ray._private import auto_init_hook

# A thread of a run that was just stopped would otherwise start Ray anew, or join whatever cluster of somebody else
# it finds on the machine. The variable alone is not enough: Ray reads it at its first import, perhaps before this.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
auto_init_hook.enable_auto_connect = os.environ["RAY_ENABLE_AUTO_CONNECT"] != "0"
