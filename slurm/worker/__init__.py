"""The program of a resident job: it keeps a model loaded and runs what the daemon hands it.

A few threads, each with one job. The main thread owns the model and MPI, and nothing else may touch it. The courier leases
requests and delivers outcomes, the heartbeat reports, a listener waits for orders; they own their connections. Another waits
for signals, and one looks now and then whether the main thread hangs. `Control` is all that they share. An idle worker sleeps
in blocking waits.

With tensor parallelism this is rank 0. The others run what it leads (`ranks`), and look for that every few milliseconds.
"""
