"""Parameters spread over two processes are updated as whole ones are."""

import pytest
import torch
import torch.multiprocessing

from tests.optim import two


@pytest.mark.slow
def test_sharded_is_whole():
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    port = two.free_port()
    processes = [context.Process(target=two.one, args=(rank, port, two.CONFIGS, results)) for rank in range(2)]
    for process in processes:
        process.start()
    told = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for rank, found in told.items():
        assert found.pop("inverse"), rank
        assert len(found) == len(two.CONFIGS)
        for (name, dtype), (gap, stays) in found.items():
            tolerance = 1e-6 if dtype == "torch.float32" else 1e-2
            assert gap <= tolerance, (rank, name, dtype)
            assert stays or name == "adafactor", f"{name} keeps none of its state in parts"
