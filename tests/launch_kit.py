"""The words that start two processes on the CPU: by torchrun, and by `accelerate launch`."""

from __future__ import annotations

import socket

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def accelerated() -> tuple[str, ...]:
    """`accelerate launch` at a port that is free.

    With --cpu it would start one process only, and leave more of them to mpirun. --multi_gpu starts two, which use the
    CPU because their script says so or there is nothing else. A port of 0 would be taken at its word.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
    return (*words, "--main_process_port", str(port), *plain)
