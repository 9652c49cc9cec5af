"""The process of a job that takes its time to end: it does not listen to USR2."""

import signal

signal.signal(signal.SIGUSR2, signal.SIG_IGN)
print("I hear nothing", flush=True)
while True:
    signal.pause()
