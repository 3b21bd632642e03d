"""The tests. Each of their processes collects garbage more rarely than usual."""

import gc

# Tracing makes many objects that stay in use; looking for others after every 700 takes a tenth of the time.
gc.set_threshold(200_000, 20, 50)
