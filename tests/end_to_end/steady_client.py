"""``python steady_client.py POOL FRAME OUT STOP``: sends the same request every 200 ms, until the file STOP is there.

It keeps to its times also when an answer is late: connections take turns, each with one request at a time. OUT gets a
line of JSON for each request: when it was due, when its result was there, a checksum of the result, and the error.
"""

import json
import sys
import threading
import time
import zlib
from contextlib import closing
from pathlib import Path

from nnsight_hpc.client.session import connect
from nnsight_hpc.client.waiting import check_completed, until_ended
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id

PERIOD = 0.2
CONNECTIONS = 4


def ask(daemon, pool, frame):
    """A checksum of the result of one request, sent and waited for as the backend of tracing does it."""
    request = new_request_id()
    alone = f"/v1/requests/{request}?pool={pool}&exclusive=1"  # in a forward with others it has other last bits
    daemon.put(alone, frame, RequestStatus)
    check_completed(until_ended(daemon, request))
    return zlib.crc32(daemon.call("GET", f"/v1/requests/{request}/result"))


def send(pool, frame, out, stop, due):
    with closing(connect()) as daemon:
        ask(daemon, pool, frame)  # logs in, which is not what is measured
        due = turn_after(due, time.time())
        while not stop.exists():
            time.sleep(max(0.0, due - time.time()))
            line = {"due": due, "error": "", "result": 0}
            try:
                line["result"] = ask(daemon, pool, frame)
            except HpcError as error:
                line["error"] = str(error)
            line["done"] = time.time()
            out.write(json.dumps(line) + "\n")
            due = turn_after(due, line["done"])


def turn_after(due, now):
    """The next turn of a connection."""
    while due < now:
        due += PERIOD * CONNECTIONS
    return due


def main(pool, frame, out, stop):
    begin = time.time()
    with Path(out).open("w", buffering=1) as lines:
        given = (pool, Path(frame).read_bytes(), lines, Path(stop))
        dues = [begin + number * PERIOD for number in range(CONNECTIONS)]
        threads = [threading.Thread(target=send, args=(*given, due)) for due in dues]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
