"""Two real gloo processes for the whole test run: started at first use, asked for one function after another."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

PATIENCE = 200  # seconds; the slowest part is importing torch twice on a loaded machine


def _serve(rank: int, pipe: Connection, rendezvous: str, port: int) -> None:
    # what torchrun would set, so that Accelerate finds the group
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    while (message := pipe.recv_bytes()) != b"":
        try:
            function, arguments = pickle.loads(message)
            answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Pair:
    """Calls `function(rank, *arguments)` on both processes and returns [result of rank 0, result of rank 1]."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.workers = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, theirs, str(Path(self.folder.name) / "init"), port), daemon=True)
            worker.start()
            self.pipes.append(ours)
            self.workers.append(worker)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"process {rank} gave no answer within {PATIENCE} s")
            answers.append(pickle.loads(pipe.recv_bytes()))
        for rank, (fine, value) in enumerate(answers):
            if not fine:
                raise AssertionError(f"process {rank} failed:\n{value}")
        return [value for _, value in answers]

    @property
    def alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)

    def close(self) -> None:
        for pipe, worker in zip(self.pipes, self.workers, strict=True):
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
            worker.join(5)
            if worker.is_alive():
                worker.kill()
        self.folder.cleanup()
