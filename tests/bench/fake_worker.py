"""A worker without a model: replies well or misbehaves, as the variant it is told to load says."""

import json
import os
import signal
import sys
import time

replies = os.fdopen(int(sys.argv[1]), "w")
variant = ""
runs = 0
FIELDS = {
    "load": {"load_s": 0.1, "model_bytes": 10, "resident_bytes": 0, "ring_bytes": 0, "settings": {}},
    "run": {"ttft_s": 0.1, "per_token_s": [0.1, 0.1], "wall_s": 0.3, "tokens": [1, 2, 3]},
}

for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "check":
        variant = command["variant"]
        with open(os.path.join(command["scratch"], "copy.swp"), "w") as copy:  # noqa: PTH118, PTH123
            copy.write("a second copy of the weights")
        print("chatter on standard output", flush=True)
    if command["do"] == "run":
        runs += 1
        if variant == "killed" and runs == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if variant == "hangs":
            time.sleep(600)
        if variant == "exits":
            sys.exit(3)
        if variant == "crashes":
            os.kill(os.getpid(), signal.SIGABRT)
        if variant == "babbles":
            print("neither JSON nor a reply", file=replies, flush=True)
            continue
    if variant == "lacks" and command["do"] == "check":
        reply = {"status": "unavailable", "reason": "no such device"}
    else:
        reply = {"status": "ok", "fields": FIELDS.get(command["do"], {})}
    print(json.dumps(reply), file=replies, flush=True)
    if command["do"] == "close":
        break
