import os
import subprocess
import sys

import torch

from athanor.core import dist

WORKER = """
import sys
import torch
from athanor.core import dist

torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
tensor = torch.tensor([1.0, 10.0]) * (dist.rank() + 1)
total = dist.all_reduce_sum(tensor)
print(dist.rank(), dist.world_size(), dist.is_main(), tensor.tolist(), total.tolist())
torch.distributed.destroy_process_group()
"""


def test_one_process_communicates_nothing():
    tensor = torch.tensor([1.0, 2.0])
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.all_reduce_sum(tensor) is tensor


def test_two_processes_sum_and_keep_their_own(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", WORKER, f"file://{tmp_path}/meeting"]
    workers = [
        subprocess.Popen([*argv, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for i in range(2)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert outputs[0][0] == "0 2 True [1.0, 10.0] [3.0, 30.0]\n"
    assert outputs[1][0] == "1 2 False [2.0, 20.0] [3.0, 30.0]\n"
