"""A rank whose pass fails while the others compute; called with a folder for words, a checkpoint, and how it fails."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from launched import say
from pairs import prompt
from transformers.distributed import DistributedConfig

import djinn


def main() -> None:
    torch.set_num_threads(1)
    words, folder, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rank = int(os.environ["RANK"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = {"prompt_tokens": 16, "new_tokens": 16, "device": device}
    plan = djinn.plan(folder, budget="10 GB", gpus=int(os.environ["WORLD_SIZE"]), **work)  # type: ignore[arg-type]
    model = djinn.load(
        folder,
        budget=plan.workspace_bytes + plan.model_bytes // 2,
        chunk="32 KiB",
        distributed_config=DistributedConfig(tp_plan="auto"),
        **work,  # type: ignore[arg-type]
    )

    def fail(*_: object) -> None:
        if how == "raise":
            raise ValueError("the third layer of rank 1 is unwell")
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        model.model.layers[2].mlp.register_forward_pre_hook(fail)
    say(words, "began", time.time())
    try:
        model.generate(prompt(7).to(device), max_new_tokens=4)
    except Exception as error:
        say(words, "caught", str(error))
        time.sleep(600)  # a caller that goes on: nobody may wait for it


if __name__ == "__main__":
    main()
