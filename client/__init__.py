"""The command line, the way to a daemon over SSH, and what a laptop does with datasets. No torch outside `backend`."""
