"""One engine behind JSON lines: `python serve.py run_ENGINE.py`, with the Python of that engine's environment.

Standard library alone, and Python's own path: an engine's environment holds nothing of s1engine. The engine's file has

    load(model, threads, cases, options) -> (generate, versions)

with `generate(prompts, new_tokens)` giving the new token ids of each prompt. A line in, a line out:

    {"op": "load", ...}                                    {"seconds", "import_seconds", "imported_bytes", "versions"}
    {"op": "generate", "prompts": …, "new_tokens": …}      {"seconds", "token_ids"}

or {"error": …}. Whatever an engine prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]
PR_SET_PDEATHSIG = 1  # prctl(2)


def main(path: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # A worker that is stopped would outlive the command, gigabytes of it: no end of its input reaches it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    generate: Generate | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.pop("op") == "load":
                generate, reply = load(path, **request)
            else:
                assert generate is not None, "load comes first"
                begun = time.perf_counter()
                token_ids = generate(request["prompts"], request["new_tokens"])
                reply = {"seconds": time.perf_counter() - begun, "token_ids": token_ids}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def load(path: str, **how: Any) -> tuple[Generate, dict[str, Any]]:
    begun = time.perf_counter()
    engine = runpy.run_path(path)
    imported = time.perf_counter()
    imported_bytes = anonymous_bytes()
    generate, versions = engine["load"](**how)
    return generate, {
        "seconds": time.perf_counter() - imported,
        "import_seconds": imported - begun,
        "imported_bytes": imported_bytes,
        "versions": {"python": sys.version.split()[0], **versions},
    }


def anonymous_bytes() -> int:
    """Of this process, in memory now: what its load is set against."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main(sys.argv[1])
