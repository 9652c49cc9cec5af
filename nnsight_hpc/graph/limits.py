"""The bounds of a graph, checked before anything runs. They are far above what notebooks use."""

MAX_DOCUMENT_BYTES = 64 << 20
MAX_NODES = 200_000
MAX_FORWARDS = 10_000
MAX_SAVES = 50_000
MAX_LOOPS = 1_000
MAX_INVOKES = 4_096
MAX_WORK = 20_000_000
"""So many steps may be taken to find the order of a graph; real ones take a few for each node."""
MAX_BLOCK_DEPTH = 16
MAX_DEPTH = 32
MAX_STRING = 65_536
"""Characters of a string that is a value."""
MAX_NAME = 1_000
"""Characters of a name: of an operation, a keyword, a saved value, a tensor, a dtype."""
MAX_PATH = 4_096
"""Characters of a path or of a model's id."""
MAX_LINE = 1_000
"""Characters of a line of the user's source; a longer one is cut where a graph is written."""
MAX_INTEGER = (1 << 63) - 1
MAX_PROBLEMS = 20
"""So many problems of one graph are shown; more do not help."""
