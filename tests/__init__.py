import os

# Else a thread of torch's that waits for another keeps a core busy: the other's, where a machine has more to do than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
