"""Runs the cases named on the command line in this process of several: torchrun starts it.

    torchrun --standalone --nproc-per-node=2 tests/distributed/worker.py FOLDER [case ...]

Writes FOLDER/RANK.json: for each case, seconds and, if it failed, how.
"""

import datetime
import json
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed import ddp, documentation, fsdp, tensor_parallel, vocab_parallel  # noqa: F401 - register cases
from tests.distributed.harness import CASES


def main(folder, *names):
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(folder, f"{distributed.get_rank()}.json")
    results = {}
    for name in names or CASES:
        torch._dynamo.reset()
        random.seed(0)
        torch.manual_seed(0)
        start, failure = time.time(), None
        try:
            CASES[name]()
        except Exception:
            failure = traceback.format_exc()
        results[name] = {"seconds": time.time() - start, "failure": failure}
        out.write_text(json.dumps(results, indent=2))
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
