"""The program of a resident job: it keeps a model loaded and runs what the daemon hands it.

Four threads, each with one job. The main thread owns the model (and later MPI) and nothing else may touch it. The
courier leases requests and delivers outcomes; the heartbeat reports and takes orders; both own their connections. The
fourth waits for signals. `Control` is all that they share. An idle worker sleeps in four blocking waits.
"""
