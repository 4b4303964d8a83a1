"""benchmarks/harness/worker_process.py with a fault: `faulty_worker.py damage|truncate|die`.

damage: one byte of every handoff's first block is another by the time it is pulled. truncate: UCX messages arrive half.
die: the process is gone in the middle of a step that computes token 251.
"""

import asyncio
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kvcache.locations import each_location  # noqa: E402 - as any script beside the packages
from prefill.worker import PrefillWorker  # noqa: E402 - as any script beside the packages

fault = sys.argv[1]
if fault == "damage":
    publish = PrefillWorker._publish

    def publish_then_damage(self, asker, handoff):
        publish(self, asker, handoff)
        engine = self._worker.engine
        for block in each_location(handoff.blocks)[:1]:
            engine.memory.view[engine.layout.block_offset(block.block_id) + 77] ^= 0x10

    PrefillWorker._publish = publish_then_damage
elif fault == "truncate":
    from transport.ucx.worker import Connection

    send = Connection.send

    def send_half(self, buffer, num_bytes, tag):
        return send(self, buffer, num_bytes // 2 if num_bytes > 4096 else num_bytes, tag)

    Connection.send = send_half
elif fault == "die":
    import os
    import signal

    from engine.runner import Runner
    from kvcache.names import unpack_tokens

    launch = Runner.launch

    def launch_or_die(self, plan):
        if any(part.seq_id != "warm-up" and 251 in unpack_tokens(part.new_token_ids) for part in plan.parts):
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(self, plan)

    Runner.launch = launch_or_die
else:
    sys.exit(f"fault {fault!r}: wanted damage, truncate or die")

script = runpy.run_path(str(ROOT / "benchmarks" / "harness" / "worker_process.py"))
asyncio.run(script["main"]())
