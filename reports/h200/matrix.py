"""The rate of a large bf16 matrix product through torch: the `matrix_flops` of the studies beside.

python reports/h200/matrix.py      # seconds, on each GPU of this machine
"""

import time

import torch

SIZE, REPEATS = 8192, 50

for index in range(torch.cuda.device_count()):
    with torch.cuda.device(index):
        a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for repeats in (10, REPEATS):  # the first ones warm up
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                a @ b
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / repeats
    print(
        f"GPU {index}, {torch.cuda.get_device_name(index)}: {2 * SIZE**3 / seconds / 1e12:.0f} "
        "TFLOP/s"
    )
