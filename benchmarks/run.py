"""All timed rows, one after the other: `make bench`.  Nothing else should run on the machine meanwhile."""

from __future__ import annotations

import activations
import certify
import conv_block
import conversion
import epoch
import gradients
import memory
import sim
import sim_processes
import sim_scale
import solve
import torch
import training_step
from timing import machine

if __name__ == "__main__":
    torch.set_num_threads(2)
    print(machine())
    training_step.run()
    activations.run()
    with torch.no_grad():
        solve.run()
        conversion.run()
    epoch.run()
    memory.run()
    conv_block.run()
    gradients.run()
    certify.run()
    sim.run()
    sim_processes.run()
    sim_scale.run()
